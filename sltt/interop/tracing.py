"""The calls of an ANN, read by torch.fx: its activations, and all that stands in the way of a spiking twin."""

import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from sltt.interop.activations import QCFS
from sltt.interop.reading import MAX_POOLS, call_name, calling_module, function_name, layer_of, trace
from sltt.sequence.modes import evaluation_mode
from sltt.sequence.state import Stateful, emits_spikes

NEURONS = frozenset({"relu", "relu6", "qcfs"})  # what a neuron stands for
_NONLINEAR = (
    "abs acos acosh arccos arccosh arcsin arcsinh arctan arctan2 arctanh asin asinh atan atan2 atanh ceil celu clamp "
    "clampmax clampmin clip cos cosh elu erf erfc erfinv exp exp2 expit expm1 fix floatpower floor floordiv "
    "floordivide fmax fmin fmod frac gelu glu hardshrink hardsigmoid hardswish hardtanh heaviside hypot leakyrelu log "
    "log10 log1p log2 logaddexp logaddexp2 logit logsigmoid max maximum min minimum mish mod pow prelu remainder round "
    "rrelu rsqrt selu sgn sigmoid sign silu sin sinc sinh softplus softshrink softsign sqrt square tan tanh tanhshrink "
    "threshold trunc"
)
_CONDITIONS = frozenset({"ge", "greater", "greaterequal", "gt", "le", "less", "lessequal", "lt", "where"})
NONLINEAR = _CONDITIONS.union(_NONLINEAR.split())  # what has no spiking counterpart
_BY_MODE = (
    "alphadropout batchnorm dropout dropout1d dropout2d dropout3d featurealphadropout featuredropout instancenorm "
    "stochasticdepth"
)
BY_MODE = frozenset(_BY_MODE.split())  # functions with `training=…`
_OF_SHAPE = (
    "device dim dtype emptylike fulllike getdevice iscuda isfloatingpoint len ndim ndimension nelement newempty "
    "newfull newones newzeros numel oneslike randlike randnlike shape size zeroslike"
)
OF_SHAPE = frozenset(_OF_SHAPE.split())  # reads no values of a tensor
_VIEWS = (
    "adjoint bfloat16 broadcastto chunk contiguous data detach diagonal double dropout dsplit expand expandas flatten "
    "float getitem h half hsplit identity mh moveaxis movedim mt narrow permute ravel reshape reshapeas select split "
    "splitwithsizes squeeze swapaxes swapdims t tensorsplit to transpose type typeas unbind unflatten unfold unsqueeze "
    "unsafechunk unsafesplit view viewas vsplit"
)
VIEWS = frozenset(_VIEWS.split())  # gives the memory that it reads, or may do so
_LAYERS = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
_HIDDEN = nn.RNNBase | nn.RNNCellBase | nn.Transformer | nn.TransformerEncoderLayer | nn.TransformerDecoderLayer
_REDRAWN = nn.Dropout1d | nn.Dropout2d | nn.Dropout3d | nn.AlphaDropout | nn.FeatureAlphaDropout
_IN_PLACE = "sltt_in_place"


