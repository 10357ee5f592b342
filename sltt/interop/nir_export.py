"""NIR, the neuromorphic intermediate representation: networks to graphs; `sltt.interop.nir_import` reads them.

A time step of `dt` seconds of NIR's equations is one step of forward Euler:

    LIF: τ v̇ = (v_leak − v) + R I     u = λ v + (1 − λ)(v_leak + R x),   λ = 1 − dt/τ
    IF:  v̇ = R I                      u = v + dt R x
    CubaLIF: τ_s İ = w S − I, and LIF  i = α i + (1 − α) w x,                α = 1 − dt/τ_s

so that τ = dt times our τ, R = 1 with `decay_input` and our τ without, and R = 1/dt for `IF`. Of `CubaLIF`, w = our
τ_syn, R = gain times our τ, and the current charges the membrane in the step that it comes. NIR's neurons fire above
the threshold, and its versions differ in the reset; what ours do is written into the nodes' metadata.
"""

# pyright: reportMissingImports=false

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import nir
import numpy as np
import torch
from torch import Tensor, fx, nn

from sltt.checks import instance, number
from sltt.interop import reading
from sltt.interop.conversion import check_finite, require
from sltt.interop.reading import pair
from sltt.neurons import IF, LIF, PLIF, CubaLIF, IntegrateAndFire, Recurrent
from sltt.sequence.copies import copy_model
from sltt.sequence.state import reset
from sltt.surrogates import Above

_HAS_RESET = {kind: "v_reset" in {f.name for f in fields(kind)} for kind in (nir.IF, nir.LIF, nir.CubaLIF)}


def to_nir(model: nn.Module, x: Tensor, *, dt: float = 1e-4) -> nir.NIRGraph:
    """Return the graph of a network in evaluation mode: `nir.write(path, to_nir(model, x))`.

    `IF`, `LIF`, `PLIF` and `CubaLIF`; linear layers and convolutions, with the BatchNorm behind them folded into their
    weights; average pooling, flatten, and sums, which are several edges into a node; `Recurrent` of these neurons and
    layers, which is a cycle.

    Args:
        model: the network of one time step.
        x: an input of one time step [B, ...], for its shape.
        dt: length of a time step in seconds.

    Raises:
        ValueError: naming every layer and operation that NIR has no counterpart for.
    """
    instance("x", x, Tensor)
    check_finite(instance("model", model, nn.Module))
    model = copy_model(model).eval()
    if x.dtype in (torch.bfloat16, torch.float16):  # NumPy has no bfloat16, and folding would round to 16 bits
        model, x = model.float(), x.float()
    return _Export(model, number("dt", dt, above=0)).export(x)


