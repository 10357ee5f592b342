"""Tags of memory: how to restore it, and what autograd saves in its place.

A tensor is recognised by its memory and by the version of that memory, never by its values: a tensor that was changed
in place after it was tagged has no tag. A tensor loses its tag when `.data` or a NumPy array of it is asked for, since
changes through these have no version.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sltt._torch import is_functorch_wrapped_tensor
from sltt.kernels.bits import pack, unpack
from sltt.kernels.options import options
from sltt.kernels.sparse import density

# Fewer elements than this are saved as they are: packing them costs more time than it is worth in memory.
PACK_FROM = 4096
# The same for spikes whose graph lives for one time step, which hardly add to the memory.
BITS_FROM = 2**15
TAG = "_sltt_tag"


class Tag:
    """How to restore tagged memory.

    Args:
        tensor: whose memory is tagged.
        make: gives a flat tensor of all of that memory.
        layers: number of convolutions and linear layers that `make` runs.
    """

    def __init__(self, tensor: Tensor, make: Callable[[], Tensor] | None = None, layers: int = 0):
        self.version = tensor._version
        self.dtype = tensor.dtype
        self._make = make
        self.layers = layers
        setattr(tensor.untyped_storage(), TAG, self)

    def make(self) -> Tensor:
        """All of the memory, flat, and nobody else's."""
        assert self._make is not None
        return self._make()

    def restore(self) -> Tensor:
        """All of the memory, flat."""
        return self.make()


class SpikeTag(Tag):
    """The tag of spikes, whose elements are 0 or `one`: they are packed at the first use of their bits.

    `one` is a number, or has a value for each channel and broadcasts to the spikes. What a layer's backward restores is
    kept for the neuron's own, which comes next.
    """

    def __init__(self, spikes: Tensor, one: float | Tensor = 1.0, bits: Tensor | None = None):
        super().__init__(spikes)
        self._one = hold(one)
        self.by_channel = isinstance(one, Tensor)
        self.layout = spikes.shape, spikes.stride()
        self._bits = bits
        self._density: float | None = None
        self._restored: Tensor | None = None

    def bits(self, spikes: Tensor) -> Tensor:
        """One bit for each element of the tagged memory, of which `spikes` is a view."""
        if self._bits is None:
            self._bits = pack(spikes.detach().as_strided(*self.layout, 0))
        return self._bits

    @property
    def one(self) -> float | Tensor:
        """What a spike is worth."""
        return self._one()

    @property
    def packed(self) -> Tensor:
        """The bits, which were asked for before."""
        assert self._bits is not None
        return self._bits

    def density(self, spikes: Tensor) -> float:
        """Share of the elements that are not 0."""
        if self._density is None:
            self._density = density(self.bits(spikes))
        return self._density

    def make(self) -> Tensor:
        one = self.one
        if not isinstance(one, Tensor):
            return unpack(self.packed, one, self.dtype)
        flat = unpack(self.packed, 1.0, self.dtype)
        flat.as_strided(*self.layout).mul_(one.detach())
        return flat

    def restore(self) -> Tensor:
        if self._restored is None:
            self._restored = self.make()
        return self._restored

    def take(self) -> Tensor:
        """What `restore` gives, for the last time."""
        restored, self._restored = self.restore(), None
        return restored

    def release(self) -> None:
        """Drop what was restored."""
        self._restored = None


def tag_of(tensor: Tensor) -> Tag | None:
    """The tag of a tensor's memory, if there is one and the memory is as it was then."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_inference() or is_functorch_wrapped_tensor(tensor):
        return None
    tag = getattr(tensor.untyped_storage(), TAG, None)
    if tag is None or tag.version != tensor._version or tag.dtype != tensor.dtype or tensor.is_neg():
        return None
    return tag


def release(spikes: Tensor) -> None:
    """Drop what the layers behind have restored of `spikes`, where the neuron's own backward is not to come soon."""
    if isinstance(tag := tag_of(spikes), SpikeTag):
        tag.release()


def may_be_read(spikes: Tensor) -> bool:
    """Whether a sparse layer may read spikes like these: there are such layers on a CPU only."""
    return options().sparse != "off" and spikes.device.type == "cpu"


def packable(tensor: Tensor) -> bool:
    """Whether a tensor is of a kind and size that pays to be packed; it must own the whole of its memory."""
    n = tensor.numel()
    return (
        options().bits
        and not tensor.is_inference()  # whose changes have no version
        and n >= PACK_FROM
        and n % 8 == 0
        and tensor.storage_offset() == 0
        and tensor.untyped_storage().nbytes() == n * tensor.element_size()
    )


def bits_pay(elements: int) -> bool:
    """Whether to save spikes as bits if the graph lives for one call, by the elements of its largest state."""
    return elements >= BITS_FROM or options().sparse == "on"


def save(tensor: Tensor) -> Any:
    """What autograd keeps of a tensor: its memory's tag, or the tensor."""
    tag = tag_of(tensor)
    if tag is None:
        # Detached: an operation's own output would hold the operation, which holds what is saved, for ever. Autograd
        # does not watch a hook's tensors for changes in place, so remember the version, which the two share.
        return tensor.detach(), tensor._version
    if isinstance(tag, SpikeTag):
        tag.bits(tensor)
    return tag, tensor.shape, tensor.stride(), tensor.storage_offset()


def restore(saved: Any, keep: bool = True) -> Tensor:
    """The tensor that was saved; `keep` what a tag restores for the next that asks."""
    if isinstance(saved[0], Tag):
        tag, shape, stride, offset = saved
        return (tag.restore() if keep else tag.make()).as_strided(shape, stride, offset)
    tensor, version = saved
    if tensor._version != version:
        raise RuntimeError(
            f"a tensor {list(tensor.shape)} that the backward needs was changed by an in-place operation "
            f"(version {tensor._version}, expected {version})"
        )
    return tensor


def hold(argument: Any) -> Callable[[], Any]:
    """Gives an argument of an operation back; raises RuntimeError for a tensor that was changed since."""
    if not isinstance(argument, Tensor):
        return lambda: argument
    saved = save(argument.detach())
    return lambda: restore(saved, keep=False)
