"""Firing rates: the share of neurons that spike in a time step."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from sltt.checks import instance
from sltt.sequence.layout import spiking_layers
from sltt.sequence.spikes import observing


def firing_rates(model: nn.Module) -> "AbstractContextManager[FiringRates]":
    """Count the spikes of every neuron layer of a model inside a block, in a loop of any kind.

        with firing_rates(model) as rates:
            rule(model, x, y, loss)
        rates.by_layer()      # {"features.2": 0.18, ...}

    A layer's rate is spikes / (neurons · time steps · samples). Layers of other libraries count too;
    a neuron that emits several spikes in a time step counts as one that emits one, and steps that a rule runs again
    (`segment=n`) count again.
    """
    layers = spiking_layers(instance("model", model, nn.Module))
    return observing(layers, FiringRates(list(layers)))


class FiringRates:
    """Count spikes for `firing_rates`, without waiting for the device."""

    counts = True

    def __init__(self, layers: list[str]):
        self._spikes: dict[str, Tensor | int] = dict.fromkeys(layers, 0)
        self._count = dict.fromkeys(layers, 0)

    def __call__(self, name: str, spikes: Any, possible: int | None = None) -> None:
        """Count the spikes of a layer [n·B, ...]; or add their number, out of so many `possible` ones."""
        if possible is None:  # as booleans, since PyTorch counts floating-point numbers one by one
            possible, spikes = int(spikes.numel()), torch.count_nonzero(spikes.detach().bool())
        self._spikes[name] += spikes
        self._count[name] += possible

    def add(self, other: "FiringRates") -> None:
        """Add what another has counted on the same model."""
        for name, spikes in other._spikes.items():
            self(name, spikes, other._count[name])

    def by_layer(self) -> dict[str, float]:
        """Return the firing rate of each layer that has run, by its name in the model."""
        return {name: int(self._spikes[name]) / count for name, count in self._count.items() if count}

    def mean(self) -> float:
        """Return the firing rate of all neurons together; 0 where there is none."""
        total = sum(self._count.values())
        return sum(int(spikes) for spikes in self._spikes.values()) / total if total else 0.0

    def state_dict(self) -> dict[str, tuple[int, int]]:
        """Return the counts so far, to continue with `load_state_dict`."""
        return {name: (int(spikes), self._count[name]) for name, spikes in self._spikes.items()}

    def load_state_dict(self, state: dict[str, tuple[int, int]]) -> None:
        """Continue from what another run of the same model counted."""
        for name, (spikes, count) in state.items():
            self._spikes[name] = spikes
            self._count[name] = count
