"""Spikes that autograd saves for the backward take one bit an element instead of two or four bytes.

A neuron tags the memory of its spikes with their bits. While `saving_bits` is open, what an operation saves of tagged
memory is saved as the tag, and restored when its backward asks for it. A tensor is recognised by its memory and by the
version of that memory, never by its values: a tensor that was changed in place after it was tagged is saved as it is. A
tensor loses its tag when `.data` or a NumPy array of it is asked for, since changes through these have no version.

Bit i of byte j is element 8 j + i of the memory. Packing is a sum of powers of two, unpacking looks up eight elements
at a time in a table of 256 rows.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._autograd import _top_saved_tensors_default_hooks  # pyright: ignore
from torch._C._functorch import is_functorch_wrapped_tensor  # pyright: ignore[reportMissingModuleSource, reportMissingImports]
from torch.overrides import TorchFunctionMode

from sltt.kernels.options import Kernel, memory, options

# Fewer elements than this are saved as they are: packing them costs more time than it is worth in memory.
PACK_FROM = 4096
_TAG = "_sltt_tag"


def pack(x: Tensor) -> Tensor:
    """Bits [n/8] of the memory [n] of a dense tensor, whose elements are zero or not; n must be a multiple of 8."""
    bits = torch.empty(x.numel() // 8, dtype=torch.uint8, device=x.device)
    _PACK(bits, x, _powers(x.device))
    return bits


def unpack(bits: Tensor, one: float, dtype: torch.dtype) -> Tensor:
    """Flat tensor [n] with `one` where a bit is set, and 0 elsewhere."""
    return torch.index_select(_table(one, dtype, bits.device), 0, bits.int()).view(-1)


def _pack(bits: Tensor, x: Tensor, powers: Tensor) -> None:
    bits.copy_(((x.view(-1, 8) != 0) * powers).sum(1).to(torch.uint8))  # exact: sums below 256


_PACK = Kernel(_pack)


@functools.cache
def _powers(device: torch.device) -> Tensor:
    return 2.0 ** torch.arange(8, device=device)


@functools.lru_cache(maxsize=64)
def _table(one: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Row b [8] is what the byte b unpacks to."""
    rows = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device) & 1
    return rows.to(dtype) * one


class Tag:
    """How to restore tagged memory.

    Args:
        tensor: whose memory is tagged.
        make: gives a flat tensor of all of that memory.
    """

    def __init__(self, tensor: Tensor, make: Callable[[], Tensor]):
        self.version = tensor._version
        self.dtype = tensor.dtype
        self.make = make
        setattr(tensor.untyped_storage(), _TAG, self)

    def restore(self) -> Tensor:
        """All of the memory, flat."""
        return self.make()


class SpikeTag(Tag):
    """The tag of a neuron's spikes. What a layer's backward restores is kept for the neuron's own, which comes next."""

    def __init__(self, spikes: Tensor):
        bits, dtype = pack(spikes), spikes.dtype
        super().__init__(spikes, lambda: unpack(bits, 1.0, dtype))
        self._restored: Tensor | None = None

    def restore(self) -> Tensor:
        if self._restored is None:
            self._restored = self.make()
        return self._restored

    def take(self) -> Tensor:
        """What `restore` gives, for the last time."""
        restored, self._restored = self.restore(), None
        return restored


def tag_of(tensor: Tensor) -> Tag | None:
    """The tag of a tensor's memory, if there is one and the memory is as it was then."""
    if tensor.layout != torch.strided or tensor.is_meta or is_functorch_wrapped_tensor(tensor):
        return None
    tag = getattr(tensor.untyped_storage(), _TAG, None)
    if tag is None or tag.version != tensor._version or tag.dtype != tensor.dtype or tensor.is_neg():
        return None
    return tag


