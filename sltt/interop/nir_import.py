"""NIR graphs to networks; the equations are in `sltt.interop.nir_export`."""

# pyright: reportMissingImports=false

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nir
import numpy as np
import torch
from torch import Tensor, nn

from sltt.checks import instance, number
from sltt.interop.conversion import require
from sltt.interop.nir_export import unique_names
from sltt.interop.reading import pair
from sltt.neurons import IF, LI, LIF, CubaLIF, Delay, Neuron, Recurrent
from sltt.sequence.state import reset
from sltt.surrogates import Above, Surrogate, Triangle


def from_nir(graph: nir.NIRGraph | str | Path, *, dt: float = 1e-4, surrogate: Surrogate = Triangle()) -> nn.Module:
    """Return the network of a graph, of one time step; several edges into a node are summed.

    Args:
        graph: of the nodes that `to_nir` gives, and SumPool2d; or the file of one.
        dt: length of a time step in seconds.
        surrogate: of the neurons, since a graph has none.

    Raises:
        ValueError: naming every node that has no counterpart here, a recurrent graph, shapes that do not fit, neurons
            with other parameters for each, or a graph that was written for another dt.
    """
    dt = number("dt", dt, above=0)
    instance("surrogate", surrogate, Surrogate)
    graph = instance("graph", nir.read(graph) if isinstance(graph, str | Path) else graph, nir.NIRGraph)
    modules, problems = {}, []
    for name, node in graph.nodes.items():
        try:
            modules[name] = _module(node, dt, surrogate)
        except ValueError as reason:
            problems.append(f"{name} ({type(node).__name__}){reason}")
    if problems:
        raise ValueError(f"no counterpart here for {'; '.join(problems)}")
    network = GraphNetwork(graph, modules)
    network.check()
    return network


class GraphNetwork(nn.Module):
    """The layers of a graph, run in an order in which each comes after those it reads; see `from_nir`."""

    def __init__(self, graph: nir.NIRGraph, modules: dict[str, nn.Module]):
        super().__init__()
        kinds = {kind: [k for k, n in graph.nodes.items() if isinstance(n, kind)] for kind in (nir.Input, nir.Output)}
        if [len(names) for names in kinds.values()] != [1, 1]:
            raise ValueError(f"expected one input and one output of the graph, got {[*kinds.values()]}")
        self.shapes = {name: _shape(node) for name, node in graph.nodes.items()}
        modules, edges = _with_recurrent(graph, modules)
        waiting = {name: [a for a, b in edges if b == name] for name in modules}
        self.reads: dict[str, list[str]] = {}
        while ready := [name for name, reads in waiting.items() if self.reads.keys() >= {*reads}]:
            self.reads |= {name: waiting.pop(name) for name in ready}
        if waiting:
            expected = "cycles of neurons and one layer of weights"
            raise ValueError(f"the graph is recurrent, around {sorted(waiting)}: expected {expected}")
        (self.input,), (self.output,) = kinds.values()
        self.keys = unique_names(self.reads)
        self.layers = nn.ModuleDict({key: modules[name] for name, key in self.keys.items()})

    def forward(self, x: Tensor) -> Tensor:
        """One time step x [B, ...]."""
        values = {self.input: x}
        for name, reads in self.reads.items():
            if reads:
                values[name] = self.layers[self.keys[name]](sum((values[r] for r in reads[1:]), values[reads[0]]))
        return values[self.output]

    def check(self) -> None:
        """Run the graph once on zeros; raises ValueError naming the node that its input does not fit."""
        values = {self.input: torch.zeros(1, *self.shapes[self.input] or ())}
        with torch.no_grad():
            for name, reads in self.reads.items():
                if not reads:
                    continue
                layer, expected = self.layers[self.keys[name]], self.shapes[name]
                got = [list(values[r].shape[1:]) for r in reads]
                fits = all(shape == got[0] for shape in got) and expected in (None, got[0])
                try:
                    require(fits, f"expected {expected}")
                    values[name] = layer(sum(values[r] for r in reads))
                except (ValueError, RuntimeError) as reason:
                    raise ValueError(f"the input of {name} has shape {got} without the batch: {reason}") from None
        reset(self)


def _with_recurrent(
    graph: nir.NIRGraph, modules: dict[str, nn.Module]
) -> tuple[dict[str, nn.Module], list[tuple[str, str]]]:
    """Make a `Recurrent` of neurons and the layer of weights that reads them alone and leads back to them alone."""
    modules, edges = dict(modules), [*graph.edges]
    for name, module in [*modules.items()]:
        leads = {b for a, b in edges if a == name}
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d) and leads == {a for a, b in edges if b == name}:
            (neuron,) = leads if len(leads) == 1 else (None,)
            if neuron is not None and isinstance(modules[neuron], Neuron):
                modules[neuron] = Recurrent(modules[neuron], modules.pop(name))
                edges = [edge for edge in edges if name not in edge]
    return modules, edges


def _shape(node: Any) -> list[int] | None:
    """Return the shape of a node's input, where it says one."""
    shape = (node.input_type or {}).get("input")
    if shape is None or any(n is None for n in np.ravel(shape)):
        return None
    return [int(n) for n in shape] or None  # numbers for all neurons alike have none


