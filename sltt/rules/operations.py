"""The operations of a forward show that it treats its samples alike, so that time steps may stand beside each other.

A batch runs once; each operation that is called must be one that leaves samples apart, by its name and its arguments:
elementwise, a layer with weights, a sum over other dimensions than the first, and the like. So a forward of the user's
own is known as far as it ran. Of one that reads a value, draws a number, changes a weight, or does what is not in the
list, nothing is known.
"""

import random
import weakref
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sltt import kernels
from sltt._torch import DispatchMode, tree_leaves, unwrapped
from sltt.rules.fold_trial import is_dropout
from sltt.sequence.hooks import without_marked_hooks
from sltt.sequence.layout import Layer, layout_of
from sltt.sequence.proof import is_proved
from sltt.sequence.reach import graph_nodes
from sltt.sequence.run import Run
from sltt.sequence.step import NEURON, Step
from sltt.sequence.steps import Sequence, channels_last

_ALIKE = "alias clone contiguous detach lift_fresh _to_copy _unsafe_view view reshape _reshape_alias"
_BY_DIM = (  # of the first sample's dimensions on
    "_log_softmax _softmax amax amin argmax argmin cumsum flip logsumexp max mean min "
    "permute roll select slice softmax split split_with_sizes squeeze sum transpose unbind unsqueeze var std cat stack"
)
# the argument with samples; all others are weights
_WEIGHTED = {"addmm": 1, "convolution": 0, "embedding": 1, "linear": 0, "mm": 0}
_POOLS = "avg_pool max_pool adaptive_avg_pool adaptive_max_pool _adaptive_avg_pool upsample pixel_shuffle im2col"
_PAIRED = "bmm baddbmm _scaled_dot_product"
_KEEPS = {*_ALIKE.split(), *_BY_DIM.split(), "native_layer_norm", "native_group_norm"}
_SIZED = {*_ALIKE.split(), "as_strided", "native_group_norm"}  # whose whole numbers are of the batch


class UnknownError(Exception):
    """An operation of which it is not known that it leaves samples apart."""


class SamplesWatch(DispatchMode):
    """Sees that the operations in its block leave samples apart; raises UnknownError for another.

    Weights and buffers are `constants`, which are the same for all samples.
    """

    def __init__(self, x: Tensor, constants: Iterable[Tensor]):
        super().__init__()
        self.batch = len(x)
        self.ours = False  # within a layer that is known
        self.samples = {id(x): x}  # which keeps the id its own
        self._constants = {id(t): t for t in constants}
        self.called: list[Any] = []  # operations, the weights and numbers that they read, the shapes of constants
        self.reads: Counter[int] = Counter()  # of tensors

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        result = func(*args, **kwargs)
        self.reads.update(map(id, tensors))
        if self.ours:
            return result
        unknown = torch.Tag.data_dependent_output, torch.Tag.nondeterministic_seeded
        if any(tag in func.tags for tag in unknown) or kernels.others_save():  # a checkpoint runs layers again
            raise UnknownError(f"calls {func}")
        name, results = func._opname.removesuffix("_"), [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        numbers = [v for v in tree_leaves((args, kwargs)) if isinstance(v, float if name in _SIZED else int | float)]
        fixed = not any(id(t) in self.samples for t in tensors)
        shapes = [t.shape for t in results if fixed]
        self.called.append((func, [id(t) for t in tensors if isinstance(t, nn.Parameter)], numbers, shapes))
        if fixed:
            if func._schema.is_mutable or not all(id(t) in self._constants for t in tensors):
                raise UnknownError(f"calls {func} on what is not its input")
            kept = self._constants
        elif self._is_alike(func, name, args, kwargs, tensors, results):
            kept = self.samples
        else:
            raise UnknownError(f"calls {func}, which may mix samples")
        kept.update((id(t), t) for t in results)
        return result

    def require(self, *args: Any, **kwargs: Any) -> None:
        """Raise UnknownError unless a layer that tells time steps apart reads samples."""
        if not all(id(t) in self.samples for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)):
            raise UnknownError("calls a layer that tells time steps apart on what is not its input")

    def add(self, result: Any) -> None:
        """Note what a layer that is known gives."""
        self.samples.update((id(t), t) for t in tree_leaves(result) if isinstance(t, Tensor))

    def _is_alike(self, func: Any, name: str, args: Any, kwargs: Any, tensors: Any, results: Any) -> bool:
        """Return whether each sample of the results is of this sample alone; samples are in the first dimension."""
        samples = [t for t in tensors if id(t) in self.samples]
        rows, first = {len(t) if t.ndim else 0 for t in samples}, samples[0]
        if any(not t.ndim or len(t) % self.batch or not len(t) for t in results) or 0 in rows:
            return False
        if id(args[0]) not in self.samples and func._schema.is_mutable:
            return False
        if torch.Tag.pointwise in func.tags or name in ("where", "copy", "fill", "masked_fill"):
            return rows == {len(results[0])} and all(self._broadcasts(t, results[0]) for t in tensors)
        if name in _WEIGHTED:
            at = _WEIGHTED[name]
            if name == "embedding" and any(args[3:4]):  # its gradient counts the rows that all samples read
                return False
            return len(samples) == 1 and first is args[at] and len(results[0]) == len(first) and first.ndim > 1
        if name.startswith(tuple(_PAIRED.split())):
            return len(rows) == 1 and all(t.ndim > 2 and self._broadcasts(t, first) for t in tensors)
        if len(rows) > 1 or len(samples) < len(tensors) - (name in ("native_layer_norm", "native_group_norm")) * 2:
            return False
        if name == "native_group_norm" and not args[0].requires_grad:  # PyTorch's backward would crash the process
            return not args[0].is_contiguous(memory_format=torch.channels_last)
        if name == "as_strided":  # of a dimension of size 1, in another memory format
            steps = zip(first.shape, first.stride(), args[2], strict=False)
            same = tuple(args[1]) == first.shape and args[3:4] in ((), (None,), (first.storage_offset(),))
            return same and all(n == 1 or old == new for n, old, new in steps)
        if name in _ALIKE.split():
            return True  # a view keeps the order of elements, in which samples are outermost
        if name.startswith(tuple(_POOLS.split())):
            return len(results[0]) == len(first)
        return name in _KEEPS and rows == {len(t) for t in results} and self._keeps_first(name, args, kwargs, first)

    def _broadcasts(self, t: Tensor, like: Tensor) -> bool:
        """Return whether an argument is of each sample, or the same for all."""
        if id(t) in self.samples:
            return t.ndim == like.ndim
        return t.ndim < like.ndim or len(t) == 1

    def _keeps_first(self, name: str, args: Any, kwargs: Any, first: Tensor) -> bool:
        """Return whether an operation by dimensions leaves the first one alone."""
        ndim, more = first.ndim, list(args[1:])
        if name in ("native_layer_norm", "native_group_norm"):
            return name == "native_group_norm" or len(more[0]) < ndim
        if name == "permute":
            return more[0][0] == 0
        if name in ("roll", "split", "split_with_sizes"):
            more = more[1:]
        dims: Any = kwargs.get("dim", kwargs.get("dims", more[:2] if name == "transpose" else more[:1]))
        if not dims and name in ("slice", "select", "squeeze", "unbind", "split", "split_with_sizes", "cat", "stack"):
            return False
        dims = tree_leaves(dims)
        ndim += name in ("unsqueeze", "stack")
        return bool(dims) and all(isinstance(d, int) and d % ndim for d in dims)


