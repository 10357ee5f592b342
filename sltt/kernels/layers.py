"""Convolutions and linear layers of a network that read spikes: each runs sparse or dense, whichever is faster.

The user's layers stay as they are. While `saved.saving` is open, a call of `F.conv2d` or `F.linear` on tagged spikes
comes here. The share of active inputs and the layer's shape decide, for the forward and for the weight gradient; the
input gradient is dense. On one machine the same spikes give the same decision, and so the same bits.
A convolution of other values, such as rates, comes here for its weight gradient.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary, WeakIdRef

from sltt._torch import is_functorch_wrapped_tensor
from sltt.kernels import costs, native, sparse, winograd
from sltt.kernels.options import options
from sltt.kernels.sparse import Layer

if TYPE_CHECKING:
    from sltt.kernels.tags import SpikeTag

CONVOLUTIONS = {F.conv1d: 1, F.conv2d: 2}
LAYERS = {*CONVOLUTIONS, F.linear}
# Up to so many output pixels, oneDNN's weight gradient in bfloat16 takes longer than one matrix product of the gradient
# with what the kernel reads: see benchmarks/sparse.py, 512 to 512 channels of 4×4 pixels.
MULTIPLIED_TO = 36
_NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_LEAST = {"stride": 1, "padding": 0, "dilation": 1}
_DEFAULTS = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}


Axes = tuple[list[int], list[int], list[int]]  # stride, padding and dilation, a number for each axis


class Weights:
    """Weights in the forms that layers read, kept for one sequence, in which they seldom change.

    Args:
        packed: keep those packed for a sparse forward too. In a training their copies would take more memory than they
            save time; in an evaluation there is room, where gradients would be.
    """

    def __init__(self, packed: bool = False) -> None:
        self._keep_packed = packed
        self._kept: Any = WeakIdKeyDictionary()  # by the weight's memory, which autograd gives back as another tensor

    def packed(self, layer: Layer, weight: Tensor, one: float | Tensor) -> Tensor:
        """What `sparse.forward` reads."""
        if not self._keep_packed:
            return sparse.pack_weight(layer, weight, one)
        form, version = one, ()
        if isinstance(one, Tensor):
            form, version = "by channel", (WeakIdRef(one.untyped_storage()), one._version)
        return self._get(weight, form, lambda: sparse.pack_weight(layer, weight, one), version)

    def cast(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight in another type."""
        return weight if weight.dtype == dtype else self._get(weight, dtype, lambda: weight.detach().to(dtype))

    def _get(self, weight: Tensor, form: Any, make: Callable[[], Tensor], version: Any = ()) -> Tensor:
        forms = self._kept.setdefault(weight.untyped_storage(), {})
        key = form, weight.dtype, weight.storage_offset(), weight.shape, weight.stride()
        version = weight._version, *version
        before, made = forms.get(key, (None, None))
        if made is None or before != version:
            made = make()
            forms[key] = version, made
        return made


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
    tag: "SpikeTag"
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
        if self.ours.input_gradient:
            return winograd.input_gradient(self.layer, grad, weight)
        weight = self.weights.cast(weight, grad.dtype)
        if self.layer.linear:
            return grad @ weight
        # of the input, only shape and memory format are looked at
        x = grad if grad.shape == self.layer.x_shape else grad.new_empty(self._channels_last_shape()).movedim(-1, 1)
        return self._convolution_backward(grad, x, weight, [True, False, False])[0]

    def weight_gradient(self, grad: Tensor, weight: Tensor, needs_bias: bool) -> tuple[Tensor, Tensor | None]:
        """∂L/∂weight and ∂L/∂bias."""
        if self.sparse_gradient:
            return sparse.weight_gradient(self.layer, self.tag.packed, grad, self.tag.one, needs_bias)
        x = self.spikes().to(grad.dtype)
        bias = (
            sparse.bias_gradient(self.layer, grad if self.layer.linear else grad.movedim(1, -1)) if needs_bias else None
        )
        if self.layer.linear:
            return grad.flatten(0, -2).T @ x.flatten(0, -2), bias
        if self.ours.weight_gradient:
            return winograd.weight_gradient(self.layer, x, grad), bias
        if _multiplies(grad.shape, grad.dtype):
            return _multiplied_weight_gradient(grad, x, weight, self.axes), bias
        return self._convolution_backward(grad, x, weight.to(grad.dtype), [False, True, False])[1], bias

    def spikes(self) -> Tensor:
        """The spikes, with the channels last in memory."""
        flat = self.tag.make().to(self.dtype)
        return (
            flat.view(self.layer.x_shape)
            if self.layer.linear
            else flat.view(self._channels_last_shape()).movedim(-1, 1)
        )

    def _channels_last_shape(self) -> tuple[int, ...]:
        batch, channels, *pixels = self.layer.x_shape
        return batch, *pixels, channels

    def _convolution_backward(self, grad: Tensor, x: Tensor, weight: Tensor, mask: list[bool]) -> Any:
        zeros = [0] * len(self.axes[0])
        return torch.ops.aten.convolution_backward(grad, x, weight, None, *self.axes, False, zeros, 1, mask)


