"""Read the forward of a network by torch.fx: its calls, as layers with their inputs, which the exports walk."""

import copy
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.nn.utils.parametrize import type_before_parametrizations

from sltt.interop.conversion import check_names, has_hooks, layer_title, require
from sltt.neurons.dropout import Dropout
from sltt.sequence.hooks import own_forward
from sltt.sequence.state import Stateful, emits_spikes, reset

ONE_TENSOR = "torch.cat((a, b), 1) makes one of two heads"
WEIGHTS = (nn.Linear, nn.Conv1d, nn.Conv2d)
AVERAGES, ADAPTIVE = (nn.AvgPool1d, nn.AvgPool2d), (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)
AFFINE = ("add", "sub", "rsub", "mul", "div", "truediv", "neg")  # also in place
MAXIMA = (nn.MaxPool1d, nn.MaxPool2d)
NOTHING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, Dropout)  # in evaluation mode
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
LAYERS = (*NOTHING, *NORMS, *WEIGHTS, *AVERAGES, *ADAPTIVE, *MAXIMA, nn.Flatten)
MAX_POOLS = (*MAXIMA, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)


@dataclass(eq=False)
class Call:
    """A layer that the forward of a network runs, or another operation.

    Attributes:
        path: of the layer in the network; of an operation, its name in the trace, which no layer has.
        place: how messages name the call.
        kind: the class in LAYERS that the layer computes as, "sum", "cat" (along the channels), "affine", "input",
            "image" (an input without channels gets one), "output"; or None.
        layer: for a function, the layer that does the same; of an "affine" call, gain and shift of each channel.
        inputs: the calls whose outputs it reads.
        shape: of the output [B, ...].
    """

    path: str
    place: str
    kind: Any
    layer: Any
    inputs: list["Call"]
    shape: torch.Size


def read_calls(model: nn.Module, x: Tensor) -> list[Call]:
    """Return the calls of a network on one time step x [B, ...], from "input" to "output", in evaluation mode.

    What does nothing then is left out. A BatchNorm goes into the weights before it, if it alone reads their output.

    Raises ValueError where torch.fx cannot trace it, or computes something else; for several results; for hooks.
    """
    if hooked := [layer_title(path, module) for path, module in model.named_modules() if has_hooks(module)]:
        remedy = "write what they do into a forward, or remove them by the handles that their registration gave"
        raise ValueError(f"the export would not run the hooks of {', '.join(hooked)}: {remedy}")
    reset(model)
    reader = _Reader(model, graph := trace(model))
    with torch.no_grad():
        logits = reader.run(x)
        reset(model)
        if not isinstance(logits, Tensor):
            raise ValueError(f"expected one tensor of logits, got {type(logits).__name__}: {ONE_TENSOR}")
        in_place = (n for n in graph.nodes if n.op == "call_method" and n.target.endswith("_"))
        lost = any(not n.users or len(n.args[0].users) > 1 for n in in_place)  # of what others read, or nobody
        if lost or not torch.allclose(logits, model(x), rtol=1e-3, atol=1e-5):
            problem = f"{type(model).__name__} changes a tensor in place, or draws random numbers, unseen in its trace"
            raise ValueError(f"{problem}: write z = z + x for z += x, and nn.Dropout for F.dropout")
    calls = [*dict.fromkeys(reader.calls.values())]
    readers = Counter(source for call in calls for source in call.inputs)
    for call in [*calls]:
        before = call.inputs[0] if call.inputs else call
        folds = call.kind in NORMS and before.kind in WEIGHTS and readers[before] == 1
        if folds and call.layer.running_mean is not None:
            call.path, call.place, call.kind, call.inputs = before.path, before.place, before.kind, before.inputs
            call.layer = _fold(before.layer, call.layer)
            calls.remove(before)
    return calls


