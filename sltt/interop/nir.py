"""NIR, the neuromorphic intermediate representation: networks to graphs and back.

A time step of `dt` seconds of NIR's equations is one step of forward Euler:

    LIF: τ v̇ = (v_leak − v) + R I     u = λ v + (1 − λ)(v_leak + R x),   λ = 1 − dt/τ
    IF:  v̇ = R I                      u = v + dt R x

so that τ = dt times our τ, R = 1 with `decay_input` and our τ without, and R = 1/dt for `IF`. NIR's neurons fire above
the threshold, and its versions differ in the reset; what ours do is written into the nodes' metadata.
"""

# pyright: reportMissingImports=false

import operator
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import nir
import numpy as np
import torch
from torch import Tensor, fx, nn

from sltt.checks import instance, number
from sltt.dropout import Dropout
from sltt.neurons import IF, LIF, PLIF, Neuron
from sltt.sequence.state import Stateful, reset
from sltt.surrogates import Above, Surrogate, Triangle

_HAS_RESET = {kind: "v_reset" in {f.name for f in fields(kind)} for kind in (nir.IF, nir.LIF)}
_NORMS = nn.BatchNorm1d | nn.BatchNorm2d
_NOTHING = nn.Identity | nn.Dropout | nn.Dropout2d | Dropout  # in evaluation
_ADD = (operator.add, operator.iadd, torch.add)


def to_nir(model: nn.Module, x: Tensor, *, dt: float = 1e-4) -> nir.NIRGraph:
    """The graph of a network in evaluation mode: `nir.write(path, to_nir(model, x))`.

    `IF`, `LIF` and `PLIF`; linear layers and convolutions, with the BatchNorm behind them folded into their weights;
    average pooling, flatten, and sums, which are several edges into a node.

    Args:
        model: the network of one time step; its state is reset.
        x: an input of one time step [B, ...], for its shape.
        dt: length of a time step in seconds.

    Raises:
        ValueError: naming every layer and operation that NIR has no counterpart for.
    """
    instance("x", x, Tensor)
    return _Export(instance("model", model, nn.Module), number("dt", dt, above=0)).export(x)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Stateful) or super().is_leaf_module(m, module_qualified_name)