class _OnSpikes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> Tensor:  # type: ignore[override]
        ctx.call, ctx.x_dtype = call, x.dtype
        ctx.save_for_backward(weight)
        return call.forward(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
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


class _OnValues(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, axes: Axes, weights: Weights, layer: Layer
    ) -> Tensor:
        ctx.axes = axes
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(x, weight)
        bias = None if bias is None else bias.to(x.dtype)
        if _ours(layer, x.dtype).forward:
            return winograd.forward(layer, x, weight, bias)
        return torch.convolution(x, weights.cast(weight, x.dtype), bias, *axes, False, [0] * len(axes[0]), 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        needs = list(ctx.needs_input_grad[:3])
        of_x, of_weight, of_bias = convolution_gradients(grad, x, weight, ctx.axes, 1, needs)
        return (
            of_x,
            None if of_weight is None else of_weight.to(weight.dtype),
            None if of_bias is None else of_bias.to(ctx.bias_dtype),
            None,
            None,
            None,
        )


def run_on_values(func: Any, args: Any, kwargs: Any, weights: Weights) -> Any:
    """A layer on any values; a convolution is computed in another way than PyTorch's where that is faster."""
    if func is not F.conv2d or not torch.is_grad_enabled():
        return func(*args, **kwargs)
    named = arguments_of(func, args, kwargs)
    x, weight, bias = named["input"], named["weight"], named["bias"]
    stride, padding, dilation = (_axes(named[name], 2, least) for name, least in _LEAST.items())
    if not _ordinary(x) or not _fitting(weight, bias, x, 2) or named["groups"] != 1:
        return func(*args, **kwargs)
    if stride is None or padding is None or dilation is None:
        return func(*args, **kwargs)
    axes = stride, padding, dilation
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    if not weight.requires_grad or weight.dtype not in (dtype, torch.float32):
        return func(*args, **kwargs)
    layer = _dense_layer(x, weight, axes, 1)
    if layer is None or not (_multiplies(layer.y_shape, dtype) or any(_ours(layer, dtype))):
        return func(*args, **kwargs)
    return _OnValues.apply(x.to(dtype), weight, bias, axes, weights, layer)


def convolution_gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    axes: tuple[list[int], list[int], list[int]],
    groups: int,
    needs: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """∂L/∂x, ∂L/∂weight and ∂L/∂bias of a convolution that reads any values; natively where that is faster.

    Args:
        grad: ∂L/∂y.
        x: the input.
        weight: of any type.
        axes: stride, padding and dilation, a number for each axis.
        groups: of the convolution.
        needs: which of the three are asked for.
    """
    of_x = of_weight = None
    if grad.is_cpu and (layer := _dense_layer(x, weight, axes, groups)) is not None:
        ours = _ours(layer, grad.dtype)
        of_x = winograd.input_gradient(layer, grad, weight) if needs[0] and ours.input_gradient else None
        if needs[1] and ours.weight_gradient:
            of_weight = winograd.weight_gradient(layer, x, grad)
        elif needs[1] and _multiplies(grad.shape, grad.dtype):
            of_weight = _multiplied_weight_gradient(grad, x, weight, axes)
    of_bias = grad.sum([0, *range(2, grad.ndim)]) if needs[2] else None
    zeros = [0] * len(axes[0])

    def pytorch(mask: list[bool]) -> Any:
        cast = weight.to(grad.dtype)
        return torch.ops.aten.convolution_backward(grad, x, cast, None, *axes, False, zeros, groups, mask)

    if needs[1] and of_weight is None:  # one by one: what PyTorch needs for the first is free at the second
        of_weight = pytorch([False, True, False])[1]
    if needs[0] and of_x is None:
        of_x = pytorch([True, False, False])[0]
    return of_x, of_weight, of_bias


def _ours(layer: Layer, dtype: torch.dtype) -> costs.Ours:
    """What of a dense layer our kernels do."""
    if native.problem() or options().sparse == "on":
        return costs.Ours(*[not native.problem() and winograd.supports(layer, dtype)] * 3)
    return costs.ours(layer, dtype)


def _multiplies(y_shape: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether the dense weight gradient of a convolution is one matrix product."""
    return len(y_shape) == 4 and dtype == torch.bfloat16 and math.prod(y_shape[2:]) <= MULTIPLIED_TO


def _multiplied_weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, axes: Axes) -> Tensor:
    """∂L/∂weight = gᵀ · x̃, where a row of x̃ is what the kernel reads for an output pixel; with the channels last."""
    (down, right), (above, left), _ = axes
    rows, columns = weight.shape[2:]
    padded = F.pad(x.movedim(1, -1), (0, 0, left, left, above, above))
    image, row, column, channel = padded.stride()
    size = grad.shape[0], *grad.shape[2:], rows, columns, x.shape[1]
    read = padded.as_strided(size, (image, down * row, right * column, row, column, channel))
    found = grad.movedim(1, -1).flatten(0, -2).T @ read.flatten(3).flatten(0, 2)
    return found.view(-1, rows, columns, x.shape[1]).movedim(-1, 1)


def _dense_layer(x: Tensor, weight: Tensor, axes: Axes, groups: int) -> Layer | None:
    """A convolution of images that may be faster than PyTorch's; None for others."""
    if options().sparse == "off" or x.ndim != 4 or not (x.is_cpu and weight.is_cpu):
        return None
    stride, padding, dilation = axes
    pairs = tuple((p, p) for p in padding)
    layer = sparse.conv_layer(tuple(x.shape), tuple(weight.shape), tuple(stride), pairs, tuple(dilation), groups)
    if layer.problem or dilation != [1, 1] or not x.movedim(1, -1).is_contiguous():
        return None
    return layer if options().sparse == "on" or layer.products >= costs.PRODUCTS_FROM else None


def arguments_of(func: Any, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of a layer's function, by name."""
    return {**_DEFAULTS, **dict(zip(_NAMES, args, strict=False)), **kwargs}


def call_on_spikes(func: Any, x: Tensor, arguments: dict[str, Any], tag: "SpikeTag", weights: Weights) -> Call | None:
    """How a layer runs on spikes; None where it runs as PyTorch would.

    Args:
        func: the layer's function.
        x: the spikes, which fill their memory.
        arguments: of the function, by name.
        tag: of the spikes.
        weights: forms of weights in this sequence.
    """
    weight, bias = arguments["weight"], arguments["bias"]
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    if not x.is_cpu or dtype not in sparse.DTYPES or not _fitting(weight, bias, x, CONVOLUTIONS.get(func, 0)):
        return None
    if weight.dtype not in (dtype, torch.float32):
        return None
    axes: Axes = [], [], []
    if func is F.linear:
        layer = sparse.linear_layer(tuple(x.shape), tuple(weight.shape))
        ordered = x.is_contiguous()
    else:
        dims = CONVOLUTIONS[func]
        stride, padding, dilation = (_axes(arguments[name], dims, least) for name, least in _LEAST.items())
        if stride is None or padding is None or dilation is None:
            return None
        axes = stride, padding, dilation
        pairs = tuple((p, p) for p in padding)
        layer = sparse.conv_layer(
            tuple(x.shape), tuple(weight.shape), tuple(stride), pairs, tuple(dilation), arguments["groups"]
        )
        ordered = x.movedim(1, -1).is_contiguous()
    always = options().sparse == "on"
    ordered = ordered and _weighs(tag, x, x.ndim - 1 if layer.linear else 1)
    if not ordered or layer.problem or not (always or layer.products >= costs.PRODUCTS_FROM) or native.problem():
        return None
    even = costs.BreakEven(2.0, 2.0) if always else costs.break_even(layer, dtype)
    density = tag.density(x)  # packs them
    forward, gradient, ours = density < even.forward, density < even.weight_gradient, _ours(layer, dtype)
    backward = gradient or ours.input_gradient or ours.weight_gradient or _multiplies(layer.y_shape, dtype)
    if not forward and not (backward and torch.is_grad_enabled()):
        return None
    return Call(layer, tag, dtype, forward, gradient, ours, axes, weights)


def _weighs(tag: "SpikeTag", x: Tensor, channels: int) -> bool:
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


def _fitting(weight: Any, bias: Any, x: Tensor, dims: int) -> bool:
    """Whether weight and bias are ordinary tensors of shapes that fit x; PyTorch says what is wrong with others."""
    if not _ordinary(weight) or not (bias is None or _ordinary(bias)):
        return False
    fits = weight.ndim == dims + 2 and weight.shape[1] == x.shape[1 if dims else -1]
    return fits and (not dims or x.ndim == dims + 2) and (bias is None or bias.shape == weight.shape[:1])


def _ordinary(tensor: Any) -> bool:
    """Whether a tensor has memory that a kernel can read, and a version."""
    return (
        isinstance(tensor, Tensor)
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_inference()
        and not is_functorch_wrapped_tensor(tensor)
    )


def _axes(value: Any, dims: int, least: int) -> list[int] | None:
    """A number for each axis; None for what PyTorch refuses, and for padding by name, which may differ by side."""
    if isinstance(value, str):
        return [0] * dims if value == "valid" else None
    values = [value] * dims if isinstance(value, int) else list(value)
    values = values * dims if len(values) == 1 else values
    return values if len(values) == dims and min(values) >= least else None
