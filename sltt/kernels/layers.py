"""Convolutions and linear layers of a network that read spikes: each runs sparse or dense, whichever is faster.

The user's layers stay as they are. While `saved.saving` is open, a call of `F.conv2d` or `F.linear` on tagged spikes
comes here. The share of active inputs and the layer's shape decide, for the forward and for the weight gradient; the
input gradient is dense. On one machine the same spikes give the same decision, and so the same bits.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sltt.kernels import costs, native, sparse
from sltt.kernels.derivatives import differentiable_once
from sltt.kernels.options import options
from sltt.kernels.restoring import SpikeTag, packable, tag_of
from sltt.kernels.sparse import Layer
from sltt.kernels.values import Axes, arguments_of, axes_in, dense_gradients, fitting, layer_of, multiplies, ours_of
from sltt.kernels.weights import Weights

CONVOLUTIONS = {F.conv1d: 1, F.conv2d: 2}
LAYERS = {*CONVOLUTIONS, F.linear}


@dataclass(frozen=True)
class Call:
    """A call of a layer on spikes.

    Attributes:
        layer: its shapes.
        tag: of the spikes, which were packed.
        dtype: of the output.
        sparse_forward: the forward touches active inputs only.
        sparse_gradient: the weight gradient does.
        ours: which dense gradients are those of `winograd`.
        axes: stride, padding and dilation of a convolution.
        weights: where the forms of the weight are kept.
    """

    layer: Layer
    tag: SpikeTag
    dtype: torch.dtype
    sparse_forward: bool
    sparse_gradient: bool
    ours: costs.Ours
    axes: Axes
    weights: Weights

    def forward(self, x: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output; x, the spikes, is needed where the forward is dense, or else unpacked."""
        if self.sparse_forward:
            packed = self.weights.packed(self.layer, weight, self.tag.one)
            return sparse.forward(self.layer, self.tag.packed, packed, bias, self.dtype)
        x = self.spikes() if x is None else x.to(self.dtype)
        weight, bias = self.weights.cast(weight, self.dtype), None if bias is None else bias.to(self.dtype)
        if self.layer.linear:
            return F.linear(x, weight, bias)
        return torch.convolution(x, weight, bias, *self.axes, False, [0] * len(self.axes[0]), 1)

    def input_gradient(self, grad: Tensor, weight: Tensor) -> Tensor:
        """∂L/∂x, dense."""
        weight = weight if self.ours.input_gradient else self.weights.cast(weight, grad.dtype)
        if self.layer.linear:
            return grad @ weight
        # of the input, only shape and memory format are looked at
        x = grad if grad.shape == self.layer.x_shape else grad.new_empty(self._channels_last_shape()).movedim(-1, 1)
        return self._gradients(grad, x, weight, (True, False))[0]

    def weight_gradient(self, grad: Tensor, weight: Tensor, needs_bias: bool) -> tuple[Tensor, Tensor | None]:
        """∂L/∂weight and ∂L/∂bias."""
        if self.sparse_gradient:
            return sparse.weight_gradient(self.layer, self.tag.packed, grad, self.tag.one, needs_bias)
        x, linear = self.spikes().to(grad.dtype), self.layer.linear
        of_bias = sparse.bias_gradient(self.layer, grad if linear else grad.movedim(1, -1)) if needs_bias else None
        if linear:
            return grad.flatten(0, -2).T @ x.flatten(0, -2), of_bias
        return self._gradients(grad, x, weight, (False, True))[1], of_bias

    def spikes(self) -> Tensor:
        """The spikes, with the channels last in memory."""
        flat = self.tag.make().to(self.dtype)
        if self.layer.linear:
            return flat.view(self.layer.x_shape)
        return flat.view(self._channels_last_shape()).movedim(-1, 1)

    def _channels_last_shape(self) -> tuple[int, ...]:
        batch, channels, *pixels = self.layer.x_shape
        return batch, *pixels, channels

    def _gradients(self, grad: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool]) -> Any:
        return dense_gradients(self.layer, self.ours, grad, x, weight, self.axes, 1, needs)


