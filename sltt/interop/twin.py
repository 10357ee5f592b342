"""The spiking twin of an ANN: the same network and weights, with a neuron at every call of an activation."""

import copy
import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from sltt.checks import folder, instance, number, sequence
from sltt.data import Data
from sltt.interop.activations import QCFS, Balanced, percentiles
from sltt.interop.reading import call_name, calling_module, check_hooks
from sltt.interop.tracing import NEURONS, NONLINEAR, Calls
from sltt.models.base import NeuronFactory, neuron_maker
from sltt.neurons import IF
from sltt.neurons.dropout import Dropout
from sltt.neurons.pooling import RunningMax
from sltt.sequence.modes import evaluation_mode
from sltt.sequence.steps import check_input

PERCENTILE = 99.9  # of activations, which is the threshold
SAMPLES = 256  # of a data set, to balance thresholds on


def spiking(
    ann: nn.Module,
    neuron: NeuronFactory = partial(IF, v_init=0.5),
    weights: str | None = None,
    data: Data | Tensor | None = None,
    percentile: float = PERCENTILE,
    replace: Sequence[str] = (),
    keep: Sequence[str] = (),
) -> nn.Module:
    """Return the spiking twin of an ANN: a copy with a neuron of its own at every call of an activation.

        ReLU(x[t]) becomes θ s[t],  s[t] the spikes of a neuron with input x[t] / θ

    The mean over T time steps is ReLU(x) in T + 1 levels up to θ. Without data θ is 1, or the clip of a `QCFS`. These
    stay: weights and their names, BatchNorm, LayerNorm and attention (within the time step). PyTorch's max pooling
    becomes `sltt.RunningMax`, which pools means over time; `nn.Dropout` becomes `sltt.Dropout`, which has one mask per
    sequence. Modules of yours that read `self.training` and hold no others, such as timm's DropPath, stay as they are.
    Choose T where you train or run the twin.

    Args:
        ann: the network; `torch.fx` traces it.
        neuron: makes a neuron. That of the default has no leak, and starts at half its threshold.
        weights: file of `torch.save` to load into the network first: a state dict, or a checkpoint of sltt.
        data: inputs [B, ...] to balance thresholds on, or a data set of images, of which up to 256 are taken: θ of a
            channel is a percentile of its activations. The θ of a `QCFS` is its clip, with data and without.
        percentile: in (0, 100]; larger activations are cut off. Few time steps want a lower one: 97 for T = 4.
        replace: other activations to put neurons at, such as "gelu" for nn.GELU and F.gelu. The twin needs training.
        keep: activations to leave as they are, such as "sigmoid" in a gate.

    Raises:
        ValueError: what cannot be turned, by name and with the remedy. Control flow that depends on values; functions
            with `training=…`; neurons that spike already; no activation. An activation without a spiking counterpart,
            hidden in a module of PyTorch. Changes in place of what is read later. Scripted modules.

    Source: Rueckauer et al. 2017 (Front. Neurosci. 11:682), for thresholds by percentiles.
    """
    make = neuron_maker(neuron)
    percentile = number("percentile", percentile, above=0, most=100)
    if data is None and percentile != PERCENTILE:
        raise ValueError(f"percentile={percentile:g} is of data, and there is none: give data=…, or leave it out")
    replace, keep = _names("replace", replace), _names("keep", keep)
    for path, module in instance("ann", ann, nn.Module).named_modules():
        if isinstance(module, torch.jit.ScriptModule):  # its activations cannot be read
            where = f"{path or 'all of it'} is of torch.jit; give the module as it was before"
            raise ValueError(f"no spiking twin of {type(ann).__name__}: {where}")
    ann = copy.deepcopy(ann)
    if weights is not None:
        content: Any = torch.load(folder("weights", weights, "a file"), map_location="cpu", weights_only=True)
        ann.load_state_dict(content.get("model", content))
    calls = Calls(ann, NEURONS.union(replace).difference(keep), NONLINEAR.difference(replace, keep))
    activations = calls.activations()
    thresholds = {} if data is None else _percentiles(calls, activations, data, percentile)
    modules = {node: calls.module(node) for node in activations}
    thresholds |= {node: module.clip.detach() for node, module in modules.items() if isinstance(module, QCFS)}
    neurons = {node: make().to(_device(ann)) for node in activations}
    made = {node: Balanced(one, thresholds[node]) if node in thresholds else one for node, one in neurons.items()}
    made |= _over_time(calls)
    replaced = [(str(node.target), module) for node in made if (module := calls.module(node))]
    check_hooks([("", ann), *replaced], "the twin", backward=True)
    places: dict[str, fx.Node] = {}
    for node, module in made.items():  # one for each call: it keeps a state for a sequence
        places[name := _free_name(calls, node, places)] = node
        ann.set_submodule(name, module)
        node.op, node.target, node.args, node.kwargs = "call_module", name, (node.all_input_nodes[0],), {}
    return fx.GraphModule(ann, calls.graph, f"Spiking{type(ann).__name__}").train(ann.training)


def _over_time(calls: Calls) -> dict[fx.Node, nn.Module]:
    """Return the other calls that time changes, and what stands for them in a sequence."""
    found: dict[fx.Node, nn.Module] = {}
    for node in calls.graph.nodes:
        if type(module := calls.module(node)) is nn.Dropout:
            found[node] = Dropout(module.p)
        elif pool := calls.pooling(node):
            found[node] = RunningMax(pool)
    return found


def _names(argument: str, names: Sequence[str]) -> tuple[str, ...]:
    return tuple(call_name(instance(argument, name, str)) for name in sequence(argument, names, "names of activations"))


def _percentiles(
    calls: Calls, activations: list[fx.Node], data: Data | Tensor, percentile: float
) -> dict[fx.Node, Tensor]:
    """Return a percentile of what each activation gives of the data, for each channel."""
    found: dict[fx.Node, Tensor] = {}

    class Observer(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if n in activations:
                found[n] = percentiles(result, -1 if calls.of_features(n) else 1, percentile)
            return result

    with evaluation_mode(calls.ann), torch.no_grad():
        images = _images(data) if isinstance(data, Data) else instance("data", data, Tensor, "or a data set")
        images = images.to(_device(calls.ann))
        check_input(images)
        Observer(calls.ann, graph=calls.graph).run(images.clone())  # which the network may change
    return found


def _device(network: nn.Module) -> torch.device:
    return next((p.device for p in network.parameters()), torch.device("cpu"))


def _images(data: Data) -> Tensor:
    splits = data.splits(1)
    if not splits.static:
        raise ValueError(f"thresholds are balanced on images, and {data} has sequences: give a tensor")
    samples, count = splits.unaugmented_train, splits.sizes["train"]
    chosen = range(0, count, -(-count // SAMPLES))  # spread, since a folder of images has one class after the other
    return splits.collate([samples[i] for i in chosen])[0]


def _free_name(calls: Calls, node: fx.Node, taken: Any) -> str:
    """Return a name for the neuron at a call: of the module called, or of the function in the module that calls it."""
    called = node.op == "call_module"
    if called and node.target not in taken:
        return str(node.target)
    base = str(node.target) if called else f"{calling_module(node)}.{calls.name(node)}".lstrip(".")
    parent = base.rpartition(".")[0]
    siblings = calls.ann.get_submodule(parent)
    names = itertools.chain([base], (f"{base}_{n}" for n in itertools.count(2)))
    return next(name for name in names if not hasattr(siblings, name.rpartition(".")[2]) and name not in taken)
