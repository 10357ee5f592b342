"""Layers with another input in their weights' gradient than in their forward: the operations behind `traces`."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sltt import kernels

NORMALISATIONS = {F.batch_norm, F.layer_norm, F.group_norm, F.instance_norm}
WEIGHTED = {F.linear, F.conv1d, F.conv2d, F.conv3d}


class Traced(torch.autograd.Function):
    """A layer's output, with traces in place of the input and of the constant 1 in the gradient of its weights."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        trace: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ones: list[float | Tensor],
        func: Any,
        settings: tuple[Any, ...],
    ) -> Tensor:
        ctx.settings, ctx.ones = settings, ones
        ctx.save_for_backward(trace, weight)
        return func(x, weight, bias)  # which may be sparse

    @staticmethod
    @kernels.differentiable_once
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        trace, weight = ctx.saved_tensors
        needs = [ctx.needs_input_grad[i] for i in (0, 2)]
        # under autocast the forward was in another type than traces
        of_x, of_weight = _gradients(grad, trace.to(grad.dtype), weight, ctx.settings, needs)
        of_bias = _bias_gradient(grad, ctx.ones, 1 if ctx.settings else -1) if ctx.needs_input_grad[3] else None
        return of_x, None, of_weight, of_bias, None, None, None


def _gradients(grad: Tensor, x: Tensor, weight: Tensor, settings: tuple[Any, ...], needs: list[bool]) -> Any:
    """Return the gradients of input and weight that are needed; `settings` are those of a convolution."""
    if not settings:
        return (
            grad @ weight.to(grad.dtype) if needs[0] else None,
            grad.flatten(0, -2).T @ x.flatten(0, -2) if needs[1] else None,
        )
    stride, padding, dilation, groups = settings
    axes = stride, 0 if padding == "valid" else padding, dilation
    dims = weight.ndim - 2
    stride, padding, dilation = ([a] * dims if isinstance(a, int) else list(a) for a in axes)
    return kernels.convolution_gradients(grad, x, weight, (stride, padding, dilation), groups, [*needs, False])[:2]


def _bias_gradient(grad: Tensor, ones: list[float | Tensor], channels: int) -> Any:
    """Return the gradient of a bias, whose input 1 has the trace `ones` in each time step of grad [n·B, ...]."""
    others = [axis for axis in range(grad.ndim) if axis != channels % grad.ndim]
    return sum(part.sum(others) * one for part, one in zip(grad.chunk(len(ones)), ones, strict=True))


def scale_gradient(x: Tensor, factor: float | Tensor) -> Tensor:
    """Return the same tensor, and its gradient times a factor."""
    same = x.view_as(x)
    same.register_hook(lambda grad: grad * factor)
    return same
