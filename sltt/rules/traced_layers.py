"""Layers with another input in their weights' gradient than in their forward: the operations behind `traces`."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sltt import kernels


def settings_of(func: Any, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
    """Stride, padding, dilation and groups of a convolution, in this order; nothing of a linear layer."""
    if func is F.linear:
        return ()
    defaults = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    return *given, *(named.get(name, default) for name, default in list(defaults.items())[len(given) :])


class _Linear:
    """y = x Wᵀ + b, and its backward from an input that may be another than that of the forward."""

    def __init__(self, function: Callable[..., Tensor]):
        self.forward = function

    def backward(self, grad: Tensor, x: Tensor, weight: Tensor, needs: list[bool]) -> Any:
        rows = grad.flatten(0, -2)
        return (
            grad @ weight.to(grad.dtype) if needs[0] else None,
            rows.T @ x.flatten(0, -2) if needs[1] else None,
            rows.sum(0) if needs[2] else None,
        )


class _Convolution:
    """A convolution, and its backward from an input that may be another than that of the forward."""

    def __init__(
        self, function: Callable[..., Tensor], stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
    ):
        self.function, self.arguments = function, (stride, padding, dilation, groups)
        self.axes = stride, 0 if padding == "valid" else padding, dilation
        self.groups = groups

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.function(x, weight, bias, *self.arguments)  # which may be sparse

    def backward(self, grad: Tensor, x: Tensor, weight: Tensor, needs: list[bool]) -> Any:
        dims = weight.ndim - 2
        stride, padding, dilation = ([a] * dims if isinstance(a, int) else list(a) for a in self.axes)
        return kernels.convolution_gradients(grad, x, weight, (stride, padding, dilation), self.groups, needs)


NORMALISATIONS = {F.batch_norm, F.layer_norm, F.group_norm, F.instance_norm}
FUNCTIONS: dict[Any, Any] = {F.linear: _Linear, **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _Convolution)}


class Traced(torch.autograd.Function):
    """A layer's output, with the trace in place of the input in the gradient of its weights."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, trace: Tensor, weight: Tensor, bias: Tensor | None, function: Any
    ) -> Tensor:
        ctx.function, ctx.x_dtype, ctx.bias_dtype = function, x.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(trace, weight)
        return function.forward(x, weight, bias)

    @staticmethod
    @kernels.differentiable_once
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        trace, weight = ctx.saved_tensors
        needs = [ctx.needs_input_grad[i] for i in (0, 2, 3)]
        # under autocast the forward was in another type than traces
        of_x, of_weight, of_bias = ctx.function.backward(grad, trace.to(grad.dtype), weight, needs)
        return (
            of_x.to(ctx.x_dtype) if needs[0] else None,
            None,
            of_weight.to(weight.dtype) if needs[1] else None,
            of_bias.to(ctx.bias_dtype) if needs[2] else None,
            None,
        )


class Scaled(torch.autograd.Function):
    """The same tensor, and its gradient times a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float | Tensor) -> Tensor:  # type: ignore[override]
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    @kernels.differentiable_once
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return grad * ctx.factor, None