class _Export(fx.Interpreter):
    """Runs the network once, layer by layer, for the shapes, and notes nodes and edges."""

    def __init__(self, model: nn.Module, dt: float):
        self.dt = dt
        self.model = model
        self.nodes: dict[str, nir.NIRNode] = {}
        self.edges: list[tuple[str, str]] = []
        self.sources: dict[fx.Node, list[str]] = {}  # the nodes of the graph whose sum is the value
        self.used: set[str] = set()
        self.problems: list[str] = []
        super().__init__(fx.GraphModule(model, _Tracer().trace(model)))

    def export(self, x: Tensor) -> nir.NIRGraph:
        training = {m: m.training for m in self.model.modules()}
        self.model.eval()
        reset(self.model)
        try:
            with torch.no_grad():
                self.run(x)
        finally:
            reset(self.model)
            for module, mode in training.items():
                module.training = mode
        if self.problems:
            raise ValueError(f"NIR has no counterpart for {'; '.join(self.problems)}")
        return nir.NIRGraph(self.nodes, self.edges)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op == "placeholder":
            self._add(n, "input", nir.Input({"input": np.array(value.shape[1:])}), [])
        elif n.op == "output":
            arg: Any = n.args[0]
            shape = np.array(value.shape[1:])
            self._add(n, "output", nir.Output({"output": shape}), self.sources[arg])
        elif n.op == "call_module":
            module = self.fetch_attr(str(n.target))
            (arg,) = n.all_input_nodes
            self._layer(n, module, arg, self.env[arg])
        elif n.op == "get_attr":
            self.problems.append(f"the weight {n.target} outside of a layer")
            self.sources[n] = []
        else:
            self._operation(n, value)
        return value

    def _operation(self, n: fx.Node, value: Any) -> None:
        inputs = n.all_input_nodes
        sources = [name for node in inputs for name in self.sources[node]]
        flattens = n.target in (torch.flatten, "flatten")
        self.sources[n] = sources
        if flattens:
            dims = [*n.args[1:], *n.kwargs.values()]
            start, end = (*dims, *(0, -1)[len(dims) :])
            self._layer(n, nn.Flatten(start, end), inputs[0], self.env[inputs[0]])  # type: ignore[arg-type]
        elif n.target not in _ADD or len(inputs) != 2 or len(set(sources)) != len(sources):
            self.problems.append(f"the operation {n.name}")

    def _layer(self, n: fx.Node, module: Any, arg: fx.Node, x: Tensor) -> None:
        name = str(n.target) if n.op == "call_module" else n.name
        sources = self.sources[arg]
        if isinstance(module, _NOTHING):
            self.sources[n] = sources
            return
        if isinstance(module, _NORMS):
            self._fold(n, name, module, arg)
            return
        if name in self.used:
            self.problems.append(f"{name} ({type(module).__name__}), which is used twice in a time step")
        try:
            node = self._node(module, x)
        except ValueError as reason:
            self.problems.append(f"{name} ({type(module).__name__}){reason}")
            self.sources[n] = []
            return
        self.used.add(name)
        self._add(n, name, node, sources)

    def _add(self, n: fx.Node, name: str, node: nir.NIRNode, sources: list[str]) -> None:
        self.nodes[name] = node
        self.edges += [(source, name) for source in sources]
        self.sources[n] = [name]

    def _fold(self, n: fx.Node, name: str, norm: Any, arg: fx.Node) -> None:
        """Fold a BatchNorm into the weights before it: w (u − μ) / √(σ² + ε) + b."""
        sources = self.sources[arg]
        self.sources[n] = sources
        before = self.nodes.get(sources[0]) if len(sources) == 1 else None
        if norm.running_mean is None or len(arg.users) > 1 or not isinstance(before, _NIR_WEIGHTS):
            self.problems.append(f"{name} ({type(norm).__name__}), which is not behind a layer with weights of its own")
            return
        gain = (norm.running_var + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight)
        shift = (0 if norm.bias is None else norm.bias) - norm.running_mean * gain
        scale, bias = _array(gain), getattr(before, "bias", 0.0)
        before.weight = before.weight * scale.reshape(-1, *[1] * (before.weight.ndim - 1))
        if isinstance(before, nir.Linear):
            before = nir.Affine(before.weight, np.zeros(len(scale)))
            self.nodes[sources[0]] = before
        before.bias = bias * scale + _array(shift)

    def _node(self, module: Any, x: Tensor) -> nir.NIRNode:
        shape = tuple(x.shape[1:])
        if isinstance(module, Neuron):
            return self._neuron(module, shape)
        if isinstance(module, nn.Linear):
            _require(x.ndim == 2, ", whose input is not [B, features]")
            weight = _array(module.weight)
            return nir.Linear(weight) if module.bias is None else nir.Affine(weight, _array(module.bias))
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            return _convolution(module, shape)
        if isinstance(module, nn.AdaptiveAvgPool2d):
            out = [n or size for n, size in zip(_pair(module.output_size), shape[-2:], strict=True)]
            _require(
                all(size % n == 0 for size, n in zip(shape[-2:], out, strict=True)), " of windows of several sizes"
            )
            window = np.array([size // n for size, n in zip(shape[-2:], out, strict=True)])
            return nir.AvgPool2d(window, window, np.zeros(2, dtype=int))
        if isinstance(module, nn.AvgPool2d):
            plain = not module.ceil_mode and module.divisor_override is None
            _require(plain and (module.count_include_pad or not np.any(module.padding)), " with these options")
            return nir.AvgPool2d(*(np.array(_pair(v)) for v in (module.kernel_size, module.stride, module.padding)))
        if isinstance(module, nn.Flatten):
            start, end = (d % x.ndim - 1 for d in (module.start_dim, module.end_dim))
            _require(start >= 0, ", which flattens the samples")
            return nir.Flatten({"input": np.array(shape)}, start, end)
        raise ValueError("")

    def _neuron(self, neuron: Any, shape: tuple[int, ...]) -> nir.NIRNode:
        def full(value: float) -> np.ndarray:
            return np.full(shape, value, dtype=np.float64)

        soft, rest = neuron.v_reset is None, neuron.v_reset or 0.0
        kinds: dict[type, type] = {IF: nir.IF, LIF: nir.LIF, PLIF: nir.LIF}
        kind = kinds.get(type(neuron))
        _require(kind is not None, "")
        _require(neuron.v_init is None, " with v_init, for which NIR has no parameter")
        values: dict[str, Any] = {"v_threshold": full(neuron.v_threshold)}
        if kind is not None and _HAS_RESET[kind]:
            values["v_reset"] = full(rest)
        metadata = {
            "dt": self.dt,
            "reset": "subtract" if soft else "value",
            "v_reset": rest,
            "fires": "above" if isinstance(neuron.surrogate, Above) else "at",
        }
        if kind is nir.IF:
            return nir.IF(r=full(1 / self.dt), metadata=metadata, **values)
        tau: float = neuron.tau
        r = 1.0 if neuron.decay_input else tau
        return nir.LIF(tau=full(tau * self.dt), r=full(r), v_leak=full(rest), metadata=metadata, **values)


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)


def _array(x: Tensor) -> np.ndarray:
    return x.detach().cpu().numpy().copy()


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


_NIR_WEIGHTS = nir.Affine | nir.Linear | nir.Conv1d | nir.Conv2d


def _convolution(module: Any, shape: tuple[int, ...]) -> nir.NIRNode:
    _require(module.padding_mode == "zeros", ", which pads by other than zeros")
    _require(module.groups == 1, ", which has several groups: NIR's types count the channels of one")
    weight = _array(module.weight)
    bias = np.zeros(len(weight), weight.dtype) if module.bias is None else _array(module.bias)
    padding: Any = module.padding
    if isinstance(padding, str):  # in numbers, since readers differ in what they make of words
        widths = [
            d * (k - 1) if padding == "same" else 0 for d, k in zip(module.dilation, module.kernel_size, strict=True)
        ]
        _require(not any(w % 2 for w in widths), ", which pads one side more than the other")
        padding = tuple(w // 2 for w in widths)
    size: Any = shape[1:]
    if isinstance(module, nn.Conv1d):
        return nir.Conv1d(size[0], weight, module.stride[0], padding[0], module.dilation[0], module.groups, bias)
    return nir.Conv2d(size, weight, module.stride, padding, module.dilation, module.groups, bias)


def from_nir(graph: nir.NIRGraph | str | Path, *, dt: float = 1e-4, surrogate: Surrogate = Triangle()) -> nn.Module:
    """The network of a graph, of one time step; several edges into a node are summed.

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
    if not isinstance(graph, nir.NIRGraph):
        graph = _read(graph)
    modules, problems = {}, []
    for name, node in graph.nodes.items():
        try:
            modules[name] = _module(node, dt, surrogate)
        except ValueError as reason:
            problems.append(f"{name} ({type(node).__name__}){reason}")
    if problems:
        raise ValueError(f"no counterpart here for {'; '.join(problems)}")
    network = Network(graph, modules)
    network.check()
    return network


def _read(path: Any) -> nir.NIRGraph:
    if not isinstance(path, str | Path):
        raise ValueError(f"graph must be a nir.NIRGraph or the file of one, got {path!r}")
    try:
        graph = nir.read(path)
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever h5py and nir raise on a file of something else
        raise ValueError(f"{path} is not the file of a NIR graph ({type(error).__name__}: {error})") from error
    assert isinstance(graph, nir.NIRGraph)
    return graph


class Network(nn.Module):
    """The layers of a graph, run in an order in which each comes after those it reads; see `from_nir`."""

    def __init__(self, graph: nir.NIRGraph, modules: dict[str, nn.Module]):
        super().__init__()
        kinds = {kind: [k for k, n in graph.nodes.items() if isinstance(n, kind)] for kind in (nir.Input, nir.Output)}
        if [len(names) for names in kinds.values()] != [1, 1]:
            raise ValueError(f"expected one input and one output, got {[*kinds.values()]}")
        self.shapes = {name: _shape(node) for name, node in graph.nodes.items()}
        self.reads: dict[str, list[str]] = {}
        while len(self.reads) < len(graph.nodes):
            ready = [
                name
                for name in graph.nodes
                if name not in self.reads and all(a in self.reads for a, b in graph.edges if b == name)
            ]
            if not ready:
                raise ValueError(f"the graph is recurrent, around {sorted({*graph.nodes} - {*self.reads})}")
            self.reads |= {name: [a for a, b in graph.edges if b == name] for name in ready}
        if unread := [name for name, reads in self.reads.items() if not reads and name not in kinds[nir.Input]]:
            raise ValueError(f"nothing leads to {unread}")
        (self.input,), (self.output,) = kinds.values()
        self.layers = nn.ModuleDict({_key(name): modules[name] for name in self.reads})

    def forward(self, x: Tensor) -> Tensor:
        """One time step x [B, ...]."""
        values = {self.input: x}
        for name, reads in self.reads.items():
            if reads:
                values[name] = self._run(name, sum((values[r] for r in reads[1:]), values[reads[0]]))
        return values[self.output]

    def _run(self, name: str, x: Tensor) -> Tensor:
        return self.layers[_key(name)](x)

    def check(self) -> None:
        """Run the graph once on zeros; raises ValueError naming the node that its input does not fit."""
        values = {self.input: torch.zeros(1, *self.shapes[self.input] or ())}
        with torch.no_grad():
            for name, reads in self.reads.items():
                if not reads:
                    continue
                got = [list(values[r].shape[1:]) for r in reads]
                expected = self.shapes[name]
                fits = all(shape == got[0] for shape in got) and expected in (None, got[0])
                try:
                    _require(fits, f"expected {expected}")
                    dtype = next((p.dtype for p in self.layers[_key(name)].parameters()), torch.float32)
                    values[name] = self._run(name, sum(values[r].to(dtype) for r in reads))  # type: ignore[arg-type]
                except (ValueError, RuntimeError) as reason:
                    raise ValueError(f"the input of {name} has shape {got} without the batch: {reason}") from None
        reset(self)


def _key(name: str) -> str:
    return name.replace(".", "_")


def _shape(node: Any) -> list[int] | None:
    """The shape of a node's input, where it says one."""
    shape = (node.input_type or {}).get("input")
    if shape is None or any(n is None for n in np.ravel(shape)):
        return None
    return [int(n) for n in shape]


def _module(node: Any, dt: float, surrogate: Surrogate) -> nn.Module:
    if isinstance(node, nir.IF | nir.LIF):
        return _neuron(node, dt, surrogate)
    for kind, make in _MODULES.items():
        if type(node) is kind:
            return make(node)
    raise ValueError("")


def _affine(node: Any) -> nn.Module:
    bias = getattr(node, "bias", None)
    _require(node.weight.ndim == 2, ", whose weight is not a matrix")
    module = nn.Linear(node.weight.shape[1], node.weight.shape[0], bias=bias is not None)
    return _filled(module, node.weight, bias)


def _conv(node: Any) -> nn.Module:
    kind = nn.Conv1d if isinstance(node, nir.Conv1d) else nn.Conv2d
    _require(int(node.groups) == 1, ", which has several groups")
    options = {name: _plain(getattr(node, name)) for name in ("stride", "padding", "dilation")}
    weight = node.weight
    module = kind(weight.shape[1], weight.shape[0], weight.shape[2:], **options)
    return _filled(module, weight, node.bias)


def _filled(module: Any, weight: np.ndarray, bias: np.ndarray | None) -> nn.Module:
    module.weight = nn.Parameter(torch.from_numpy(np.array(weight)))
    if bias is not None:
        module.bias = nn.Parameter(torch.from_numpy(np.array(bias)).to(module.weight.dtype))
    return module


def _plain(value: Any) -> Any:
    if isinstance(value, str | bytes):
        return value if isinstance(value, str) else value.decode()
    array = np.asarray(value)
    return int(array) if array.ndim == 0 else tuple(int(v) for v in array)


class _SumPool2d(nn.AvgPool2d):
    def forward(self, input: Tensor) -> Tensor:
        height, width = _pair(self.kernel_size)
        return super().forward(input) * (height * width)


def _pool(kind: Callable[..., nn.Module]) -> Callable[[Any], nn.Module]:
    return lambda node: kind(*(_pair(_plain(v)) for v in (node.kernel_size, node.stride, node.padding)))


def _flatten(node: Any) -> nn.Module:
    start, end = (int(d) for d in (node.start_dim, node.end_dim))
    return nn.Flatten(*(d + 1 if d >= 0 else d for d in (start, end)))


_MODULES: dict[type, Callable[[Any], nn.Module]] = {
    nir.Input: lambda node: nn.Identity(),
    nir.Output: lambda node: nn.Identity(),
    nir.Linear: _affine,
    nir.Affine: _affine,
    nir.Conv1d: _conv,
    nir.Conv2d: _conv,
    nir.AvgPool2d: _pool(nn.AvgPool2d),
    nir.SumPool2d: _pool(_SumPool2d),
    nir.Flatten: _flatten,
}


def _neuron(node: Any, dt: float, surrogate: Surrogate) -> nn.Module:
    """`LIF` or `IF`; without the metadata of `to_nir`, reset and threshold are those of NIR's equations."""
    own = {k: v.decode() if isinstance(v, bytes) else v for k, v in node.metadata.items()}
    if "dt" in own and not np.isclose(own["dt"], dt):
        raise ValueError(f", which was written for time steps of {own['dt']:g} s: give dt={own['dt']:g}")
    rest = float(own["v_reset"]) if "v_reset" in own else _uniform(node, "v_reset") if hasattr(node, "v_reset") else 0.0
    soft = own.get("reset", "value" if hasattr(node, "v_reset") else "subtract") == "subtract"
    arguments: dict[str, Any] = {
        "v_threshold": _uniform(node, "v_threshold"),
        "v_reset": None if soft else rest,
        "surrogate": surrogate if own.get("fires") == "at" else Above(surrogate),
    }
    r = _uniform(node, "r")
    if isinstance(node, nir.IF):
        _require(bool(np.isclose(r * dt, 1)), f", whose r = {r:g} is not 1/dt = {1 / dt:g}")
        return IF(**arguments)
    tau, leak = _uniform(node, "tau") / dt, _uniform(node, "v_leak")
    _require(tau > 1, f", whose tau is not longer than a time step: tau/dt = {tau:g}")
    _require(leak == (0.0 if soft else rest), f", whose v_leak = {leak:g} is not the potential of its reset")
    decays = bool(np.isclose(r, 1))
    _require(decays or bool(np.isclose(r, tau)), f", whose r = {r:g} is neither 1 nor tau/dt = {tau:g}")
    return LIF(tau, decay_input=decays, **arguments)


def _uniform(node: Any, name: str) -> float:
    values = np.unique(getattr(node, name))
    _require(len(values) == 1, f", whose {name} is not the same for all neurons")
    return float(values[0])
