"""Choose how many time steps go into one call of the network: from the shapes of its layers, never from a clock.

A matrix product of few rows (samples × pixels) takes the time of one with many, since it reads its whole weight. So
several time steps share a call, until the layers' products have some 2,048 rows. A network whose products have as many
in one time step runs step by step.

Steps share a call only where that changes no result. Whether it does is found once a network, on a copy: two time steps
of two samples, with random spikes for those of the neurons, run one by one and in one call.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sltt import kernels
from sltt._torch import TorchDispatchMode, _disable_current_modes, _DropoutNd
from sltt.dropout import Dropout
from sltt.sequence.copies import copied
from sltt.sequence.layout import Layer, Layout
from sltt.sequence.once import is_sharded
from sltt.sequence.run import Run
from sltt.sequence.spikes import SEES_FOLDS
from sltt.sequence.step import NEURON, Step
from sltt.sequence.steps import Sequence

ROWS = 2048  # of a layer's matrix product in a call; more save no time
ROOM = 2**24  # bytes that the further steps of a call may take, or half of those of the weights
_SHARED_FROM = 2**16  # elements of a parameter that the copy shares
_STEPS, _SAMPLES = 2, 2


class Fold(NamedTuple):
    """Time steps in a call of the network.

    Attributes:
        trained: with a graph.
        forward: without one.
        why: why it is one; None if the network's layers are large, or if there are several.
    """

    trained: int = 1
    forward: int = 1
    why: str | None = None


_folds: WeakKeyDictionary[nn.Module, dict[Any, Fold]] = WeakKeyDictionary()


def choose_fold(run: Run) -> Fold:
    """Return how many time steps of a sequence share a call of its network, which is at its first one."""
    model, sequence = run.model, run.sequence
    x = sequence.input(range(1))
    modules = tuple((type(m), m.training, _hooks(m)) for m in run.layout.layers)
    key = x.shape, x.dtype, x.device, sequence.steps, modules
    if sequence.steps == 1 or any(is_lazy(p) for p in model.parameters()):  # it has no weights before its first batch
        return Fold()
    found = _folds.setdefault(model, {})
    if key not in found:
        found[key] = _choose(run, x)
    return found[key]


def chosen_fold(model: nn.Module) -> Fold | None:
    """Return what was chosen last for a network; None before its first batch, and under rules that do not fold."""
    return next(reversed(_folds.get(model, {}).values()), None)


def _choose(run: Run, x: Tensor) -> Fold:
    if problem := _problem(run):
        return Fold(why=problem)
    try:
        with ExitStack() as stack:
            stack.enter_context(_disable_current_modes())  # which count operations, say
            stack.enter_context(kernels.without_modes())
            stack.enter_context(torch.random.fork_rng([x.device] if x.is_cuda else []))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(kernels.using(bits=False, compile="off"))  # no kernel looks at values
            torch.manual_seed(0)
            seen, problem = _compare(run.model, x)
    except Exception as error:  # of any kind: it is the user's code
        return Fold(why=f"does not run so on two samples ({type(error).__name__}: {error})")
    if problem:
        return Fold(why=problem)
    scale, steps = len(x) / _SAMPLES, run.sequence.steps
    rows, size = seen.rows * scale, 1.5 * seen.bytes * scale  # measured: what layers keep, and gradients
    room = max(ROOM, sum(p.nbytes for p in run.model.parameters()) // 2)
    most = min(ROWS / rows, 1 + room / size)
    return Fold(_even(steps, most), _even(steps, min(2 * ROWS / rows, 1 + 2 * room / size)))


def _even(steps: int, most: float) -> int:
    """At most `most` time steps, so that as few calls as possible have about as many each."""
    return math.ceil(steps / math.ceil(steps / max(1, int(most))))


def _problem(run: Run) -> str | None:
    """Return why the steps of a network cannot share a call, where that shows without running it."""
    if is_sharded(run.model):
        return "has sharded weights"
    for layer in run.layout.layers.values():
        if _hooks(layer.module):
            return f"has hooks on {layer}, which see one time step in a call"
        if layer.compiled:
            return f"has compiled code in {layer}"
    try:
        run.layout.require_folds()
    except ValueError as error:
        return str(error)
    return None


def _hooks(module: nn.Module) -> int:
    """The number of hooks on a module and its weights, without those that compute its weights, and those of ours."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values(), *module._backward_hooks.values()]
    for p in module._parameters.values():  # which see the gradient of one time step
        for some in (getattr(p, "_backward_hooks", None), getattr(p, "_post_accumulate_grad_hooks", None)):
            hooks += (some or {}).values()
    ours = (type(hook).__module__.startswith("torch.nn.utils") or hasattr(hook, SEES_FOLDS) for hook in hooks)
    return len(hooks) - sum(ours)


class _Watch(TorchDispatchMode):
    """Sees operations whose results other samples, or the number of calls, may change; `found` names one."""

    found: str | None = None
    ours = False  # within a layer of neurons

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # PyTorch would import its compiler, which takes seconds, at the first operation

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.ours and torch.Tag.data_dependent_output in func.tags:
            self.found = "decides by the value of a tensor"
        if not self.ours and torch.Tag.nondeterministic_seeded in func.tags:
            self.found = "draws random numbers"
        return func(*args, **(kwargs or {}))


