"""Roles: what a layer is to a rule. Modules that keep a state, ours and other libraries', and what each can."""

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm

from sltt._torch import _BatchNorm, _InstanceNorm, _SpectralNorm
from sltt.checks import flag, function, instance
from sltt.sequence.hooks import own_forward


class Stateful(nn.Module):
    """A module that keeps tensors between time steps.

    A subclass lists the attributes that hold them in `states`: tensors, or tuples and lists of tensors. Each is None
    before the first step of a sequence. States belong to one sequence, so they are no part of the state dict. A copy
    has the values of the states, without the graph behind them.

    Attributes:
        states: names of the attributes that hold tensors between time steps.
        spikes: the module's outputs are spikes.
        differentiable: a gradient flows through the states; none flows through a mask that was drawn.
        timeless: an input that does not change gives the same output at every step, so that `sltt.once` may run it.
    """

    states: ClassVar[tuple[str, ...]] = ()
    spikes: ClassVar[bool] = False
    differentiable: ClassVar[bool] = True
    timeless: ClassVar[bool] = False

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
                setattr(self, name, state.detach() if type(state) is Tensor else map_tensors(Tensor.detach, state))

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: map_tensors(Tensor.detach, getattr(self, name)) for name in self.states}
        return {**vars(self), **kept}

    def check_state(self, name: str, x: Tensor, dtype: torch.dtype) -> None:
        """Raise ValueError if the state `name` does not fit this time step's input x, or is not of `dtype`."""
        state: Tensor = vars(self)[name] if name in vars(self) else getattr(self, name)
        if state.shape != x.shape or state.device != x.device or state.dtype != dtype:
            raise ValueError(
                f"{type(self).__name__} keeps a state {_describe(state)} of an earlier input, but got input "
                f"{_describe(x)}. Call sltt.reset(model) before a new sequence."
            )


@dataclass(frozen=True)
class Role:
    """Role of the modules of a class; see `register` for the fields with its names."""

    kind: str  # keeper of a state, weight, norm, pool, sequence or other; keepers that emit spikes are neurons
    states: Callable[[Any], Iterable[str]] = lambda _: ()
    reset: Callable[[Any], Any] | None = None
    spikes: Callable[[Any], bool] = lambda _: False
    check: Callable[[Any, int, bool], str | None] | None = None
    translate: Callable[[Any], nn.Module] | None = None
    decay: Callable[[Any], float | Tensor | None] | None = None
    folds: Callable[[Any], str | None] | None = None  # why a call of several time steps would give other results
    stepwise: bool = False  # a norm that takes the statistics of each time step of a call by itself
    # gives what runs several time steps in a call, or None: of neurons `(x, steps, cut)`; of other layers
    # `(x, steps, cut, weights)`, which gives None where no kernel does it
    advance: Callable[[Any], Any] | None = None
    of: type | None = None  # the class whose forward is known
    weight: Callable[[Any], Tensor] = lambda module: module.weight  # that a weight layer applies


# Known without `register`: sltt.interop.<library> is imported when a network has a module of the library.
LIBRARIES = {"norse", "sinabs", "snntorch", "spikingjelly"}
_roles: dict[type, Role] = {}
_registrations: list[type] = []


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
            `kept` says that it is inside a module that keeps a state, and may keep its state for it.
        translate: for `sltt.interop.convert`, gives the module of ours in place of the module, or raises
            `sltt.interop.ConversionError` with the reason.
        decay: gives the λ of a module's membrane potential, for `OTTT`; or None where it has none, or where a spike
            resets it to a value. Not asked where `translate` gives a module of ours, which knows its λ.

    Raises ValueError naming an argument of another type.
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
    set_role(kind, Role("keeper", names, reset, emits, check, translate, decay))


def set_role(kind: type, role: Role) -> None:
    """Give a role to the modules of a class; subclasses are included, unless they have one themselves."""
    _roles[kind] = role
    _registrations.append(kind)
    role_of.cache_clear()


def registrations() -> int:
    """Return how often a role was set: what is known of a network's layers holds for as many."""
    return len(_registrations)


@functools.cache
def role_of(cls: type) -> Role:
    """Return the role of the modules of a class."""
    for library in {c.__module__.partition(".")[0] for c in cls.__mro__} & LIBRARIES:
        import_module(f"sltt.interop.{library}")
    bases = [c for c in cls.__mro__ if c in _roles]
    # what keeps a state is a keeper in the first place, as a BatchNorm with a state is; but for a subclass with a role
    keeper = next((c for c in bases if _roles[c].kind == "keeper"), None)
    return _OTHER if not bases else _roles[keeper if keeper and not issubclass(bases[0], keeper) else bases[0]]


