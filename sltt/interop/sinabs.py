"""sinabs' layers that run one time step: the squeezing ones, with `num_timesteps=1`, or `batch_size` that of the input.

The others take [B, T, ...], and would take the channels of a time step for its time.
"""

from collections.abc import Iterator
from typing import Any

import torch
from sinabs.layers import SqueezeMixin, StatefulLayer

from sltt.state import register


def _states(module: Any) -> Iterator[str]:
    return (name for name, buffer in module._buffers.items() if buffer is not None)


def _reset(module: Any) -> None:
    for name in _states(module):
        # of no size, which the layer takes for no state and fills with zeros of the input's shape
        setattr(module, name, torch.zeros(0, device=getattr(module, name).device))


def _check(module: Any, batch: int, kept: bool) -> str | None:
    if not isinstance(module, SqueezeMixin):
        return "takes [B, T, ...]: use the squeezing layer, such as LIFSqueeze(num_timesteps=1)"
    if 1 not in (module.num_timesteps, batch // module.batch_size if module.batch_size == batch else 0):
        return (
            f"has batch_size={module.batch_size} and num_timesteps={module.num_timesteps}, for a time step of {batch} "
            "samples: give it num_timesteps=1"
        )
    return None


register(StatefulLayer, _states, reset=_reset, spikes=lambda module: module.does_spike, check=_check)
