"""SpikingJelly's modules in single-step mode: their memories are the state."""

# pyright: reportMissingImports=false

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from spikingjelly.activation_based import base, layer, neuron, surrogate
from torch import Tensor, nn

from sltt import surrogates
from sltt.interop.adapted import AfterReset, make_adapter
from sltt.interop.conversion import ConversionError, require
from sltt.neurons import IF, LIF, PLIF
from sltt.sequence.hooks import own_forward
from sltt.sequence.state import register, role_of, set_role


def _states(module: Any) -> Iterator[str]:
    yield from module._memories
    if isinstance(getattr(module, "v_seq", None), Tensor):  # of store_v_seq=True
        yield "v_seq"


def _check(module: Any, batch: int, kept: bool) -> str | None:
    if isinstance(module, neuron.SLTTLIFNode | neuron.OTTTLIFNode):
        return "has a learning rule of its own: use LIFNode, and sltt's rule"
    if "s" not in module.supported_step_mode():
        return "takes all time steps in one call: use a module that has step_mode='s'"
    if getattr(module, "step_mode", "s") != "s":
        return "is in multi-step mode: call functional.set_step_mode(model, 's')"
    return None


def _spikes(module: Any) -> bool:
    return isinstance(module, neuron.BaseNode | neuron.SimpleBaseNode)


def _translate(module: Any) -> nn.Module:
    if not _spikes(module):
        return module
    kind = {neuron.LIFNode: LIF, neuron.IFNode: IF, neuron.ParametricLIFNode: PLIF}.get(type(module))
    require(kind is not None, "has other dynamics than LIFNode, IFNode and ParametricLIFNode")
    require(module.step_mode == "s", "is in multi-step mode: call functional.set_step_mode(model, 's')")
    require(not module.store_v_seq, "stores its membrane potentials: set store_v_seq = False")
    arguments: dict[str, Any] = {name: getattr(module, name) for name in ("v_threshold", "v_reset", "detach_reset")}
    arguments["surrogate"] = _surrogate(module.surrogate_function)
    if (first := module._memories_rv["v"]) != (module.v_reset or 0):
        arguments["v_init"] = first
    if kind is IF:
        return IF(**arguments)
    if kind is LIF:
        return LIF(module.tau, decay_input=module.decay_input, **arguments)
    plif = PLIF(decay_input=module.decay_input, **arguments)
    plif.w = module.w  # 1/τ = σ(w) in both
    return plif


def _as_pytorch(module: Any) -> nn.Module:
    """Return one of the layers that SpikingJelly gives a step mode as PyTorch's."""
    kind = type(module).__bases__[0]
    if type(module) is not role_of(type(module)).of or kind is nn.Module or own_forward(module, type(module)):
        return module
    new = copy.copy(module)
    new.__class__ = kind
    new.step_mode = "s"  # which the network around it may read
    return new


def _constants(module: Any) -> tuple[Any, ...]:
    names = "v_threshold", "v_reset", "detach_reset", "step_mode", "store_v_seq", "tau", "decay_input"
    surrogate = module.surrogate_function
    of_surrogate = surrogate, getattr(surrogate, "alpha", None), getattr(surrogate, "spiking", None)
    return module._memories_rv["v"], *of_surrogate, *(getattr(module, name, None) for name in names)


def _surrogate(function: Any) -> surrogates.Surrogate:
    make = _SURROGATES.get(type(function))
    if make is None or not function.spiking:
        raise ConversionError(f"has the surrogate {function}, which is not in sltt.surrogates")
    return make(function.alpha)


_SURROGATES: dict[type, Callable[[float], surrogates.Surrogate]] = {
    surrogate.PiecewiseQuadratic: lambda alpha: surrogates.Triangle(1 / alpha),
    surrogate.Rect: lambda alpha: surrogates.Rectangle(1 / alpha),
    surrogate.Sigmoid: surrogates.Sigmoid,
    surrogate.ATan: surrogates.ArcTan,
    surrogate.PiecewiseExp: surrogates.Exponential,
    surrogate.SoftSign: surrogates.FastSigmoid,
    surrogate.SuperSpike: lambda alpha: surrogates.FastSigmoid(1.0, scale=2 * alpha),
    surrogate.Erf: lambda alpha: surrogates.Gaussian(1 / (alpha * math.sqrt(2))),
}


register(base.StepModule, (), check=_check)
for _kind in vars(layer).values():  # whose step mode "s" is the forward of PyTorch's layer
    if isinstance(_kind, type) and _kind.__bases__[1:] == (base.StepModule,):
        _role = role_of(_kind.__bases__[0])
        set_role(_kind, replace(_role, check=_check, translate=_as_pytorch, of=_kind))
register(base.MemoryModule, _states, reset=lambda m: m.reset(), spikes=_spikes, check=_check, translate=_translate)
_role = replace(
    role_of(base.MemoryModule), advance=lambda module: make_adapter(AfterReset, module, "v", _translate, _constants)
)
for _kind in (neuron.BaseNode, neuron.SimpleBaseNode):
    set_role(_kind, _role)
