"""snnTorch's neurons with `init_hidden=True`: their states are the buffers that are not saved.

snnTorch's own reset and detach reach the neurons that its constructors saw, not those of a copy of the network; these
reach the neurons that the network has.
"""

from collections.abc import Iterator
from typing import Any

import torch
from snntorch import DeltaLeaky, SpikingNeuron

from sltt.state import register


def _states(module: Any) -> Iterator[str]:
    return (name for name in module._buffers if name in module._non_persistent_buffers_set)


def _reset(module: Any) -> None:
    for name in _states(module):
        # of no size, which the neuron takes for no state and fills with zeros of the input's shape
        setattr(module, name, torch.zeros(0, dtype=module.threshold.dtype, device=module.threshold.device))


def _check(module: Any, batch: int, kept: bool) -> str | None:
    if not any(_states(module)):
        return "takes all time steps in one call, or keeps no state: use Leaky, Synaptic or another that steps"
    if isinstance(module, DeltaLeaky):
        return "gives its state with its spikes, whatever init_hidden says: use Leaky"
    if not (module.init_hidden or kept):
        return "passes its state through its calls: give it init_hidden=True"
    return None


register(SpikingNeuron, _states, reset=_reset, spikes=True, check=_check)
