"""What autograd saves for the backward is replaced by what it can be restored from, where that is smaller.

A neuron tags the memory of its spikes with their bits. While `saving` is open, what an operation saves of tagged memory
is saved as the tag, and restored when its backward asks for it. What is computed from tagged memory may be tagged in
turn, with the operation to run again: spikes times a number and pooled spikes; what was normalised, since a
normalisation saves its input in any case; and with `recompute` the outputs of convolutions and linear layers and their
sums, so that a normalisation after them saves nothing, unless recomputing them takes much time for little memory.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from sltt._torch import TensorBase, _to_dlpack, _top_saved_tensors_default_hooks, is_functorch_wrapped_tensor
from sltt.kernels.deferred import Normalised, deferred_norm
from sltt.kernels.layers import LAYERS, Call, layer_call, run
from sltt.kernels.options import memory, options
from sltt.kernels.pooling import max_pool
from sltt.kernels.restoring import TAG, SpikeTag, Tag, hold, packable, restore, save, tag_of
from sltt.kernels.values import arguments_of, run_on_values
from sltt.kernels.weights import Weights

# A tensor is recomputed from at most so many layers. A chain of residual blocks is a sum that grows: beyond this, one
# of its terms is saved, or the recomputing would take a time that is quadratic in the number of blocks.
LAYERS_AT_MOST = 2
# A layer of more products for each of its outputs keeps them. These are the last layers of a network: they take as much
# time as the first ones, and have few outputs.
PRODUCTS_AT_MOST = 2048


def tag_dropped(y: Tensor, spikes: Tensor, one: float) -> None:
    """Tag y = spikes times a mask of 0 and `one`, if they are a neuron's: what is left is 0 or `one` too."""
    tag = tag_of(spikes)
    if isinstance(tag, SpikeTag) and not tag.by_channel and tag.one == 1.0 and packable(y):
        SpikeTag(y, one)


def tag_normalised(y: Tensor, x: Tensor, again: Callable[[Tensor], Tensor]) -> None:
    """Tag y = again(x), where the graph of y saves x in any case."""
    if y.requires_grad and packable(y) and x.stride() == y.stride() and not is_functorch_wrapped_tensor(x):
        held = hold(x)
        Tag(y, lambda: memory(again(held())), tag.layers if (tag := tag_of(x)) else 0)


@contextmanager
def saving(recompute: bool = False, graph: bool = True, weights: Weights | None = None) -> Iterator[None]:
    """Inside this block layers that read spikes may be sparse, and autograd saves tags for tagged tensors.

    Where other saved-tensor hooks are active, such as `save_on_cpu` or those of a checkpoint within the network, they
    are left in force, nothing is tagged, and no layer is sparse.

    Args:
        recompute: tag the outputs of convolutions and linear layers too: the backward runs them once more.
        graph: a graph is built, for which autograd saves tensors.
        weights: the forms of weights that this sequence has used so far.
    """
    if recompute and not options().bits:
        raise ValueError(
            "recompute starts from spikes saved as bits, and kernels.using(bits=False) is in force: leave one out"
        )
    if not options().bits or _top_saved_tensors_default_hooks(True) is not None:
        yield
        return
    hooks = torch.autograd.graph.saved_tensors_hooks(save, restore) if graph else nullcontext()
    with hooks, _Tagging(recompute, weights or Weights()):
        yield


