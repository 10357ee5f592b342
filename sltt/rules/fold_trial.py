"""Try whether time steps may share a call of a network: two steps of two samples, one by one and in one call.

The trial runs on a copy. Its neurons give random spikes, so that layers behind silent neurons show what they do; its
small parameters are changed, so that layers that are equal at first differ.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sltt._torch import DispatchMode, _DropoutNd
from sltt.dropout import Dropout
from sltt.sequence.copies import copied
from sltt.sequence.layout import Layer, Layout
from sltt.sequence.run import Run
from sltt.sequence.step import NEURON, Step
from sltt.sequence.steps import Sequence

SAMPLES, _STEPS = 2, 2
_SHARED_FROM = 2**16  # elements of a parameter that the copy shares


class _Watch(DispatchMode):
    """Sees operations whose results other samples, or the number of calls, may change; `found` names one."""

    found: str | None = None
    ours = False  # within a layer of neurons

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.ours and torch.Tag.data_dependent_output in func.tags:
            self.found = "decides by the value of a tensor"
        if not self.ours and torch.Tag.nondeterministic_seeded in func.tags:
            self.found = "draws random numbers"
        return func(*args, **(kwargs or {}))


class Seen(Step):
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


def try_fold(model: nn.Module, x: Tensor, most: int) -> tuple[Seen, str | None]:
    """Run two time steps one by one and in one call, on a copy; return what was seen, and why results differ.

    A network that has more than `most` rows for two steps of x [B, ...] is not tried in one call.
    """
    twin = copied(model, lambda p: p.numel() >= _SHARED_FROM)
    small = [p for p in twin.parameters() if p.numel() < _SHARED_FROM and p.requires_grad]
    with torch.no_grad():
        for p in small:  # equal layers, one for each time step, are to differ
            p += torch.rand_like(p)
    for module in twin.modules():
        if isinstance(module, _DropoutNd | Dropout):
            module.eval()
    shape = _STEPS, SAMPLES, *x.shape[1:]
    pair = (
        torch.randn(shape, dtype=x.dtype, device=x.device) if x.is_floating_point() else torch.randint(2, shape).to(x)
    )
    watch = _Watch()
    sequence, seen, before = Sequence(pair, _STEPS, False), Seen(watch), [*_attributes(twin)]
    with Run(twin, sequence, seen) as run, watch:
        one_by_one = torch.cat([run(x_t).detach().clone() for x_t in pair])
    if seen.rows / SAMPLES * len(x) * 2 > most:
        return seen, None
    if not seen.rows:
        return seen, "has no linear layer and no convolution of PyTorch's"
    if changed := next((name for name, *was in _attributes(twin) if (name, *was) not in before), None):
        return seen, f"changes {changed} in a time step"
    if watch.found:
        return seen, watch.found
    with Run(twin, sequence, again := Seen(watch)) as run:
        folded = run(pair.flatten(0, 1), _STEPS)
        if folded.requires_grad and small:  # a checkpoint runs layers again
            torch.autograd.grad(folded.sum(), small, allow_unused=True)
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