def state_names(module: nn.Module) -> tuple[str, ...]:
    """Return the attributes of a module that hold tensors between time steps; none for a module that keeps no state."""
    return tuple(role_of(type(module)).states(module))


def emits_spikes(module: nn.Module) -> bool:
    """Return whether a module is a layer of spiking neurons, ours or another library's."""
    return role_of(type(module)).spikes(module)


def reset(model: nn.Module) -> None:
    """Reset the state of every stateful module in `model`, ours or another library's, before a new sequence."""
    for module in instance("model", model, nn.Module).modules():
        reset_module(module)


def reset_module(module: nn.Module) -> None:
    """Reset one module without those in it."""
    role = role_of(type(module))
    if role.reset:
        role.reset(module)
    else:
        for name in role.states(module):
            setattr(module, name, None)


def detach(model: nn.Module) -> None:
    """Cut the graph behind the state of every stateful module in `model`: v[t] becomes a constant of step t + 1."""
    for module in instance("model", model, nn.Module).modules():
        detach_module(module)


def detach_module(module: nn.Module) -> None:
    """Detach the states of one module, without those of modules in it."""
    if isinstance(module, Stateful):
        module.detach()
        return
    for name in state_names(module):
        setattr(module, name, map_tensors(Tensor.detach, getattr(module, name)))


def state_tensors(module: nn.Module) -> list[Tensor]:
    """Return the tensors in the states of one module."""
    tensors: list[Tensor] = []
    for name in state_names(module):
        map_tensors(tensors.append, getattr(module, name))
    return tensors


def map_tensors(function: Callable[[Tensor], Any], state: Any) -> Any:
    """Return a state with `function` applied to its tensors, in new tuples, named tuples, lists and dictionaries."""
    if isinstance(state, Tensor):
        return function(state)
    if isinstance(state, tuple) and hasattr(state, "_fields"):
        return type(state)(*(map_tensors(function, s) for s in state))
    if isinstance(state, list | tuple):
        return type(state)(map_tensors(function, s) for s in state)
    if isinstance(state, dict):
        return {key: map_tensors(function, s) for key, s in state.items()}
    return state


def _norm_folds(norm: nn.Module) -> str | None:
    own = "normalises over the batch in a way of its own"
    return own if isinstance(norm, torch.jit.ScriptModule) or own_forward(norm, role_of(type(norm)).of) else None  # pyright: ignore


def _other_folds(module: Any) -> str | None:
    if isinstance(module, torch.jit.ScriptModule):
        return "is scripted, so that it cannot be looked into"
    if isinstance(module, _InstanceNorm) and module.training and module.track_running_stats:
        return "keeps running statistics"
    hooks = module._forward_pre_hooks.values()
    spectral = isinstance(module, _SpectralNorm) or any(isinstance(hook, SpectralNorm) for hook in hooks)
    return "changes its estimate in every call" if spectral and module.training else None


_EXPLICIT = (
    "is recurrent and keeps no state itself: put it into a sltt.Stateful that keeps its state; or, if it reads the "
    "tokens of one time step and forgets them, say so: sltt.register(nn.GRU, states=[])"
)
_COPIED = "runs each step on a new copy of the model, which would forget the state: use DistributedDataParallel"
_OTHER = Role("other", folds=_other_folds)
set_role(_BatchNorm, Role("norm", folds=_norm_folds, stepwise=True, of=_BatchNorm))
for _kind in (nn.LayerNorm, nn.GroupNorm, _InstanceNorm):
    set_role(_kind, Role("norm", folds=_other_folds))
for _kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d):
    set_role(_kind, Role("weight", folds=_other_folds, of=_kind))
for _kind in (nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d):
    set_role(_kind, Role("pool", of=_kind))
set_role(nn.Sequential, Role("sequence", folds=_other_folds, of=nn.Sequential))
for _kind in (nn.RNNBase, nn.RNNCellBase):
    set_role(_kind, Role("other", check=lambda *call: None if call[-1] else _EXPLICIT, folds=lambda _: "is recurrent"))
set_role(nn.DataParallel, Role("other", check=lambda *_: _COPIED))
register(Stateful, lambda m: m.states, reset=lambda m: m.reset(), spikes=lambda m: m.spikes)


def _describe(x: Tensor) -> str:
    return f"{list(x.shape)} ({str(x.dtype).removeprefix('torch.')}, {x.device})"
