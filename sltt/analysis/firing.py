"""Firing rates: the share of neurons that spike in a time step."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from sltt.kernels import known_count
from sltt.sequence.layout import spiking_layers
from sltt.sequence.spikes import observe_spikes

PARTS = 100  # counts of a layer that wait to be added up
EXACT = 2**24  # the whole numbers up to here are in float32


def firing_rates(model: nn.Module) -> "AbstractContextManager[FiringRates]":
    """Count the spikes of every neuron layer of a model inside a block, in a loop of any kind.

        with firing_rates(model) as rates:
            rule(model, x, y, loss)
        rates.by_layer()      # {"features.2": 0.18, ...}

    A layer's rate is spikes / (neurons · time steps · samples). Layers of other libraries count too;
    a neuron that emits several spikes in a time step counts as one that emits one.
    """
    layers = spiking_layers(model)
    return observe_spikes(layers, FiringRates(list(layers)))


class FiringRates:
    """Count spikes for `firing_rates`, without waiting for the device. What a kernel has counted is taken as it is."""

    counts, replays = True, False  # a time step that `segment=n` replays counts once

    def __init__(self, layers: list[str]):
        self._spikes: dict[str, Tensor | int] = dict.fromkeys(layers, 0)
        self._parts: dict[str, list[Tensor]] = {name: [] for name in layers}  # of counts on a GPU, to be added together
        self._count: dict[str, Any] = dict.fromkeys(layers, 0)

    def __call__(self, name: str, spikes: Any, possible: int | None = None) -> None:
        """Count the spikes of a layer [n·B, ...]; or, with `possible`, add `spikes` as their number."""
        if self.replays:
            return
        count: Any = int(spikes.numel()) if possible is None else possible
        if torch.compiler.is_compiling():  # a number that grows would be compiled anew in each step
            count = torch.tensor(count, device=spikes.device)
        self._count[name] += count
        if possible is not None:
            self._spikes[name] += spikes
        elif (parts := known_count(spikes)) is not None:
            self._wait(name, parts)
        elif spikes.is_cpu or not spikes.is_floating_point() or spikes.numel() > EXACT:
            # as booleans, since PyTorch counts floating-point numbers one by one
            self._spikes[name] += torch.count_nonzero(spikes.detach().bool())
        else:  # one launch
            dtype = torch.promote_types(spikes.dtype, torch.float32)
            self._wait(name, torch.linalg.vector_norm(spikes.detach(), 0, dtype=dtype).view(1))

    def _wait(self, name: str, parts: Tensor) -> None:
        self._parts[name].append(parts)
        if len(self._parts[name]) == PARTS:
            self.settle()

    def settle(self) -> None:
        """Add up what single calls counted on a GPU."""
        for name, parts in self._parts.items():
            if parts:
                self._spikes[name] += (torch.cat(parts) if len(parts) > 1 else parts[0]).sum(dtype=torch.int64)
                parts.clear()

    def add(self, other: "FiringRates") -> None:
        """Add what another has counted on the same model."""
        other.settle()
        for name, spikes in other._spikes.items():
            self(name, spikes, other._count[name])

    def by_layer(self) -> dict[str, float]:
        """Return the firing rate of each layer that has run, by its name in the model."""
        self.settle()
        return {name: int(self._spikes[name]) / int(count) for name, count in self._count.items() if count}

    def __repr__(self) -> str:
        return f"FiringRates({', '.join(f'{name}: {rate:.1%}' for name, rate in self.by_layer().items())})"

    def mean(self) -> float:
        """Return the firing rate of all neurons together; 0 where there is none."""
        self.settle()
        total = sum(map(int, self._count.values()))
        return sum(int(spikes) for spikes in self._spikes.values()) / total if total else 0.0

    def state_dict(self) -> dict[str, tuple[int, int]]:
        """Return the counts so far, to continue with `load_state_dict`."""
        self.settle()
        return {name: (int(spikes), int(self._count[name])) for name, spikes in self._spikes.items()}

    def load_state_dict(self, state: dict[str, tuple[int, int]]) -> None:
        """Continue from what another run of the same model counted."""
        for name, (spikes, count) in state.items():
            self._parts[name].clear()
            self._spikes[name] = spikes
            self._count[name] = count
