"""Neurons of other libraries as they are, in the kernels of ours: on their own states, with their own constants.

A neuron whose equation ours has runs by the neuron that `convert` would put in its place. Its states are those that its
own code would leave, up to rounding. What has no counterpart here, or has changed so, runs by its own code.
"""

from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sltt._torch import transforms_active
from sltt.interop.conversion import layer_title
from sltt.neurons import CubaLIF, IntegrateAndFire
from sltt.sequence.hooks import count_hooks, own_forward

Translate = Callable[[Any], Any]
Read = Callable[[Any], Iterable[Any]]
_reasons: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()  # why the own code of a neuron runs


class Adapter:
    """Runs time steps of a neuron of another library by one of ours.

    Args:
        module: the neuron.
        translate: gives the neuron of ours, or raises ConversionError.
        read: gives what the translation rests on, which may change before each call.
    """

    ours: Any = None  # the neuron
    half_state = True  # theirs have the type of the input; else float32, in 16 bits too

    def __init__(self, module: Any, translate: Translate, read: Read):
        self.module, self.translate, self.read = module, translate, read
        self._seen: Any = None
        self.find_ours()

    def find_ours(self) -> bool:
        """Return whether a neuron of ours has the equation, with the constants of now."""
        now = [_value(v) if isinstance(v, Tensor) else v for v in self.read(self.module)]
        if now != self._seen:
            try:
                self.ours = self.translate(self.module)
                _reasons.pop(self.module, None)
            except (ValueError, ArithmeticError, RuntimeError) as reason:  # also of a constant that ours do not take
                self.ours, _reasons[self.module] = None, str(reason)
            self._seen = now
            if self.ours is not None:
                self.ours.half_state = self.half_state
                self._run = self.ours.prepare()
        return self.ours is not None

    def run(self, x: Tensor, steps: int, cut: bool, states: Iterable[Any], how: Any = None) -> Tensor | None:
        """Run the time steps in x [n·B, ...] from states; return None where only the neuron's own code does it.

        The states, each None or of no elements before the first step, are then those of `ours`, which `how` runs.
        """
        if not self.find_ours() or not x.is_floating_point():
            return None
        shape, first = (len(x) // steps, *x.shape[1:]), self.ours.first_states()
        dtype = x.dtype if self.half_state else torch.promote_types(x.dtype, torch.float32)
        for name, state in zip(self.ours.states, states, strict=True):
            if not isinstance(state, Tensor) or not state.numel():
                state = None if not isinstance(state, float) or state == first[name] else x.new_full(shape, state)
            elif state.shape != shape or state.dtype != dtype or state.device != x.device:
                return None
            setattr(self.ours, name, state)
        return (how or self._run)(x, steps, cut)


class AfterReset(Adapter):
    """A neuron that keeps its states in attributes, named in the order of ours, after the reset as ours do."""

    def __init__(self, module: Any, states: str, translate: Translate, read: Read):
        super().__init__(module, translate, read)
        self.states = states.split()

    def advance_normalised(self, norm: Any, x: Tensor, bias: Tensor | None, steps: int, cut: bool) -> Tensor | None:
        """Run the time steps in x behind a BatchNorm as `Neuron.advance_normalised` does."""
        return self(x, steps, cut, lambda *_: self.ours.advance_normalised(norm, x, bias, steps, cut))

    def __call__(self, x: Tensor, steps: int, cut: bool, how: Any = None) -> Tensor | None:
        spikes = self.run(x, steps, cut, [getattr(self.module, name) for name in self.states], how)
        if spikes is not None:
            self.leave()
        return spikes

    def leave(self) -> None:
        """Give the module the states of ours."""
        for name, own in zip(self.states, self.ours.states, strict=True):
            setattr(self.module, name, getattr(self.ours, own))
            setattr(self.ours, own, None)


class BeforeReset(AfterReset):
    """A neuron that keeps u, first of its states, which the next time step resets: v = u − r s, or v = (1 − s) u."""

    _left: Tensor | None = None  # the u that was left, its version, and the v behind it
    _version: int
    _v: Tensor

    def __call__(self, x: Tensor, steps: int, cut: bool, how: Any = None) -> Tensor | None:
        if not getattr(self.module, "reset_delay", True):  # snnTorch's, in the time step of the spike
            return super().__call__(x, steps, cut, how)
        seen, (name, *more) = self._seen, self.states
        if not self.find_ours() or (how and self.ours.v_reset is not None):
            return None
        if seen is not self._seen:  # v is another with another threshold
            self._left = None
        u, others = getattr(self.module, name), [getattr(self.module, other) for other in more]
        last, first, ours = x[-(len(x) // steps) :], [], self.ours
        amount = ours.v_threshold if ours.subtract is None else ours.subtract
        v = self._after_reset(u, amount) if u.numel() else None
        if ours.v_reset is not None and steps > 1:  # v is zero where the last step fires: its u is charged apart
            if (spikes := self.run(x[: -len(last)], steps - 1, cut, [v])) is None:
                return None
            first, v, x, steps = [spikes], ours.v.detach() if cut else ours.v, last, 1
        if (spikes := self.run(x, steps, cut, [v, *others], how)) is None:
            return None
        self._v = ours.v
        if ours.v_reset is None:
            left = torch.add(ours.v, spikes.detach()[-len(last) :], alpha=amount)
        else:
            left = ours.decay() * (0.0 if v is None else v) + last
        self.leave()
        self._left, self._version = left, left._version
        setattr(self.module, name, left)
        return torch.cat([*first, spikes]) if first else spikes

    def _after_reset(self, u: Tensor, amount: float) -> Tensor:
        left = self._left
        if left is not None and u.data_ptr() == left.data_ptr() and u._version == self._version:
            if u is left:
                return self._v
            if not u.requires_grad:
                return self._v.detach()
        fires = self.ours.surrogate.fires(u.detach() - self.ours.v_threshold).to(u.dtype)
        return u - (amount if self.ours.v_reset is None else u) * fires


def find_own_code(model: nn.Module) -> list[str]:
    """Name the neurons of other libraries that their own code has run, with the reason."""
    return [f"{layer_title(name, m)} {_reasons[m]}" for name, m in model.named_modules() if m in _reasons]


def _value(constant: Tensor) -> Any:
    """Return what tells a change of a constant; on another device, to read the number would wait."""
    readable = constant.is_cpu and constant.numel() == 1
    return constant.item() if readable else (id(constant), constant._version), constant.requires_grad


def make_adapter(kind: type[Adapter], module: Any, *args: Any) -> Any:
    """Return an adapter of a module; None where its own code runs: it is changed, or of another equation."""
    cls, _reasons[module] = type(module), "has hooks or code of its own"
    if own_forward(module, cls) or any(map(count_hooks, module.children())) or transforms_active():
        return None
    if any(callable(getattr(cls, name, None)) for name in vars(module) if name != "forward"):
        return None  # a method of the user's own
    adapter = kind(module, *args)
    return adapter if isinstance(adapter.ours, IntegrateAndFire | CubaLIF) else None
