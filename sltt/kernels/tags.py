"""What autograd saves for the backward is replaced by what it can be restored from, where that is smaller.

A neuron tags the memory of its spikes with their bits. While `saving` is open, what an operation saves of tagged memory
is saved as the tag, and restored when its backward asks for it. What is computed from tagged memory may be tagged in
turn, with the operation to run again: spikes times a number and pooled spikes; what was normalised, since a
normalisation saves its input in any case; and with `recompute` the outputs of convolutions and linear layers and their
sums, so that a normalisation after them saves nothing.

A tensor is recognised by its memory and by the version of that memory, never by its values: a tensor that was changed
in place after it was tagged is saved as it is. A tensor loses its tag when `.data` or a NumPy array of it is asked for,
since changes through these have no version.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from sltt._torch import _to_dlpack, _top_saved_tensors_default_hooks, is_functorch_wrapped_tensor
from sltt.kernels.bits import pack, unpack
from sltt.kernels.options import memory, options

# Fewer elements than this are saved as they are: packing them costs more time than it is worth in memory.
PACK_FROM = 4096
# A tensor is recomputed from at most so many layers. A chain of residual blocks is a sum that grows: beyond this, one
# of its terms is saved, or the recomputing would take a time that is quadratic in the number of blocks.
LAYERS_AT_MOST = 2
_TAG = "_sltt_tag"


class Tag:
    """How to restore tagged memory.

    Args:
        tensor: whose memory is tagged.
        make: gives a flat tensor of all of that memory.
        layers: number of convolutions and linear layers that `make` runs.
    """

    def __init__(self, tensor: Tensor, make: Callable[[], Tensor], layers: int = 0):
        self.version = tensor._version
        self.dtype = tensor.dtype
        self.make = make
        self.layers = layers
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

    def release(self) -> None:
        """Drop what was restored."""
        self._restored = None


def tag_of(tensor: Tensor) -> Tag | None:
    """The tag of a tensor's memory, if there is one and the memory is as it was then."""
    if tensor.layout != torch.strided or tensor.is_meta or is_functorch_wrapped_tensor(tensor):
        return None
    tag = getattr(tensor.untyped_storage(), _TAG, None)
    if tag is None or tag.version != tensor._version or tag.dtype != tensor.dtype or tensor.is_neg():
        return None
    return tag


def release(spikes: Tensor) -> None:
    """Drop what the layers behind have restored of `spikes`, where the neuron's own backward is not to come soon."""
    if isinstance(tag := tag_of(spikes), SpikeTag):
        tag.release()


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


def tag_normalised(y: Tensor, x: Tensor, again: Callable[[Tensor], Tensor]) -> None:
    """Tag y = again(x), where the graph of y saves x in any case."""
    if y.requires_grad and packable(y) and x.stride() == y.stride() and not is_functorch_wrapped_tensor(x):
        held = _held(x)
        Tag(y, lambda: memory(again(held())), tag.layers if (tag := tag_of(x)) else 0)


@contextmanager
def saving(recompute: bool = False) -> Iterator[None]:
    """Inside this block autograd saves tags for tagged tensors; gradients are the same to the last bit.

    Where saved-tensor hooks are active already, such as `save_on_cpu`, they are left in force and nothing is tagged.

    Args:
        recompute: tag the outputs of convolutions and linear layers too: the backward runs them once more.
    """
    if recompute and not options().bits:
        raise ValueError("recompute starts from spikes saved as bits, and kernels.using(bits=False) is in force")
    if not options().bits or _top_saved_tensors_default_hooks(True) is not None:
        yield
        return
    with torch.autograd.graph.saved_tensors_hooks(_save, _restore), _Tagging(recompute):
        yield


def _save(tensor: Tensor) -> Any:
    tag = tag_of(tensor)
    if tag is None:
        # Detached: an operation's own output would hold the operation, which holds what is saved, for ever. Autograd
        # does not watch a hook's tensors for changes in place, so remember the version, which the two share.
        return tensor.detach(), tensor._version
    return tag, tensor.shape, tensor.stride(), tensor.storage_offset()


def _restore(saved: Any, keep: bool = True) -> Tensor:
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


