"""Neurons of other libraries as they are, in the kernels of ours: on their own states, with their own constants.

A neuron whose equation ours has runs by the neuron that `convert` would put in its place. Its states are those that its
own code would leave, up to rounding. What has no counterpart here, or has changed so, runs by its own code.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sltt._torch import transforms_active
from sltt.interop.conversion import ConversionError
from sltt.neurons import IntegrateAndFire
from sltt.sequence.hooks import count_hooks, own_forward

Read = Callable[[Any], tuple[Any, ...]]


class Adapter:
    """Runs time steps of a neuron of another library by one of ours.

    Args:
        module: the neuron; `state` is the name of its membrane potential.
        translate: gives the neuron of ours, or raises ConversionError.
        read: gives what the translation rests on, which may change before each call.
        before_reset: the state is the potential before the reset, of a soft one.
    """

    def __init__(self, module: Any, state: str, translate: Callable[[Any], Any], read: Read, before_reset: bool):
        self.module, self.state, self.translate, self.read = module, state, translate, read
        self.before_reset = before_reset
        self._seen: Any = None
        self._given: Tensor | None = None  # the state that was left, with `ours.v` the potential behind it
        self.find_ours()

    def find_ours(self) -> bool:
        """Return whether a neuron of ours has the equation, with the constants of now."""
        now = tuple((id(v), v._version) if isinstance(v, Tensor) else v for v in self.read(self.module))
        if now != self._seen:
            try:
                self.ours = self.translate(self.module)
                if not isinstance(self.ours, IntegrateAndFire) or (self.before_reset and self.ours.v_reset is not None):
                    self.ours = None
            except ConversionError:
                self.ours = None
            self._seen, self._given = now, None
            if self.ours is not None:
                self.ours.half_state = True  # theirs have the type of the input
                self._run = self.ours.prepare()
                self._amount = self.ours.v_threshold if self.ours.subtract is None else self.ours.subtract
        return self.ours is not None

    def __call__(self, x: Tensor, steps: int, cut: bool, *_: Any) -> Tensor | None:
        """Run the time steps in x [n·B, ...]; return None where only the neuron's own code does it."""
        if not self.find_ours() or not x.is_floating_point():
            return None
        ours: Any = self.ours
        state, shape = getattr(self.module, self.state), (len(x) // steps, *x.shape[1:])
        if not isinstance(state, Tensor) or not state.numel():
            ours.v = None if not isinstance(state, float) or state == ours.start else x.new_full(shape, state)
        elif state.shape != shape or state.dtype != x.dtype or state.device != x.device:
            return None
        elif self.before_reset:
            ours.v = self._after_reset(state)
        else:
            ours.v = state
        spikes = self._run(x, steps, cut)
        given = ours.v
        if self.before_reset:
            given = self._given = torch.add(given, spikes.detach()[-len(given) :], alpha=self._amount)
        else:
            ours.v = None
        setattr(self.module, self.state, given)
        return spikes

    def _after_reset(self, state: Tensor) -> Tensor:
        """Return v = u − r s of the state u; that of the step before is at hand, unless the state was changed."""
        ours, given = self.ours, self._given
        if given is not None and state.data_ptr() == given.data_ptr() and state._version == given._version:
            if state is given:
                return ours.v
            if not state.requires_grad:
                return ours.v.detach()
        return state - self._amount * ours.surrogate.fires(state.detach() - ours.v_threshold).to(state.dtype)


def adapter_of(state: str, translate: Callable[[Any], Any], read: Read, before_reset: bool = False) -> Any:
    """Return what gives a role its `advance`: an `Adapter` of a module, or None where its own code runs."""

    def prepare(module: Any) -> Adapter | None:
        kind = type(module)
        if own_forward(module, kind) or any(map(count_hooks, module.children())) or transforms_active():
            return None
        if any(callable(getattr(kind, name, None)) for name in vars(module) if name != "forward"):
            return None  # a method of the user's own
        try:
            adapter = Adapter(module, state, translate, read, before_reset)
        except AttributeError:  # another class of the library, without these constants
            return None
        return adapter if adapter.ours is not None else None

    return prepare
