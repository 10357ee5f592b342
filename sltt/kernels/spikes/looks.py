"""Spikes are known by their values: a look finds whether all elements of a tensor are 0 or one value, and packs them.

Whoever made the spikes, scaled, pooled or dropped them: nothing is remembered of a tensor that may change. A look reads
the memory once, about 1% of the time of a layer, and ends at the first elements of a tensor that is something else.
"""

import math

import torch
from torch import Tensor

from sltt._torch import is_functorch_wrapped_tensor
from sltt.kernels import native
from sltt.kernels.options import COMPILE_FROM, dense, memory, options
from sltt.kernels.spikes.bits import pack, unpack

# Fewer elements than this are saved as they are: packing them costs more time than it is worth in memory.
PACK_FROM = 4096
# The same for spikes whose graph lives for one time step, which hardly add to the memory.
BITS_FROM = 2**15
BITS = "_sltt_bits"  # the attribute of a storage with the bits that the neuron keeps of it


class Spikes:
    """A tensor of 0 and `one` as bits [n/8], one for each element of its memory; `count` is the number of spikes."""

    __slots__ = ("bits", "count", "dtype", "one", "shape", "stride")

    def __init__(self, x: Tensor, bits: Tensor, one: float, count: int):
        self.bits, self.one, self.count = bits, one, count
        self.dtype, self.shape, self.stride = x.dtype, x.shape, x.stride()

    @property
    def density(self) -> float:
        """Share of the elements that are not 0."""
        return self.count / max(1, 8 * self.bits.numel())

    @property
    def device(self) -> torch.device:
        return self.bits.device

    def dense(self) -> Tensor:
        """Return the tensor again, in memory of its own."""
        return unpack(self.bits, self.one, self.dtype).as_strided(self.shape, self.stride)


def can_pack(x: Tensor) -> bool:
    """Return whether packing a tensor as bits pays, by its kind and size."""
    n = x.numel()
    return (
        n >= PACK_FROM
        and n % 8 == 0
        and options().bits
        and x.is_floating_point()
        and x.layout == torch.strided
        and x.itemsize in (2, 4, 8)
        and not (x.is_meta or x.is_neg() or is_functorch_wrapped_tensor(x))
        and dense(x)
    )


def bits_pay(elements: int) -> bool:
    """Return whether bits pay where a graph lives for one call, by the elements of its largest state."""
    return elements >= BITS_FROM or options().sparse == "on"


def look(x: Tensor) -> Spikes | None:
    """Find the spikes in a tensor on the CPU; return None for other values, or where packing does not pay."""
    if not x.is_cpu or not can_pack(x):
        return None
    n = x.numel()
    library = native.library() if n >= COMPILE_FROM else native.find_loaded()
    if library is None:
        return _look(x)
    bits, found = torch.empty(n // 8, dtype=torch.uint8, device="cpu"), torch.empty(1, dtype=x.dtype, device="cpu")
    addresses = x.data_ptr(), x.itemsize, bits.data_ptr(), n // 8, found.data_ptr()
    count, one = library.sltt_look(*addresses, torch.get_num_threads()), found.item() or 1.0  # which it wrote
    return Spikes(x, _share_bits(x, bits), one, count) if count >= 0 and math.isfinite(one) else None


def _look(x: Tensor) -> Spikes | None:
    """Do as `look`, without native code."""
    flat = memory(x)
    for part in (flat[:256], flat):  # a few elements tell of most tensors that they are something else
        one = part[part.abs().argmax()]
        if not (one.isfinite() and bool(((part == one) | (part == 0)).all())):
            return None
    return Spikes(x, pack(x), one.item() or 1.0, int(flat.count_nonzero()))


def _share_bits(x: Tensor, bits: Tensor) -> Tensor:
    """Return the bits that the neuron keeps, if they are the same."""
    known = getattr(x.untyped_storage(), BITS, None)
    if known is None or len(known) != len(bits):
        return bits
    library = native.find_loaded()
    return known if library and library.sltt_same(known, bits, len(bits)) else bits
