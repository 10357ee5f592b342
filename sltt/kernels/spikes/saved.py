"""Save less for the backward: what a tensor can be restored from, where that is smaller.

On a CPU spikes are known by their values (`looks`), and saved as bits. On another device, where a look would wait, a
neuron says so: it tags the memory of its spikes. What is computed from spikes, and what was normalised, is tagged with
the operation to run again: pooled spikes; the output of a BatchNorm over several time steps, since a normalisation
saves its input in any case; with `recompute` the outputs of convolutions and linear layers.

A tag is of memory, and of the version of that memory: a tensor that was changed in place after it was tagged has none.
On a CPU a sum of the memory tells most changes that have no version, as through `.data`; one that keeps the sum, such
as another order, is out of reach.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from sltt._torch import _top_saved_tensors_default_hooks, is_functorch_wrapped_tensor
from sltt.kernels.options import memory, options
from sltt.kernels.spikes.bits import unpack
from sltt.kernels.spikes.looks import PACK_FROM, Spikes, look

TAG = "_sltt_tag"  # the attribute of a storage with its tag
COUNT = "_sltt_count"  # and with the number of spikes in it
# A tensor is recomputed from at most so many layers: beyond this, recomputing would take a time that is quadratic in
# the number of layers without a normalisation between them.
LAYERS_AT_MOST = 2


class Tag:
    """A way to restore the memory of a tensor: `make` gives all of it, flat, and runs so many `layers` with weights."""

    def __init__(self, tensor: Tensor, make: Callable[[], Tensor], layers: int = 0):
        self.version, self.dtype = tensor._version, tensor.dtype
        self.make, self.layers = make, layers
        self.total = _total(tensor)
        setattr(tensor.untyped_storage(), TAG, self)


def _total(tensor: Tensor) -> float | None:
    """Return the sum of all of a tensor's memory; None on a device that it would wait for."""
    if not tensor.is_cpu:
        return None
    flat = tensor.detach().new_empty(0)
    flat.set_(tensor.untyped_storage(), 0, (tensor.untyped_storage().nbytes() // flat.element_size(),), (1,))
    return flat.sum(dtype=torch.promote_types(flat.dtype, torch.float32)).item()


def tag_of(tensor: Tensor) -> Tag | None:
    """Return the tag of a tensor's memory, if there is one and the memory is as it was then."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_inference() or is_functorch_wrapped_tensor(tensor):
        return None
    tag = getattr(tensor.untyped_storage(), TAG, None)
    if tag is None or tag.version != tensor._version or tag.dtype != tensor.dtype or tensor.is_neg():
        return None
    return tag


def can_tag(tensor: Tensor) -> bool:
    """Return whether a tensor owns the whole of its memory, and is large enough to be restored."""
    n = tensor.numel()
    return (
        options().bits
        and n >= PACK_FROM
        and not (tensor.is_meta or tensor.is_inference() or is_functorch_wrapped_tensor(tensor))  # without a version
        and tensor.storage_offset() == 0
        and tensor.untyped_storage().nbytes() == n * tensor.element_size()
    )


def tag_spikes(spikes: Tensor, bits: Tensor) -> None:
    """Tag the spikes of a neuron on a device where a look at them would wait."""
    dtype = spikes.dtype
    Tag(spikes, lambda: unpack(bits, 1.0, dtype))


def keep_count(spikes: Tensor, parts: Tensor) -> None:
    """Keep the number of spikes with their memory: `parts` of it [n], which the neuron's kernel counted."""
    if not spikes.is_inference():
        setattr(spikes.untyped_storage(), COUNT, (parts, spikes._version, spikes.numel()))


def known_count(spikes: Tensor) -> Tensor | None:
    """Return parts of the number of spikes, if a kernel counted them and the memory is as it was then."""
    if torch.compiler.is_compiling() or type(spikes) is not Tensor or is_functorch_wrapped_tensor(spikes):
        return None
    parts, *then = getattr(spikes.untyped_storage(), COUNT, (None,))
    return parts if parts is not None and then == [spikes._version, spikes.numel()] else None


def tag_made(
    y: Tensor, x: Tensor, again: Callable[[Tensor], Tensor], layers: int = 0, spikes: Spikes | None = None
) -> None:
    """Tag y = again(x), which is made without a graph where a backward needs it; x is what autograd saves in any case.

    So many `layers` with weights are in it. x is `spikes`, if that is known.
    """
    layers += tag.layers if (tag := tag_of(x)) else 0
    if y.requires_grad and layers <= LAYERS_AT_MOST and can_tag(y) and not is_functorch_wrapped_tensor(x):
        saved: Any = save(x.detach()) if spikes is None else (spikes,)
        stride = y.stride()

        def make() -> Tensor:
            with torch.no_grad():
                made = again(restore(saved))
                same = made.stride() == stride
                return memory(made if same else made.new_empty_strided(made.shape, stride).copy_(made))

        Tag(y, make, layers)


def tag_sum(x: Tensor, seen: deque[Tensor]) -> None:
    """Tag x, which is about to be normalised, if it is the sum of the two tensors that were seen last.

    That is a residual connection: on a CPU the values show it, elsewhere the graph, which does not wait. Those that
    were seen have tags, or are saved in any case: as x is if it gets no tag.
    """
    others = [operand for operand in seen if operand is not x]
    same = [operand for operand in others if operand.shape == x.shape and operand.dtype == x.dtype]
    if tag_of(x) is None and len(same) == 2 and _is_sum(x, *same):
        kept, tag = save(same[1].detach()), tag_of(same[1])
        tag_made(x, same[0], lambda first: first + restore(kept), tag.layers if tag else 0)
    seen.clear()
    seen.extend(others if tag_of(x) else [*others, x])


def _is_sum(x: Tensor, a: Tensor, b: Tensor) -> bool:
    if x.is_cpu:
        return torch.equal(a.detach() + b.detach(), x.detach())
    node: Any = x.grad_fn
    if node is None or node.name() != "AddBackward0" or node._saved_alpha != 1 or x._version:
        return False
    return {*node.next_functions} == {(operand.grad_fn, operand.output_nr) for operand in (a, b)}


@contextmanager
def save_as_bits() -> Iterator[None]:
    """Save spikes as bits inside this block, and tagged tensors as their tags.

    Where other saved-tensor hooks are in force, such as `save_on_cpu`, they stay in force.
    """
    on = options().bits and _top_saved_tensors_default_hooks(True) is None
    with torch.autograd.graph.saved_tensors_hooks(save, restore) if on else nullcontext():
        yield


def others_save() -> bool:
    """Return whether saved-tensor hooks of others are in force."""
    hooks = _top_saved_tensors_default_hooks(True)
    return hooks is not None and hooks[0] is not save


def save(tensor: Tensor) -> Any:
    """Return what autograd keeps of a tensor: its tag, its bits, or itself."""
    if torch.compiler.is_compiling():  # the compiler decides what to save
        return tensor
    if (tag := tag_of(tensor)) is not None and tag.total == _total(tensor):
        return tag, tensor.shape, tensor.stride(), tensor.storage_offset()
    if not (tensor.is_leaf and tensor.requires_grad) and (spikes := look(tensor.detach())) is not None:
        return (spikes,)
    # Detached: an operation's own output would hold the operation, which holds what is saved, for ever. Autograd does
    # not watch a hook's tensors for changes in place, so remember the version, which the two share.
    return tensor.detach(), tensor._version


def restore(saved: Any) -> Tensor:
    """Return the tensor that was saved."""
    if isinstance(saved, Tensor):
        return saved
    if isinstance(saved[0], Spikes):
        return saved[0].dense()
    if isinstance(saved[0], Tag):
        tag, shape, stride, offset = saved
        return tag.make().as_strided(shape, stride, offset)
    tensor, version = saved
    if not tensor.is_inference() and tensor._version != version:
        raise RuntimeError(
            f"a tensor {list(tensor.shape)} that the backward needs was changed by an in-place operation "
            f"(version {tensor._version}, expected {version})"
        )
    return tensor
