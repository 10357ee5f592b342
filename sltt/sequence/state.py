"""Modules that keep a state between time steps: the protocol, and how other libraries' modules are made known."""

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sltt.checks import flag, function, instance
from sltt.sequence.fold import CLOCK, Fold, fold_of

OBSERVERS = "_sltt_observers"  # the attribute of a layer of neurons that holds those who see its spikes


class Stateful(nn.Module):
    """A module that keeps tensors between time steps.

    A subclass lists the attributes that hold them in `states`: tensors, or tuples and lists of tensors. Each is None
    before the first step of a sequence. States belong to one sequence, so they are no part of the state dict. A copy
    has the values of the states, without the graph behind them.

    A rule may run several time steps in one call: `fold` says how many. A subclass that takes them apart says
    `foldable = True`.

    Attributes:
        states: names of the attributes that hold tensors between time steps.
        spikes: the module's outputs are spikes.
        differentiable: a gradient flows through the states; none flows through a mask that was drawn.
        timeless: an input that does not change gives the same output at every step, so that `sltt.once` may run it.
        foldable: the module takes the time steps in a batch apart.
    """

    states: ClassVar[tuple[str, ...]] = ()
    spikes: ClassVar[bool] = False
    differentiable: ClassVar[bool] = True
    timeless: ClassVar[bool] = False
    foldable: ClassVar[bool] = False

    @property
    def fold(self) -> Fold:
        """How the call of the network that is in progress folds time into the batch dimension."""
        return fold_of(self)

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def reset(self) -> None:
        """Forget the sequence: every state becomes None."""
        for name in self.states:
            setattr(self, name, None)

    def detach(self) -> None:
        """Keep the values and drop the graph behind them: no gradient flows to earlier time steps."""
        for name in self.states:
            if (state := getattr(self, name)) is not None:
                setattr(self, name, map_tensors(Tensor.detach, state))

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: map_tensors(Tensor.detach, getattr(self, name)) for name in self.states}
        return {key: value for key, value in {**vars(self), **kept}.items() if key not in (CLOCK, OBSERVERS)}

    def check_state(self, name: str, x: Tensor, dtype: torch.dtype) -> None:
        """Raise ValueError if the state `name` does not fit this time step's input x, or is not of `dtype`."""
        state: Tensor = getattr(self, name)
        if state.shape != x.shape or state.device != x.device or state.dtype != dtype:
            raise ValueError(
                f"{type(self).__name__} keeps a state {_describe(state)} of an earlier input, but got input "
                f"{_describe(x)}. Call sltt.reset(model) before a new sequence."
            )


@dataclass(frozen=True)
class Kind:
    """How the modules of a type keep their state; see `register` for its fields."""

    states: Callable[[Any], Iterable[str]]
    reset: Callable[[Any], Any] | None
    spikes: Callable[[Any], bool]
    check: Callable[[Any, int, bool], str | None]
    translate: Callable[[Any], nn.Module] | None
    decay: Callable[[Any], float | Tensor | None] | None


# Known without `register`: sltt.interop.<library> is imported when a network has a module of the library.
_LIBRARIES = {"norse", "sinabs", "snntorch", "spikingjelly"}
_kinds: dict[type, Kind] = {}


def register(
    kind: type,
    states: Iterable[str] | Callable[[Any], Iterable[str]],
    *,
    reset: Callable[[Any], Any] | None = None,
    spikes: bool | Callable[[Any], bool] = False,
    check: Callable[[Any, int, bool], str | None] | None = None,
    translate: Callable[[Any], nn.Module] | None = None,
    decay: Callable[[Any], float | Tensor | None] | None = None,
) -> None:
    """Tell the rules how modules that are no `Stateful` keep their state between time steps.

        sltt.register(TheirNeuron, states=["v"], reset=TheirNeuron.reset, spikes=True)

    Args:
        kind: their class; subclasses are included, unless they are registered themselves.
        states: names of the attributes that hold tensors, or tuples and lists of tensors; or a function of the module
            that gives the names. A rule detaches these, and `BPTT(segment=n)` keeps them.
        reset: called with the module before a sequence; None sets every state to None.
        spikes: the module's outputs are spikes, for `FiringRates` to count and `OTTT` to trace; or a function of the
            module that says so.
        check: `check(module, batch, kept)` says why the module cannot run one time step of `batch` samples, or None.
            `kept` says that it is inside a `Stateful`, which may keep its state for it.
        translate: for `sltt.interop.convert`, gives the module of ours in place of the module, or raises
            `sltt.interop.ConversionError` with the reason.
        decay: gives the λ of a module's membrane potential, for `OTTT`; or None where it has none, or where a spike
            resets it to a value. Not asked where `translate` gives a module of ours, which knows its λ.

    Raises:
        ValueError: an argument of another type; the message names it.
    """
    if not isinstance(kind, type):
        raise ValueError(f"kind must be a class of modules, got {kind!r}")
    states = tuple(states) if isinstance(states, Iterator) else states
    listed = isinstance(states, Iterable) and not isinstance(states, str)
    if not callable(states) and not (listed and all(isinstance(name, str) for name in states)):
        raise ValueError(f"states must be names of attributes, such as ['v'], or a function, got {states!r}")
    for name, value in (("reset", reset), ("check", check), ("translate", translate), ("decay", decay)):
        if value is not None:
            function(name, value, "the module")
    if not callable(spikes):
        flag("spikes", spikes, "or a function of the module")
    names = states if callable(states) else lambda _, names=tuple(states): names
    emits = spikes if callable(spikes) else lambda _: spikes
    _kinds[kind] = Kind(names, reset, emits, check or (lambda *_: None), translate, decay)
    kind_of.cache_clear()