class _OnSpikes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> Tensor:  # type: ignore[override]
        ctx.call, ctx.x_dtype = call, x.dtype
        ctx.save_for_backward(weight)
        return call.forward(x, weight, bias)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        call: Call = ctx.call
        (weight,) = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad = grad.contiguous() if call.layer.linear else grad.movedim(1, -1).contiguous().movedim(-1, 1)
        of_x = call.input_gradient(grad, weight).to(ctx.x_dtype) if needs_x else None
        of_weight = of_bias = None
        if needs_weight or needs_bias:
            of_weight, of_bias = call.weight_gradient(grad, weight, needs_bias)
            of_weight = of_weight.to(weight.dtype)
            of_bias = None if of_bias is None else of_bias.to(weight.dtype)
        return of_x, of_weight if needs_weight else None, of_bias, None


def run(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The layer's output, with a graph where one is wanted."""
    return _OnSpikes.apply(x, weight, bias, call)  # type: ignore[return-value]


def layer_call(
    func: Any, args: Any, kwargs: Any, weights: Weights
) -> tuple[Call, Tensor, Tensor, Tensor | None] | None:
    """How a call of a layer's function runs on spikes, with its input, weight and bias; None where it is PyTorch's."""
    x = args[0] if args else kwargs.get("input")
    if options().sparse == "off" or not isinstance(x, Tensor) or not isinstance(tag := tag_of(x), SpikeTag):
        return None
    if not packable(x):
        return None
    arguments = arguments_of(func, args, kwargs)
    weight, bias = arguments["weight"], arguments["bias"]
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    if not x.is_cpu or dtype not in sparse.DTYPES or not fitting(weight, bias, x, CONVOLUTIONS.get(func, 0)):
        return None
    if weight.dtype not in (dtype, torch.float32):
        return None
    axes = ([], [], []) if func is F.linear else axes_in(arguments, CONVOLUTIONS[func])
    if axes is None:
        return None
    if func is F.linear:
        layer, ordered = sparse.linear_layer(tuple(x.shape), tuple(weight.shape)), x.is_contiguous()
    else:
        layer, ordered = layer_of(x, weight, axes, arguments["groups"]), x.movedim(1, -1).is_contiguous()
    always = options().sparse == "on"
    ordered = ordered and _weighs(tag, x, x.ndim - 1 if layer.linear else 1)
    if not ordered or layer.problem or not (always or layer.products >= costs.PRODUCTS_FROM) or native.problem():
        return None
    even = costs.BreakEven(2.0, 2.0) if always else costs.break_even(layer, dtype)
    if not (even.forward or torch.is_grad_enabled()):
        return None  # it never runs sparse: to pack spikes would be for nothing
    density = tag.density(x)  # packs them
    forward, gradient, ours = density < even.forward, density < even.weight_gradient, ours_of(layer, dtype)
    backward = gradient or ours.input_gradient or ours.weight_gradient or multiplies(layer, dtype)
    if not forward and not (backward and torch.is_grad_enabled()):
        return None
    return Call(layer, tag, dtype, forward, gradient, ours, axes, weights), x, weight, bias


def _weighs(tag: SpikeTag, x: Tensor, channels: int) -> bool:
    """Whether what a spike of each channel is worth can go into the weights of a layer that reads x.

    Args:
        tag: of x, which may be a view of the spikes.
        x: the layer's input.
        channels: the dimension of its channels.
    """
    one = tag.one
    if not isinstance(one, Tensor):
        return True
    if (x.shape, x.stride()) != tag.layout or one.ndim < x.ndim - channels or not one.isfinite().all():
        return False
    return one.shape[channels - x.ndim] == one.numel() == x.shape[channels]
