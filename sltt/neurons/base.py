"""A neuron is a pure function of input and states; the module here keeps the states, and runs the function fused."""

import functools
import inspect
from collections.abc import Callable, Hashable, Mapping
from types import FunctionType, ModuleType
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from sltt._torch import transforms_active
from sltt.checks import instance
from sltt.frozen import arguments_of
from sltt.kernels import CustomStep, NeuronStep, custom_step, neuron_step, normed_step, without_modes
from sltt.neurons.inspection import emits_bits
from sltt.sequence.hooks import own_forward
from sltt.sequence.reach import variables_of
from sltt.sequence.spikes import show
from sltt.sequence.state import Role, Stateful, set_role
from sltt.sequence.steps import in_backward
from sltt.surrogates import Surrogate


class Neuron(Stateful):
    """A layer of neurons: a pure function `step`, and a class that names its states and holds its parameters.

        class Adaptive(sltt.Neuron):
            states = ("v", "a")

            def __init__(self, decay=0.5):
                super().__init__()
                self.decay = decay
                self.rise = nn.Parameter(torch.tensor(0.2))

            @staticmethod
            def step(x, v, a, *, decay, rise):
                u = decay * v + x
                s = sltt.surrogates.Triangle()(u - 1 - rise * a)
                return s, u - s, 0.9 * a + s

    The library fuses `step` into one pass forward and one backward. The backward runs `step` again from its input and
    states. Rules can fold its time steps and cut its gradient, and its spikes are stored as bits. `step` is checked
    when it first runs.

    step(x, *states, **arguments) -> (spikes, *states)
        A static method, elementwise: each result has the shape and type of x [B, ...]. Compute the spikes by a
        surrogate, so that they have a gradient. Spikes that are a surrogate's unchanged result are stored as bits.
    arguments
        Each keyword argument of `step` is the attribute of the same name, or the result of a method of that name.
        Numbers, flags and surrogates are compiled in. Tensors have no dimension, or one value for each channel, [C].
        A method may be called more than once in a time step, and gives the same each time.

    An attribute or a method `decay`, the λ of the membrane potential, tells OTTT how fast traces decay. The traces are
    exact if ∂v[t]/∂v[t−1] = λ with the spikes as constants, and ∂v[t]/∂x[t] does not change over time.

    Attributes:
        states: names of the states, in the order of `step`. Each is None before the first step of a sequence.
        start: value of the states before the first step: a number, or one for each name.
        half_state: keep states in the input's type also where that has 16 bits; else in float32 at least.

    Raises ValueError at the first step, naming what is wrong with the function.
    """

    states: ClassVar[tuple[str, ...]] = ("v",)
    step: ClassVar[Callable[..., tuple[Tensor, ...]]]
    start: float | Mapping[str, float] = 0.0
    half_state: bool = False
    spikes = True
    watched = 0  # how many see the spikes

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        names = () if isinstance(cls.states, str) else cls.states  # which is refused later
        if taken := [n for n in names if n == "step" or hasattr(Neuron, n) or hasattr(nn.Identity(), n)]:
            raise ValueError(f"{cls.__name__} has a state {taken[0]!r}, which modules have already: take another name")

    def forward(self, x: Tensor) -> Tensor:
        """Input current x [B, ...] of one time step to spikes [B, ...]."""
        return self.advance(x)

    def advance(self, x: Tensor, steps: int = 1, cut: bool = False) -> Tensor:
        """Run several time steps, one after the other in x [n·B, ...]; with `cut`, no gradient flows between them."""
        if torch.compiler.is_compiling() or transforms_active():
            spikes = self._plain_steps(x, self._prepare_states(x, steps), steps, cut)
            if torch.compiler.is_compiling() and self.watched:
                show(self, spikes)
            return spikes
        with without_modes():  # one would be called for each attribute of a tensor
            check_forward(self)
            self._prepare_states(x, steps)
            return self.fused_steps(x, steps, cut)

    def prepare(self) -> Callable[[Tensor, int, bool], Tensor]:
        """Return what `advance` does in a run."""
        return self.advance

    def advance_normalised(self, norm: Any, x: Tensor, bias: Tensor | None, steps: int, cut: bool) -> Tensor | None:
        """Run the time steps in x behind a BatchNorm by a kernel that also normalises; return None without one.

        `bias`, if given, stands for the norm's, whose values it has.
        """
        self._prepare_states(x, steps)
        (step, learned), neuron = self.kernel_step(x), cast(Any, self)
        results = None if step is None else normed_step(step, neuron.v, x, norm, bias, learned, steps, cut)
        if results is None:
            return None
        spikes, neuron.v = results
        return spikes

    def kernel_step(self, x: Tensor | None = None) -> tuple[NeuronStep | None, Tensor | None]:
        """Return the constants for kernels of `LIF`, None where they do not run these neurons; and what is learned."""
        return None, None

    def _prepare_states(self, x: Tensor, steps: int) -> torch.dtype:
        """Make the states before the first step of a sequence, and check them before the others; their type."""
        first = split_steps(x, steps)
        dtype = self.state_type(x)
        for name in self.states:
            if getattr(self, name) is None:
                setattr(self, name, torch.full_like(first, self.first_states()[name], dtype=dtype))
            else:
                self.check_state(name, first, dtype)
        return dtype

    def state_type(self, x: Tensor) -> torch.dtype:
        """Return the type of the states for an input x."""
        instance("x", x, Tensor)
        return x.dtype if self.half_state else torch.promote_types(x.dtype, torch.float32)

    def first_states(self) -> dict[str, float]:
        """Return the value of each state before the first step."""
        start: dict[str, float]
        start = dict(self.start) if isinstance(self.start, Mapping) else dict.fromkeys(self.states, self.start)
        if start.keys() != {*self.states} or not all(isinstance(value, int | float) for value in start.values()):
            expected = f"a number, or one for each state ({', '.join(self.states)})"
            raise ValueError(f"{type(self).__name__} has start = {self.start!r}: expected {expected}")
        return {name: start[name] for name in self.states}

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of `step`."""
        names = argument_names(type(self))
        if missing := [name for name in names if not hasattr(self, name)]:
            kind, name = type(self).__name__, missing[0]
            raise ValueError(f"{kind}.step takes {name}, and the neuron has none: set self.{name}, or define a method")
        values = {name: getattr(self, name) for name in names}
        return {name: value() if inspect.ismethod(value) else value for name, value in values.items()}

    def _fit_arguments(self, x: Tensor, dtype: torch.dtype) -> dict[str, Any]:
        """Return the arguments, with tensors in the states' type and ready to be broadcast to x."""
        return {
            name: self._fit(name, value.to(dtype), x) if isinstance(value, Tensor) else value
            for name, value in self.arguments().items()
        }

    def _fit(self, name: str, value: Tensor, x: Tensor) -> Tensor:
        if value.numel() == 1:
            return value.reshape(())
        if x.ndim < 2 or value.shape != x.shape[1:2]:
            has = f"{type(self).__name__} has {name} of shape {list(value.shape)} for an input {list(x.shape)}"
            raise ValueError(f"{has}: expected one number, or one for each channel, {list(x.shape[1:2])}")
        return value.view(-1, *[1] * (x.ndim - 2))

    def fused_steps(self, x: Tensor, steps: int, cut: bool) -> Tensor:
        """Run the time steps in x by a kernel, from the states on."""
        constants, learned = self.kernel_step(x)
        if constants is not None:
            neuron = cast(Any, self)
            spikes, neuron.v = neuron_step(constants, neuron.v, x, learned, steps, cut)
            return spikes
        step, parameters = self.as_function(x)
        bits = emits_bits(type(self), step)
        states = tuple(getattr(self, name) for name in self.states)
        spikes, states = custom_step(step, bits, x, states, parameters, steps, cut)
        for name, state in zip(self.states, states, strict=True):
            setattr(self, name, state)
        return spikes

    def as_function(self, x: Tensor) -> tuple[CustomStep, tuple[Tensor, ...]]:
        """Return `step` with its constants, and its parameters, ready for an input x."""
        named = self._fit_arguments(x, self.state_type(x))
        tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
        constants = tuple((name, value) for name, value in named.items() if name not in tensors)
        if unknown := [name for name, value in constants if not isinstance(value, Hashable)]:
            has = f"{type(self).__name__} has {unknown[0]} = {getattr(self, unknown[0])!r}"
            raise ValueError(f"{has}: expected a number, a surrogate or a tensor")
        parameters = tuple((name, value.ndim > 0) for name, value in tensors.items())
        step = type(self).step
        reads = _numbers_read(step, *(value for _, value in constants if isinstance(value, Surrogate)))
        return CustomStep(step, len(self.states), parameters, constants, reads), tuple(tensors.values())

    def _plain_steps(self, x: Tensor, dtype: torch.dtype, steps: int, cut: bool) -> Tensor:
        """Run the plain function in one graph with the layers around, which differentiate and fuse it themselves."""
        named, spikes = self._fit_arguments(x, dtype), []
        states = [getattr(self, name) for name in self.states]
        for x_t in x.chunk(steps) if steps > 1 else (x,):  # exporters have no split into one
            if cut and spikes:
                states = [state.detach() for state in states]
            s, *states = self.step(x_t.to(dtype), *states, **named)
            spikes.append(s.to(x.dtype))
        for name, state in zip(self.states, states, strict=True):
            setattr(self, name, state)
        return spikes[0] if steps == 1 else torch.cat(spikes)

    def extra_repr(self) -> str:
        settings = {name: getattr(self, name, None) for name in arguments_of(type(self))}
        shown = {name: value for name, value in settings.items() if isinstance(value, int | float | Surrogate)}
        learned = {name for name in shown if isinstance(getattr(type(self), name, None), property)}
        return ", ".join(f"{name}={f'{v:.4g}' if name in learned else v}" for name, v in shown.items())


