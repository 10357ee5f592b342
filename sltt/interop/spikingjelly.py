"""SpikingJelly's modules in single-step mode: their memories are the state."""

from collections.abc import Iterator
from typing import Any

from spikingjelly.activation_based import base, neuron
from torch import Tensor

from sltt.state import register

_SPIKING = neuron.BaseNode | neuron.SimpleBaseNode
_RULES = tuple(getattr(neuron, name) for name in ("SLTTLIFNode", "OTTTLIFNode") if hasattr(neuron, name))


def _states(module: Any) -> Iterator[str]:
    yield from module._memories
    if isinstance(getattr(module, "v_seq", None), Tensor):  # of store_v_seq=True
        yield "v_seq"


def _check(module: Any, batch: int, kept: bool) -> str | None:
    if isinstance(module, _RULES):
        return "has a learning rule of its own: use LIFNode, and sltt's rule"
    if "s" not in module.supported_step_mode():
        return "takes all time steps in one call: use a module that has step_mode='s'"
    if getattr(module, "step_mode", "s") != "s":
        return "is in multi-step mode: call functional.set_step_mode(model, 's')"
    return None


register(base.StepModule, (), check=_check)
register(
    base.MemoryModule,
    _states,
    reset=lambda module: module.reset(),
    spikes=lambda module: isinstance(module, _SPIKING),
    check=_check,
)