class _Seen(Step):
    """Time steps whose neurons give random spikes, and which see the sizes of layers.

    Attributes:
        rows: the most rows of a layer's matrix product in a time step.
        bytes: of what the layers give in it.
        read: what each layer of neurons reads, which their random spikes would hide.
    """

    def __init__(self, watch: _Watch) -> None:
        self.rows = self.bytes = 0
        self.read: dict[nn.Module, list[Tensor]] = {}
        self.ran: dict[Layer, int] = {}
        self.watch = watch

    def neuron(self, layer: Layer, *args: Any, **kwargs: Any) -> Any:
        if layer.advance is None or len(args) != 1:
            return super().neuron(layer, *args, **kwargs)
        x, first = args[0], self.ran.get(layer, 0)
        self.run.take_turn(layer, NEURON)
        self.watch.ours = True
        layer.advance(x, self.run.fold, False)  # for the states
        self.read.setdefault(layer.module, []).append(x.detach().clone())
        self.ran[layer] = first + self.run.fold
        self._count(x)
        drawn = []
        for t in range(first, first + self.run.fold):
            generator = torch.Generator().manual_seed(1000 * [*self.ran].index(layer) + t)
            shape = len(x) // self.run.fold, *x.shape[1:]
            drawn.append(torch.rand(shape, generator=generator) < 0.3)
        self.watch.ours = False
        return torch.cat(drawn).to(x) + 0 * x

    def weight(self, layer: Layer, *args: Any, **kwargs: Any) -> Any:
        y = layer.plain(*args, **kwargs)
        self.rows = max(self.rows, y.numel() // self.run.fold // len(layer.role.weight(layer.module)))
        self._count(y)
        return y

    def _count(self, y: Tensor) -> None:
        self.bytes += y.nbytes if self.run.call == 1 else 0


def _compare(model: nn.Module, x: Tensor) -> tuple[_Seen, str | None]:
    """Run two time steps one by one and in one call; return what was seen, and why results differ."""
    twin = copied(model, lambda p: p.numel() >= _SHARED_FROM)
    small = [p for p in twin.parameters() if p.numel() < _SHARED_FROM and p.requires_grad]
    with torch.no_grad():
        for p in small:  # equal layers, one for each time step, are to differ
            p += torch.rand_like(p)
    for module in twin.modules():
        if isinstance(module, _DropoutNd | Dropout):
            module.eval()
    shape = _STEPS, _SAMPLES, *x.shape[1:]
    pair = (
        torch.randn(shape, dtype=x.dtype, device=x.device) if x.is_floating_point() else torch.randint(2, shape).to(x)
    )
    watch = _Watch()
    sequence, seen, before = Sequence(pair, _STEPS, False), _Seen(watch), [*_attributes(twin)]
    with Run(twin, sequence, seen) as run, watch:
        one_by_one = torch.cat([run(x_t).detach().clone() for x_t in pair])
    if seen.rows * len(x) * 2 > ROWS * _SAMPLES:
        return seen, None
    if not seen.rows:
        return seen, "has no linear layer and no convolution of PyTorch's"
    if changed := next((name for name, *was in _attributes(twin) if (name, *was) not in before), None):
        return seen, f"changes {changed} in a time step"
    if watch.found:
        return seen, watch.found
    with Run(twin, sequence, again := _Seen(watch)) as run:
        folded = run(pair.flatten(0, 1), _STEPS)
        torch.autograd.grad(folded.sum(), small, allow_unused=True) if folded.requires_grad and small else None
    found = [(one_by_one, folded), *((torch.cat(x), torch.cat(again.read[m])) for m, x in seen.read.items())]
    if not all(_same(a, b) for a, b in found):
        return seen, "gives other results then: it mixes samples, or keeps a state that no rule knows"
    return seen, None


def _same(a: Tensor, b: Tensor) -> bool:
    """Return whether two time steps have the results that they have in one call, but for rounding."""
    tolerance = 1e-4 if a.dtype.itemsize > 2 else 2e-2
    return a.numel() == b.numel() and bool((a.flatten() - b.flatten()).abs().max() <= tolerance * a.abs().max())


def _attributes(model: nn.Module) -> Iterator[tuple[Any, ...]]:
    """What modules hold besides their states: a name each, and what a change in a time step would change."""
    for layer in Layout(model).layers.values():
        if layer.role.stepwise:
            continue
        module, place = layer.module, f"{layer.name or 'the model'}."
        for name, value in vars(module).items():
            if name not in ("_parameters", "_buffers", "_modules", "forward", *layer.states):
                plain = value if isinstance(value, int | float | str | None) else id(value)
                yield place + name, plain, len(value) if isinstance(value, list | dict | set) else 0
        for name, buffer in module._buffers.items():
            if name not in layer.states:
                yield place + name, id(buffer), 0 if buffer is None else buffer._version
