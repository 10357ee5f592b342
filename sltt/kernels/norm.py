"""Batch normalisation of several time steps in one tensor, each with the statistics of its own batch."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from sltt._torch import _BatchNorm
from sltt.kernels.derivatives import differentiable_once
from sltt.kernels.saved_tensors import tag_normalised
from sltt.sequence.fold import fold_of
from sltt.sequence.hooks import replaced


def stepwise_norms(norms: Iterable[_BatchNorm]) -> AbstractContextManager[None]:
    """Inside this block, each BatchNorm takes the statistics of each folded time step, and counts each as a batch."""
    return replaced("forward", {norm: _stepwise(norm) for norm in norms})


def _stepwise(norm: _BatchNorm) -> Any:
    def forward(input: Tensor) -> Tensor:
        steps = fold_of(norm).steps
        tracked = norm.running_mean is not None and norm.running_var is not None
        if steps == 1 or not (norm.training or not tracked):
            return _BatchNorm.forward(norm, input)
        norm._check_input_dim(input)
        if input.numel() == steps * input.shape[1]:
            raise ValueError(
                f"BatchNorm needs more than one value for each channel, got {list(input.shape)} of {steps} steps: use "
                "a larger batch"
            )
        running, momenta = batch_statistics(norm, steps)
        return stepwise_batch_norm(input, steps, running, norm.weight, norm.bias, momenta, norm.eps)

    return forward


def batch_statistics(norm: _BatchNorm, steps: int) -> tuple[tuple[Tensor, Tensor] | None, list[float]]:
    """Count so many batches of a norm in training mode: the running statistics to update, and the weight of each."""
    if not norm.training or not norm.track_running_stats or norm.running_mean is None or norm.running_var is None:
        return None, [0.0] * steps
    momenta = [0.0 if norm.momentum is None else norm.momentum] * steps
    if norm.num_batches_tracked is not None:
        if norm.momentum is None:  # the average of all batches
            seen = int(norm.num_batches_tracked)
            momenta = [1 / (seen + t) for t in range(1, steps + 1)]
        norm.num_batches_tracked.add_(steps)
    return (norm.running_mean, norm.running_var), momenta


def stepwise_batch_norm(
    x: Tensor,
    steps: int,
    running: tuple[Tensor, Tensor] | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momenta: list[float],
    eps: float,
) -> Tensor:
    """Batch normalisation in training mode of x [T·B, C, ...], as if called for each of T time steps in turn.

    Args:
        x: the time steps, one after the other.
        steps: T.
        running: running mean [C] and variance [C], updated T times.
        weight: [C], or None.
        bias: [C], or None.
        momenta: the weight of the new statistics in each of the T updates.
        eps: added to the variance.
    """
    # the operator writes plain and channels-last tensors only
    x = x.contiguous(memory_format=torch.channels_last if _channels_last(x) else torch.contiguous_format)
    y: Any = _StepwiseBatchNorm.apply(x, steps, running, weight, bias, momenta, eps)
    tag_normalised(y, x, lambda again: _normalise(again, steps, None, weight, bias, momenta, eps)[0])
    return y


def _channels_last(x: Tensor) -> bool:
    return x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _normalise(
    x: Tensor,
    steps: int,
    running: tuple[Tensor, Tensor] | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momenta: list[float],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The normalised tensor, and the mean and inverse deviation [T, C] of each step; without a graph."""
    # the types that the operator gives its statistics
    statistics = torch.promote_types(x.dtype, torch.float32)
    if x.device.type == "cpu" and weight is None:
        statistics = x.dtype
    mean, invstd = (torch.empty(steps, x.shape[1], dtype=statistics, device=x.device) for _ in range(2))
    y = torch.empty_like(x)
    running_mean, running_var = running or (None, None)
    for t, (x_t, y_t) in enumerate(zip(x.chunk(steps), y.chunk(steps), strict=True)):
        torch.ops.aten.native_batch_norm.out(
            x_t, weight, bias, running_mean, running_var, True, momenta[t], eps,
            out=y_t, save_mean=mean[t], save_invstd=invstd[t],
        )  # fmt: skip
    return y, mean, invstd


class _StepwiseBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        steps: int,
        running: tuple[Tensor, Tensor] | None,
        weight: Tensor | None,
        bias: Tensor | None,
        momenta: list[float],
        eps: float,
    ) -> Tensor:
        y, mean, invstd = _normalise(x, steps, running, weight, bias, momenta, eps)
        ctx.steps, ctx.eps = steps, eps
        ctx.save_for_backward(x, weight, mean, invstd)
        return y

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, mean, invstd = ctx.saved_tensors
        needs = [ctx.needs_input_grad[i] for i in (0, 3, 4)]
        grad_x = torch.empty_like(x) if needs[0] else None
        totals: list[Tensor | None] = [None, None]
        for t in range(ctx.steps):
            x_t, grad_t = (part.chunk(ctx.steps)[t] for part in (x, grad))
            of_x, *of_affine = torch.ops.aten.native_batch_norm_backward(
                grad_t, x_t, weight, None, None, mean[t], invstd[t], True, ctx.eps, needs
            )
            if grad_x is not None:
                grad_x.chunk(ctx.steps)[t].copy_(of_x)
            for i, g in enumerate(of_affine):
                if needs[i + 1]:
                    totals[i] = g if totals[i] is None else totals[i] + g
        return grad_x, None, None, totals[0], totals[1], None, None
