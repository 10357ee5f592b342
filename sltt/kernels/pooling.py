"""Max pooling of a sum over time in native code: one pass that adds to the sum, pools it, and subtracts.

It runs in steps without a graph, on a CPU, for images of float32 or bfloat16 with the channels last in memory, and
gives the bits of the operations.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sltt._torch import transforms_active
from sltt.kernels.native import library_for
from sltt.sequence.hooks import own_forward


class _Pooling(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int64) for name in ("n", "h", "w", "channels", "kh", "kw", "oh", "ow"))


def running_max(
    pool: Callable[[Tensor], Tensor], total: Tensor, largest: Tensor, x: Tensor
) -> tuple[Tensor, Tensor, Tensor] | None:
    """total + x, its pooling, and what that gains over `largest`, in x's type; None where the kernel cannot.

    Args:
        pool: the pooling.
        total: sum of the inputs before, [B, C, H, W].
        largest: pooling of `total`.
        x: input, [B, C, H, W].
    """
    if torch.compiler.is_compiling() or (size := _windows(pool)) is None or not _fits(total, largest, x):
        return None
    if (library := library_for(x.numel())) is None:
        return None
    (n, channels, h, w), (kh, kw) = x.shape, size
    if h < kh or w < kw:
        return None
    pooling = ctypes.byref(_Pooling(n, h, w, channels, kh, kw, h // kh, w // kw))
    summed = torch.empty_like(x, dtype=torch.float32)
    most = torch.empty_like(largest, dtype=torch.float32)
    gained = torch.empty_like(largest, dtype=x.dtype)
    half, half_total = (one.dtype == torch.bfloat16 for one in (x, total))
    library.sltt_running_max(
        pooling, half, half_total, x, total, largest, summed, most, gained, torch.get_num_threads()
    )
    return summed, most, gained


def _windows(pool: Any) -> tuple[int, int] | None:
    """Height and width of a pooling whose windows lie side by side."""
    if not isinstance(pool, nn.MaxPool2d) or own_forward(pool, nn.MaxPool2d):
        return None
    if pool.return_indices or pool.ceil_mode or pool._forward_hooks or pool._forward_pre_hooks:
        return None
    size, stride, padding, dilation = (
        (one, one) if isinstance(one, int) else (one[0], one[1])
        for one in (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
    )
    return size if size == stride and padding == (0, 0) and dilation == (1, 1) else None


def _fits(total: Tensor, largest: Tensor, x: Tensor) -> bool:
    tensors = total, largest, x
    if torch.is_grad_enabled() and any(one.requires_grad for one in tensors):
        return False
    if x.dtype not in (torch.float32, torch.bfloat16) or total.dtype != largest.dtype:
        return False
    if total.dtype not in (torch.float32, x.dtype) or transforms_active():
        return False
    return x.ndim == 4 and all(_plain(one) for one in tensors)


def _plain(x: Tensor) -> bool:
    return type(x) is Tensor and x.is_cpu and not x.is_neg() and x.is_contiguous(memory_format=torch.channels_last)