def packable(tensor: Tensor) -> bool:
    """Whether a tensor is of a kind and size that pays to be packed; it must own the whole of its memory."""
    n = tensor.numel()
    return (
        options().bits
        and n >= PACK_FROM
        and n % 8 == 0
        and tensor.storage_offset() == 0
        and tensor.untyped_storage().nbytes() == n * tensor.element_size()
    )


def tag_dropped(y: Tensor, spikes: Tensor, one: float) -> None:
    """Tag y = spikes times a mask of 0 and `one`, if they are a neuron's: what is left is 0 or `one` too."""
    if isinstance(tag_of(spikes), SpikeTag) and packable(y):  # not of pooled or scaled spikes: those have other levels
        bits, dtype = pack(y), y.dtype
        Tag(y, lambda: unpack(bits, one, dtype))


@contextmanager
def saving_bits() -> Iterator[None]:
    """Inside this block autograd saves tagged tensors as bits; gradients are the same to the last bit.

    Where saved-tensor hooks are active already, such as `save_on_cpu`, they are left in force and nothing is packed.
    """
    if not options().bits or _top_saved_tensors_default_hooks(True) is not None:
        yield
        return
    with torch.autograd.graph.saved_tensors_hooks(_save, _restore), _Levels():
        yield


def _save(tensor: Tensor) -> Any:
    tag = tag_of(tensor)
    if tag is None:
        # autograd does not watch a hook's tensors for changes in place, so remember the version
        return tensor, tensor._version
    return tag, tensor.shape, tensor.stride(), tensor.storage_offset()


def _restore(saved: Any) -> Tensor:
    if isinstance(saved[0], Tag):
        tag, shape, stride, offset = saved
        return tag.restore().as_strided(shape, stride, offset)
    tensor, version = saved
    if tensor._version != version:
        raise RuntimeError(
            f"a tensor {list(tensor.shape)} that the backward needs was changed by an in-place operation "
            f"(version {tensor._version}, expected {version})"
        )
    return tensor


class _Levels(TorchFunctionMode):
    """Tags what stays a few levels: spikes times a number, and average-pooled spikes, which are pooled again."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if torch.compiler.is_compiling():  # inside torch.compile(model), which decides itself what to save
            return result
        if func in _SCALING and len(args) == 2:
            self._scaled(args, result)
        elif func in _POOLING and args:
            self._pooled(func, args, kwargs or {}, result)
        elif func in _ALIASING and tag_of(args[0]) is not None:
            delattr(args[0].untyped_storage(), _TAG)
        return result

    @staticmethod
    def _scaled(args: Any, result: Any) -> None:
        spikes, factor = args if isinstance(args[0], Tensor) else reversed(args)
        if not isinstance(factor, int | float) or (tag := tag_of(spikes)) is None:
            return
        alike = spikes.stride() == result.stride() and spikes.dtype == result.dtype
        if alike and packable(spikes) and packable(result):  # both own all of their memory
            Tag(result, lambda: tag.restore() * factor)

    @staticmethod
    def _pooled(func: Any, args: Any, kwargs: Any, result: Tensor) -> None:
        tag = tag_of(args[0])
        if tag is None or result.dtype != args[0].dtype or not packable(result):  # autocast may change the type
            return
        # nothing here may hold args[0]: the spikes themselves are to go
        shape, stride, offset = args[0].shape, args[0].stride(), args[0].storage_offset()
        rest = args[1:]

        def restore() -> Tensor:
            with torch.no_grad():
                pooled = func(tag.restore().as_strided(shape, stride, offset), *rest, **kwargs)
            return memory(pooled)

        Tag(result, restore)


_ALIASING = {
    vars(torch._C.TensorBase)["data"].__get__,
    torch.Tensor.numpy,
    torch.Tensor.__array__,
    torch.Tensor.__dlpack__,
}
_SCALING = {torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__}
_POOLING = {F.avg_pool2d, F.adaptive_avg_pool2d, F.avg_pool1d, F.adaptive_avg_pool1d}
