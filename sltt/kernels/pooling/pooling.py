"""Max pooling in native code, also of a sum over time: one pass that adds to the sum, pools it, and subtracts.

It runs on a CPU, for images of float32 or bfloat16 with the channels last in memory and windows side by side, and gives
the bits of the operations. For the gradient it keeps a byte for each maximum, and no input. A sum over time is pooled
natively in steps without a graph.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sltt._torch import transforms_active
from sltt.kernels.derivatives import differentiable_once
from sltt.kernels.native import library_for

_DTYPES = (torch.float32, torch.bfloat16)
_POSITIONS = 256  # in a window, at most: a byte tells them apart


class _Windows(ctypes.Structure):
    """Windows of kh × kw pixels, side by side: oh × ow of them in an image of h × w pixels."""

    _fields_ = tuple((name, ctypes.c_int64) for name in ("n", "h", "w", "channels", "kh", "kw", "oh", "ow"))


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, library: ctypes.CDLL, windows: _Windows) -> Tensor:  # type: ignore[override]
        ctx.library, ctx.windows = library, windows
        positions = _empty(windows.n, windows.channels, windows.oh, windows.ow, dtype=torch.uint8)
        ctx.save_for_backward(positions)
        return _maxima(x, library, windows, positions)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (positions,), z = ctx.saved_tensors, ctx.windows
        grad = grad.resolve_neg().contiguous(memory_format=torch.channels_last)
        out = _empty(z.n, z.channels, z.h, z.w, dtype=grad.dtype)
        half, threads = grad.dtype == torch.bfloat16, torch.get_num_threads()
        ctx.library.sltt_max_pool_gradient(ctypes.byref(z), half, grad, positions, out, threads)
        return out, None, None


def _maxima(x: Tensor, library: ctypes.CDLL, windows: _Windows, positions: Tensor | None) -> Tensor:
    """Return the maximum of each window; write its position in the window, if asked for."""
    y = _empty(windows.n, windows.channels, windows.oh, windows.ow, dtype=x.dtype)
    half, threads = x.dtype == torch.bfloat16, torch.get_num_threads()
    library.sltt_max_pool(ctypes.byref(windows), half, x, y, positions, threads)
    return y


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cpu", memory_format=torch.channels_last)


def max_pool(pool: nn.MaxPool1d | nn.MaxPool2d, x: Tensor) -> Tensor | None:
    """Return the output of a max pooling; None where it does not run natively."""
    signals = isinstance(pool, nn.MaxPool1d) and x.ndim == 3
    x = x.unsqueeze(2) if signals else x  # as images of one row
    if (native := _native_form(pool, x)) is None:
        return None
    trained = torch.is_grad_enabled() and x.requires_grad
    y: Any = _MaxPool.apply(x, *native) if trained else _maxima(x, *native, None)
    return y.squeeze(2) if signals else y


def running_max(
    pool: Callable[[Tensor], Tensor], total: Tensor, largest: Tensor, x: Tensor
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return total + x, its pooling, and what that gains over `largest`, in x's type; None where the kernel cannot.

    `total` is the sum of the inputs before, [B, C, H, W], and `largest` its pooling.
    """
    if torch.compiler.is_compiling() or not _fits(total, largest, x) or (native := _native_form(pool, x)) is None:
        return None
    library, windows = native
    summed = torch.empty_like(x, dtype=torch.float32)
    most = torch.empty_like(largest, dtype=torch.float32)
    gained = torch.empty_like(largest, dtype=x.dtype)
    half, half_total = (tensor.dtype == torch.bfloat16 for tensor in (x, total))
    library.sltt_running_max(
        ctypes.byref(windows), half, half_total, x, total, largest, summed, most, gained, torch.get_num_threads()
    )
    return summed, most, gained


def _native_form(pool: Any, x: Tensor) -> tuple[ctypes.CDLL, _Windows] | None:
    """Return the kernels and the windows of a pooling; None where windows do not lie side by side in native images."""
    axes = 1 if isinstance(pool, nn.MaxPool1d) else 2
    supported = axes == 1 or isinstance(pool, nn.MaxPool2d)
    if not supported or pool.return_indices or pool.ceil_mode or not _is_channels_last(x):
        return None
    settings = pool.kernel_size, pool.stride, pool.padding, pool.dilation
    size, stride, padding, dilation = ((s,) * axes if isinstance(s, int) else s for s in settings)
    if not isinstance(size, tuple) or (size, padding, dilation) != (stride, (0,) * axes, (1,) * axes):
        return None
    if len(size) != axes:
        return None
    (n, channels, h, w), (kh, kw) = x.shape, (1, *size)[-2:]
    if not (1 <= kh <= h and 1 <= kw <= w and kh * kw <= _POSITIONS and x.numel()):
        return None
    library = library_for(x.numel())
    return None if library is None else (library, _Windows(n, h, w, channels, kh, kw, h // kh, w // kw))


def _fits(total: Tensor, largest: Tensor, x: Tensor) -> bool:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (total, largest, x)):
        return False
    if total.dtype != largest.dtype or total.dtype not in (torch.float32, x.dtype):
        return False
    return _is_channels_last(total) and _is_channels_last(largest)


def _is_channels_last(x: Any) -> bool:
    """Return whether memory is of images with the channels last, which the kernels read."""
    if type(x) is not Tensor or x.ndim != 4 or x.dtype not in _DTYPES or transforms_active():
        return False
    # of a single channel, memory may have either order, and PyTorch goes by the strides
    return x.is_cpu and not x.is_neg() and x.is_contiguous(memory_format=torch.channels_last) and x.stride(1) == 1