class _Tagging(TorchFunctionMode):
    """Tags what operations compute from tagged memory."""

    def __init__(self, recompute: bool):
        super().__init__()
        self.recompute = recompute

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if torch.compiler.is_compiling():  # inside torch.compile(model), which decides itself what to save
            return result
        if func in _SCALING and len(args) == 2:
            _tag_scaled(args, result)
        elif func in _POOLING and args:
            _tag_pooled(func, args, kwargs, result)
        elif self.recompute and func in _LAYERS and args:
            _tag_layer(func, args, kwargs, result)
        elif self.recompute and func in _ADDING and len(args) == 2 and not kwargs:
            _tag_sum(args, result)
        elif func in _ALIASING:
            for tensor in args:
                if isinstance(tensor, Tensor) and not is_lazy(tensor) and tag_of(tensor) is not None:
                    delattr(tensor.untyped_storage(), _TAG)
        return result


def _tag_scaled(args: Any, result: Any) -> None:
    spikes, factor = args if isinstance(args[0], Tensor) else reversed(args)
    if not isinstance(factor, int | float) or (tag := tag_of(spikes)) is None:
        return
    if _alike(spikes, result) and packable(spikes) and packable(result):  # both own all of their memory
        Tag(result, lambda: tag.make() * factor, tag.layers)


def _tag_pooled(func: Any, args: Any, kwargs: Any, result: Tensor) -> None:
    if (tag := tag_of(args[0])) is not None and packable(result):
        Tag(result, _again(func, args, kwargs, result), tag.layers)


def _tag_layer(func: Any, args: Any, kwargs: Any, result: Tensor) -> None:
    """Tag what a layer gives, to be computed once more from its input, which the layer saves in any case."""
    layers = 1 + (tag.layers if (tag := tag_of(args[0])) else 0)
    if layers <= LAYERS_AT_MOST and packable(result):
        Tag(result, _again(func, args, kwargs, result), layers)


def _tag_sum(args: Any, result: Any) -> None:
    """Tag a sum of which a term is recomputed; another term is held as it is, in place of the sum."""
    if not all(isinstance(a, Tensor) and _alike(a, result) and packable(a) for a in (*args, result)):
        return
    tags = [tag_of(a) for a in args]
    layers = sum(tag.layers for tag in tags if tag)
    if not 0 < layers <= LAYERS_AT_MOST:
        return
    tagged, other = args if tags[0] else reversed(args)
    first, second = _held(tagged), _held(other)
    Tag(result, lambda: memory(first().add_(second())), layers)  # what is restored from a tag is nobody else's


def _again(func: Any, args: Any, kwargs: Any, result: Tensor) -> Callable[[], Tensor]:
    """Runs an operation again, in the form that gave `result`. Holds what autograd would save, and nothing else."""
    held = [_held(a) for a in args]
    named = {name: _held(a) for name, a in kwargs.items()}
    stride, device = result.stride(), result.device.type
    # without its cache: what is cast without a graph must not be used by layers with one
    cast: dict[str, Any] = {
        "dtype": torch.get_autocast_dtype(device),
        "enabled": torch.is_autocast_enabled(device),
        "cache_enabled": False,
    }

    def make() -> Tensor:
        with torch.no_grad(), torch.autocast(device, **cast):
            y = func(*(a() for a in held), **{name: a() for name, a in named.items()})
        if y.stride() != stride:
            y = torch.empty_strided(y.shape, stride, dtype=y.dtype, device=y.device).copy_(y)
        return memory(y)

    return make


def _held(argument: Any) -> Callable[[], Any]:
    """Gives an argument of an operation back; raises RuntimeError for a tensor that was changed since."""
    if not isinstance(argument, Tensor):
        return lambda: argument
    saved = _save(argument.detach())
    return lambda: _restore(saved, keep=False)


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


_ALIASING = {
    vars(torch._C.TensorBase)["data"].__get__,
    torch.Tensor.numpy,
    torch.Tensor.__array__,
    torch.Tensor.__dlpack__,
    torch.Tensor.set_,
    _to_dlpack,
}
_SCALING = {torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__}
_POOLING = {F.avg_pool2d, F.adaptive_avg_pool2d, F.avg_pool1d, F.adaptive_avg_pool1d}
_LAYERS = {F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, F.linear}
_ADDING = {torch.add, torch.Tensor.add, torch.Tensor.__add__}
