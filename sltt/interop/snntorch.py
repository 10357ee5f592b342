"""snnTorch's neurons with `init_hidden=True`: their states are the buffers that are not saved.

snnTorch's own reset and detach reach the neurons that its constructors saw, not those of a copy of the network; these
reach the neurons that the network has. `to_snntorch` is the way back.
"""

# pyright: reportMissingImports=false

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from snntorch import DeltaLeaky, Lapicque, Leaky, SpikingNeuron, Synaptic
from torch import Tensor, nn

from sltt import surrogates
from sltt.interop.adapted import BeforeReset, make_adapter
from sltt.interop.conversion import ConversionError, leaky, read_constant, require, synaptic, translate_all
from sltt.neurons import IF, LIF, PLIF, IntegrateAndFire, Neuron
from sltt.neurons.dropout import Dropout
from sltt.sequence.hooks import own_forward
from sltt.sequence.state import Stateful, emits_spikes, register, role_of, set_role


def to_snntorch(model: nn.Module) -> nn.Module:
    """Return a copy of a network with neurons of snnTorch, `Leaky(init_hidden=True)`, and the same outputs.

    `IF`, and `LIF` and `PLIF` with v_reset=0 or `LIF` with subtract=V_th/λ: snnTorch subtracts the threshold after the
    leak of the next time step, and detaches its reset. `Dropout` becomes nn.Dropout; layers of PyTorch stay.

    Raises ValueError naming every layer with a state that snnTorch has not, and the nearest that it has.
    """
    return translate_all(model, _make_leaky, "snnTorch has no counterpart for {}")


def _make_leaky(module: Any) -> nn.Module:
    neuron: Any = module
    if emits_spikes(module) and not isinstance(module, Stateful | SpikingNeuron):
        raise ConversionError("is of another library: sltt.interop.convert makes it ours")
    if type(module) is Dropout or not isinstance(module, Stateful):
        return nn.Dropout(neuron.p).train(neuron.training) if isinstance(module, Dropout) else module
    plain = type(module) in (IF, LIF, PLIF) and not own_forward(module, Neuron)
    require(plain, "has other dynamics than IF, LIF and PLIF")
    require(neuron.v_init in (None, neuron.v_reset or 0), "has a v_init: leave it out")
    require(not neuron.decay_input, "has decay_input: scale the weights before it by 1/τ")
    decay, threshold = torch.as_tensor(neuron.decay(), dtype=torch.float64).detach(), neuron.v_threshold
    delayed = neuron.v_reset is None and math.isclose(float(decay) * (neuron.subtract or threshold), threshold)
    remedy = f"use v_reset=0, or LIF with subtract={threshold / decay:.9g}"
    require(neuron.v_reset == 0 or delayed, f"resets in another way than snnTorch: {remedy}")
    settings: dict[str, Any] = {"init_hidden": True, "reset_mechanism": "subtract" if delayed else "zero"}
    settings |= {"threshold": torch.tensor(threshold, dtype=torch.float64), "learn_beta": isinstance(neuron, PLIF)}
    return Leaky(decay, spike_grad=neuron.surrogate, **settings)


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
    kind, resets, delayed = type(module), module.reset_mechanism, getattr(module, "reset_delay", True)
    arguments = _arguments(module)
    beta = 1 - module.time_step / (module.R * module.C) if kind is Lapicque else module.beta
    decay, threshold = read_constant("beta", beta), arguments["v_threshold"]
    # the reset of a step before is that of a spike that has no gradient any more
    reset: dict[str, Any] = {"v_reset": 0.0, "detach_reset": delayed}
    if resets == "zero":
        require(not delayed or kind is Leaky, "resets the next input, too: use reset_mechanism='subtract'")
    else:
        require(resets == "subtract", f"has no reset that ours have ({resets})")
        require(delayed, "fires once more, without a spike, if still above its threshold (reset_delay=False)")
        # after the decay of the next time step
        reset = {"detach_reset": True, **({} if decay == 1 else {"subtract": threshold / max(decay, 1e-9)})}
    if kind is Synaptic:
        return synaptic(decay, read_constant("alpha", module.alpha), 1.0, **reset, **arguments)
    return leaky(decay, decay_input=kind is Lapicque, **reset, **arguments)


