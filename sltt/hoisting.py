"""Work that time does not change is done once a sequence.

What a network computes from its weights alone (weight standardisation), and from a static input before the first
neuron, is the same at every time step. While `hoisting` is open, such an operation runs when it is first met and gives
the same tensor, cut off from its graph, whenever it is met again. The gradients of all time steps add up in that
tensor, and go through the operations' graph once, at the end: the same gradient, up to the order of a sum.

An operation is taken for the same if it is the same function of the same tensors, unchanged, and the same numbers, and
only functions in a list of pure ones are. BatchNorm's running statistics are updated as often as without.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sltt.kernels import without_modes
from sltt.state import current_fold

_current: "Hoisting | None" = None


@contextmanager
def hoisting(x: Tensor | None) -> "Iterator[Hoisting]":
    """Open a `Hoisting` for one sequence; `x` is its input if that is the same at every time step."""
    global _current
    before, _current = _current, Hoisting(x)
    try:
        with _current as hoisted:
            yield hoisted
    finally:
        _current = before


def each_step(x: Tensor) -> Tensor:
    """x for every time step of the fold, [n·B, ...], where it was computed once for all of them, [B, ...]."""
    return x if _current is None else _current.each_step(x)


def same_each_step(x: Tensor) -> bool:
    """Whether x was computed once for all time steps of a fold."""
    return _current is not None and _current.depends_on_input(x)


@dataclass
class _Result:
    """A result of an operation: in its graph, and cut off from it; whether it has a batch dimension."""

    value: Tensor
    leaf: Tensor
    of_input: bool


class Hoisting(TorchFunctionMode):
    """Runs operations on what time does not change once.

    Args:
        x: static input, or None.
    """

    def __init__(self, x: Tensor | None):
        super().__init__()
        self._results: dict[int, _Result] = {}  # by the id of the leaf, which it keeps alive
        self._calls: dict[Any, Any] = {}
        self._statistics: dict[Any, tuple[Tensor, Tensor]] = {}
        self._batch = 0 if x is None else len(x)
        if x is not None:
            self._results[id(x)] = _Result(x, x, of_input=True)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling() or func in _SHAPE:
            return func(*args, **kwargs)
        if func is F.batch_norm:
            return self._batch_norm(*args, **kwargs)
        if func in _IN_PLACE and any(id(t) in self._results for t in _tensors(args)):
            call = _IN_PLACE[func].bind(*args, **kwargs)
            call.arguments["inplace"] = False  # the result, which is what layers use, is the same
            args, kwargs = call.args, call.kwargs
        if func in _PURE and (key := self._key(func, args, kwargs)) is not None:
            return self._once(key, func, args, kwargs)
        return self._each_time(func, args, kwargs)

    def depends_on_input(self, x: Tensor) -> bool:
        """Whether x is the static input, or was computed from it."""
        return id(x) in self._results and self._results[id(x)].of_input

    def each_step(self, x: Tensor) -> Tensor:
        """See `each_step` of this module."""
        steps = current_fold().steps
        if steps == 1 or not self.depends_on_input(x) or x.shape[:1] != (self._batch,):
            return x
        with without_modes():
            return x.repeat(steps, *[1] * (x.ndim - 1))

    def finish(self, backward: Callable[[Tensor], Any]) -> None:
        """Send the gradients that the time steps left in the results through the graph behind them."""
        pairs = [(r.value, r.leaf.grad) for r in self._results.values() if r.value is not r.leaf]
        pairs = [(value, grad) for value, grad in pairs if grad is not None]
        if pairs:
            values, grads = zip(*pairs, strict=True)
            backward(hand_over(torch.zeros((), device=values[0].device), values, grads))

    def _key(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What makes two calls the same; None if time may change this one."""
        found: list[bool] = []
        # a result without a graph is none for a step with one, and autocast decides on the type
        modes = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")

        def part(a: Any) -> Any:
            if isinstance(a, Tensor):
                found.append(isinstance(a, nn.Parameter) or id(a) in self._results)
                return id(a), a._version
            if isinstance(a, tuple | list):
                return tuple(map(part, a))
            if isinstance(a, slice):
                return slice, a.start, a.stop, a.step
            if not isinstance(a, _PLAIN):
                found.append(False)
            return type(a), a

        key = func, modes, tuple(map(part, args)), tuple((name, part(a)) for name, a in kwargs.items())
        return key if found and all(found) else None

    def _once(self, key: Any, func: Any, args: Any, kwargs: Any) -> Any:
        if key not in self._calls:
            of_input = any(self.depends_on_input(a) for a in _tensors((args, kwargs)))
            args, kwargs = _mapped(
                (args, kwargs), lambda t: self._results[id(t)].value if id(t) in self._results else t
            )
            self._calls[key] = _mapped(func(*args, **kwargs), lambda t: self._leaf(t, of_input))
        return self._calls[key]

    def _value(self, x: Tensor) -> Tensor:
        """x in its graph."""
        return self._results[id(x)].value if id(x) in self._results else x

    def _leaf(self, value: Tensor, of_input: bool) -> Tensor:
        leaf = value.detach().requires_grad_(value.requires_grad)
        self._results[id(leaf)] = _Result(value, leaf, of_input)
        return leaf

    def _each_time(self, func: Any, args: Any, kwargs: Any) -> Any:
        name = getattr(func, "__name__", "")
        writes = (name.endswith("_") and not name.endswith("__")) or name in _ASSIGNED
        if writes and args and id(args[0]) in self._results:
            raise RuntimeError(f"{name} changes in place what was computed once for all time steps: use hoist=False")
        args, kwargs = _mapped((args, kwargs), self.each_step)
        return func(*args, **kwargs)

    def _batch_norm(self, *args: Any, **kwargs: Any) -> Any:
        call = _BATCH_NORM.bind(*args, **kwargs)
        call.apply_defaults()
        x, mean, var, weight, bias, training, momentum, eps = call.args
        inputs = [t for t in (x, weight, bias) if t is not None]
        key = self._key(F.batch_norm, (*inputs, training, eps), {})
        if key is None or not self.depends_on_input(x):
            return self._each_time(F.batch_norm, call.args, {})
        if not training or mean is None or var is None:
            state = tuple((id(t), t._version) for t in (mean, var) if t is not None)
            return self._once((key, state), F.batch_norm, call.args, {})
        if key not in self._statistics:
            self._statistics[key] = torch.zeros_like(mean), torch.ones_like(var)
        of_batch = self._statistics[key]
        result = self._once(key, F.batch_norm, (x, *of_batch, weight, bias, training, 1.0, eps), {})
        with torch.no_grad():
            mean.lerp_(of_batch[0], momentum)
            var.lerp_(of_batch[1], momentum)
        return result