class _Hooks(TorchFunctionMode):
    """Sees hooks on tensors, which see one time step in a call, and values that NumPy reads."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        seen = "register_hook retain_grad register_post_accumulate_grad_hook numpy tolist __array__ __dlpack__"
        if getattr(func, "__name__", "-") in seen.split() or func == Tensor.grad_fn.__get__:  # pyright: ignore
            raise UnknownError("registers a hook on a tensor, or on what made it, or reads its values")
        return func(*args, **(kwargs or {}))


class Sizes(Step):
    """A time step that shows the sizes of layers: neurons and BatchNorms pass on what they read."""

    def __init__(self) -> None:
        self.products = 0  # multiplications of the layers' matrix products
        self.weights = 0  # elements
        self.bytes = 0  # of what the layers give

    def neuron(self, layer: Layer, *args: Any, **kwargs: Any) -> Any:
        if layer.advance is None or len(args) != 1:
            return layer.plain(*args, **kwargs)
        self.run.take_turn(layer, NEURON)
        self.bytes += args[0].nbytes
        return args[0].asinh()  # keeps large values in bounds

    def norm(self, layer: Layer, *args: Any, **kwargs: Any) -> Any:
        return args[0] if layer.role.stepwise and len(args) == 1 else layer.plain(*args, **kwargs)

    def weight(self, layer: Layer, *args: Any, **kwargs: Any) -> Any:
        y, weight = layer.plain(*args, **kwargs), layer.role.weight(layer.module)
        self.products += y.numel() // len(weight) * weight.numel()
        self.weights += weight.numel()
        self.bytes += y.nbytes
        return y


class _Watched(Sizes):
    """Such a time step whose operations are seen; layers of ours that keep a state are known."""

    def __init__(self, operations: SamplesWatch):
        super().__init__()
        self.operations = operations
        self._normalised: dict[int, str] = {}
        self._pairs: list[tuple[str, str, int, weakref.ref[Tensor]]] = []
        self._ran: set[Layer] = set()

    def _take_turn(self, layer: Layer) -> None:
        if layer in self._ran:
            raise UnknownError(f"runs {layer} twice")
        self._ran.add(layer)

    def handler(self, layer: Layer, folds: bool) -> Any:
        return self.keeper if is_dropout(layer.module) else super().handler(layer, folds)

    def neuron(self, layer: Layer, *args: Any, **kwargs: Any) -> Any:
        if layer.advance is None or len(args) != 1:
            return self.keeper(layer, *args, **kwargs)
        self.operations.require(*args)
        if norm := self._normalised.get(id(args[0])):
            self._pairs.append((norm, layer.name, id(args[0]), weakref.ref(args[0])))
        return args[0].asinh()

    def norm(self, layer: Layer, *args: Any, **kwargs: Any) -> Any:
        if kernels.others_save():
            raise UnknownError("normalises in a checkpoint")
        if layer.role.stepwise:
            self._take_turn(layer)
            self.operations.require(*args, **kwargs)
        y = super().norm(layer, *args, **kwargs)
        if args and y is args[0]:
            y = y.view_as(y)
            self._normalised[id(y)] = layer.name
        return y

    def weight(self, layer: Layer, *args: Any, **kwargs: Any) -> Any:
        y = super().weight(layer, *args, **kwargs)
        if self.run.sequence.last and isinstance(layer.module, nn.Conv1d):  # it gives them so in a run
            self.operations.ours = True
            y = channels_last(y)
            self.operations.ours = False
            self.operations.add(y)
        return y

    def find_pairs(self) -> dict[str, str]:
        """Return the layers of neurons that alone read what a BatchNorm gives, by its name."""
        self.operations.samples.clear()
        reads = self.operations.reads
        return {norm: neuron for norm, neuron, y, left in self._pairs if reads[y] == 1 and left() is None}

    def keeper(self, layer: Layer, *args: Any, **kwargs: Any) -> Any:
        if not is_proved(layer):
            raise UnknownError(f"keeps a state of its own in {layer}")
        self._take_turn(layer)
        self.operations.require(*args, **kwargs)
        self.operations.ours = True
        y = layer.plain(*args, **kwargs)
        self.operations.ours = False
        self.operations.add(y)
        return y


def watch_samples(run: Run, model: nn.Module, steps: int) -> dict[str, str] | None:
    """Watch a network's operations in one time step of a batch, and in so many in a call.

    Returns the layers of neurons that alone read a BatchNorm, by its name, where samples stay apart; else None.
    `model` is a copy of the run's.
    """
    drawn = repr((random.getstate(), np.random.get_state()))
    try:
        (called, pairs), again = (_watch(model, run.sequence.input(range(n)), n == 1) for n in (1, steps))
        weights = ([*m.parameters(), *m.buffers()] for m in (model, unwrapped(run.model)))
        kept = all(torch.equal(a, b) for a, b in zip(*weights, strict=True))  # also those changed through `.data`
    except Exception:  # of any kind: it is the user's code
        return None
    # the same of more samples, and when it runs again
    same = again == (called, pairs) and drawn == repr((random.getstate(), np.random.get_state()))
    return pairs if same and kept else None


def takes_channels_last(run: Run, model: nn.Module) -> bool:
    """Return whether a network takes images with their channels last in memory; some views do not."""
    if run.layout.pixels:
        with suppress(Exception):
            _watch(model, run.sequence.with_channels_last(run.layout.pixels).input(range(1)), last=True)
            return True
    return False


def _watch(model: nn.Module, x: Tensor, planted: bool = False, last: bool = False) -> tuple[list[Any], dict[str, str]]:
    """Run a network; return what it calls, and the pairs. Raises UnknownError if it may mix samples."""
    x = x.clone()
    operations, layout = SamplesWatch(x, [*model.parameters(), *model.buffers()]), layout_of(model)
    inner = Run(model, Sequence(x, 1, True, last=last), step := _Watched(operations))
    with kernels.using(bits=False), without_marked_hooks(model.modules()), inner:
        # states that no neuron reads here: a forward that reads, changes or resets one does more
        states = [(k.module, name) for k in inner.layout.keepers if k.spikes and k.advance for name in k.states]
        values = [torch.empty(0) if planted else getattr(module, name) for module, name in states]
        for (module, name), value in zip(states, values, strict=True):
            setattr(module, name, value)
        with torch.enable_grad(), _Hooks(), operations:
            y = model(x)
        if any(getattr(*state) is not value for state, value in zip(states, values, strict=True)):
            raise UnknownError("changes the state of a neuron")
        _check_gradient(y, operations)
    if changes := layout.changes():
        raise UnknownError(f"changes {next(iter(changes))}")
    del y
    return operations.called, step.find_pairs()


def _check_gradient(y: Any, operations: SamplesWatch) -> None:  # apart, since a node that is named keeps tensors
    if id(y) not in operations.samples:
        raise UnknownError("gives what is not of its input")
    for node in graph_nodes([y.grad_fn]):
        own = isinstance(node, torch.autograd.function.BackwardCFunction)
        if own and not type(node)._forward_cls.__module__.startswith("sltt."):  # type: ignore[attr-defined]
            raise UnknownError(f"has a gradient of its own in {type(node).__name__}")
