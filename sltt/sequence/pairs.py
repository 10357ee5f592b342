"""A BatchNorm and the neurons that alone read it, which may be one operation, see `Step.pair`.

They are known to be neighbours in an `nn.Sequential`, where a network calls `normalise_and_fire`, and where the
operations of a forward show it (`find_pairs` of `sltt.rules.operations`).
"""

from collections.abc import Iterable
from functools import reduce

import torch
from torch import Tensor, nn

from sltt._torch import _BatchNorm
from sltt.sequence.claims import run_of
from sltt.sequence.hooks import own_forward, runs_hooks
from sltt.sequence.once import once
from sltt.sequence.spikes import show
from sltt.sequence.state import emits_spikes


def normalise_and_fire(norm: nn.Module, neuron: nn.Module, x: Tensor, *, hoist: bool = False) -> Tensor:
    """Return `neuron(norm(x))`, in one pass over memory where a kernel has both.

        x = sltt.normalise_and_fire(self.norm, self.neuron, self.conv(x))

    Under a rule, a BatchNorm of a large tensor on a CPU, or of several time steps, then writes no normalised tensor.
    Where one of the modules has hooks, both run by themselves. An `nn.Sequential` does the same for a BatchNorm and the
    neurons behind it.

    Args:
        norm: a BatchNorm; another module runs by itself.
        neuron: a layer of neurons, such as `sltt.LIF`.
        x: input of the norm, [B, C, ...].
        hoist: the norm runs as by `sltt.once(norm, x)`.
    """
    if torch.compiler.is_compiling():
        return neuron(norm(x))
    y = None if hoist and _is_fixed(x, neuron) else _run_pair(norm, neuron, x)
    if y is None:
        x = once(norm, x) if hoist else norm(x)  # one name: x goes before the neuron runs
        y = neuron(x)
    return y


def run_before_norm(layer: nn.Module, x: Tensor, norm: nn.Module | None = None) -> Tensor:
    """Return `layer(x)`, which the norm alone reads: without the bias where a BatchNorm takes that off again."""
    run = run_of(layer) if isinstance(norm, _BatchNorm) and not torch.compiler.is_compiling() else None
    y = None if run is None else run.biases.weigh(layer, norm, x)
    return layer(x) if y is None else y


def run_layers(layers: Iterable[nn.Module], x: Tensor, hoisted: int = 0) -> Tensor:
    """Run modules one after the other, the first so many as by `sltt.once`."""
    modules = [*layers]
    if torch.compiler.is_compiling():
        return reduce(lambda x, module: module(x), modules, x)
    while hoisted and _is_fixed(x, modules[0]):
        x, hoisted = once(modules.pop(0), x), hoisted - 1
    modules = _flatten(modules)
    if run := run_of(modules[0]) if modules else None:
        for _ in range(run.count_repeats(x, modules)):
            first = modules.pop(0)
            x = run.results.keep(first, first, (x,))
    while modules:
        pair = len(modules) > 1 and isinstance(modules[0], _BatchNorm) and emits_spikes(modules[1])
        y = _run_pair(*modules[:2], x) if pair else None
        if y is None:
            x, modules = run_before_norm(modules[0], x, *modules[1:2]), modules[1:]
        else:
            x, modules = y, modules[2:]
    return x


def _is_fixed(x: Tensor, module: nn.Module) -> bool:
    run = run_of(module)
    return run is not None and run.results.is_fixed(x)


def _run_pair(norm: nn.Module, neuron: nn.Module, x: Tensor) -> Tensor | None:
    if (run := run_of(neuron)) is None:
        return None
    first, second = (run.layout.layers.get(module) for module in (norm, neuron))
    is_known = first is not None and second is not None and second.spikes and first.role.stepwise
    y = run.step.pair(first, second, x) if is_known else None  # pyright: ignore[reportArgumentType]
    if y is not None:
        show(neuron, y)
    return y


def _flatten(layers: Iterable[nn.Module]) -> list[nn.Module]:
    """Return modules, and in place of an `nn.Sequential` without hooks those in it."""
    flat: list[nn.Module] = []
    for layer in layers:
        if isinstance(layer, nn.Sequential) and not own_forward(layer, nn.Sequential) and not runs_hooks(layer):
            flat += _flatten(layer)
        else:
            flat.append(layer)
    return flat
