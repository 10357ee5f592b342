"""Work that time does not change is done once a sequence.

A network marks such work: `sltt.once(self.stem, x)` in place of `self.stem(x)`, or `sltt.once(self.weights)` for
what depends on weights only. Under a rule, the function runs when it is first met in a sequence, and its result, cut
off from its graph, is given again at every later time step. The gradients of all time steps add up in that result, and
go through the function's graph once, at the end: the same gradient, up to the order of a sum.

Work on an input is the same at every step only if the input is: the sequence's static image, or the result of such
work. Elsewhere, `once` calls the function and does nothing else. So it does inside `torch.compile`, a checkpoint, and
other hooks on saved tensors.
"""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sltt.kernels import others_save
from sltt.sequence.claims import run_of
from sltt.sequence.state import Stateful, state_names


def once(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Call `function(*inputs)` once per sequence instead of once per time step, where time does not change the result.

    Work on weights alone runs once per sequence under a rule, unless the rule is `online` or the weights are sharded.
    Work on inputs runs once only for a static input, under a rule with `hoist=True` or in `sltt.unroll`. A BatchNorm in
    `function` then sees one batch per sequence: its running statistics are updated once, not T times.

    Args:
        function: a module, or its method, that depends on its inputs and weights alone, on no random numbers.
        inputs: tensors; none for work on weights.

    Raises:
        ValueError: under a rule, a function that is no module or method of one, or a module with a state.
        RuntimeError: the result was changed in place.
    """
    if torch.compiler.is_compiling():
        return function(*inputs)
    owner = getattr(function, "__self__", function)
    if not callable(function) or not isinstance(owner, nn.Module):
        raise ValueError(f"once takes a module or a method of one, got {function!r:.60}: call it without sltt.once")
    run = run_of(owner)
    if run is None or others_save():  # a checkpoint runs it again, and expects the same operations
        return function(*inputs)
    return run.results.once(function, owner, inputs)


class _Result(NamedTuple):
    value: Tensor  # in its graph
    leaf: Tensor  # cut off from it
    version: int


class Results:
    """The results of `once` in one sequence.

    Args:
        x: the sequence's input if it is the same at every time step, or None.
        marked: keep what `sltt.once` marks on a fixed input; else that of plain layers alone.
        grad: build graphs for a backward, also in a step that has none itself.
        keep: keep results; else every call computes.

    Attributes:
        in_graph: the rule builds a graph in this time step; else it has switched gradients off, and not the network.
    """

    def __init__(self, x: Tensor | None, marked: bool, grad: bool, keep: bool):
        self._marked, self._grad = marked, grad
        self.in_graph = True
        self._keep = keep
        self._fixed = [] if x is None else [x]  # what time does not change
        self._results: dict[Any, _Result] = {}
        self._sums: dict[Tensor, Any] = {}  # of gradients of results in bfloat16 and float16
        self._checked: set[nn.Module] = set()

    def once(self, function: Callable[..., Tensor], owner: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        """Do as `once` of this module."""
        self._check(owner, "call it without sltt.once" if owner is function else "give it a module without neurons")
        return self.keep(function, owner, inputs) if all(map(self.is_fixed, inputs)) else function(*inputs)

    def keep(self, function: Callable[..., Tensor], owner: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        """Return what a function gives at its first call, with inputs that time does not change."""
        if not self._keep:
            return function(*inputs)
        versions = tuple(map(_version, owner.parameters()))  # a rule may change weights in the middle
        grad = self._grad and (torch.is_grad_enabled() or not self.in_graph)
        # of a method its function, which is the same in each time step; fixed inputs and the owner stay alive
        key = owner, getattr(function, "__func__", function), tuple(map(id, inputs)), versions, grad
        if key not in self._results:
            with torch.set_grad_enabled(grad):
                value = function(*inputs)
            leaf = value.detach().requires_grad_(value.requires_grad)
            if leaf.requires_grad and leaf.itemsize < 4:
                leaf.register_post_accumulate_grad_hook(self._add)
            self._results[key] = _Result(value, leaf, _version(leaf))
            self._fixed.append(leaf)
        result = self._results[key]
        if _version(result.leaf) != result.version:
            raise RuntimeError(f"what {function} gave was changed in place, and serves all steps: x = 2 * x for x *= 2")
        return result.leaf

    def is_fixed(self, x: Tensor, marked: bool = True) -> bool:
        """Return whether time does not change x, for a layer that is marked or a plain one."""
        return (self._marked or not marked) and any(x is fixed for fixed in self._fixed)

    def _check(self, owner: nn.Module, remedy: str) -> None:
        """Raise ValueError for a module that time changes."""
        if owner in self._checked:
            return
        for name, module in owner.named_modules():
            if state_names(module) and not (isinstance(module, Stateful) and module.timeless):
                raise ValueError(
                    f"sltt.once runs {type(owner).__name__} once a sequence, but {name or 'it'} "
                    f"({type(module).__name__}) keeps a state from step to step: {remedy}"
                )
        self._checked.add(owner)

    def finish(self, backward: Callable[[Tensor], Any]) -> None:
        """Send the gradients that the time steps left in the results through the graphs behind them."""
        for value, leaf, _ in reversed(self._results.values()):  # a later result may have been made from an earlier
            if (gradient := self._sums.get(leaf, leaf.grad)) is not None:
                backward(add_gradients(torch.zeros((), device=value.device), [(value, gradient.to(value.dtype))]))

    def _add(self, leaf: Tensor) -> None:
        """Add the gradient of a call in float32: in a sum of 8 bits, those of later steps would be lost."""
        self._sums[leaf] = self._sums.get(leaf, 0.0) + leaf.grad.float()  # type: ignore[union-attr]
        leaf.grad = None


def add_gradients(total: Tensor, gradients: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the scalar `total`, whose backward also gives each tensor the gradient that an earlier one found."""
    return _AddGradients.apply([g for _, g in gradients], total, *(x for x, _ in gradients))  # type: ignore[return-value]


class _AddGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradients: Any, total: Tensor, *values: Tensor) -> Tensor:  # type: ignore[override]
        ctx.gradients = gradients
        return total.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        # the gradients carry the scale of the loss already: the backward that found them had it
        return None, grad, *ctx.gradients


def is_sharded(model: nn.Module) -> bool:
    """Return whether a network's weights are sharded: those of a graph are gone when its backward comes."""
    module = sys.modules.get("torch.distributed.fsdp")  # not imported where nothing is sharded
    return module is not None and any(isinstance(m, module.FSDPModule) for m in model.modules())


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version
