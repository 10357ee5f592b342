"""The T time steps of a sequence, and a model that runs them.

Shapes: T time steps, B samples, C classes; a call of the network takes n time steps.
"""

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sltt._torch import _current_graph_task_id, is_compiled
from sltt.checks import instance, whole_number
from sltt.sequence.fold import ONE_STEP, Clock, Fold, clock_of, clocked
from sltt.sequence.hooks import hooked
from sltt.sequence.modes import evaluating
from sltt.sequence.spikes import spiking_layers
from sltt.sequence.state import Stateful, check_steps, detach_module, reset, state_names, state_tensors


@dataclass(frozen=True)
class Sequence:
    """T time steps of input: x [T, B, ...], or the same image [B, ...] T times.

    Attributes:
        x: the input.
        steps: T.
        static: x is shown at every step.
        damaged: whether a value of x is NaN or infinite, not looked at yet since that waits for the device; None if it
            is finite.
    """

    x: Tensor
    steps: int
    static: bool
    damaged: Tensor | None = None

    @property
    def batch(self) -> int:
        """B."""
        return self.x.shape[0 if self.static else 1]

    def input(self, steps: range) -> Tensor:
        """The input of time steps, folded into the batch dimension: [n·B, ...]."""
        if self.static:
            return self.x if len(steps) == 1 else self.x.repeat(len(steps), *[1] * (self.x.ndim - 1))
        return self.x[steps.start] if len(steps) == 1 else self.x[steps.start : steps.stop].flatten(0, 1)

    def mean(self) -> Tensor:
        """The mean input over time, [B, ...]."""
        if self.static:
            return self.x
        return self.x.mean(0) if self.x.is_floating_point() else self.x.mean(0, dtype=torch.get_default_dtype())

    def result(self, value: Tensor) -> Tensor:
        """What is computed from the input: NaN in place of `value` if the input is damaged."""
        return value if self.damaged is None else value.masked_fill(self.damaged, math.nan)


class Network:
    """A model in the middle of a sequence.

    Args:
        model: maps the input of one time step [B, ...] to logits [B, C].
        batch: B.

    Attributes:
        watched: the next call is looked at.
    """

    def __init__(self, model: nn.Module, batch: int):
        self.model = model
        self.batch = batch
        self.watched = False
        self.clock = Clock()
        self.keepers = [m for m in model.modules() if state_names(m)]

    @property
    def samples(self) -> int:
        """n·B, in the call that is in progress."""
        return self.batch * self.clock.fold.steps

    def __call__(self, x: Tensor, fold: Fold = ONE_STEP) -> Tensor:
        """Run time steps in one call of the model: [n·B, ...] to logits [n, B, C]."""
        self.clock.calls += 1
        self.clock.fold = fold
        with _Attention(self) if self.watched else nullcontext():
            logits = self.model(x)
        if not isinstance(logits, Tensor):
            raise ValueError(
                f"expected the model to return the logits [B, C] of one time step, got {type(logits).__name__}; "
                "keep the state in the modules and return the output only"
            )
        if self.watched:
            self.watched = False
            _known.add(self.model)
        if fold.steps == 1:
            if logits.shape[:1] != x.shape[:1]:
                raise ValueError(
                    f"expected logits [{len(x)}, C] of the {len(x)} samples in a time step, got "
                    f"{list(logits.shape)}: an input is [T, B, ...], time first; [B, ...] without time needs steps=T"
                )
            return logits.unsqueeze(0)
        if logits.shape[:1] != (fold.steps * self.batch,):
            raise ValueError(
                f"expected logits of {self.batch} samples in each of {fold.steps} folded time steps, "
                f"[{fold.steps * self.batch}, C], got {list(logits.shape)}; a layer does not take the steps as "
                "samples: use fold=1"
            )
        return logits.unflatten(0, (fold.steps, self.batch))

    def largest_state(self) -> int:
        """Elements of the largest tensor in the states."""
        return max((state.numel() for module in self.keepers for state in state_tensors(module)), default=0)

    def detach(self) -> None:
        """Cut the graph behind the states: v[t] becomes a constant of step t + 1."""
        for module in self.keepers:
            detach_module(module)


@contextmanager
def running(model: nn.Module, sequence: Sequence) -> Iterator[Network]:
    """A model, checked and reset, for the steps of a sequence; it is reset afterwards, also after an exception.

    Raises ValueError if the model is in a sequence already. A part of it may run a sequence of its own.
    """
    with _lock:
        if any(module in _running for module in model.modules()):
            raise ValueError(
                f"{type(model).__name__} is in the middle of another sequence, and its neurons keep one state: call it "
                "after that sequence, or on a copy that was made before it: copy.deepcopy(model)"
            )
        _running.add(model)
    try:
        with _prepared(model, sequence) as network:
            yield network
    finally:
        _running.discard(model)


_lock = threading.Lock()
_running: WeakSet[nn.Module] = WeakSet()


@contextmanager
def _prepared(model: nn.Module, sequence: Sequence) -> Iterator[Network]:
    check_steps(model, sequence.batch)
    network = Network(model, sequence.batch)
    modules = [m for m in model.modules() if isinstance(m, Stateful)]
    neurons = spiking_layers(model)
    once = (m.register_forward_pre_hook(OncePerCall(n, network.clock, NEURON)) for n, m in neurons.items())
    attending = (
        m.register_forward_pre_hook(partial(_among_tokens, name, network), with_kwargs=True)
        for name, m in model.named_modules()
        if isinstance(m, nn.MultiheadAttention)
    )
    reset(model)
    try:
        with clocked({*modules, *neurons.values()}, network.clock), hooked(*once, *attending):
            if model not in _known and any(is_compiled(module) for module in model.modules()):
                _check_compiled(network, sequence.input(range(1))[:1])
                _known.add(model)
            network.watched = model not in _known
            yield network
    finally:
        reset(model)