def _module(node: Any, dt: float, surrogate: Surrogate) -> nn.Module:
    if isinstance(node, nir.IF | nir.LI | nir.LIF | nir.CubaLIF):
        return _neuron(node, dt, surrogate)
    if isinstance(node, nir.Delay):
        steps = _uniform(node, "delay") / dt
        require(bool(np.isclose(steps, round(steps))), f", whose delay is no whole number of time steps: {steps:g}")
        return Delay([round(steps)])
    require(type(node) in _MODULES, "")
    return _MODULES[type(node)](node)


def _affine(node: Any) -> nn.Module:
    bias = getattr(node, "bias", None)
    require(node.weight.ndim == 2, ", whose weight is not a matrix")
    module = nn.Linear(node.weight.shape[1], node.weight.shape[0], bias=bias is not None)
    return _fill(module, node.weight, bias)


def _conv(node: Any) -> nn.Module:
    kind = nn.Conv1d if isinstance(node, nir.Conv1d) else nn.Conv2d
    require(int(node.groups) == 1, ", which has several groups")
    options = {name: _to_python(getattr(node, name)) for name in ("stride", "padding", "dilation")}
    weight = node.weight
    module = kind(weight.shape[1], weight.shape[0], weight.shape[2:], **options)
    return _fill(module, weight, node.bias)


def _fill(module: Any, weight: np.ndarray, bias: np.ndarray | None) -> nn.Module:
    dtype = torch.get_default_dtype()  # as PyTorch makes layers
    module.weight = nn.Parameter(torch.from_numpy(np.array(weight)).to(dtype))
    if bias is not None:
        module.bias = nn.Parameter(torch.from_numpy(np.array(bias)).to(dtype))
    return module


def _to_python(value: Any) -> Any:
    if isinstance(value, str | bytes):
        return value if isinstance(value, str) else value.decode()
    array = np.asarray(value)
    return int(array) if array.ndim == 0 else tuple(int(v) for v in array)


class _SumPool2d(nn.AvgPool2d):
    def forward(self, input: Tensor) -> Tensor:
        height, width = pair(self.kernel_size)
        return super().forward(input) * (height * width)


def _pool(kind: Callable[..., nn.Module]) -> Callable[[Any], nn.Module]:
    return lambda node: kind(*(pair(_to_python(v)) for v in (node.kernel_size, node.stride, node.padding)))


def _flatten(node: Any) -> nn.Module:
    start, end = (int(d) for d in (node.start_dim, node.end_dim))
    return nn.Flatten(*(d + 1 if d >= 0 else d for d in (start, end)))


_MODULES: dict[type, Callable[[Any], nn.Module]] = {nir.Input: lambda node: nn.Identity()}
_MODULES |= {nir.Output: lambda node: nn.Identity(), nir.Linear: _affine, nir.Affine: _affine, nir.Conv1d: _conv}
_MODULES |= {nir.Conv2d: _conv, nir.AvgPool2d: _pool(nn.AvgPool2d), nir.SumPool2d: _pool(_SumPool2d)}
_MODULES |= {nir.Flatten: _flatten}


def _neuron(node: Any, dt: float, surrogate: Surrogate) -> nn.Module:
    """A neuron of ours; without the metadata of `to_nir`, reset and threshold are those of NIR's equations."""
    own = {k: v.decode() if isinstance(v, bytes) else v for k, v in node.metadata.items()}
    if "dt" in own and not np.isclose(own["dt"], dt):
        raise ValueError(f", which was written for time steps of {own['dt']:g} s: give dt={own['dt']:g}")
    rest = float(own["v_reset"]) if "v_reset" in own else _uniform(node, "v_reset") if hasattr(node, "v_reset") else 0.0
    soft = own.get("reset", "value" if hasattr(node, "v_reset") else "subtract") == "subtract"
    arguments: dict[str, Any] = {}
    if not isinstance(node, nir.LI):
        arguments = {"v_threshold": _uniform(node, "v_threshold"), "v_reset": None if soft else rest}
        arguments["surrogate"] = surrogate if own.get("fires") == "at" else Above(surrogate)
    r = _uniform(node, "r")
    if isinstance(node, nir.IF):
        require(bool(np.isclose(r * dt, 1)), f", whose r = {r:g} is not 1/dt = {1 / dt:g}")
        return IF(**arguments)
    cuba = isinstance(node, nir.CubaLIF)
    tau, leak = _uniform(node, "tau_mem" if cuba else "tau") / dt, _uniform(node, "v_leak")
    require(tau > 1, f", whose tau is not longer than a time step: tau/dt = {tau:g}")
    require(leak == (0.0 if soft else rest), f", whose v_leak = {leak:g} is not the potential of its reset")
    if cuba:
        tau_syn = _uniform(node, "tau_syn") / dt
        require(tau_syn >= 1, f", whose tau_syn is shorter than a time step: tau_syn/dt = {tau_syn:g}")
        return CubaLIF(tau, tau_syn, r / tau * _uniform(node, "w_in") / tau_syn, **arguments)
    decays = bool(np.isclose(r, 1))
    require(decays or bool(np.isclose(r, tau)), f", whose r = {r:g} is neither 1 nor tau/dt = {tau:g}")
    return (LI if isinstance(node, nir.LI) else LIF)(tau, decay_input=decays, **arguments)


def _uniform(node: Any, name: str) -> float:
    values = np.unique(getattr(node, name))
    require(len(values) == 1, f", whose {name} is not the same for all neurons")
    return float(values[0])
