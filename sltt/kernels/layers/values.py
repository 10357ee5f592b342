"""Gradients of convolutions of any values, such as rates or traces, in other ways than PyTorch's where that is faster.

Those of 3×3 convolutions of stride 1 are Winograd's (`winograd`), where `costs` say that it pays. The weight
gradient of small images in bfloat16 is a matrix product for each position of the kernel. The forward is PyTorch's.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sltt._torch import is_functorch_wrapped_tensor
from sltt.kernels.layers import costs, sparse, winograd
from sltt.kernels.layers.sparse import LayerSizes
from sltt.kernels.layers.weights import WeightCache
from sltt.kernels.options import options

# Up to so many output pixels, products of the gradient with what each position of the kernel reads take about as long
# as oneDNN's weight gradient in bfloat16, and with AMX less than half as long: see benchmarks/sparse.py, 256 to 256
# channels of 8×8 pixels.
MULTIPLIED_TO = 64
POSITIONS_AT_MOST = 9  # of a kernel: each is a product, and a copy of what it reads

Axes = tuple[list[int], list[int], list[int]]  # stride, padding and dilation, a number for each axis


class _OnValues(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, axes: Axes, weights: WeightCache
    ) -> Tensor:
        ctx.axes, ctx.dtypes = axes, (weight.dtype, None if bias is None else bias.dtype)
        weight = weights.cast(weight, x.dtype)
        ctx.save_for_backward(x, weight)  # as PyTorch does: a checkpoint may run the layer again without us
        bias = None if bias is None else bias.to(x.dtype)
        return torch.convolution(x, weight, bias, *axes, False, [0] * len(axes[0]), 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        if torch.is_grad_enabled() and weight.dtype != ctx.dtypes[0]:
            raise RuntimeError("gradients of a convolution have no graph under autocast: train with sparse='off'")
        grad = grad.contiguous(memory_format=torch.channels_last)
        of_x, of_weight = convolution_gradients(grad, x, weight, ctx.axes, 1, ctx.needs_input_grad[:2])
        of_weight = None if of_weight is None else of_weight.to(ctx.dtypes[0])
        of_bias = grad.sum([0, 2, 3]).to(ctx.dtypes[1]) if ctx.needs_input_grad[2] else None
        return of_x, of_weight, of_bias, None, None


def plan_of(
    operation: Any, x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[LayerSizes, torch.dtype, Axes] | None:
    """Return the shapes, the type of the output and the axes of a layer that may run in another way than PyTorch's.

    None for small ones, and where PyTorch says what is wrong.
    """
    if not options().bits or not parameters_fit(weight, bias, x, operation.axes):
        return None
    *numbers, groups = operation.settings or ((), (), (), 1)
    axes, casts = axes_in(numbers, operation.axes), torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if casts else x.dtype
    types = {t.dtype for t in (x, weight, bias) if t is not None}
    if axes is None or dtype not in sparse.DTYPES or not types <= {dtype, torch.float32 if casts else dtype}:
        return None
    layer = _large_layer(x, weight, axes, groups)
    return None if layer is None else (layer, dtype, axes)


def run_on_values(operation: Any, x: Tensor, weight: Tensor, bias: Tensor | None, weights: WeightCache) -> Any:
    """Return a layer on any values; the gradients of a convolution are computed in another way where that is faster."""
    able = operation.axes == 2 and torch.is_grad_enabled() and is_ordinary(x)
    if not able or (plan := plan_of(operation, x, weight, bias)) is None or not has_fast_gradients(*plan[:2]):
        return operation(x, weight, bias)
    _, dtype, axes = plan
    return _OnValues.apply(x.to(dtype), weight, bias, axes, weights)


def convolution_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, axes: Axes, groups: int, needs: Sequence[bool]
) -> tuple[Any, Any]:
    """Return ∂L/∂x and ∂L/∂weight of a convolution, or None for those not asked for; natively where that is faster.

    For ∂L/∂x alone, x is any tensor of the input's shape and memory format. The weight is of any type.
    """
    of_x = of_weight = None
    # a graph of the gradients is PyTorch's
    layer = None if torch.is_grad_enabled() else _large_layer(x, weight, axes, groups)
    fast = layer is not None and runs_winograd(layer, grad.dtype)

    def pytorch(*mask: bool) -> Any:
        zeros, cast = [0] * len(axes[0]), weight.to(grad.dtype)
        return torch.ops.aten.convolution_backward(grad, x, cast, None, *axes, False, zeros, groups, mask)

    # one by one: what PyTorch needs for the first is free at the second
    if needs[1]:
        if layer and fast:
            of_weight = winograd.weight_gradient(layer, x, grad)
        elif layer and _multiplies(layer, grad.dtype):
            of_weight = _multiplied_weight_gradient(grad, x, weight, axes)
        else:
            of_weight = pytorch(False, True, False)[1]
    if needs[0]:
        of_x = winograd.input_gradient(layer, grad, weight) if layer and fast else pytorch(True, False, False)[0]
    return of_x, of_weight


def has_fast_gradients(layer: LayerSizes, dtype: torch.dtype) -> bool:
    """Return whether dense gradients of a layer are faster in another way than PyTorch's."""
    return runs_winograd(layer, dtype) or _multiplies(layer, dtype)