_known: WeakSet[nn.Module] = WeakSet()  # models that have run a step in which hooks, or function modes, run


def _check_compiled(network: Network, x: Tensor) -> None:
    """Run a time step of one sample of a compiled model without the compiler: hooks do not run in compiled code.

    In evaluation mode, which changes no statistics and draws no random numbers.
    """
    with evaluating(network.model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        network(x)
    torch.clear_autocast_cache()  # casts of weights without a graph would cut them off in the steps that follow
    reset(network.model)


NEURON = "runs twice in a time step, and has one membrane potential: use a neuron of its own for each place"


class OncePerCall:
    """A forward pre-hook: raises ValueError with `problem` where a module runs twice in a call of the network."""

    def __init__(self, name: str, clock: Clock, problem: str):
        self.name = name
        self.clock = clock
        self.problem = problem
        self.seen = 0

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        # a sequence within the sequence has a clock of its own; in a backward, the neuron itself says what is wrong
        if clock_of(module) is not self.clock or torch.compiler.is_compiling() or in_backward():
            return
        if self.seen == self.clock.calls:
            raise ValueError(f"{self.name or 'the model'} ({type(module).__name__}) {self.problem}")
        self.seen = self.clock.calls


def _among_tokens(name: str, network: Network, module: Any, args: Any, kwargs: Any) -> None:
    """A forward pre-hook of attention: raises ValueError where it is among samples or time steps."""
    query: Tensor = args[0] if args else kwargs["query"]
    tokens = int(query.ndim == 3 and module.batch_first)
    what = f"{name or 'the model'} ({type(module).__name__}) attends over dimension {tokens} of its input"
    _check_tokens(query, tokens, network, what, "give it tokens [B, N, E] and make it with batch_first=True")


class _Attention(TorchFunctionMode):
    """As `_among_tokens`, in calls of `F.scaled_dot_product_attention`, whose tokens are the last but one dimension."""

    def __init__(self, network: Network):
        super().__init__()
        self.network = network

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query: Tensor = args[0] if args else kwargs["query"]
            tokens = query.ndim - 2
            what = f"scaled_dot_product_attention attends over dimension {tokens} of its query"
            _check_tokens(query, tokens, self.network, what, "give it queries, keys and values [B, heads, N, E]")
        return func(*args, **kwargs)


def _check_tokens(query: Tensor, tokens: int, network: Network, what: str, remedy: str) -> None:
    """Raise ValueError where `tokens`, a dimension of a query, is that of the samples.

    It has so many elements then, and no other dimension but the features has them.
    """
    samples, others = network.samples, math.prod(query.shape[:-1]) // max(1, query.shape[tokens])
    if query.shape[tokens] == samples and others % samples != 0:
        raise ValueError(
            f"{what} {list(query.shape)}, the {samples} samples of a time step: {remedy}. Attention over time has no "
            "step by step form: let neurons carry the past, or train without a rule"
        )


def in_backward() -> bool:
    """Whether autograd runs a backward in this thread, in which a checkpoint may run a forward again."""
    return _current_graph_task_id() != -1


def time_steps(x: Tensor, steps: int | None, target: Any = None) -> Sequence:
    """Check an input, and its batch size against the target's; return it as a sequence of time steps."""
    static = steps is not None
    form = "[B, ...] with steps=T" if static else "[T, B, ...], time first"
    instance("x", x, Tensor)
    if x.ndim < 2:
        raise ValueError(f"expected input {form}, got shape {list(x.shape)}")
    length = x.shape[0] if steps is None else whole_number("steps", steps, least=1)
    if length < 1:
        raise ValueError(f"expected at least one time step, got an input of shape {list(x.shape)}")
    sequence = Sequence(x, length, static)
    if isinstance(target, Tensor) and target.ndim and target.shape[0] != sequence.batch:
        raise ValueError(
            f"expected a target for each of the {sequence.batch} samples of an input {form}, "
            f"got input {list(x.shape)} and target {list(target.shape)}"
            + ("; for a static input [B, ...] say steps=T" if not static and len(target) == len(x) else "")
        )
    if x.device.type == "cpu":
        check_input(x)
    elif x.is_floating_point():
        return Sequence(x, length, static, ~_finite(x))
    return sequence


def check_input(x: Tensor) -> None:
    """Raise ValueError for a value that is NaN or infinite; waits for the device of x.

    A neuron would swallow a NaN: it compares false with the threshold, so the neuron is silent and the loss finite.
    """
    if x.is_floating_point() and not _finite(x):
        bad = x.numel() - int(x.isfinite().sum())
        raise ValueError(
            f"expected a finite input, got {bad} NaN or infinite of {x.numel()} values: look for them in the data"
        )


def _finite(x: Tensor) -> Tensor:
    """Whether all values are finite; `x.isfinite()` would take more memory than x, at the peak of a small network."""
    if not x.numel():
        return torch.ones((), dtype=torch.bool, device=x.device)
    low, high = x.detach().aminmax()  # NaN if a value is
    return low.isfinite() & high.isfinite()