@functools.cache
def kind_of(cls: type) -> Kind | None:
    """How the modules of a class keep their state; None for a class that nothing is known of."""
    for library in {c.__module__.partition(".")[0] for c in cls.__mro__} & _LIBRARIES:
        import_module(f"sltt.interop.{library}")
    found = [c for c in cls.__mro__ if c in _kinds]
    for other in found[1:]:
        if not issubclass(found[0], other):
            raise ValueError(
                f"{cls.__name__} is a {found[0].__name__} and a {other.__name__}, which keep their states in different "
                f"ways: say how {cls.__name__} does, by sltt.register({cls.__name__}, states=…)"
            )
    return _kinds[found[0]] if found else None


def state_names(module: nn.Module) -> tuple[str, ...]:
    """The attributes of a module that hold tensors between time steps; none for a module that keeps no state."""
    kind = kind_of(type(module))
    return tuple(kind.states(module)) if kind else ()


def emits_spikes(module: nn.Module) -> bool:
    """Whether a module is a layer of spiking neurons, ours or another library's."""
    kind = kind_of(type(module))
    return kind is not None and kind.spikes(module)


def check_steps(model: nn.Module, batch: int) -> None:
    """Check that a rule can run the model one time step at a time; warn if it keeps no state at all.

    Raises:
        ValueError: naming every module that takes several time steps in a call, or whose state a rule cannot reach.
    """
    keepers = (m for m in model.modules() if isinstance(m, Stateful))
    kept = {inner for keeper in keepers for child in keeper.children() for inner in child.modules()}
    problems = []
    for name, module in model.named_modules():
        kind = kind_of(type(module))
        if kind and (problem := kind.check(module, batch, module in kept)):
            problems.append(f"{name or 'the model'} ({type(module).__name__}) {problem}")
    if problems:
        raise ValueError("a rule runs one time step in a call of the model, but " + "; ".join(problems))
    if not any(state_names(module) for module in model.modules()):
        warnings.warn(
            "no module of the model keeps a state between time steps, so that all rules are the same. A rule knows "
            "sltt's neurons and every sltt.Stateful, the neurons of SpikingJelly, snnTorch, sinabs and Norse, and what "
            "sltt.register is given",
            stacklevel=3,
        )


def reset(model: nn.Module) -> None:
    """Reset the state of every stateful module in `model`, ours or another library's, before a new sequence."""
    for module in instance("model", model, nn.Module).modules():
        kind = kind_of(type(module))
        if kind and kind.reset:
            kind.reset(module)
        elif kind:
            for name in kind.states(module):
                setattr(module, name, None)


def detach(model: nn.Module) -> None:
    """Cut the graph behind the state of every stateful module in `model`: v[t] becomes a constant of step t + 1."""
    for module in instance("model", model, nn.Module).modules():
        detach_module(module)


def detach_module(module: nn.Module) -> None:
    """As `detach`, of one module without those in it."""
    if isinstance(module, Stateful):
        module.detach()
        return
    for name in state_names(module):
        setattr(module, name, map_tensors(Tensor.detach, getattr(module, name)))


def state_tensors(module: nn.Module) -> list[Tensor]:
    """The tensors in the states of one module."""
    found: list[Tensor] = []
    for name in state_names(module):
        map_tensors(found.append, getattr(module, name))
    return found


def map_tensors(function: Callable[[Tensor], Any], state: Any) -> Any:
    """A state with `function` applied to its tensors, in new tuples, named tuples, lists and dictionaries."""
    if isinstance(state, Tensor):
        return function(state)
    if isinstance(state, tuple) and hasattr(state, "_fields"):
        return type(state)(*(map_tensors(function, s) for s in state))
    if isinstance(state, list | tuple):
        return type(state)(map_tensors(function, s) for s in state)
    if isinstance(state, dict):
        return {key: map_tensors(function, s) for key, s in state.items()}
    return state


def _explicit(module: nn.Module, batch: int, kept: bool) -> str | None:
    return None if kept else "is recurrent and keeps no state itself: put it into a sltt.Stateful that keeps its state"


register(Stateful, lambda m: m.states, reset=lambda m: m.reset(), spikes=lambda m: m.spikes)
register(nn.RNNBase, (), check=_explicit)
register(nn.RNNCellBase, (), check=_explicit)


def _describe(x: Tensor) -> str:
    return f"{list(x.shape)} ({str(x.dtype).removeprefix('torch.')}, {x.device})"
