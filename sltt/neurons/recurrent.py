"""Recurrence: a layer of neurons reads its own spikes of the step before."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sltt._torch import has_own_operations, transforms_active
from sltt.checks import instance
from sltt.kernels import WeightCache, recurrent_steps, runs_recurrence
from sltt.neurons.base import Neuron
from sltt.neurons.leaky import IntegrateAndFire
from sltt.sequence.hooks import own_forward, runs_hooks
from sltt.sequence.spikes import show
from sltt.sequence.state import Role, Stateful, emits_spikes, set_role


class Recurrent(Stateful):
    """Neurons whose spikes come back as current one time step later.

        s[t] = neuron(x[t] + layer(s[t−1]))         s[0] = 0

        sltt.Recurrent(sltt.LIF(tau=10.0), nn.Linear(256, 256, bias=False))
        sltt.Recurrent(sltt.ALIF(), nn.Conv2d(32, 32, 3, padding=1))

    SLTT sends no gradient through the recurrent spikes: the layer learns from the step alone, ∇W = Σ_t e[t] s[t−1]ᵀ.
    OTTT traces the spikes that the layer reads, which is e-prop for one layer. The time steps of a call run one after
    the other inside this layer: in one native call for LIF, IF or PLIF and a linear layer in 32 or 16 bits on a CPU,
    which adds the weights of active neurons only, in float32. The spikes are its state: no layer behind it may
    change them in place.

    Args:
        neuron: the neurons.
        layer: maps their spikes to a current of the same shape.

    Raises:
        ValueError: `neuron` is no layer of neurons; at the first step, `layer` does not keep the shape of the spikes.

    Source: Bellec et al., Nature Communications 2020 (e-prop).
    """

    states = ("s",)
    s: Tensor | None

    def __init__(self, neuron: nn.Module, layer: nn.Module):
        super().__init__()
        self.neuron = instance("neuron", neuron, nn.Module)
        self.layer = instance("layer", layer, nn.Module)
        if not emits_spikes(neuron):
            raise ValueError(f"neuron must be a layer of neurons, such as sltt.LIF(), got {type(neuron).__name__}")

    def first_states(self) -> dict[str, float]:
        """Return the value of the state before the first step."""
        return {"s": 0.0}

    def forward(self, x: Tensor) -> Tensor:
        """Map the input current x [B, ...] of one time step to spikes [B, ...]."""
        before = torch.zeros_like(x) if self.s is None else self.s
        back = self.layer(before)
        if back.shape != x.shape:
            problem = f"the recurrent layer {self.layer} gets spikes {list(x.shape)} and gives {list(back.shape)}"
            raise ValueError(f"{problem}: expected a layer that keeps the shape, as nn.Linear(n, n)")
        self.s = spikes = self.neuron(x + back)
        return spikes

    def runs_in_one_call(self) -> bool:
        """Return whether a kernel runs the time steps of a call, see `prepare`."""
        neuron: Any = self.neuron
        if self.prepare() is None:
            return False
        step, decay = neuron.kernel_step()
        hooks = runs_hooks(neuron, self.layer)
        return not hooks and decay is None and runs_recurrence(step, self.layer.weight)  # pyright: ignore[reportArgumentType]

    def prepare(self) -> Callable[..., Tensor | None] | None:
        """Return what runs several time steps in a call by a kernel; None for layers that no kernel knows."""
        neuron, layer = self.neuron, self.layer
        if not (isinstance(neuron, IntegrateAndFire) and isinstance(layer, nn.Linear)):
            return None
        plain = ((self, Recurrent), (neuron, Neuron), (layer, nn.Linear))
        if transforms_active() or any(own_forward(module, kind) for module, kind in plain):
            return None
        if neuron.kernel_step()[0] is None or "weight" not in layer._parameters:  # it is computed, as by a norm
            return None

        def advance(x: Tensor, steps: int, cut: bool, weights: WeightCache, trace: Any = None) -> Tensor | None:
            (step, decay), weight = neuron.kernel_step(), layer.weight
            takes_kernel = step is not None and type(weight) is nn.Parameter and x.shape[-1] == layer.out_features
            if not takes_kernel or runs_hooks(neuron, layer) or has_own_operations():
                return None
            if self.s is not None and not torch.equal(self.s * self.s, self.s):  # changed: no spikes any more
                return None
            neuron._prepare_states(x, steps)
            assert step is not None
            assert neuron.v is not None
            tensors = x, self.s, neuron.v, weight, layer.bias, decay
            results = recurrent_steps(step, *tensors, weights, steps, cut, trace)
            if results is None:
                return None
            spikes, self.s, neuron.v = results
            show(neuron, spikes)
            return spikes

        return advance


set_role(Recurrent, Role("keeper", lambda m: m.states, lambda m: m.reset(), advance=lambda m: m.prepare()))
