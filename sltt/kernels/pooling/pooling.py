"""Max pooling in native code, also of a sum over time: one pass that adds to the sum, pools it, and subtracts.

It runs on a CPU, for images of float32 or bfloat16 with the channels last in memory and windows side by side, and gives
the bits of the operations. For the gradient it keeps a byte for each maximum, and no input. A sum over time is pooled
natively in steps without a graph.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sltt._torch import transforms_active
from sltt.kernels.layers.values import is_ordinary
from sltt.kernels.native import library_for
from sltt.kernels.norm.deferred import materialise

_DTYPES = (torch.float32, torch.bfloat16)
_POSITIONS = 256  # in a window, at most: a byte tells them apart


class _Pooling(ctypes.Structure):
    """Windows of kh × kw pixels, side by side: oh × ow of them in an image of h × w pixels."""

    _fields_ = tuple((name, ctypes.c_int64) for name in ("n", "h", "w", "channels", "kh", "kw", "oh", "ow"))

    @classmethod
    def of(cls, x: Tensor, size: tuple[int, int]) -> "_Pooling | None":
        """Return the windows of images x [B, C, H, W]; None where they are smaller than a window."""
        (n, channels, h, w), (kh, kw) = x.shape, size
        return None if h < kh or w < kw else cls(n, h, w, channels, kh, kw, h // kh, w // kw)


@dataclass
class _MaxPooling:
    """A max pooling of some images in native code."""

    library: ctypes.CDLL
    windows: _Pooling

    def maxima(self, x: Tensor, positions: Tensor | None) -> Tensor:
        """Return the maximum of each window; writes its position in the window, if asked for."""
        y = self.empty_result(x.dtype)
        half, threads = x.dtype == torch.bfloat16, torch.get_num_threads()
        self.library.sltt_max_pool(ctypes.byref(self.windows), half, x, y, positions, threads)
        return y

    def spread(self, grad: Tensor, positions: Tensor) -> Tensor:
        """Return ∂L/∂x: the gradient of each maximum, at its position."""
        z = self.windows
        out = _empty(z.n, z.channels, z.h, z.w, dtype=grad.dtype)
        half, threads = grad.dtype == torch.bfloat16, torch.get_num_threads()
        self.library.sltt_max_pool_gradient(ctypes.byref(z), half, grad, positions, out, threads)
        return out

    def spread_with_graph(self, grad: Tensor, positions: Tensor) -> Tensor:
        """Return the same, by operations of PyTorch."""
        z = self.windows
        each = torch.arange(z.kh * z.kw, device="cpu").view(z.kh, z.kw)
        out = torch.where(positions[..., None, None] == each, grad[..., None, None], 0)  # [n, channels, oh, ow, kh, kw]
        out = out.movedim(-2, 3).reshape(z.n, z.channels, z.oh * z.kh, z.ow * z.kw)
        return F.pad(out, (0, z.w - z.ow * z.kw, 0, z.h - z.oh * z.kh))

    def empty_result(self, dtype: torch.dtype) -> Tensor:
        """Memory of the output's shape."""
        z = self.windows
        return _empty(z.n, z.channels, z.oh, z.ow, dtype=dtype)


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cpu", memory_format=torch.channels_last)


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, pooling: _MaxPooling) -> Tensor:  # type: ignore[override]
        ctx.pooling, positions = pooling, pooling.empty_result(torch.uint8)
        ctx.save_for_backward(positions)
        return pooling.maxima(x, positions)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (positions,) = ctx.saved_tensors
        if torch.is_grad_enabled() or not is_ordinary(grad):
            return ctx.pooling.spread_with_graph(grad, positions), None
        return ctx.pooling.spread(grad.contiguous(memory_format=torch.channels_last), positions), None


def max_pool(pool: nn.MaxPool2d, x: Tensor) -> Tensor | None:
    """Return the output of a max pooling; None where it does not run natively."""
    x = materialise(x)
    size = _windows(pool)
    if size is None or size[0] * size[1] > _POSITIONS or not _is_channels_last(x) or not x.numel():
        return None
    if (windows := _Pooling.of(x, size)) is None or (library := library_for(x.numel())) is None:
        return None
    pooling = _MaxPooling(library, windows)
    if torch.is_grad_enabled() and x.requires_grad:
        return _MaxPool.apply(x, pooling)  # type: ignore[return-value]
    return pooling.maxima(x, None)


def running_max(
    pool: Callable[[Tensor], Tensor], total: Tensor, largest: Tensor, x: Tensor
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return total + x, its pooling, and what that gains over `largest`, in x's type; None where the kernel cannot.

    Args:
        pool: the pooling.
        total: sum of the inputs before, [B, C, H, W].
        largest: pooling of `total`.
        x: input, [B, C, H, W].
    """
    if torch.compiler.is_compiling() or (size := _windows(pool)) is None or not _fits(total, largest, x):
        return None
    if pool._forward_hooks or pool._forward_pre_hooks:  # type: ignore[attr-defined]
        return None
    if (windows := _Pooling.of(x, size)) is None or (library := library_for(x.numel())) is None:
        return None
    summed = torch.empty_like(x, dtype=torch.float32)
    most = torch.empty_like(largest, dtype=torch.float32)
    gained = torch.empty_like(largest, dtype=x.dtype)
    half, half_total = (one.dtype == torch.bfloat16 for one in (x, total))
    library.sltt_running_max(
        ctypes.byref(windows), half, half_total, x, total, largest, summed, most, gained, torch.get_num_threads()
    )
    return summed, most, gained


def _windows(pool: Any) -> tuple[int, int] | None:
    """Height and width of a pooling whose windows lie side by side."""
    if not isinstance(pool, nn.MaxPool2d) or pool.return_indices or pool.ceil_mode:
        return None
    return _side_by_side(pool.kernel_size, pool.stride, pool.padding, pool.dilation)


def _side_by_side(size: Any, stride: Any, padding: Any, dilation: Any) -> tuple[int, int] | None:
    """Height and width of windows, if they lie side by side; of other types than int, PyTorch knows what they are."""
    size, stride, padding, dilation = (
        (one, one) if isinstance(one, int) else tuple(one) if isinstance(one, tuple | list) else ()
        for one in (size, size if stride is None else stride, padding, dilation)
    )
    if len(size) != 2 or not all(isinstance(side, int) and side >= 1 for side in size):
        return None
    return size if size == stride and padding == (0, 0) and dilation == (1, 1) else None


def _fits(total: Tensor, largest: Tensor, x: Tensor) -> bool:
    tensors = total, largest, x
    if torch.is_grad_enabled() and any(one.requires_grad for one in tensors):
        return False
    if total.dtype != largest.dtype or total.dtype not in (torch.float32, x.dtype):
        return False
    return all(_is_channels_last(one) for one in tensors)


def _is_channels_last(x: Any) -> bool:
    """Return whether memory is of images with the channels last, which the kernels read."""
    if type(x) is not Tensor or x.ndim != 4 or x.dtype not in _DTYPES or transforms_active():
        return False
    # of a single channel, memory may have either order, and PyTorch goes by the strides
    return x.is_cpu and not x.is_neg() and x.is_contiguous(memory_format=torch.channels_last) and x.stride(1) == 1
