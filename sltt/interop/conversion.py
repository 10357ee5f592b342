"""Conversion: neurons of other libraries replaced by ours, where the dynamics are the same.

Each library's file translates its neurons and their parameters; docs/interop.md lists the neurons.
"""

import copy
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sltt.checks import instance
from sltt.neurons import IF, LIF, CubaLIF
from sltt.sequence.state import Stateful, emits_spikes, reset, role_of


class ConversionError(ValueError):
    """A neuron has no exact counterpart here."""


def convert(model: nn.Module) -> nn.Module:
    """Return a copy of a network with its neurons replaced by ours; outputs and gradients are the same.

    Neurons of SpikingJelly, snnTorch, sinabs and, in `KeepState`, Norse then run in the fused step, and can be folded.
    A `SequentialState` of Norse becomes a `nn.Sequential`. Weights are copied, and learnable time constants too. Other
    layers stay as they are, leaky integrators that do not spike among them.

        sinabs    λ = exp(−1/tau_mem)          α = exp(−1/tau_syn)
        Norse     λ = 1 − dt · tau_mem_inv     α = 1 − dt · tau_syn_inv

    Args:
        model: the network; its state is reset.

    Raises ValueError naming every neuron that has no exact counterpart here, and why.
    """
    remedy = "The rules take these neurons as they are"
    return translate_all(model, _translate, f"no exact counterpart here for {{}}. {remedy}")


def translate_all(model: nn.Module, translate: Callable[[Any], nn.Module], message: str) -> nn.Module:
    """Return a copy of a network with each module replaced; raise ValueError with a message of those that cannot be."""
    reset(instance("model", model, nn.Module))
    refused: dict[nn.Module, str] = {}
    copies: dict[int, Any] = {}
    _translate_module(model, "", translate, copies, refused)
    if refused:
        raise ValueError(message.format("; ".join(refused.values())))
    return copy.deepcopy(model, copies)


def _translate_module(
    module: nn.Module, path: str, translate: Any, copies: dict[int, Any], refused: dict[nn.Module, str]
) -> None:
    """Put what replaces the modules into `copies`, the memory of `copy.deepcopy`; one that is used twice stays one."""
    if id(module) in copies:
        return
    try:
        new = translate(module)
    except (ValueError, ArithmeticError, RuntimeError) as reason:  # also of a constant that ours do not take
        refused[module] = f"{layer_title(path, module)}, which {reason}"
        return
    if new is not module and has_hooks(module, backward=True):
        refused[module] = f"{layer_title(path, module)}, which has hooks that ours would not run"
    for name, child in new.named_children():
        _translate_module(child, f"{path}.{name}".lstrip("."), translate, copies, refused)
    if new is not module:
        copies[id(module)] = copy.deepcopy(new, copies)


def _translate(module: nn.Module) -> nn.Module:
    role = role_of(type(module))
    if role.translate:
        source = f"what translate of sltt.register gives for {type(module).__name__}"
        return instance(source, role.translate(module), nn.Module)
    if emits_spikes(module) and not isinstance(module, Stateful):
        raise ConversionError("is of a type that is registered without translate=…")
    return module


def leaky(decay: float, **arguments: Any) -> nn.Module:
    """`LIF` with λ = decay, or `IF` for λ = 1, which has no input to scale."""
    if decay == 1 and not arguments.pop("decay_input", False):
        return IF(**arguments)
    if not 0 < decay < 1:
        raise ConversionError(f"keeps {decay:g} of its membrane potential in a time step; ours keep between 0 and 1")
    return LIF.from_beta(decay, **arguments)


def synaptic(decay: float, synaptic_decay: float, gain: float, **arguments: Any) -> nn.Module:
    """`CubaLIF` with λ = decay, α = synaptic_decay and g = gain."""
    if not (0 < decay <= 1 and 0 <= synaptic_decay < 1):
        decays = f"{decay:g} of its membrane potential and {synaptic_decay:g} of its current in a time step"
        raise ConversionError(f"keeps {decays}; ours keep between 0 and 1, and less than 1 of a current")
    tau = None if decay == 1 else 1 / (1 - decay)
    return CubaLIF(tau, 1 / (1 - synaptic_decay), gain, **arguments)


def read_constant(name: str, value: Any) -> float:
    """Return a parameter that is the same number for all neurons of a layer, and is not learned."""
    value = torch.as_tensor(value)
    if value.requires_grad:
        raise ConversionError(f"learns {name}: set requires_grad_(False) if it is to stay as it is")
    if not (value == value.flatten()[0]).all():
        raise ConversionError(f"has another {name} for each neuron")
    return float(value.flatten()[0])


def layer_title(path: str, layer: Any) -> str:
    """Return how messages name a layer."""
    return f"{path or 'the model'} ({type(layer).__name__})"


def check_names(model: nn.Module) -> None:
    """Raise ValueError for a name in a network that would leave a string or a comment of code that it is written to."""
    of_modules = [(type(m).__name__, *vars(m), *m._modules, *m._parameters, *m._buffers) for m in model.modules()]
    for name in (name for names in of_modules for name in names):
        if not name.isprintable() or re.search(r"""["'`\\]|\*/|/\*""", name):
            expected = "no quotes, backslashes, control characters or signs of comments"
            raise ValueError(f"the name {name!r} would enter source code: expected {expected}; rename it")


def has_hooks(module: nn.Module, backward: bool = False) -> bool:
    """Return whether hooks see a module's calls, other than those of PyTorch that compute its weights, and of ours."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    hooks += [*module._backward_hooks.values(), *module._backward_pre_hooks.values()] if backward else []
    return any(not (type(h).__module__.startswith("torch.nn.utils") or hasattr(h, "sees_folds")) for h in hooks)


def check_exportable(model: nn.Module) -> None:
    """Raise ValueError for a weight, or a statistic of BatchNorm, that is NaN or infinite."""
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} has values that are NaN or infinite: export a checkpoint from before that")


_NEAREST = {
    **dict.fromkeys(("layernorm", "groupnorm", "instancenorm"), "BatchNorm"),
    "relu": "neurons",
    **dict.fromkeys(
        ("node)", "(leaky)", "(synaptic)", "(lapicque)", "squeeze)", "(keepstate)"), "sltt.interop.convert(model)"
    ),
    **dict.fromkeys(("(alif)", "(channellif)", "(integerlif)", "(ternarylif)"), "LIF, PLIF, IF or CubaLIF"),
    **dict.fromkeys(("(runningmax)", "adaptivemaxpool"), "MaxPool"),
    "windows of several sizes": "an output size that divides the input's",
    "softmax": "the logits before it, whose largest is the same in each time step",
    "sigmoid": "the logit before it: 0 is a probability of 0.5",
    "operation sub": "x + (-1.0) * y",
    "operation unsqueeze": "an input [B, 1, ...]",
    "operation squeeze": "an output [B, 1]",
    "transpose": "Conv on all pixels",
}


def add_remedies(problems: list[str]) -> list[str]:
    """Return what an export cannot take, each with the nearest that it can."""
    hints = [[near for word, near in _NEAREST.items() if word in p.split(" in ")[0].lower()] for p in problems]
    return [p + "".join(f" (use {near})" for near in nearest) for p, nearest in zip(problems, hints, strict=True)]


def require(condition: bool, otherwise: str) -> None:
    """Raise ConversionError with a reason unless a condition holds."""
    if not condition:
        raise ConversionError(otherwise)