def runs_winograd(layer: LayerSizes, dtype: torch.dtype) -> bool:
    """Return whether the dense gradients of a layer are those of `winograd`, which takes weights of any type."""
    return winograd.supports(layer, dtype) if options().sparse == "on" else costs.fast_gradients(layer, dtype)


def _multiplies(layer: LayerSizes, dtype: torch.dtype) -> bool:
    """Return whether matrix products compute the dense weight gradient of a convolution."""
    if len(layer.y_shape) != 4 or dtype != torch.bfloat16:
        return False
    return math.prod(layer.y_shape[2:]) <= MULTIPLIED_TO and math.prod(layer.weight_shape[2:]) <= POSITIONS_AT_MOST


def _multiplied_weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, axes: Axes) -> Tensor:
    """Return ∂L/∂weight = gᵀ · x̃ for each position of the kernel; a row of x̃ is what an output pixel reads."""
    (down, right), (above, left), _ = axes
    (rows, columns), (height, width) = weight.shape[2:], grad.shape[2:]
    outputs = grad.movedim(1, -1).flatten(0, -2).T.contiguous()  # oneDNN takes twice as long for a transposed view
    padded = F.pad(x.movedim(1, -1), (0, 0, left, left, above, above))
    gradient = grad.new_empty(len(weight), rows, columns, x.shape[1])
    for i, j in itertools.product(range(rows), range(columns)):
        read = padded[:, i : i + down * height : down, j : j + right * width : right]
        torch.mm(outputs, read.flatten(0, 2), out=gradient[:, i, j])
    return gradient.movedim(-1, 1)


def _large_layer(x: Tensor, weight: Tensor, axes: Axes, groups: int) -> LayerSizes | None:
    """Return the shapes of a layer that is large enough to run in another way than PyTorch's; None for others."""
    if options().sparse == "off" or not (x.is_cpu and weight.is_cpu):
        return None
    if weight.ndim == 2:
        layer, ordered = sparse.linear_layer(tuple(x.shape), tuple(weight.shape)), x.is_contiguous()
    else:
        stride, padding, dilation = map(tuple, axes)
        pairs = tuple((p, p) for p in padding)
        layer = sparse.conv_layer(tuple(x.shape), tuple(weight.shape), stride, pairs, dilation, groups)
        ordered = x.movedim(1, -1).is_contiguous()
    large = options().sparse == "on" or layer.products >= costs.PRODUCTS_FROM
    return layer if ordered and layer.fits and large else None


def parameters_fit(weight: Any, bias: Any, x: Tensor, dims: int) -> bool:
    """Return whether weight and bias are ordinary tensors that fit x; PyTorch says what is wrong with others."""
    if not is_ordinary(weight) or not (bias is None or is_ordinary(bias)):
        return False
    fits = weight.ndim == dims + 2 and weight.shape[1] == x.shape[1 if dims else -1]
    return fits and (not dims or x.ndim == dims + 2) and (bias is None or bias.shape == weight.shape[:1])


def is_ordinary(tensor: Any) -> bool:
    """Return whether a tensor has memory that a kernel can read, a version, and no operations of its own."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_inference()
        and not tensor.is_neg()
        and not is_functorch_wrapped_tensor(tensor)
    )


def axes_in(settings: Sequence[Any], dims: int) -> Axes | None:
    """Stride, padding and dilation in a convolution's settings, for each axis; None where PyTorch refuses one."""
    axes = []
    for value, least in zip(settings, (1, 0, 1), strict=False):
        values = list(value) if isinstance(value, tuple | list) else [value]
        values = values * dims if len(values) == 1 else values
        if len(values) != dims or not all(isinstance(value, int) and value >= least for value in values):
            return None
        axes.append(values)
    return axes[0], axes[1], axes[2]
