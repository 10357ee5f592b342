"""Convolutions and linear layers that read spikes: each runs sparse or dense, whichever is faster.

The share of active inputs and the layer's shape decide, for the forward and for the weight gradient; the input gradient
is dense. On one machine the same spikes give the same decision, and so the same bits.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sltt.kernels import native
from sltt.kernels.derivatives import differentiable_once
from sltt.kernels.layers import costs, sparse
from sltt.kernels.layers.sparse import LayerSizes
from sltt.kernels.layers.values import (
    Axes,
    axes_in,
    convolution_gradients,
    has_fast_gradients,
    plan_of,
    run_on_values,
    runs_winograd,
)
from sltt.kernels.layers.weights import WeightCache
from sltt.kernels.options import options
from sltt.kernels.spikes.looks import Spikes, look
from sltt.kernels.spikes.saved import can_tag, others_save, restore, save, tag_made

# A layer of more products for each of its outputs keeps them. These are the last layers of a network: they take as much
# time as the first ones, and have few outputs.
PRODUCTS_AT_MOST = 2048


class LayerFunction(NamedTuple):
    """The function that a layer applies to its input, its weight and its bias."""

    function: Any  # F.linear, F.conv1d or F.conv2d
    axes: int  # of pixels
    settings: tuple[Any, ...] = ()  # of a convolution: stride, padding, dilation and groups

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.function(x, weight, bias, *self.settings)


_LINEAR = LayerFunction(F.linear, 0)


def operation_of(module: nn.Module) -> LayerFunction | None:
    """Return the operation of a layer of PyTorch, as it is now; None for a padding that is no number."""
    if isinstance(module, nn.Linear):
        return _LINEAR
    if not isinstance(module, nn.Conv1d | nn.Conv2d) or module.padding_mode != "zeros" or module.padding == "same":
        return None
    function, axes = (F.conv1d, 1) if isinstance(module, nn.Conv1d) else (F.conv2d, 2)
    padding = 0 if module.padding == "valid" else module.padding
    return LayerFunction(function, axes, (module.stride, padding, module.dilation, module.groups))


@dataclass(frozen=True)
class SpikeCall:
    """A call of a layer on spikes."""

    layer: LayerSizes
    spikes: Spikes
    dtype: torch.dtype  # of the output
    sparse_forward: bool  # the forward touches active inputs only
    sparse_gradient: bool  # the weight gradient does
    axes: Axes
    weights: WeightCache

    def forward(self, x: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the layer's output; x, the spikes, is needed where the forward is dense, or else unpacked."""
        if self.sparse_forward:
            packed = self.weights.pack_weight(self.layer, weight, self.spikes.one)
            return sparse.forward(self.layer, self.spikes.bits, packed, bias, self.dtype)
        x = (self.spikes.dense() if x is None else x).to(self.dtype)
        weight, bias = self.weights.cast(weight, self.dtype), None if bias is None else bias.to(self.dtype)
        if self.layer.linear:
            return F.linear(x, weight, bias)
        return torch.convolution(x, weight, bias, *self.axes, False, [0] * len(self.axes[0]), 1)

    def input_gradient(self, grad: Tensor, weight: Tensor) -> Tensor:
        """Return ∂L/∂x, dense."""
        if not runs_winograd(self.layer, grad.dtype):
            weight = self.weights.cast(weight, grad.dtype)
        if self.layer.linear:
            return grad @ weight
        batch, channels, *pixels = self.layer.x_shape
        x = grad if grad.shape == self.layer.x_shape else grad.new_empty((batch, *pixels, channels)).movedim(-1, 1)
        return convolution_gradients(grad, x, weight, self.axes, 1, (True, False))[0]

    def weight_gradient(self, grad: Tensor, weight: Tensor, of_bias: Tensor | None) -> Tensor:
        """Return ∂L/∂weight; a sparse one writes ∂L/∂bias where it is given."""
        if self.sparse_gradient:
            return sparse.weight_gradient(self.layer, self.spikes.bits, grad, self.spikes.one, of_bias)
        x = self.spikes.dense().to(grad.dtype)
        if self.layer.linear:
            return grad.flatten(0, -2).T @ x.flatten(0, -2)
        return convolution_gradients(grad, x, weight, self.axes, 1, (False, True))[1]


