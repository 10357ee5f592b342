"""Convolutions and linear layers on spikes: only active inputs are touched.

A spike is 0 or `one`, so a product with it is a sum: y = one · Σ_active w + bias, and ∂L/∂w = one · Σ_active ∂L/∂y.
Spikes come as bits (`bits.pack`) of memory with the channels last: [B, H, W, C], [B, L, C] or [..., C]. All sums are
float32. Results do not depend on the number of threads, to the last bit.

    layer = conv_layer(x.shape, weight.shape, stride=(1, 1), padding=((1, 1), (1, 1)))
    if layer.fits and not native.problem() and density(bits) < costs.break_even(layer, x.dtype).forward:
        y = forward(layer, bits, pack_weight(layer, weight), bias, x.dtype)
"""

import ctypes
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sltt.kernels import native

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The widest row that the pixels of a layer with one kernel element are laid out in: as good as any, and fits the cache.
_ROW = 128


@dataclass(frozen=True)
class LayerSizes:
    """A layer applied to an input of one shape; make it by `conv_layer` or `linear_layer`."""

    x_shape: tuple[int, ...]  # [B, C, H, W], [B, C, L] or, of a linear layer, [..., C]
    weight_shape: tuple[int, ...]  # [C_out, C, KH, KW], [C_out, C, K] or [C_out, C]
    y_shape: tuple[int, ...]
    sizes: tuple[int, ...]  # of the equivalent convolution of images: n, h, w, ci, co, kh, kw, sh, sw, ph, pw, oh, ow
    fits: bool  # it can be sparse

    @property
    def linear(self) -> bool:
        """Return whether this is a linear layer."""
        return len(self.weight_shape) == 2

    @property
    def flat(self) -> bool:
        """Return whether pixels are independent: a linear layer, or a kernel of one element."""
        h, w, *kernel, oh, ow = (*self.sizes[1:3], *self.sizes[5:])
        return kernel == [1, 1, 1, 1, 0, 0] and (h, w) == (oh, ow)

    @property
    def sums_bias(self) -> bool:
        """Return whether the kernel of the weight gradient can give that of the bias."""
        return self.flat and self.weight_shape[0] % 16 == 0

    @property
    def products(self) -> int:
        """Multiplications of the dense layer."""
        return math.prod(self.y_shape) * math.prod(self.weight_shape[1:])

    @functools.cached_property
    def y_stride(self) -> tuple[int, ...]:
        """Strides of the output, with the channels last in memory."""
        batch, channels, *pixels = self.y_shape
        order = self.y_shape if self.linear else (batch, *pixels, channels)
        steps = [math.prod(order[i + 1 :]) for i in range(len(order))]
        return tuple(steps) if self.linear else (steps[0], 1, *steps[1:-1])

    @functools.cached_property
    def pointer(self) -> Any:
        """Return `sizes` for the native kernels."""
        return (ctypes.c_int64 * len(self.sizes))(*self.sizes)

    @property
    def packed_size(self) -> int:
        """Elements of the packed weight: channels in whole blocks, 16 of the output and up to 64 of the input."""
        _, _, _, ci, co, kh, kw, *_ = self.sizes
        return -(-co // 16) * 16 * -(-ci // 64) * min(ci, 64) * kh * kw


@functools.lru_cache(maxsize=1024)
def conv_layer(
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> LayerSizes:
    """Return a convolution of [B, C, L] or [B, C, H, W]; `padding` has a pair (before, after) for each axis."""
    x_shape, weight_shape = tuple(x_shape), tuple(weight_shape)
    axes = [
        (size, kernel, step, before, (size + before + after - spread * (kernel - 1) - 1) // step + 1)
        for size, kernel, step, (before, after), spread in zip(
            x_shape[2:], weight_shape[2:], stride, padding, dilation, strict=False
        )
    ]
    y_shape = (x_shape[0], weight_shape[0], *(out for *_, out in axes))
    h, w = ((1, 1, 1, 0, 1), *axes)[-2:]
    sizes = _sizes(x_shape[0], x_shape[1], weight_shape[0], h, w)
    fits = len(axes) in (1, 2) and groups == 1 and all(d == 1 for d in dilation) and _fit(sizes)
    return LayerSizes(x_shape, weight_shape, y_shape, sizes, fits)


@functools.lru_cache(maxsize=1024)
def linear_layer(x_shape: Sequence[int], weight_shape: Sequence[int]) -> LayerSizes:
    """Return a linear layer of [..., C]."""
    x_shape, weight_shape = tuple(x_shape), tuple(weight_shape)
    point = (1, 1, 1, 0, 1)
    sizes = _sizes(math.prod(x_shape[:-1]), x_shape[-1], weight_shape[0], point, point)
    return LayerSizes(x_shape, weight_shape, (*x_shape[:-1], weight_shape[0]), sizes, _fit(sizes))


def density(bits: Tensor) -> float:
    """Share of the bits that are set."""
    return library().sltt_count(bits, bits.numel()) / max(1, 8 * bits.numel())


def pack_weight(layer: LayerSizes, weight: Tensor, one: float = 1.0) -> Tensor:
    """Return the weight times `one` in the order that `forward` reads, in float32; of use until the weight changes."""
    weight = weight.detach().float()
    packed = torch.empty(layer.packed_size, dtype=torch.float32, device="cpu")
    library().sltt_pack(weight, strides_of(weight), layer.pointer, one, packed, torch.get_num_threads())
    return packed


def forward(layer: LayerSizes, bits: Tensor, packed: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return y = layer(spikes) in `dtype`, with the channels last in memory; `packed` is what `pack_weight` gives."""
    assert 8 * bits.numel() == math.prod(layer.x_shape)
    assert packed.numel() == layer.packed_size
    kept = torch.float32 if dtype == torch.float16 else dtype
    y = torch.empty_strided(layer.y_shape, layer.y_stride, dtype=kept)  # no view, which could not be changed in place
    bias = None if bias is None else bias.detach().float().contiguous()
    half = kept == torch.bfloat16
    library().sltt_forward(bits, layer.pointer, packed, bias, y, half, torch.get_num_threads())
    return y.to(dtype)


def weight_gradient(layer: LayerSizes, bits: Tensor, grad_y: Tensor, one: float = 1.0, of_bias: Any = None) -> Tensor:
    """Return ∂L/∂weight in float32, with the channels last in memory; write ∂L/∂bias of a layer that `sums_bias`."""
    assert 8 * bits.numel() == math.prod(layer.x_shape)
    assert grad_y.shape == layer.y_shape
    g = grad_y if layer.linear else grad_y.movedim(1, -1)
    g = g.to(torch.float32 if g.dtype == torch.float16 else g.dtype).contiguous()
    shape = layer.weight_shape[0], *layer.weight_shape[2:], layer.weight_shape[1]
    grad = torch.empty(shape, dtype=torch.float32, device="cpu").movedim(-1, 1)
    half, threads = g.dtype == torch.bfloat16, torch.get_num_threads()
    library().sltt_weight_gradient(bits, layer.pointer, g, half, one, grad, strides_of(grad), of_bias, threads)
    return grad


def _sizes(n: int, ci: int, co: int, h: Sequence[int], w: Sequence[int]) -> tuple[int, ...]:
    """Return `LayerSizes.sizes`; an axis is its size, kernel, stride, padding before and output size."""
    if h[1:4] == w[1:4] == (1, 1, 0) and h[0] == h[4] and w[0] == w[4]:
        pixels = n * h[0] * w[0]  # are independent: in rows of equal length
        row = next(r for r in range(min(_ROW, max(1, pixels)), 0, -1) if pixels % r == 0)
        n, h, w = pixels // row, (1, 1, 1, 0, 1), (row, 1, 1, 0, row)
    return (n, h[0], w[0], ci, co, h[1], w[1], h[2], w[2], h[3], w[3], h[4], w[4])


def _fit(sizes: tuple[int, ...]) -> bool:
    n, h, w, ci, co, *_, oh, ow = sizes
    return min(ci, co) >= 16 and min(n, h, w, oh, ow) >= 1 and n * h * w * ci < 2**32


def strides_of(weight: Tensor) -> Any:
    """Strides as of [C_out, C, KH, KW]."""
    out, channel, *kernel = weight.stride()
    return (ctypes.c_int64 * 4)(out, channel, *((0, 0, *kernel)[-2:]))


def library() -> ctypes.CDLL:
    """Return the native kernels, which are there."""
    loaded = native.library()
    assert loaded is not None, "ask `native.problem` before"
    return loaded