class _Tagging(TorchFunctionMode):
    """Runs layers on spikes, and tags what operations compute from tagged memory."""

    def __init__(self, recompute: bool, weights: Weights):
        super().__init__()
        self.recompute = recompute
        self.weights = weights
        self._waiting: Normalised | None = None  # the last one

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # inside torch.compile(model), the compiler decides itself what to save; most other calls ask for an attribute
        if torch.compiler.is_compiling():
            return func(*args, **kwargs)
        if self._waiting is not None and getattr(func, "__name__", "") != "__get__":  # which asks for an attribute
            self._settle()
        if func not in _KNOWN:
            return func(*args, **kwargs)
        if func not in _ALIASING and _others_save():
            return run_on_values(func, args, kwargs, self.weights)  # which saves what PyTorch's layers save
        if func is F.batch_norm and (waiting := deferred_norm(*args, **kwargs)) is not None:
            self._waiting = waiting.normalised
            return waiting
        if func in LAYERS and (found := layer_call(func, args, kwargs, self.weights)):
            return self._run(*found)
        pools = func is F.max_pool2d
        result = max_pool(*args, **kwargs) if pools else run_on_values(func, args, kwargs, self.weights)
        if func in _SCALING and len(args) == 2:
            _tag_scaled(args, result)
        elif func in _POOLING and args:
            _tag_pooled(func, args, kwargs, result)
        elif func in _MAX_POOLING and args and isinstance(result, Tensor):  # not with its indices
            _tag_maximum(func, args[0], result)
        elif self.recompute and func in _LAYERS and args:
            _tag_layer(func, args, kwargs, result)
        elif self.recompute and func in _ADDING and len(args) == 2 and not kwargs:
            _tag_sum(args, result)
        elif func in _ALIASING:
            for tensor in args:
                if isinstance(tensor, Tensor) and not is_lazy(tensor) and tag_of(tensor) is not None:
                    delattr(tensor.untyped_storage(), TAG)
        return result

    def _settle(self) -> None:
        """Normalise what no neuron has taken, before another operation may change its input."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None and not waiting.taken:
            _ = waiting.value

    def _run(self, call: Call, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        result = run(call, x, weight, bias)
        if self.recompute and packable(result) and _recomputes(weight):
            held, held_bias = hold(weight), hold(bias)

            def again() -> Tensor:
                with torch.no_grad():
                    return memory(call.forward(None, held(), held_bias()))

            Tag(result, again, layers=1)
        return result


def _others_save() -> bool:
    """Whether hooks of others are in force. A checkpoint runs layers again without us, and compares what they save."""
    hooks = _top_saved_tensors_default_hooks(True)
    return hooks is not None and hooks[0] is not save


def _tag_scaled(args: Any, result: Any) -> None:
    spikes, factor = args if isinstance(args[0], Tensor) and tag_of(args[0]) else reversed(args)
    if not isinstance(spikes, Tensor) or (tag := tag_of(spikes)) is None:
        return
    if not (_alike(spikes, result) and packable(spikes) and packable(result)):  # both own all of their memory
        return
    if isinstance(factor, Tensor) and factor.ndim:
        _tag_scaled_by_channel(tag, spikes, factor, result)
        return
    if isinstance(factor, Tensor) and not (factor.is_cuda or factor.requires_grad):
        factor = factor.item()  # as of a threshold that balances a layer
    if not isinstance(factor, int | float) or not math.isfinite(factor):
        return
    if isinstance(tag, SpikeTag) and not tag.by_channel:
        one = torch.tensor(tag.one, dtype=tag.dtype) * factor  # rounded as the product is
        SpikeTag(result, one.item(), tag.bits(spikes))
    else:
        if isinstance(tag, SpikeTag):
            tag.bits(spikes)  # which it is made of
        Tag(result, lambda: tag.make() * factor, tag.layers)


def _tag_scaled_by_channel(tag: Tag, spikes: Tensor, factor: Tensor, result: Tensor) -> None:
    """Spikes times a value for each channel, as of thresholds that balance channels."""
    of_channels = max(factor.shape) == factor.numel() < result.numel() and not is_functorch_wrapped_tensor(factor)
    if of_channels and isinstance(tag, SpikeTag) and not tag.by_channel and tag.one == 1.0:
        SpikeTag(result, factor, tag.bits(spikes))


def _tag_maximum(func: Any, spikes: Tensor, result: Tensor) -> None:
    """The maximum of spikes is a spike, where all that are pooled are worth the same."""
    if isinstance(tag := tag_of(spikes), SpikeTag) and packable(result):
        pooled = 1 if func in (F.max_pool1d, F.adaptive_max_pool1d) else 2
        # of spikes worth a value for each channel: not of a view, whose channels are elsewhere
        whole = (spikes.shape, spikes.stride()) == tag.layout
        if not isinstance(one := tag.one, Tensor) or (whole and math.prod(one.shape[-pooled:]) == 1):
            SpikeTag(result, one)


def _tag_pooled(func: Any, args: Any, kwargs: Any, result: Tensor) -> None:
    if (tag := tag_of(args[0])) is not None and packable(result):
        Tag(result, _again(func, args, kwargs, result), tag.layers)


def _tag_layer(func: Any, args: Any, kwargs: Any, result: Tensor) -> None:
    """Tag what a layer gives, to be computed once more from its input, which the layer saves in any case."""
    layers = 1 + (tag.layers if (tag := tag_of(args[0])) else 0)
    if layers <= LAYERS_AT_MOST and packable(result) and _recomputes(arguments_of(func, args, kwargs)["weight"]):
        Tag(result, _again(func, args, kwargs, result), layers)


def _recomputes(weight: Tensor) -> bool:
    """Whether recomputing the outputs of a layer of this weight saves more in memory than it costs in time."""
    return math.prod(weight.shape[1:]) <= PRODUCTS_AT_MOST


def _tag_sum(args: Any, result: Any) -> None:
    """Tag a sum of which a term is recomputed; another term is held as it is, in place of the sum."""
    if not all(isinstance(a, Tensor) and _alike(a, result) and packable(a) for a in (*args, result)):
        return
    tags = [tag_of(a) for a in args]
    layers = sum(tag.layers for tag in tags if tag)
    if not 0 < layers <= LAYERS_AT_MOST:
        return
    tagged, other = args if tags[0] else reversed(args)
    first, second = hold(tagged), hold(other)
    Tag(result, lambda: memory(first().add_(second())), layers)  # what is restored from a tag is nobody else's


def _again(func: Any, args: Any, kwargs: Any, result: Tensor) -> Callable[[], Tensor]:
    """Runs an operation again, in the form that gave `result`. Holds what autograd would save, and nothing else."""
    held = [hold(a) for a in args]
    named = {name: hold(a) for name, a in kwargs.items()}
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


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


_ALIASING = {
    vars(TensorBase)["data"].__get__,
    torch.Tensor.numpy,
    torch.Tensor.__array__,
    torch.Tensor.__dlpack__,
    torch.Tensor.set_,
    _to_dlpack,
}
_SCALING = {torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__}
_POOLING = {F.avg_pool2d, F.adaptive_avg_pool2d, F.avg_pool1d, F.adaptive_avg_pool1d}
_MAX_POOLING = {F.max_pool1d, F.max_pool2d, F.adaptive_max_pool1d, F.adaptive_max_pool2d}
_LAYERS = {F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, F.linear}
_ADDING = {torch.add, torch.Tensor.add, torch.Tensor.__add__}
_KNOWN = {F.batch_norm, *LAYERS, *_LAYERS, *_SCALING, *_POOLING, *_MAX_POOLING, *_ADDING, *_ALIASING}