class _OnSpikes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, call: SpikeCall) -> Tensor:  # type: ignore[override]
        ctx.call, ctx.x_dtype = call, x.dtype
        ctx.save_for_backward(weight)
        return call.forward(x, weight, bias)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        call: SpikeCall = ctx.call
        (weight,) = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        last = (grad if call.layer.linear else grad.movedim(1, -1)).contiguous()  # [..., C_out]
        grad = last if call.layer.linear else last.movedim(-1, 1)
        of_x = call.input_gradient(grad, weight).to(ctx.x_dtype) if needs_x else None
        together = needs_bias and needs_weight and call.sparse_gradient and call.layer.sums_bias
        of_bias = grad.new_empty(len(weight), dtype=torch.float32) if together else None
        of_weight = call.weight_gradient(grad, weight, of_bias).to(weight.dtype) if needs_weight else None
        if needs_bias:
            of_bias = (last.flatten(0, -2).sum(0, dtype=torch.float32) if of_bias is None else of_bias).to(weight.dtype)
        return of_x, of_weight, of_bias, None


def run_layer(
    operation: LayerFunction,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weights: WeightCache,
    recompute: bool = False,
) -> Tensor:
    """Return the output of a layer, computed on active inputs where that is faster.

    With `recompute`, it is made again in the backward, instead of being kept.
    """
    if images := as_images(operation, x, weight):
        return run_layer(*images, bias, weights, recompute).squeeze(2)
    if others_save():
        return run_on_values(operation, x, weight, bias, weights)  # which saves what PyTorch's layers save
    y: Any
    if call := spike_call(operation, x, weight, bias, weights):
        y = _OnSpikes.apply(x, weight, bias, call)
    else:
        y = run_on_values(operation, x, weight, bias, weights)
    if recompute and math.prod(weight.shape[1:]) <= PRODUCTS_AT_MOST and can_tag(y):
        _tag_layer(operation, y, x, weight, bias, call)
    return y


def as_images(operation: LayerFunction, x: Tensor, weight: Tensor) -> tuple[LayerFunction, Tensor, Tensor] | None:
    """Return a convolution of signals as one of images of one row, whose format PyTorch keeps.

    None unless the signals' channels are last in memory.
    """
    signals = operation.axes == 1 and x.ndim == 3 and x.stride(1) == 1
    if not signals or not (axes := axes_in(operation.settings[:3], 1)):
        return None
    (stride,), (padding,), (dilation,) = axes
    images = LayerFunction(F.conv2d, 2, ((1, stride), (0, padding), (1, dilation), operation.settings[3]))
    return images, x.unsqueeze(2), weight.unsqueeze(2)


def _tag_layer(
    operation: LayerFunction, y: Any, x: Tensor, weight: Tensor, bias: Tensor | None, call: SpikeCall | None
) -> None:
    kept, device = [None if t is None else save(t.detach()) for t in (weight, bias)], x.device.type
    dtype, casts = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)

    def run_again(x: Tensor) -> Tensor:
        weight, bias = (None if tensor is None else restore(tensor) for tensor in kept)
        assert weight is not None
        if call is not None:
            return call.forward(x, weight, bias)
        # without its cache: what is cast without a graph must not be used by layers with one
        with torch.autocast(device, dtype, casts, cache_enabled=False):
            return operation(x, weight, bias)

    tag_made(y, x, run_again, layers=1, spikes=call and call.spikes)


def is_small(operation: LayerFunction, x: Tensor, weight: Tensor) -> bool:
    """Return whether a layer has too few products to run in another way than PyTorch's, whatever it reads."""
    if options().sparse == "on" or not x.is_cpu:
        return False
    channels = x.shape[1] if operation.axes else weight.shape[-1]
    products = weight.numel() * (x.numel() // max(1, channels))  # at most: the output may be smaller than the input
    return products < costs.PRODUCTS_FROM


def spike_call(
    operation: LayerFunction, x: Tensor, weight: Tensor, bias: Tensor | None, weights: WeightCache
) -> SpikeCall | None:
    """Return how a layer runs on spikes; None where x is something else, or it is PyTorch's."""
    if (plan := plan_of(operation, x, weight, bias)) is None or native.problem():
        return None
    layer, dtype, axes = plan
    always = options().sparse == "on"
    even = costs.BreakEven(2.0, 2.0) if always else costs.break_even(layer, dtype, weights.calls)
    if not (even.forward or torch.is_grad_enabled()):
        return None  # it never runs sparse: to look would be for nothing
    if (spikes := look(x.detach())) is None:
        return None
    forward, gradient = (spikes.density < most for most in even)
    if not forward and not (torch.is_grad_enabled() and (gradient or has_fast_gradients(layer, dtype))):
        return None
    if forward:
        weights.note_sparse(weight)
    return SpikeCall(layer, spikes, dtype, forward, gradient, axes, weights)
