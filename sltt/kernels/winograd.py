"""Dense 3×3 convolutions of stride 1 in a quarter of the multiplications: the forward and both gradients.

Winograd's F(4×4, 3×3), in float32 sums. Inputs and gradients are float32 or bfloat16, with the channels last in memory;
weights are of any type. Rounding errors are about three times those of PyTorch. Results do not depend on the number of
threads, to the last bit.
"""

import functools

import torch
from torch import Tensor

from sltt.kernels.sparse import Layer, check_memory, conv_layer, library, strides_of

_SIDE = 4  # of a tile of outputs


def supports(layer: Layer, dtype: torch.dtype) -> bool:
    """Whether the kernels can do the layer, and without computing much more than its pixels."""
    _, h, w, ci, co, kh, kw, sh, sw, ph, pw, oh, ow = layer.sizes
    if (kh, kw, sh, sw) != (3, 3, 1, 1) or len(layer.x_shape) != 4 or max(ph, pw) > 2 or ci % 32 or co % 32:
        return False
    return dtype in (torch.float32, torch.bfloat16) and _fits_tiles(h, w) and _fits_tiles(oh, ow)


def forward(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y in the type of x: the input gradient of the layer that reads y and gives x."""
    y = _input_gradient(_turned(layer), x, weight.detach().float().transpose(0, 1), turned=True)
    return y if bias is None else y.add_(bias.detach().to(y.dtype).view(-1, 1, 1))


def input_gradient(layer: Layer, grad_y: Tensor, weight: Tensor) -> Tensor:
    """∂L/∂x in the type of ∂L/∂y."""
    return _input_gradient(layer, grad_y, weight.detach().float(), turned=False)


def weight_gradient(layer: Layer, x: Tensor, grad_y: Tensor) -> Tensor:
    """∂L/∂weight in float32."""
    assert x.shape == layer.x_shape
    assert grad_y.shape == layer.y_shape
    assert grad_y.dtype == x.dtype
    x, g = x.movedim(1, -1).contiguous(), grad_y.movedim(1, -1).contiguous()
    outputs, inputs, *kernel = layer.weight_shape
    grad = torch.empty((outputs, *kernel, inputs))
    short = library().sltt_dense_weight_gradient(
        layer.pointer,
        x.data_ptr(),
        g.data_ptr(),
        g.dtype == torch.bfloat16,
        grad.data_ptr(),
        torch.get_num_threads(),
    )
    check_memory(short)
    return grad.movedim(-1, 1)


def _fits_tiles(h: int, w: int) -> bool:
    return _SIDE**2 * -(-h // _SIDE) * -(-w // _SIDE) <= 3 * h * w


@functools.lru_cache(maxsize=1024)
def _turned(layer: Layer) -> Layer:
    """The layer that reads the outputs of another and gives its inputs."""
    *_, ph, pw, _, _ = layer.sizes
    outputs, inputs, *kernel = layer.weight_shape
    return conv_layer(layer.y_shape, (inputs, outputs, *kernel), (1, 1), ((2 - ph, 2 - ph), (2 - pw, 2 - pw)))


def _input_gradient(layer: Layer, grad_y: Tensor, weight: Tensor, turned: bool) -> Tensor:
    """∂L/∂x; `turned`: with the kernel upside down."""
    assert grad_y.shape == layer.y_shape
    g = grad_y.movedim(1, -1).contiguous()
    batch, channels, *pixels = layer.x_shape
    grad = g.new_empty((batch, *pixels, channels))
    strides, start = strides_of(weight), weight.data_ptr()
    if turned:
        start += weight.element_size() * 2 * (strides[2] + strides[3])
        strides[2], strides[3] = -strides[2], -strides[3]
    short = library().sltt_input_gradient(
        layer.pointer,
        start,
        strides,
        g.data_ptr(),
        g.dtype == torch.bfloat16,
        grad.data_ptr(),
        torch.get_num_threads(),
    )
    check_memory(short)
    return grad.movedim(-1, 1)