class Calls:
    """The calls of a network in evaluation mode, in their order; in training some networks give more than logits.

    Args:
        ann: the network.
        neurons: names of the activations to put neurons at.
        refused: names of those that have no counterpart.

    Raises:
        ValueError: its forward cannot be traced.

    Attributes:
        graph: the calls.
    """

    def __init__(self, ann: nn.Module, neurons: frozenset[str], refused: frozenset[str]):
        self.ann, self.neurons, self.refused = ann, neurons, refused
        with evaluation_mode(ann):
            remedy = ", or put sltt's neurons in place of the activations by hand"
            self.graph = trace(ann, _Tracer, remedy)
        for node in self.graph.nodes:
            self._restore_norm(node)
        self.varying: set[fx.Node] = set()  # depends on the values of the input, not on shapes and weights alone
        self.roots: dict[fx.Node, fx.Node] = {}  # the tensor that a call gives a view of, or else the call
        for node in self.graph.nodes:
            view = self._is_view(node) and not _in_place(node, self.module(node))
            self.roots[node] = self.roots[node.all_input_nodes[0]] if view else node
            varies = not self.varying.isdisjoint(node.all_input_nodes) and not self._of_shape(node)
            if node.op == "placeholder" or varies:
                self.varying.add(node)

    def _restore_norm(self, node: fx.Node) -> None:
        """Make a call of `F.batch_norm` in a subclass of BatchNorm, as timm's with an activation, one of a module."""
        path, layers = calling_module(node), (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
        module = self.ann.get_submodule(path)
        layer = next((layer for layer in layers if isinstance(module, layer)), None)
        if layer and node.target is F.batch_norm:
            object.__setattr__(module, "__class__", layer)  # its children stay
            weights = node.all_input_nodes[1:]
            node.op, node.target, node.args, node.kwargs = "call_module", path, node.args[:1], {}
            for weight in weights:
                self.graph.erase_node(weight)

    def activations(self) -> list[fx.Node]:
        """Return the calls to put neurons at; raise ValueError with all problems at once."""
        found: list[fx.Node] = []
        problems: dict[str, list[str]] = {}
        for node in self.graph.nodes:
            if problem := self._problem(node):
                problems.setdefault(problem, []).append(self._place(node))
            elif self._is_one_of(node, self.neurons):
                found.append(node)
        if problems:
            listed = "; ".join(f"{_list_places(places)}: {problem}" for problem, places in problems.items())
            raise ValueError(f"no spiking twin of {type(self.ann).__name__}: {listed}")
        if not found:
            remedy = 'use nn.ReLU() or F.relu, or name the activation that it has, such as replace=["gelu"]'
            raise ValueError(f"no activation was found in {type(self.ann).__name__}: {remedy}")
        return found

    def module(self, node: fx.Node) -> nn.Module | None:
        """Return the module that a call runs; None for a function or a method."""
        return self.ann.get_submodule(str(node.target)) if node.op == "call_module" else None

    def name(self, node: fx.Node) -> str:
        """Return the name of what a call runs: relu for `nn.ReLU`, `F.relu` and `Tensor.relu_`."""
        module = self.module(node)
        if module is not None:
            return call_name(type(module).__name__)
        if node.target is getattr:  # x.shape
            return call_name(str(node.args[1]))
        return function_name(node)

    def of_features(self, node: fx.Node) -> bool:
        """Return whether the channels of a call are the last dimension, as behind a linear layer; else the second."""
        while node.all_input_nodes:
            node = node.all_input_nodes[0]
            name = self.name(node)
            if isinstance(self.module(node), nn.Linear) or name in ("linear", "layernorm"):
                return True
            if name.startswith(("conv", "batchnorm", "groupnorm")) or isinstance(self.module(node), _LAYERS):
                return False
        return False

    def pooling(self, node: fx.Node) -> nn.Module | None:
        """Return the max pooling that a call runs; None for another call, or where indices or input values enter."""
        layer = layer_of(node) or self.module(node)
        return layer if isinstance(layer, MAX_POOLS) and not layer.return_indices else None

    def _problem(self, node: fx.Node) -> str | None:
        module, name = self.module(node), self.name(node)
        if module is not None and emits_spikes(module):
            return "spiking neurons already, where an ANN has an activation"
        if isinstance(module, _HIDDEN):
            return "an activation hidden inside; build it of nn.Linear, attention and nn.ReLU"
        if isinstance(module, _REDRAWN):
            return "another mask at every time step; use nn.Dropout"
        if self._has_fixed_mode(node):
            return "`training` would be fixed by the tracing; use p=0, or a module such as nn.Dropout"
        if self._is_one_of(node, self.refused):
            if name in _CONDITIONS:
                return f'no spiking counterpart; write F.relu, or keep=["{name}"]'
            replace = f'replace=["{name}"] to put neurons there all the same'
            return f'no spiking counterpart; train with ReLU, or {replace}, or keep=["{name}"]'
        if isinstance(node.kwargs.get("out"), fx.Node):
            return "writes into another tensor; leave out= out"
        if node in self.varying and _in_place(node, module):
            changed = node.all_input_nodes[0]
            root, late = self.roots[changed], self._read_later(node)
            activation = self._is_one_of(node, self.neurons)  # in the twin, a neuron that changes nothing in place
            of_input = root.op == "placeholder" and not activation and not node.meta.get(_IN_PLACE)
            if changed.op == "get_attr" or of_input:
                return "changes in place what every time step reads; write z = z + x for z += x"
            if late and (node.users or changed is root):
                where = f"changes in place what {self._place(late)} reads afterwards"
                return f"{where}; use inplace=False, or z = z + x for z += x"
            if not node.users:
                return "changes a part of a tensor in place, which no trace shows; write y = activation(x), and read y"
        return None

    def _is_one_of(self, node: fx.Node, names: frozenset[str]) -> bool:
        """Return whether a call is an activation of these names, and not math on shapes or weights."""
        name = self.name(node)
        two = "other" in node.kwargs or any(isinstance(other, fx.Node) for other in node.args[1:2])
        if name in ("max", "min") and not two:
            return False  # pooling
        return node.op.startswith("call") and name in names and node in self.varying

    def _has_fixed_mode(self, node: fx.Node) -> bool:
        """Return whether a call has `training=…` as it is in the trace."""
        by_mode = node.op == "call_function" and self.name(node) in BY_MODE
        return by_mode and 0 not in (*node.args[1:2], node.kwargs.get("p"))

    def _of_shape(self, node: fx.Node) -> bool:
        return node.op in ("call_function", "call_method") and self.name(node) in OF_SHAPE

    def _is_view(self, node: fx.Node) -> bool:
        """Return whether a call may give the memory of its first input; dropout does in evaluation mode."""
        called = node.op.startswith("call") and bool(node.all_input_nodes)
        return called and (self.name(node) in VIEWS or differs_in_training(self.module(node)))

    def _read_later(self, node: fx.Node) -> fx.Node | None:
        """Return the first call that reads a tensor, or a view of it, after a call changed it in place."""
        root = self.roots[node.all_input_nodes[0]]
        for user in self.graph.nodes:
            reads = self.roots[user] is user and not self._of_shape(user)
            if user > node and reads and any(self.roots[one] is root for one in user.all_input_nodes):
                return user
        return None

    def _place(self, node: fx.Node) -> str:
        return f"{node.target if node.op == 'call_module' else node.name} ({self.name(node)})"


def _list_places(places: list[str]) -> str:
    return ", ".join(places[:3]) + (f" and {len(places) - 3} more" if len(places) > 3 else "")


def _in_place(node: fx.Node, module: nn.Module | None) -> bool:
    if module is not None:
        return bool(getattr(module, "inplace", False))
    if node.meta.get(_IN_PLACE):
        return True
    name = str(getattr(node.target, "__name__", node.target))
    return node.kwargs.get("inplace") is True or (name.endswith("_") and not name.endswith("__"))


def differs_in_training(module: nn.Module | None) -> bool:
    """Return whether a user's module does otherwise in training, as timm's DropPath, and has no activation inside."""
    if module is None or type(module).__module__.startswith("torch.") or [*module.children()]:
        return False
    try:
        source = inspect.getsource(type(module))
    except (OSError, TypeError):  # it has none
        return False
    return ".training" in source and "relu" not in source.lower()


class _Tracer(fx.Tracer):
    """Goes into all modules but layers, those that keep a state, and those that do otherwise in training."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        kept = isinstance(m, _LAYERS | Stateful | QCFS) or differs_in_training(m)
        return kept or super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return Proxy(node, self)


class Proxy(fx.Proxy):
    """Marks `y += x` as in place: fx reads y + x."""


def _mark(name: str) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    def in_place(self: fx.Proxy, other: Any) -> fx.Proxy:
        result = getattr(operator, name)(self, other)
        result.node.meta[_IN_PLACE] = True
        return result

    return in_place


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor"):
    setattr(Proxy, f"__i{_name}__", _mark(f"__{_name}__"))
