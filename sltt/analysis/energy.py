"""Synaptic operations of an inference, and an estimate of its energy beside that of the same network as an ANN."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sltt.checks import instance
from sltt.rules import unroll
from sltt.sequence.spikes import observing, spiking_layers

# Energy of a 32-bit floating-point operation in a 45 nm process; Horowitz, ISSCC 2014.
PICOJOULES_MULTIPLY_ACCUMULATE = 4.6
PICOJOULES_ACCUMULATE = 0.9


@dataclass(frozen=True)
class LayerOperations:
    """A convolution or linear layer in the inference of one sample.

    Attributes:
        name: of the layer in the model.
        macs: multiply-accumulates of one time step, if every input counts.
        steps: how often the layer runs in the T time steps.
        density: share of its inputs that are not zero.
        spiking: its input comes from neurons, so that each input that is not zero costs an accumulate for each synapse;
            else it is the data, and costs a multiply-accumulate for each synapse.
    """

    name: str
    macs: int
    steps: int
    density: float
    spiking: bool

    @property
    def synaptic_operations(self) -> float:
        """Accumulates of all time steps, or multiply-accumulates where the input is the data."""
        return self.macs * self.steps * (self.density if self.spiking else 1.0)

    @property
    def picojoules(self) -> float:
        """The estimate for these."""
        return self.synaptic_operations * (PICOJOULES_ACCUMULATE if self.spiking else PICOJOULES_MULTIPLY_ACCUMULATE)

    @property
    def picojoules_as_ann(self) -> float:
        """The estimate for the layer in a network without time, where every input costs a multiply-accumulate."""
        return self.macs * PICOJOULES_MULTIPLY_ACCUMULATE


@torch.no_grad()
def synaptic_operations(model: nn.Module, x: Tensor, *, steps: int | None = None) -> list[LayerOperations]:
    """Operations of each convolution and linear layer, measured on a batch.

        sum(layer.picojoules for layer in synaptic_operations(model, x))

    A layer that runs before the first neuron of a time step reads the data. Average pooling in front of a layer counts
    as spikes: hardware for spikes takes its factor into the weights. What neurons themselves take, the products of
    attention, and memory are not in the estimate; it is for comparing networks, not for planning a chip.

    Args:
        model: maps one time step to logits; in the mode that it is in, so call `model.eval()` before.
        x: sequence [T, B, ...], or with `steps` a static input [B, ...].
        steps: T for a static input.
    """
    instance("model", model, nn.Module)
    instance("x", x, Tensor)
    counts: dict[str, _Count] = {}
    fired = False

    def start(module: nn.Module, args: Any) -> None:
        nonlocal fired
        fired = False

    def fire(name: str, spikes: Tensor) -> None:
        nonlocal fired
        fired = True

    def count(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, out: Tensor) -> None:
            (x,) = args
            one = counts.setdefault(name, _Count(_macs(module, x, out), spiking=fired))
            one.runs += 1
            one.nonzero += int(torch.count_nonzero(x))
            one.inputs += x.numel()

        return hook

    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, LAYERS)]
    handles = [model.register_forward_pre_hook(start)]
    handles += [m.register_forward_hook(count(name)) for name, m in layers]
    try:
        with observing(spiking_layers(model), fire):
            unroll(model, x, steps=steps)
    finally:
        for handle in handles:
            handle.remove()
    return [LayerOperations(name, c.macs, c.runs, c.nonzero / c.inputs, c.spiking) for name, c in counts.items()]


LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass
class _Count:
    macs: int
    spiking: bool
    runs: int = 0
    nonzero: int = 0
    inputs: int = 0


def _macs(layer: Any, x: Tensor, out: Tensor) -> int:
    """Multiply-accumulates of one sample: each output has one for every input that it is connected to."""
    if isinstance(layer, nn.Linear):
        return out.numel() // x.shape[0] * layer.in_features
    return out.numel() // x.shape[0] * layer.in_channels // layer.groups * math.prod(layer.kernel_size)
