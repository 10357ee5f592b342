"""Spikes as bits: one bit an element instead of two or four bytes.

Bit i of byte j is element 8 j + i of the memory. Packing is a sum of powers of two, unpacking looks up eight elements
at a time in a table of 256 rows.
"""

import functools

import torch
from torch import Tensor

from sltt.kernels.options import Kernel


def pack(x: Tensor) -> Tensor:
    """Bits [n/8] of the memory [n] of a dense tensor, whose elements are zero or not; n must be a multiple of 8."""
    bits = torch.empty(x.numel() // 8, dtype=torch.uint8, device=x.device)
    _PACK(bits, x)
    return bits


def unpack(bits: Tensor, one: float, dtype: torch.dtype) -> Tensor:
    """Flat tensor [n] with `one` where a bit is set, and 0 elsewhere."""
    return torch.index_select(_table(one, dtype, bits.device), 0, bits.int()).view(-1)


def _pack(bits: Tensor, x: Tensor) -> None:
    ones = (x != 0).view(torch.uint8).view(-1, 8)
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
