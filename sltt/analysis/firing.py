"""Firing rates: the share of neurons that spike in a time step."""

from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from sltt.checks import instance
from sltt.sequence.state import emits_spikes


def firing_rates(model: nn.Module) -> "FiringRates":
    """Count the spikes of every neuron layer of a model inside a block, in a loop of any kind.

        with firing_rates(model) as rates:
            rule(model, x, y, loss)
        rates.by_layer()      # {"features.2": 0.18, ...}

    A layer's rate is its spikes over its neurons times time steps times samples. Layers of other libraries count too;
    a neuron that emits several spikes in a time step counts as one that emits one, and steps that a rule runs again
    (`segment=n`) count again.
    """
    return FiringRates(model)


class FiringRates:
    """What `firing_rates` counts, without waiting for the device."""

    def __init__(self, model: nn.Module):
        instance("model", model, nn.Module)
        self._layers = {name: m for name, m in model.named_modules() if emits_spikes(m)}
        self._spikes: dict[str, Tensor | int] = dict.fromkeys(self._layers, 0)
        self._count = dict.fromkeys(self._layers, 0)
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        for name, module in self._layers.items():
            self._hooks.append(module.register_forward_hook(self._hook(name)))
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _hook(self, name: str) -> Any:
        def count(module: nn.Module, inputs: Any, output: Any) -> None:
            spikes: Tensor = output[0] if isinstance(output, tuple) else output  # other libraries give the state too
            # as booleans, since PyTorch counts floating-point numbers one by one
            self._spikes[name] += torch.count_nonzero(spikes.detach().bool())
            self._count[name] += spikes.numel()

        return count

    def by_layer(self) -> dict[str, float]:
        """The firing rate of each layer that has run, by its name in the model."""
        return {name: int(self._spikes[name]) / count for name, count in self._count.items() if count}

    def mean(self) -> float:
        """The firing rate of all neurons together; 0 where there is none."""
        total = sum(self._count.values())
        return sum(int(spikes) for spikes in self._spikes.values()) / total if total else 0.0

    def state_dict(self) -> dict[str, tuple[int, int]]:
        """What was counted so far, to continue with `load_state_dict`."""
        return {name: (int(self._spikes[name]), self._count[name]) for name in self._layers}

    def load_state_dict(self, state: dict[str, tuple[int, int]]) -> None:
        """Continue from what another run of the same model counted."""
        for name, (spikes, count) in state.items():
            self._spikes[name] = spikes
            self._count[name] = count
