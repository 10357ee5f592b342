"""Read networks for exports: their calls, by torch.fx, and their layers in numbers."""

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from sltt.dropout import Dropout
from sltt.interop.conversion import require
from sltt.neurons import OnlineRenorm
from sltt.sequence.hooks import own_forward
from sltt.sequence.state import Stateful

WEIGHTS = (nn.Linear, nn.Conv1d, nn.Conv2d)
AVERAGES, ADAPTIVE = (nn.AvgPool1d, nn.AvgPool2d), (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)
MAXIMA = (nn.MaxPool1d, nn.MaxPool2d)
NOTHING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, Dropout)  # in evaluation mode
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, OnlineRenorm)
LAYERS = (*NOTHING, *NORMS, *WEIGHTS, *AVERAGES, *ADAPTIVE, *MAXIMA, nn.Flatten)
ADD = (operator.add, operator.iadd, torch.add, "add", "add_")
FLATTEN = (torch.flatten, "flatten")


class Tracer(fx.Tracer):
    """Leaves whole what keeps a state, and layers of PyTorch with another name."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return kind_of(m) is not None or isinstance(m, Stateful) or super().is_leaf_module(m, module_qualified_name)


def kind_of(module: nn.Module) -> type[nn.Module] | None:
    """Return the layer of PyTorch or of ours that a module computes; None for others."""
    return next((kind for kind in LAYERS if isinstance(module, kind) and not own_forward(module, kind)), None)


def trace(model: nn.Module, tracer: type[fx.Tracer] = Tracer, remedy: str = "") -> fx.Graph:
    """Return the calls of a network; raise ValueError if torch.fx cannot trace it."""
    try:
        return tracer().trace(model)
    except Exception as error:  # of any kind, since symbols run through the network's own code
        raise ValueError(
            f"{type(model).__name__} cannot be traced by torch.fx: {' '.join(str(error).split())}. Write its forward "
            f"without control flow that depends on values{remedy}"
        ) from error


def calling_module(node: fx.Node) -> str:
    """Return the path of the module of which the forward makes a call."""
    return [*(path for path, _ in node.meta.get("nn_module_stack", {"": ("", None)}).values())][-1]


def flatten_of(node: fx.Node) -> nn.Flatten:
    """Return the layer for a call of `torch.flatten` or `Tensor.flatten`."""
    given: dict[str, Any] = dict(zip(("start_dim", "end_dim"), node.args[1:], strict=False)) | node.kwargs
    return nn.Flatten(given.get("start_dim", 0), given.get("end_dim", -1))


def pair(value: Any, first: int = 0) -> tuple[int, int]:
    """Height and width; of a layer with one dimension, the width behind `first`."""
    if isinstance(value, tuple) and len(value) == 1:
        return first, value[0]
    return (value, value) if isinstance(value, int) else tuple(value)


def padding_of(conv: Any) -> tuple[int, int]:
    """Return the padding of a convolution in numbers; raise ConversionError if the sides differ."""
    require(conv.padding_mode == "zeros", ", which pads by other than zeros")
    if not isinstance(conv.padding, str):
        return pair(conv.padding)
    both = [d * (k - 1) * (conv.padding == "same") for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    require(not any(width % 2 for width in both), ", which pads one side more than the other")
    return pair(tuple(width // 2 for width in both))


def gain_and_shift(norm: Any) -> tuple[Tensor, Tensor]:
    """Return gain and shift [C] of a BatchNorm with running statistics, in float64."""
    gain = (norm.running_var.double() + norm.eps).rsqrt()
    gain = gain if norm.weight is None else gain * norm.weight
    shift = -norm.running_mean * gain
    return gain, shift if norm.bias is None else shift + norm.bias