def _fold(layer: Any, norm: Any) -> nn.Module:
    """Return a layer that gives what a BatchNorm behind it gives: w (u − μ) / √(σ² + ε) + b."""
    folded, statistics = copy_plain(layer), (norm.running_mean, norm.running_var, norm.eps)
    folded.weight, folded.bias = fuse_conv_bn_weights(layer.weight, layer.bias, *statistics, norm.weight, norm.bias)
    return folded


def copy_plain(layer: Any) -> Any:
    """Return a copy of a layer whose weights may be set: what computed them is gone."""
    copied = copy.deepcopy(layer)
    copied.__class__ = type_before_parametrizations(layer)
    for name in copied._modules.pop("parametrizations", ()):
        setattr(copied, name, nn.Parameter(getattr(layer, name)))
    return copied


class _Reader(fx.Interpreter):
    """Runs a network once, for the shapes, and notes its calls."""

    def __init__(self, model: nn.Module, graph: fx.Graph):
        super().__init__(model, graph=graph)
        self.paths = dict(model.named_modules())
        self.calls: dict[Any, Call] = {}  # by node

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        inputs = [self.calls[node] for node in n.all_input_nodes if node in self.calls]
        if isinstance(value, Tensor) and (inputs or n.op in ("placeholder", "call_module")):  # others are constants
            kind, layer = self._layer(n, inputs, value.shape)
            if n.op == "call_module":
                path, place = str(n.target), layer_title(str(n.target), layer)
            else:
                path, caller = n.name if n.op.startswith("call") else kind, calling_module(n)
                place = f"the operation {path} in {layer_title(caller, self.paths[caller])}"
                while path in self.paths:
                    path += "_"
            # a mean drops the dimensions that pooling keeps
            if kind in ADAPTIVE and value.ndim == 2 and n.op != "call_module":
                shape = torch.Size([*value.shape, *[1] * (len(inputs[0].shape) - 2)])
                inputs = [self.calls.setdefault((n, "pool"), Call(f"{path}_pool", place, kind, layer, inputs, shape))]
                kind, layer = nn.Flatten, nn.Flatten()
            self.calls[n] = inputs[0] if kind in NOTHING else Call(path, place, kind, layer, inputs, value.shape)
        return value

    def _layer(self, n: fx.Node, inputs: list[Call], shape: torch.Size) -> tuple[Any, Any]:
        """Return the kind and the layer of a call whose output has this shape."""
        if n.op in ("placeholder", "output"):
            return "input" if n.op == "placeholder" else "output", None
        if n.op == "call_module":
            module = self.fetch_attr(str(n.target))
            return kind_of(module), module
        if layer := layer_of(n):
            return type(layer), layer
        name, arguments = function_name(n), [*n.args, *n.kwargs.values()]
        numbers = [value for value in arguments if isinstance(value, int | float)]
        if len(arguments) == len(inputs) == 2 and name in ("add", "iadd") and inputs[0].shape == inputs[1].shape:
            return "sum", None
        joined = [len(value) for value in arguments if isinstance(value, list | tuple)]
        if name in ("cat", "concat", "concatenate") and numbers in ([1], [1 - len(shape)]) and joined == [len(inputs)]:
            return "cat", None
        if name in ("dropout", "dropout1d", "dropout2d") and n.kwargs.get("training") is False:
            return nn.Identity, None
        affine = name.removeprefix("i") in AFFINE and [call.shape for call in inputs] == [shape] and len(shape) > 1
        of_sizes = any(isinstance(self.env[node], int) for node in n.all_input_nodes)  # of which one is the batch's
        if affine and not of_sizes and (factors := self._affine(n, shape)):
            return "affine", factors
        flat = len(inputs) == 1 and len(shape) == 2 and shape[0] == inputs[0].shape[0]
        if flat and name in ("view", "reshape", "squeeze"):
            return nn.Flatten, nn.Flatten()
        if name == "unsqueeze" and inputs[0].kind == "input" and shape[1] == 1:
            return "image", None
        if len(inputs) == 1 and name == "mean" and n.kwargs.keys() <= {"dim", "keepdim"}:
            dims: Any = n.kwargs.get("dim", (*n.args, None)[1])
            size = len(inputs[0].shape)
            dims = {d % size for d in ([dims] if isinstance(dims, int) else dims or ())}
            if size in (3, 4) and dims == {*range(2, size)}:
                kind = nn.AdaptiveAvgPool1d if size == 3 else nn.AdaptiveAvgPool2d
                return kind, kind(1)
        return None, None

    def _affine(self, n: fx.Node, shape: torch.Size) -> tuple[Tensor, Tensor] | None:
        """Return gain and shift, a number or one of each channel, of a call that computes g x + s of x [B, C, ...]."""

        def call(number: float) -> Tensor:
            x = torch.full(shape, number, dtype=torch.float64)
            args, kwargs = fx.map_arg((n.args, n.kwargs), lambda node: x if node in self.calls else self.env[node])
            return getattr(self, n.op)(n.target, args, kwargs).transpose(0, 1).flatten(1)

        shift, gain = call(0), call(1) - call(0)
        if not torch.allclose(call(2), 2 * gain + shift) or any((v != v[:, :1]).any() for v in (gain, shift)):
            return None
        gain, shift = (v[:1, 0] if (v == v[0, 0]).all() else v[:, 0] for v in (gain, shift))
        return gain, shift


