"""The calls of an ANN, read by torch.fx: its activations, and all that stands in the way of a spiking twin."""

import torch.nn.functional as F
from torch import fx, nn

from sltt.interop.activations import QCFS
from sltt.sequence.modes import evaluating
from sltt.sequence.state import Stateful, emits_spikes

NEURONS = frozenset({"relu", "relu6", "qcfs"})  # what a neuron stands for
_NONLINEAR = (
    "abs celu clamp clip cos elu erf exp ge gelu glu gt hardshrink hardsigmoid hardswish hardtanh le leakyrelu log "
    "logsigmoid lt maximum minimum mish prelu rrelu selu sigmoid sign silu sin softplus softshrink softsign tanh "
    "tanhshrink threshold where"
)
NONLINEAR = frozenset(_NONLINEAR.split())  # what has no spiking counterpart
_BY_MODE = (
    "alphadropout batchnorm dropout dropout1d dropout2d dropout3d featurealphadropout featuredropout instancenorm "
    "stochasticdepth"
)
BY_MODE = frozenset(_BY_MODE.split())  # functions with `training=…`
_LAYERS = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
_HIDDEN = nn.RNNBase | nn.RNNCellBase | nn.Transformer | nn.TransformerEncoderLayer | nn.TransformerDecoderLayer
_REDRAWN = nn.Dropout1d | nn.Dropout2d | nn.Dropout3d | nn.AlphaDropout | nn.FeatureAlphaDropout


class Calls:
    """The calls of a network in evaluation mode, in their order; in training some networks give more than logits.

    Args:
        ann: the network.

    Raises:
        ValueError: its forward cannot be traced.

    Attributes:
        graph: the calls.
    """

    def __init__(self, ann: nn.Module):
        self.ann = ann
        try:
            with evaluating(ann):
                self.graph = _Tracer().trace(ann)
        except Exception as error:  # of any kind, since symbols run through the network's own code
            raise ValueError(
                f"{type(ann).__name__} cannot be traced by torch.fx: {' '.join(str(error).split())}. Write its forward "
                "without control flow that depends on values, or put sltt's neurons in place of the activations by hand"
            ) from error
        for node in self.graph.nodes:
            self._restore_norm(node)
        self.order = {node: i for i, node in enumerate(self.graph.nodes)}

    def _restore_norm(self, node: fx.Node) -> None:
        """Make a call of `F.batch_norm` in a subclass of BatchNorm, as timm's with an activation, one of a module."""
        path, layers = self.around(node), (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
        module = self.ann.get_submodule(path)
        layer = next((layer for layer in layers if isinstance(module, layer)), None)
        if layer and node.target is F.batch_norm:
            object.__setattr__(module, "__class__", layer)  # its children stay
            weights = node.all_input_nodes[1:]
            node.op, node.target, node.args, node.kwargs = "call_module", path, node.args[:1], {}
            for weight in weights:
                self.graph.erase_node(weight)

    def around(self, node: fx.Node) -> str:
        """The path of the module of which the forward makes a call."""
        return [*(path for path, _ in node.meta.get("nn_module_stack", {"": ("", None)}).values())][-1]

    def activations(self, neurons: frozenset[str], refused: frozenset[str]) -> list[fx.Node]:
        """The calls to put neurons at; raises ValueError with all problems at once.

        Args:
            neurons: names of the activations to put neurons at.
            refused: names of those that have no counterpart.
        """
        found: list[fx.Node] = []
        problems: dict[str, list[str]] = {}
        for node in self.graph.nodes:
            if problem := self._problem(node, refused):
                problems.setdefault(problem, []).append(self._place(node))
            elif self.name(node) in neurons:
                found.append(node)
        if problems:
            listed = "; ".join(f"{_some(places)}: {problem}" for problem, places in problems.items())
            raise ValueError(f"no spiking twin of {type(self.ann).__name__}: {listed}")
        if not found:
            raise ValueError(
                f"no activation was found in {type(self.ann).__name__}: use nn.ReLU() or F.relu, or name the "
                'activation that it has, such as replace=["gelu"]'
            )
        return found

    def module(self, node: fx.Node) -> nn.Module | None:
        """The module that a call runs; None for a function or a method."""
        return self.ann.get_submodule(str(node.target)) if node.op == "call_module" else None

    def name(self, node: fx.Node) -> str:
        """What a call runs: relu for `nn.ReLU`, `F.relu` and `Tensor.relu_`."""
        module = self.module(node)
        return plain(getattr(node.target, "__name__", str(node.target)) if module is None else type(module).__name__)

    def of_features(self, node: fx.Node) -> bool:
        """Whether the channels of a call are the last dimension, as behind a linear layer; else the second."""
        while node.all_input_nodes:
            node = node.all_input_nodes[0]
            name = self.name(node)
            if isinstance(self.module(node), nn.Linear) or name in ("linear", "layernorm"):
                return True
            if name.startswith(("conv", "batchnorm", "groupnorm")) or isinstance(self.module(node), _LAYERS):
                return False
        return False

    def _problem(self, node: fx.Node, refused: frozenset[str]) -> str | None:
        module, name = self.module(node), self.name(node)
        if module is not None and emits_spikes(module):
            return "spiking neurons already, where an ANN has an activation"
        if isinstance(module, _HIDDEN):
            return "an activation hidden inside; build it of nn.Linear, attention and nn.ReLU"
        if isinstance(module, _REDRAWN):
            return "another mask at every time step; use nn.Dropout"
        if node.op == "call_function" and name in BY_MODE and 0 not in (*node.args[1:2], node.kwargs.get("p")):
            return "`training` would be fixed by the tracing; use p=0, or a module such as nn.Dropout"
        if name in refused:
            return (
                f'no spiking counterpart; train with ReLU, or replace=["{name}"] to put neurons there all the '
                f'same, or keep=["{name}"]'
            )
        if _in_place(node, module):
            before = node.all_input_nodes[0]
            if late := [user for user in before.users if self.order[user] > self.order[node]]:
                return f"changes in place what {self._place(late[0])} reads afterwards; use inplace=False"
            if not node.users:
                return "changes a part of a tensor in place, which no trace shows; write y = activation(x), and read y"
        return None

    def _place(self, node: fx.Node) -> str:
        return f"{node.target if node.op == 'call_module' else node.name} ({self.name(node)})"


def _some(places: list[str]) -> str:
    return ", ".join(places[:3]) + (f" and {len(places) - 3} more" if len(places) > 3 else "")


def plain(name: str) -> str:
    """One name for nn.LeakyReLU, F.leaky_relu and F.leaky_relu_."""
    return name.lower().replace("_", "")


def _in_place(node: fx.Node, module: nn.Module | None) -> bool:
    if module is not None:
        return bool(getattr(module, "inplace", False))
    name = str(getattr(node.target, "__name__", node.target))
    return node.kwargs.get("inplace") is True or (name.endswith("_") and not name.endswith("__"))


class _Tracer(fx.Tracer):
    """Goes into all modules but layers, and those that keep a state."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _LAYERS | Stateful | QCFS) or super().is_leaf_module(m, module_qualified_name)