def _advance_of(neuron: Neuron) -> Callable[[Tensor, int, bool], Tensor] | None:
    return neuron.prepare() if neuron.spikes and not own_forward(neuron, Neuron) and not transforms_active() else None


_ROLE = Role("keeper", lambda m: m.states, lambda m: m.reset(), lambda m: m.spikes, advance=_advance_of, of=Neuron)
set_role(Neuron, _ROLE)


def split_steps(x: Tensor, steps: int) -> Tensor:
    """Return the first of the time steps in x [n·B, ...]; raise ValueError where they are not its first dimension."""
    if steps == 1:
        return x
    if len(x) % steps:
        raise ValueError(f"neurons got {list(x.shape)} for {steps} time steps, folded into the samples; use fold=1")
    return x[: len(x) // steps]


def check_forward(neuron: nn.Module) -> None:
    """Raise RuntimeError where neurons run in a backward pass."""
    if in_backward():
        reason = "torch.utils.checkpoint repeats a forward whose state has moved on, and would give wrong gradients"
        remedy = "Leave the neurons out of what is checkpointed."
        raise RuntimeError(f"{type(neuron).__name__} ran inside a backward pass: {reason}. {remedy}")


_OURS = "torch", "sltt", "builtins", "abc"  # packages whose functions and classes read no numbers of users


def _numbers_read(*values: Any) -> tuple[Any, ...]:
    """Return the numbers that users' functions and surrogates read from outside: they are compiled in."""
    numbers, waiting, seen = [], [*values], set[int]()
    while waiting:
        value = waiting.pop()
        if isinstance(value, int | float | str | bool | list | tuple | dict):
            numbers.append(repr(value))
        elif id(value) not in seen:
            seen.add(id(value))
            kinds = value.__mro__ if isinstance(value, type) else type(value).__mro__
            own = [kind for kind in kinds if kind.__module__.partition(".")[0] not in _OURS]
            if isinstance(value, FunctionType):
                waiting += variables_of(value) if (value.__module__ or "").partition(".")[0] not in _OURS else ()
            elif isinstance(value, ModuleType):
                waiting += [v for v in vars(value).values() if isinstance(v, int | float)]
            elif own:
                waiting += [read for one in (*own, value) for read in getattr(one, "__dict__", {}).values()]
    return tuple(numbers)


@functools.cache
def takes_any(kind: type[Neuron]) -> bool:
    """Return whether a class's `step` takes keyword arguments of any name."""
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(kind.step).parameters.values())


@functools.cache
def argument_names(kind: type[Neuron]) -> tuple[str, ...]:
    """Return the keyword arguments of a class's `step`; raises ValueError if it is no function of x and the states."""
    if isinstance(kind.states, str):
        raise ValueError(f"{kind.__name__} has states = {kind.states!r}: write a tuple of names, ({kind.states!r},)")
    if not kind.states:
        raise ValueError(f"{kind.__name__} has no states: what keeps none is an nn.Module that calls a surrogate")
    function = inspect.getattr_static(kind, "step", None)
    if not isinstance(function, staticmethod):
        expected = f"step(x, {', '.join(kind.states)}, *, …) -> (spikes, new states), a @staticmethod"
        raise ValueError(f"{kind.__name__} needs a function {expected}: it computes from its arguments alone")
    parameters = inspect.signature(function.__func__).parameters.values()
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if positional[1:] != list(kind.states):
        expected = f"x and the states {', '.join(kind.states)}; others are keyword arguments, behind a *"
        raise ValueError(f"{kind.__name__}.step takes ({', '.join(positional)}), expected {expected}")
    return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
