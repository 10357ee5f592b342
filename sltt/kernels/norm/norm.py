"""Batch normalisation of several time steps in one tensor, each with the statistics of its own batch."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sltt._torch import _BatchNorm, add_to_each
from sltt.kernels.derivatives import differentiable_once
from sltt.kernels.spikes.saved import tag_made

_counts: ContextVar[Counter[_BatchNorm] | None] = ContextVar("counts", default=None)  # batches of norms in a block


def stepwise_norm(norm: _BatchNorm, input: Tensor, steps: int) -> Tensor:
    """Normalise [n·B, C, ...] by the statistics of each of the n time steps, and count each as a batch."""
    if not (norm.training or norm.running_mean is None or norm.running_var is None):
        return _BatchNorm.forward(norm, input)
    norm._check_input_dim(input)
    if input.numel() == steps * input.shape[1]:
        raise ValueError(
            f"BatchNorm needs more than one value for each channel, got {list(input.shape)} of {steps} steps: use a "
            "larger batch"
        )
    # the operator writes plain and channels-last tensors only
    ordered = input.ndim == 4 and input.is_contiguous(memory_format=torch.channels_last)
    x = input if ordered else input.contiguous()
    running, momenta = batch_statistics(norm, steps)
    affine = norm.weight, norm.bias
    normalise = partial(_normalise, steps=steps, affine=affine, momenta=momenta, eps=norm.eps)
    y: Any = _StepwiseBatchNorm.apply(x, *affine, steps, norm.eps, partial(normalise, running=running))
    # once more for the same output: the running statistics change no more
    tag_made(y, x, lambda x: normalise(x, running=running and tuple(r.clone() for r in running))[0])
    return y


def plain_norm(norm: _BatchNorm, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Normalise as the norm does; `bias`, if given, stands for the norm's, whose values it has."""
    bias = norm.bias if bias is None else bias
    norm._check_input_dim(x)
    training = norm.training or norm.running_mean is None
    running, (momentum,) = batch_statistics(norm, 1)
    used = (running or (None, None)) if training else (norm.running_mean, norm.running_var)
    return F.batch_norm(x, *used, norm.weight, bias, training, momentum, norm.eps)


def batch_statistics(norm: _BatchNorm, steps: int) -> tuple[tuple[Tensor, Tensor] | None, list[float]]:
    """Count so many batches of a norm in training mode: the running statistics to update, and the weight of each."""
    if not norm.training or not norm.track_running_stats or norm.running_mean is None or norm.running_var is None:
        return None, [0.0] * steps
    momenta = [0.0 if norm.momentum is None else norm.momentum] * steps
    if norm.num_batches_tracked is not None:
        if norm.momentum is None:  # the average of all batches
            seen = int(norm.num_batches_tracked)
            momenta = [1 / (seen + t) for t in range(1, steps + 1)]
        counts = _counts.get()
        if counts is None or norm.momentum is None:
            norm.num_batches_tracked.add_(steps)
        else:
            counts[norm] += steps
    return (norm.running_mean, norm.running_var), momenta


@contextmanager
def counting_batches() -> Iterator[Counter[_BatchNorm]]:
    """Add the batches that norms count in this block to their counters at its end, all in one launch."""
    counts: Counter[_BatchNorm] = Counter()
    token = _counts.set(counts)
    try:
        yield counts
    finally:
        _counts.reset(token)
        if counts:
            add_to_each([norm.num_batches_tracked for norm in counts], list(counts.values()))


def _normalise(
    x: Tensor,
    steps: int,
    running: tuple[Tensor, ...] | None,
    affine: tuple[Tensor | None, Tensor | None],
    momenta: list[float],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return x [T·B, C, ...] normalised as by T calls, and mean and inverse deviation [T, C]; without a graph.

    The running mean and variance [C] are updated T times, with the weights `momenta`.
    """
    # on the CPU, the operator takes statistics in the type of what is beside the input
    beside = [t.dtype for t in (*affine, *(running or ())) if t is not None]
    statistics = [*beside, x.dtype][0] if x.is_cpu else torch.promote_types(x.dtype, torch.float32)
    mean, invstd = (torch.empty(steps, x.shape[1], dtype=statistics, device=x.device) for _ in range(2))
    y = torch.empty_like(x)
    running_mean, running_var = running or (None, None)
    for t, (x_t, y_t) in enumerate(zip(x.chunk(steps), y.chunk(steps), strict=True)):
        torch.ops.aten.native_batch_norm.out(
            x_t, *affine, running_mean, running_var, True, momenta[t], eps,
            out=y_t, save_mean=mean[t], save_invstd=invstd[t],
        )  # fmt: skip
    return y, mean, invstd


class _StepwiseBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, steps: int, eps: float, normalise: Any
    ) -> Tensor:
        y, mean, invstd = normalise(x)
        ctx.steps, ctx.eps = steps, eps
        ctx.save_for_backward(x, weight, mean, invstd)
        return y

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, mean, invstd = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        grad_x = torch.empty_like(x) if needs[0] else None
        totals: list[Tensor | None] = [None, None]
        results = [None] * ctx.steps if grad_x is None else grad_x.chunk(ctx.steps)
        parts = zip(x.chunk(ctx.steps), grad.chunk(ctx.steps), results, mean, invstd, strict=True)
        for x_t, grad_t, result, mean_t, invstd_t in parts:
            of_x, *of_affine = torch.ops.aten.native_batch_norm_backward(
                grad_t, x_t, weight, None, None, mean_t, invstd_t, True, ctx.eps, needs
            )
            if result is not None:
                result.copy_(of_x)
            for i, g in enumerate(of_affine):
                if needs[i + 1]:
                    totals[i] = g if totals[i] is None else totals[i] + g
        return grad_x, *totals, None, None, None