def _arguments(module: Any) -> dict[str, Any]:
    require(type(module) in (Leaky, Lapicque, Synaptic), "has other dynamics than Leaky, Lapicque and Synaptic")
    require(module.init_hidden and not module.output, "gives its state with its spikes: use init_hidden=True")
    resets = {"subtract": "_base_sub", "zero": "_base_zero", "none": "_base_int"}
    made, now = list(resets.values())[int(module.reset_mechanism_val)], resets[module.reset_mechanism]
    require(made == now == (_state_function(module) or now), "was made with another reset_mechanism: make it anew")
    require(not module.inhibition, "lets one neuron of the layer fire only (inhibition=True)")
    require(not module.state_quant, "rounds its membrane potential (state_quant)")
    require(read_constant("graded_spikes_factor", module.graded_spikes_factor) == 1, "has spikes that are not 0 or 1")
    require(type(module) is not Lapicque or read_constant("R", module.R) == 1, "scales its input (R is not 1)")
    threshold = read_constant("threshold", module.threshold)
    require(threshold > 0, f"has the threshold {threshold:g}, which is not positive")
    return {"v_threshold": threshold, "surrogate": _surrogate(module.spike_grad)}


class _Beta(IntegrateAndFire):
    """A `Leaky` that runs in our kernels, and has no counterpart to convert to: it learns β, or has no reset."""

    def __init__(self, module: Any):
        resets = module.reset_mechanism
        require(module.beta.numel() == 1 and resets != "subtract", "learns a β that its reset depends on")
        rest = None if resets == "none" else 0.0
        super().__init__(v_reset=rest, detach_reset=module.reset_delay, **_arguments(module))
        self.layer, self.subtract = (module,), 0.0

    def decay(self) -> Any:
        beta = self.layer[0].beta.clamp(0, 1)
        return beta if beta.requires_grad else beta.item()


def _find_ours(module: Any) -> nn.Module:
    own = type(module) is Leaky and (module.beta.requires_grad or module.reset_mechanism == "none")
    return _Beta(module) if own else _translate(module)


def _constants(module: Any) -> tuple[Any, ...]:
    states = module._non_persistent_buffers_set
    tensors = [t for name, t in (module._parameters | module._buffers).items() if name not in states]
    plain = [getattr(module, name) for name in ("reset_mechanism", "inhibition", "state_quant", "output")]
    flags = _state_function(module), getattr(module, "reset_delay", True), *plain
    return *tensors, *(t.requires_grad for t in tensors), module.spike_grad, *flags


def _state_function(module: Any) -> str | None:
    return getattr(getattr(module, "state_function", None), "__name__", None)


def _decay(module: Any) -> Any:
    """Return β, of a membrane potential that spikes do not set to zero: u[t] = β u[t−1] + x[t] − θ s[t−1]."""
    plain = type(module) is Leaky and module.reset_mechanism in ("subtract", "none") and not module.state_quant
    return module.beta.clamp(0, 1) if plain else None


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


def _advance(module: Any) -> Any:
    states = "mem syn" if type(module) is Synaptic else "mem"
    return make_adapter(_Adapter, module, states, _find_ours, _constants)


class _Adapter(BeforeReset):
    @property
    def half_state(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Return whether no spikes of float32, as their surrogates give them, change the state."""
        return self.module.reset_mechanism == "none" or isinstance(self.module.spike_grad, surrogates.Surrogate)

    def __call__(self, x: Tensor, steps: int, cut: bool, how: Any = None) -> Tensor | None:
        if type(self.module) is Synaptic and x.element_size() < 4 and not self.half_state:
            return None  # its current has 16 bits, and its potential 32
        return super().__call__(x, steps, cut, how)


register(SpikingNeuron, _states, reset=_reset, spikes=True, check=_check, translate=_translate, decay=_decay)
set_role(SpikingNeuron, replace(role_of(SpikingNeuron), advance=_advance))
