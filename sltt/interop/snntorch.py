"""snnTorch's neurons with `init_hidden=True`: their states are the buffers that are not saved.

snnTorch's own reset and detach reach the neurons that its constructors saw, not those of a copy of the network; these
reach the neurons that the network has.
"""

# pyright: reportMissingImports=false

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from snntorch import DeltaLeaky, Leaky, SpikingNeuron, Synaptic
from torch import nn

from sltt import surrogates
from sltt.interop.adapted import BeforeReset, make_adapter
from sltt.interop.conversion import ConversionError, leaky, read_constant, require, synaptic
from sltt.sequence.state import register, role_of, set_role


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


def _translate(module: Any) -> nn.Module:
    require(type(module) in (Leaky, Synaptic), "has other dynamics than Leaky and Synaptic")
    require(module.init_hidden and not module.output, "gives its state with its spikes: use init_hidden=True")
    require(not module.inhibition, "lets one neuron of the layer fire only (inhibition=True)")
    require(not module.state_quant, "rounds its membrane potential (state_quant)")
    require(read_constant("graded_spikes_factor", module.graded_spikes_factor) == 1, "has spikes that are not 0 or 1")
    decay, threshold = read_constant("beta", module.beta), read_constant("threshold", module.threshold)
    arguments = {"v_threshold": threshold, "surrogate": _surrogate(module.spike_grad)}
    if type(module) is Synaptic:
        return _synaptic(module, decay, arguments)
    if module.reset_mechanism == "zero" and threshold > 0:
        # the reset of a step before is that of a spike that has no gradient any more
        return leaky(decay, v_reset=0.0, detach_reset=module.reset_delay, **arguments)
    require(module.reset_mechanism == "subtract", f"has no reset that ours have ({module.reset_mechanism})")
    require(module.reset_delay, "fires once more, without a spike, if still above its threshold (reset_delay=False)")
    later = {} if decay == 1 else {"subtract": threshold / max(decay, 1e-9)}  # after the decay of the next time step
    return leaky(decay, detach_reset=True, **later, **arguments)


def _constants(module: Any) -> tuple[Any, ...]:
    tensors = module.beta, module.threshold, module.graded_spikes_factor
    flags = module.reset_mechanism, module.reset_delay, module.inhibition, module.state_quant, module.output
    return *tensors, *(t.requires_grad for t in tensors), module.spike_grad, *flags


def _decay(module: Any) -> Any:
    """Return β, of a membrane potential that spikes do not set to zero: u[t] = β u[t−1] + x[t] − θ s[t−1]."""
    plain = type(module) is Leaky and module.reset_mechanism in ("subtract", "none") and not module.state_quant
    return module.beta.clamp(0, 1) if plain else None


def _synaptic(module: Any, decay: float, arguments: dict[str, Any]) -> nn.Module:
    at_once = module.reset_mechanism == "zero" and not module.reset_delay and arguments["v_threshold"] > 0
    require(
        at_once or (decay == 1 and module.reset_mechanism == "subtract" and module.reset_delay),
        "resets together with the input of the next time step: use reset_mechanism='zero' with reset_delay=False",
    )
    reset: dict[str, Any] = {"v_reset": 0.0} if at_once else {"detach_reset": True}
    return synaptic(decay, read_constant("alpha", module.alpha), 1.0, **reset, **arguments)


def _surrogate(function: Any) -> surrogates.Surrogate:
    if isinstance(function, surrogates.Surrogate):
        return function
    # what atan(alpha=2) gives is a function with alpha in its closure, and fires above the threshold only
    maker = getattr(function, "__qualname__", "").removesuffix(".<locals>.inner")
    make = _SURROGATES.get(maker) if getattr(function, "__module__", "") == "snntorch.surrogate" else None
    if make is None:
        raise ConversionError(f"has the surrogate {maker or function!r}, which is not in sltt.surrogates")
    (slope,) = (cell.cell_contents for cell in function.__closure__)
    return surrogates.Above(make(slope))


_SURROGATES: dict[str, Callable[[float], surrogates.Surrogate]] = {
    "atan": surrogates.ArcTan,
    "sigmoid": surrogates.Sigmoid,
    "fast_sigmoid": lambda slope: surrogates.FastSigmoid(slope, scale=2 / slope),
}


register(SpikingNeuron, _states, reset=_reset, spikes=True, check=_check, translate=_translate, decay=_decay)
_advance = partial(make_adapter, BeforeReset)
set_role(Leaky, replace(role_of(SpikingNeuron), advance=lambda module: _advance(module, "mem", _translate, _constants)))