class _Export(fx.Interpreter):
    """Runs the network once, layer by layer, for the shapes, and notes nodes and edges."""

    def __init__(self, model: nn.Module, dt: float):
        self.dt = dt
        self.model = model
        self.nodes: dict[str, nir.NIRNode] = {}
        self.edges: list[tuple[str, str]] = []
        self.sources: dict[fx.Node, list[str]] = {}  # the nodes of the graph whose sum is the value
        self.used: set[str] = set()
        self.names = unique_names(name for name, _ in model.named_modules())  # some readers take no dots
        self.problems: list[str] = []
        super().__init__(fx.GraphModule(model, reading.trace(model)))

    def export(self, x: Tensor) -> nir.NIRGraph:
        reset(self.model)
        with torch.no_grad():
            found = self.run(x)
            reset(self.model)
            same = torch.allclose(found, self.model(x), rtol=1e-3, atol=1e-5)
        if not self.problems and not same:
            self.problems.append("a change in place, which a trace does not show")
        if self.problems:
            raise ValueError(f"NIR has no counterpart for {'; '.join(self.problems)}")
        return nir.NIRGraph(self.nodes, self.edges)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op == "placeholder":
            self._add(n, self._free_name("input"), nir.Input({"input": np.array(value.shape[1:])}), [])
        elif n.op == "output":
            (arg,) = n.all_input_nodes
            shape = np.array(value.shape[1:])
            self._add(n, self._free_name("output"), nir.Output({"output": shape}), self.sources[arg])
        elif n.op == "call_module":
            self._layer(n, self.fetch_attr(str(n.target)))
        elif n.op == "get_attr":
            self.problems.append(f"the weight {n.target} outside of a layer")
            self.sources[n] = []
        else:
            self._operation(n)
        return value

    def _free_name(self, name: str) -> str:
        """Return a name that no layer has."""
        while name in self.names.values():
            name += "_"
        return name

    def _operation(self, n: fx.Node) -> None:
        inputs = n.all_input_nodes
        sources = [name for node in inputs for name in self.sources[node]]
        self.sources[n] = sources
        if n.target in reading.FLATTEN:
            self._layer(n, reading.flatten_of(n))
        elif n.target not in reading.ADD or n.kwargs or len(inputs) != 2 or len(set(sources)) != len(sources):
            self.problems.append(f"the operation {n.name}")

    def _layer(self, n: fx.Node, module: Any) -> None:
        (arg,) = n.all_input_nodes
        path = str(n.target) if n.op == "call_module" else n.name
        name = self.names[path] if n.op == "call_module" else self._free_name(path)
        sources = self.sources[arg]
        if isinstance(module, reading.NOTHING):
            self.sources[n] = sources
            return
        if isinstance(module, reading.NORMS):
            self._fold(n, path, module, arg)
            return
        if name in self.used:
            self.problems.append(f"{path} ({type(module).__name__}), which is used twice in a time step")
        try:
            if isinstance(module, Recurrent):
                back = self.names[f"{path}.layer"]
                self.nodes[back] = self._node(module.layer, self.env[arg])
                self.edges += [(name, back), (back, name)]
                module = module.neuron
            node = self._node(module, self.env[arg])
        except ValueError as reason:
            self.problems.append(f"{path} ({type(module).__name__}){reason}")
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
        if norm.running_mean is None or not isinstance(before, _NIR_WEIGHTS) or not self._is_single(arg, sources[0]):
            self.problems.append(f"{name} ({type(norm).__name__}), which is not behind a layer with weights of its own")
            return
        scale, shift = (_array(value.to(norm.running_var.dtype)) for value in reading.gain_and_shift(norm))
        bias = getattr(before, "bias", 0.0)
        before.weight = before.weight * scale.reshape(-1, *[1] * (before.weight.ndim - 1))
        if isinstance(before, nir.Linear):
            before = nir.Affine(before.weight, np.zeros(len(scale)))
            self.nodes[sources[0]] = before
        before.bias = bias * scale + shift

    def _is_single(self, node: fx.Node, layer: str) -> bool:
        """Return whether nothing but this node's one reader reads a layer's output."""
        while len(node.users) == 1 and self.names.get(str(node.target)) != layer:
            (node,) = node.all_input_nodes
        return len(node.users) == 1

    def _node(self, module: Any, x: Tensor) -> nir.NIRNode:
        shape = tuple(x.shape[1:])
        if isinstance(module, IntegrateAndFire | CubaLIF):
            return self._neuron(module, shape)
        if isinstance(module, nn.Linear):
            require(x.ndim == 2, ", whose input is not [B, features]")
            weight = _array(module.weight)
            return nir.Linear(weight) if module.bias is None else nir.Affine(weight, _array(module.bias))
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            return _convolution(module, shape)
        if isinstance(module, nn.AdaptiveAvgPool2d):
            out = [n or size for n, size in zip(pair(module.output_size), shape[-2:], strict=True)]
            require(all(size % n == 0 for size, n in zip(shape[-2:], out, strict=True)), " of windows of several sizes")
            window = np.array([size // n for size, n in zip(shape[-2:], out, strict=True)])
            return nir.AvgPool2d(window, window, np.zeros(2, dtype=int))
        if isinstance(module, nn.AvgPool2d):
            plain = not module.ceil_mode and module.divisor_override is None
            require(plain and (module.count_include_pad or not np.any(module.padding)), " with these options")
            return nir.AvgPool2d(*(np.array(pair(v)) for v in (module.kernel_size, module.stride, module.padding)))
        if isinstance(module, nn.Flatten):
            start, end = (d % x.ndim - 1 for d in (module.start_dim, module.end_dim))
            require(start >= 0, ", which flattens the samples")
            return nir.Flatten({"input": np.array(shape)}, start, end)
        raise ValueError("")

    def _neuron(self, neuron: Any, shape: tuple[int, ...]) -> nir.NIRNode:
        def full(value: float) -> np.ndarray:
            return np.full(shape, value, dtype=np.float64)

        soft, rest = neuron.v_reset is None, neuron.v_reset or 0.0
        kinds: dict[type, type] = {IF: nir.IF, LIF: nir.LIF, PLIF: nir.LIF, CubaLIF: nir.CubaLIF}
        require(type(neuron) in kinds, "")
        require(getattr(neuron, "v_init", None) is None, " with v_init, for which NIR has no parameter")
        kind = kinds[type(neuron)]
        values: dict[str, Any] = {"v_threshold": full(neuron.v_threshold)}
        if _HAS_RESET[kind]:
            values["v_reset"] = full(rest)
        metadata = {
            "dt": self.dt,
            "reset": "subtract" if soft else "value",
            "v_reset": rest,
            "fires": "above" if isinstance(neuron.surrogate, Above) else "at",
        }
        if kind is nir.IF:
            return nir.IF(r=full(1 / self.dt), metadata=metadata, **values)
        require(neuron.tau is not None, " without a leak, for which NIR has no time constant")
        tau: Any = neuron.tau
        if isinstance(neuron, CubaLIF):
            values |= {"tau_mem": full(tau * self.dt), "tau_syn": full(neuron.tau_syn * self.dt)}
            values |= {"r": full(neuron.gain * tau), "v_leak": full(rest), "w_in": full(neuron.tau_syn)}
            return nir.CubaLIF(metadata=metadata, **values)
        r = 1.0 if neuron.decay_input else tau
        return nir.LIF(tau=full(tau * self.dt), r=full(r), v_leak=full(rest), metadata=metadata, **values)


def unique_names(names: Iterable[str]) -> dict[str, str]:
    """Return for each name one that a module may have: without dots."""
    found: dict[str, str] = {}
    taken, empty = set(), nn.ModuleDict()
    for name in names:
        key = name.replace(".", "_")
        while not key or hasattr(empty, key) or key in taken:
            key += "_"
        taken.add(key)
        found[name] = key
    return found


def _array(x: Tensor) -> np.ndarray:
    return x.detach().cpu().numpy().copy()


_NIR_WEIGHTS = nir.Affine | nir.Linear | nir.Conv1d | nir.Conv2d


def _convolution(module: Any, shape: tuple[int, ...]) -> nir.NIRNode:
    padding = reading.padding_of(module)  # in numbers, since readers differ in what they make of words
    require(module.groups == 1, ", which has several groups: NIR's types count the channels of one")
    weight = _array(module.weight)
    bias = np.zeros(len(weight), weight.dtype) if module.bias is None else _array(module.bias)
    size: Any = shape[1:]
    if isinstance(module, nn.Conv1d):
        return nir.Conv1d(size[0], weight, module.stride[0], padding[1], module.dilation[0], module.groups, bias)
    return nir.Conv2d(size, weight, module.stride, padding, module.dilation, module.groups, bias)
