"""Spikes as bits: one bit an element instead of two or four bytes.

Bit i of byte j is element 8 j + i of the memory. Packing is a sum of powers of two; on a CPU with a C++ compiler, a
native loop, ten times as fast. Unpacking looks up eight elements at a time in a table of 256 rows, or is native too.
"""

import ctypes
import functools

import torch
from torch import Tensor

from sltt.kernels import native
from sltt.kernels.options import COMPILE_FROM, Kernel


def pack(x: Tensor) -> Tensor:
    """Bits [n/8] of the memory [n] of a dense tensor, whose elements are zero or not; n must be a multiple of 8."""
    bits = torch.empty(x.numel() // 8, dtype=torch.uint8, device=x.device)
    if (library := _library(x)) is None:
        _PACK(bits, x)
    else:
        x = x.resolve_neg()
        library.sltt_pack_bits(x, x.itemsize, bits, len(bits), torch.get_num_threads())
    return bits


def unpack(bits: Tensor, one: float, dtype: torch.dtype) -> Tensor:
    """Flat tensor [n] with `one` where a bit is set, and 0 elsewhere."""
    table = _table(one, dtype, bits.device)
    x = torch.empty(8 * bits.numel(), dtype=dtype, device=bits.device)
    if (library := _library(x)) is None:
        torch.index_select(table, 0, bits.int(), out=x.view(-1, 8))
    else:
        library.sltt_unpack_bits(bits, len(bits), table, x.itemsize, x, torch.get_num_threads())
    return x


def _library(x: Tensor) -> ctypes.CDLL | None:
    """Return the native loops; they are compiled for large layers only, as the neuron step is."""
    if x.device.type != "cpu" or x.itemsize not in (2, 4, 8):
        return None
    return native.library() if x.numel() >= COMPILE_FROM else native.find_loaded()


def _pack(bits: Tensor, x: Tensor) -> None:
    ones = (x != 0).to(torch.uint8).view(-1, 8)  # Triton has no view of bools as bytes
    packed = ones[:, 0].clone()
    for i in range(1, 8):  # TorchInductor makes this one loop, and a sum over a row of eight a slow one
        packed += ones[:, i] << i
    bits.copy_(packed)


_PACK = Kernel(_pack)


@functools.lru_cache(maxsize=64)
def _table(one: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Row b [8] is what the byte b unpacks to."""
    rows = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device) & 1
    return rows.to(dtype) * one