class Tracer(fx.Tracer):
    """Leaves whole what keeps a state, and layers of PyTorch with another name."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        own = kind_of(m) is not None or isinstance(m, Stateful) or emits_spikes(m)
        return own or super().is_leaf_module(m, module_qualified_name)


def kind_of(module: nn.Module) -> type[nn.Module] | None:
    """Return the layer of PyTorch or of ours that a module computes; None for others."""
    return next((kind for kind in LAYERS if isinstance(module, kind) and not own_forward(module, kind)), None)


def trace(model: nn.Module) -> fx.Graph:
    """Return the calls of a network; raise ValueError if torch.fx cannot trace it, or its names are no text of code."""
    check_names(model)
    try:
        return Tracer().trace(model)
    except Exception as error:  # of any kind, since symbols run through the network's own code
        remedy = "Write its forward without control flow that depends on values"
        reason = " ".join(str(error).split())
        remedy += "; x.shape[0] for len(x)" * ("'len'" in reason)
        raise ValueError(f"{type(model).__name__} cannot be traced by torch.fx: {reason}. {remedy}") from error


def function_name(node: fx.Node) -> str:
    """Return the name of the function or method that a call runs: maxpool2d for `F.max_pool2d`."""
    return getattr(node.target, "__name__", str(node.target)).lower().replace("_", "")


def calling_module(node: fx.Node) -> str:
    """Return the path of the module of which the forward makes a call."""
    return [*(path for path, _ in node.meta.get("nn_module_stack", {"": ("", None)}).values())][-1]


_OF_FUNCTIONS = {kind.__name__.lower(): kind for kind in (nn.Flatten, *AVERAGES, *ADAPTIVE, *MAX_POOLS)}
_ARGUMENTS = {
    "Flatten": ("start_dim", "end_dim"),
    "Adaptive": ("output_size", "return_indices"),
    "Avg": ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
    "Max": ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
}


def layer_of(node: fx.Node) -> nn.Module | None:
    """Return the layer that does what a function does: pooling or flatten; None for others, or if tensors set it."""
    kind = _OF_FUNCTIONS.get(function_name(node)) if node.op in ("call_function", "call_method") else None
    if kind is None or len(node.all_input_nodes) > 1:
        return None
    names = next(names for word, names in _ARGUMENTS.items() if word in kind.__name__)
    arguments: dict[str, Any] = {"start_dim": 0} if kind is nn.Flatten else {}
    arguments |= dict(zip(("input", *names), node.args, strict=False)) | node.kwargs
    del arguments["input"]
    return kind(**arguments)


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
