"""Structure proves that a network treats its samples alike: known layers in known containers.

Such a network may take several time steps in a call, and does not change its weights in one. Of any other forward
nothing is assumed: see `sltt.rules.folding`.
"""

from collections import Counter
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from sltt._torch import _DropoutNd, has_global_hooks, has_own_operations, unwrapped, wrapped_module
from sltt.sequence.hooks import count_hooks
from sltt.sequence.state import LIBRARIES

# of torch.nn.modules
_ALIKE = "activation conv dropout linear normalization padding pixelshuffle pooling upsampling"
# over samples, with numbers that are drawn, or over any dimension, of which the operations tell
_NOT_ALIKE = nn.MultiheadAttention, nn.RReLU, nn.Softmax, nn.Softmax2d, nn.Softmin, nn.LogSoftmax, nn.GLU
_PADS = nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d
_CONTAINERS = nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict


def find_unproved(layers: dict[nn.Module, Any]) -> str | None:
    """Return why nothing is known of a network's forward, as of the first layer that is not; None if all are known."""
    hooked = next((layer for module, layer in layers.items() if count_hooks(module)), None)
    if hooked:
        return f"has hooks on {hooked}, which see one time step in a call"
    places = Counter(module for _, module in unwrapped(next(iter(layers))).named_modules(remove_duplicate=False))
    inside: set[nn.Module] = set()  # what keeps a state, which takes the time steps one after the other
    for module, layer in layers.items():
        if module not in inside and not is_proved(layer):
            return f"has a forward of its own in {layer}"
        if places[module] > 1 and (layer.role.stepwise or layer.states):
            return f"runs {layer} in two places"
        inner = [layers[m] for m in module.modules()] if isinstance(module, ParametrizationList) else []
        if any(i.role.stepwise or i.role.kind == "keeper" or isinstance(i.module, _DropoutNd) for i in inner):
            return f"computes a weight by layers that tell time steps apart in {layer}"
        if layer.role.kind == "keeper" and module not in inside:
            inside.update(module.modules())
    return None


def find_modes() -> str | None:
    """Return why nothing is known of any network here and now: hooks for all modules, or a function mode."""
    if has_global_hooks():
        return "is under hooks for all modules, which see one time step in a call"
    return "is under a function mode, which may do anything" if has_own_operations() else None


def is_proved(layer: Any) -> bool:
    """Return whether a layer is known to treat its samples alike."""
    module, role, kind = layer.module, layer.role, type(layer.module)
    if any(type(p) is not nn.Parameter for p in module._parameters.values() if p is not None):
        return False
    if "forward" in vars(module) and not layer.is_known:
        return False
    if wrapped_module(module) is not None:
        return True
    package, name = kind.__module__.partition(".")[0], kind.__module__
    if isinstance(module, nn.Flatten | nn.Unflatten):
        dim: Any = module.start_dim if isinstance(module, nn.Flatten) else module.dim
        return (package == "torch" or layer.is_known) and isinstance(dim, int) and dim > 0
    if package == "sltt" or layer.is_known:
        return True
    if role.kind == "keeper":
        return package in LIBRARIES
    if role.kind == "norm" and role.of is None:  # GroupNorm: operations tell whether channels may be last
        return package == "torch" and not isinstance(module, nn.GroupNorm)
    of_torch = name in {f"torch.nn.modules.{file}" for file in _ALIKE.split()}
    alike = of_torch and not isinstance(module, _NOT_ALIKE + _PADS)
    return alike or kind in _CONTAINERS or name.startswith("torch.nn.utils")