def hand_over(total: Tensor, values: Any, gradients: Any) -> Tensor:
    """The scalar `total`, whose backward also gives `values` their `gradients`, which an earlier backward found."""
    return _HandOver.apply(gradients, total, *values)  # type: ignore[return-value]


class _HandOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradients: Any, total: Tensor, *values: Tensor) -> Tensor:  # type: ignore[override]
        ctx.gradients = gradients
        return total.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        # the gradients carry the scale of the loss already: the backward that found them had it
        return None, grad, *ctx.gradients


def _tensors(tree: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _mapped(tree, lambda t: (found.append(t), t)[1])
    return found


def _mapped(tree: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The tree of tuples, lists and dicts with every tensor replaced."""
    if isinstance(tree, Tensor):
        return function(tree)
    if type(tree) in (tuple, list):
        return type(tree)(_mapped(a, function) for a in tree)
    if type(tree) is dict:
        return {name: _mapped(a, function) for name, a in tree.items()}
    return tree


_BATCH_NORM = inspect.signature(F.batch_norm)
_PLAIN = (int, float, complex, bool, str, type(None), type(...), torch.dtype, torch.device, torch.memory_format)
_ASSIGNED = {"__iadd__", "__isub__", "__imul__", "__itruediv__", "__setitem__"}
# Functions of their arguments alone, without side effects, whose result is a tensor or several.
_FUNCTIONAL = """conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear pad interpolate
    normalize avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d max_pool1d
    max_pool2d max_pool3d layer_norm group_norm relu gelu silu elu leaky_relu softplus hardtanh hardswish mish
    softmax"""
_TORCH = """add sub mul div neg pow sqrt rsqrt square abs exp log sigmoid tanh relu clamp mean sum var std flatten
    reshape unsqueeze squeeze permute transpose matmul softmax"""
_METHODS = """norm view view_as expand expand_as t contiguous to float double bfloat16 half type_as unflatten
    __add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__ __rdiv__ __neg__ __pow__ __matmul__
    __getitem__"""
_PURE = {
    *(getattr(F, name) for name in _FUNCTIONAL.split()),
    *(getattr(owner, name) for name in _TORCH.split() for owner in (torch, Tensor)),
    *(getattr(torch, name) for name in ("var_mean", "std_mean", "cat", "stack", "mm", "bmm", "einsum")),
    *(getattr(Tensor, name) for name in _METHODS.split()),
}
_IN_PLACE = {f: inspect.signature(f) for f in (F.relu, F.silu, F.elu, F.leaky_relu, F.hardtanh, F.hardswish, F.mish)}
_SHAPE = {
    *(getattr(Tensor, name) for name in ("size", "dim", "numel", "stride", "is_contiguous", "is_floating_point")),
    *(vars(torch._C.TensorBase)[name].__get__ for name in ("shape", "ndim", "dtype", "device", "layout")),
    Tensor.__len__,
}
