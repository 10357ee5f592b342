"""sinabs' layers that run one time step: the squeezing ones, with `num_timesteps=1`, or `batch_size` that of the input.

The others take [B, T, ...], and would take the channels of a time step for its time.
"""

# pyright: reportMissingImports=false

from collections.abc import Iterator
from dataclasses import replace
from math import inf
from typing import Any

import torch
from sinabs.activation import (
    Gaussian,
    MaxSpike,
    MembraneReset,
    MembraneSubtract,
    MultiSpike,
    SingleExponential,
    SingleSpike,
)
from sinabs.layers import IAFSqueeze, LIFSqueeze, SqueezeMixin, StatefulLayer
from torch import Tensor, nn

from sltt import surrogates
from sltt.interop.adapted import AfterReset, make_adapter
from sltt.interop.conversion import ConversionError, leaky, read_constant, require, synaptic
from sltt.neurons import IntegrateAndFire
from sltt.sequence.state import register, role_of, set_role


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
        has = f"has batch_size={module.batch_size} and num_timesteps={module.num_timesteps}"
        return f"{has}, for a time step of {batch} samples: give it num_timesteps=1"
    return None


def _translate(module: Any) -> nn.Module:
    if not module.does_spike:
        return module
    require(type(module) in (LIFSqueeze, IAFSqueeze), "has other dynamics than LIFSqueeze and IAFSqueeze")
    require(module.num_timesteps == 1, "may take several time steps in a call: give it num_timesteps=1")
    require(module.spike_fn is SingleSpike, "may fire several times in a time step: give it spike_fn=SingleSpike")
    require(not module.train_alphas, "learns its decay (train_alphas=True)")
    require(module.min_v_mem is None, "keeps its membrane potential above min_v_mem")
    require(not module.record_states, "records its states: set record_states = False")
    for name in ("tau_mem", "tau_syn"):
        if (tau := getattr(module, name)) is not None:
            read_constant(name, tau)
    threshold = read_constant("spike_threshold", module.spike_threshold)
    reset: dict[str, Any] = {}
    if isinstance(module.reset_fn, MembraneReset):
        require(module.reset_fn.reset_value == 0, "adds the reset value to neurons that did not fire, too")
        reset = {"v_reset": 0.0, "detach_reset": True}
    else:
        subtracts = isinstance(module.reset_fn, MembraneSubtract)
        require(subtracts and module.reset_fn.subtract_value in (None, threshold), "has a reset that ours do not have")
    reset |= {"v_threshold": threshold, "surrogate": _surrogate(module.surrogate_grad_fn, threshold)}
    decay = read_constant("tau_mem", module.alpha_mem_calculated.detach())
    if module.tau_syn is None:
        return leaky(decay, decay_input=module.norm_input, **reset)
    synaptic_decay = read_constant("tau_syn", module.alpha_syn_calculated.detach())
    # theirs decays together with the input that just came
    gain = synaptic_decay * (1 - decay if module.norm_input else 1.0)
    return synaptic(decay, synaptic_decay, gain, **reset)


def _decay(module: Any) -> Any:
    """Return α of the membrane potential of neurons without a synaptic current, from which spikes subtract."""
    plain = type(module) in (LIFSqueeze, IAFSqueeze) and isinstance(module.reset_fn, MembraneSubtract)
    plain = plain and not module.train_alphas and module.tau_syn is None and module.min_v_mem is None
    return module.alpha_mem_calculated if plain else None


def _surrogate(function: Any, threshold: float) -> surrogates.Surrogate:
    if isinstance(function, SingleExponential):
        return surrogates.Exponential(1 / (function.grad_width * threshold), scale=2 * function.grad_scale)
    if isinstance(function, Gaussian) and function.mu == 0:
        return surrogates.Gaussian(function.sigma, scale=function.grad_scale)
    raise ConversionError(f"has the surrogate {function}, which is not in sltt.surrogates")


class _Integrate(IntegrateAndFire):
    """A layer of sinabs that runs in our kernels: it may fire several times in a time step, and learns τ by default."""

    def __init__(self, module: Any):
        plain = type(module) in (LIFSqueeze, IAFSqueeze) and module.does_spike and module.alpha_syn_calculated is None
        require(plain and module.min_v_mem is None and not module.record_states, "has other dynamics")
        require(isinstance(module.reset_fn, MembraneSubtract), "has a reset that ours do not have")
        threshold = read_constant("spike_threshold", module.spike_threshold)
        super().__init__(threshold, surrogate=_surrogate(module.surrogate_grad_fn, threshold))
        fires, self.layer = module.spike_fn, (module,)
        require(fires in (SingleSpike, MultiSpike) or isinstance(fires, MaxSpike), "has a spike_fn of its own")
        self.most = 1.0 if fires is SingleSpike else getattr(fires, "max_num_spikes_per_bin", None) or inf
        self.decay_input, self.subtract = module.norm_input, module.reset_fn.subtract_value
        require(module.alpha_mem_calculated.numel() == 1, "has a tau_mem for each neuron")

    def decay(self) -> Any:
        alpha = self.layer[0].alpha_mem_calculated
        return alpha if alpha.requires_grad else alpha.item()


class _Squeezed(AfterReset):
    half_state = False  # their spikes are float32

    def __call__(self, x: Tensor, steps: int, cut: bool, how: Any = None) -> Tensor | None:
        spikes = super().__call__(x, steps, cut, how)
        if spikes is not None:
            self.module.i_syn, self.module.recordings = None, {}
            self.module.firing_rate = spikes[-len(self.module.v_mem) :].mean()
        return spikes


def _constants(module: Any) -> tuple[Any, ...]:
    functions = module.spike_fn, module.reset_fn, module.surrogate_grad_fn
    others = "spike_threshold", "min_v_mem", "norm_input", "record_states", "tau_syn", "train_alphas"
    return *functions, repr(functions), *(getattr(module, name, None) for name in others)


_of = {"spikes": lambda module: module.does_spike, "decay": _decay}
register(StatefulLayer, _states, reset=_reset, check=_check, translate=_translate, **_of)
_role = replace(role_of(StatefulLayer), advance=lambda m: make_adapter(_Squeezed, m, "v_mem", _Integrate, _constants))
set_role(StatefulLayer, _role)
