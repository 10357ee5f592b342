"""Try whether time steps may share a call of a network: run them one by one and in one call, forward and backward.

The trial runs on a copy. Its neurons give asinh of their input, so that nothing before or behind them is hidden; its
small parameters are changed, so that layers that are equal at first differ.
"""

import io
import pickle
import random
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sltt._torch import DispatchMode, _DropoutNd
from sltt.dropout import Dropout
from sltt.sequence.copies import copy_model
from sltt.sequence.layout import Layer, Layout
from sltt.sequence.run import Run
from sltt.sequence.step import NEURON, Step
from sltt.sequence.steps import Sequence

SAMPLES, _STEPS = 2, 2
_SHARED_FROM = 2**16  # elements of a parameter that the copy shares
_DROPOUTS = _DropoutNd.__module__, Dropout.__module__  # whose masks are drawn for each sample
_OWN = "_parameters", "_buffers", "_modules", "forward"


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
    """Time steps whose neurons pass on what they read, and which see the sizes of layers.

    Attributes:
        rows: the most rows of a layer's matrix product in a time step.
        bytes: of what the layers give in it.
        watch: sees the operations, where the time steps are watched.
    """

    def __init__(self) -> None:
        self.rows = self.bytes = 0
        self.watch = _Watch()

    def neuron(self, layer: Layer, *args: Any, **kwargs: Any) -> Any:
        if layer.advance is None or len(args) != 1:
            return super().neuron(layer, *args, **kwargs)
        self.run.take_turn(layer, NEURON)
        self.watch.ours = True
        with torch.no_grad():
            layer.advance(args[0], self.run.fold, False)  # for the states
        self.watch.ours = False
        self._count(args[0])
        return args[0].asinh()  # keeps large values in bounds, and errors of rounding small

    def weight(self, layer: Layer, *args: Any, **kwargs: Any) -> Any:
        y = layer.plain(*args, **kwargs)
        self.rows = max(self.rows, y.numel() // self.run.fold // len(layer.role.weight(layer.module)))
        self._count(y)
        return y

    def _count(self, y: Tensor) -> None:
        self.bytes += y.nbytes if self.run.call == 1 else 0


class Trial:
    """A copy of a network, to try time steps of inputs [B, ...] on.

    Attributes:
        seen: the sizes of its layers, of `SAMPLES` samples.
        problem: why its time steps cannot share a call, where one time step shows it.
    """

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.twin = copy_model(model, lambda p: p.numel() >= _SHARED_FROM)
        self.small = [p for p in self.twin.parameters() if p.numel() < _SHARED_FROM and p.requires_grad]
        self.like = x
        with torch.no_grad():
            for p in self.small:  # equal layers, one for each time step, are to differ
                p += torch.rand_like(p)
        for module in self.twin.modules():
            if type(module).__module__ in _DROPOUTS:
                module.eval()
        before = _contents(self.twin)
        with torch.no_grad():
            self.seen = self._run(SAMPLES, _STEPS, 1, watched=True)[0]
        changed = next((name for name, _ in _contents(self.twin).items() - before.items()), None)
        self.problem = f"changes {changed} in a time step" if changed else self.seen.watch.found

    def compare(self, steps: int) -> str | None:
        """Run so many time steps one by one and in one call; return why outputs or gradients differ, or None."""
        alone, together = (self._run(len(self.like), steps, fold)[1:] for fold in (1, steps))
        if all(map(_equal_but_rounding, alone, together)):
            return None
        return "gives other results then: it mixes samples, or keeps a state that no rule knows"

    def _run(self, batch: int, steps: int, fold: int, watched: bool = False) -> tuple[Seen, Tensor, Tensor, Tensor]:
        """Run time steps of random samples in calls of `fold`, with the backward of SLTT.

        Return the layers, the outputs, and the gradients of input and small parameters by a random sum of the outputs.
        """
        torch.manual_seed(steps)
        like, shape = self.like, (steps, batch, *self.like.shape[1:])
        generator = torch.Generator().manual_seed(steps)  # another thread may draw from the global one
        if like.is_floating_point():
            x = torch.randn(shape, dtype=like.dtype, generator=generator).to(like)
        else:
            x = torch.randint(2, shape, generator=generator).to(like)
        seen, outputs, of_x = Seen(), [], []
        with Run(self.twin, Sequence(x, steps, False), seen) as run, seen.watch if watched else nullcontext():
            for t in range(0, steps, fold):
                part = x[t : t + fold].flatten(0, 1).requires_grad_(like.is_floating_point())
                y = run(part, fold, cut=True)
                outputs.append(y.detach().clone())
                inputs = [one for one in (part, *self.small) if one.requires_grad]
                if y.requires_grad and inputs:
                    weights = torch.randn((steps, *y.shape[1:]), generator=generator.manual_seed(steps))
                    torch.autograd.backward(y, weights[t : t + fold].to(y), inputs=inputs)
                of_x.append(part.grad)
                run.detach()
        gradients = _join(of_x, x), _join([p.grad for p in self.small], x)
        for p in self.small:
            p.grad = None
        return seen, torch.cat(outputs), *gradients


def _join(gradients: list[Tensor | None], x: Tensor) -> Tensor:
    """Return all gradients as one tensor, on the device of x."""
    return torch.cat([torch.zeros(1, device=x.device), *(g.flatten().to(x.device) for g in gradients if g is not None)])


def _equal_but_rounding(a: Tensor, b: Tensor) -> bool:
    """Return whether time steps have the results that they have in one call, but for rounding."""
    tolerance = {2: 2e-2, 4: 1e-4}.get(a.dtype.itemsize, 1e-10)
    return a.numel() == b.numel() and bool((a.flatten() - b.flatten()).abs().max() <= tolerance * a.abs().max())


class _Contents(pickle.Pickler):
    """Writes what an attribute holds: of tensors their values, of modules which they are."""

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, Tensor):
            return obj.shape, obj.detach().cpu().flatten().view(torch.uint8).numpy().tobytes()
        return id(obj) if isinstance(obj, nn.Module) else None


def _content(value: Any) -> Any:
    """Return what an attribute holds, to be compared; what cannot be written, such as a lambda, by which it is."""
    file = io.BytesIO()
    try:
        _Contents(file).dump(value)
    except Exception:  # of any kind: it is the user's object
        return id(value)
    return file.getvalue()


def _contents(model: nn.Module) -> dict[str, Any]:
    """Return what modules hold besides their states and large parameters, by name, and other random generators."""
    found = {"the random numbers of Python or NumPy": _content((random.getstate(), np.random.get_state()))}
    for layer in Layout(model).layers.values():
        if layer.role.stepwise:
            continue
        module, place = layer.module, f"{layer.name or 'the model'}."
        small = {name: p for name, p in module._parameters.items() if p is not None and p.numel() < _SHARED_FROM}
        held = {**{k: v for k, v in vars(module).items() if k not in _OWN}, **module._buffers, **small}
        found |= {place + name: _content(held[name]) for name in held.keys() - {*layer.states}}
    return found
