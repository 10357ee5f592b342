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

import re
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import nir
import numpy as np
import torch
from torch import Tensor, nn

from sltt.checks import instance, number
from sltt.interop import reading
from sltt.interop.conversion import add_remedies, check_exportable, require
from sltt.interop.reading import Call, pair
from sltt.neurons import IF, LI, LIF, PLIF, CubaLIF, Delay, IntegrateAndFire, Neuron, Recurrent
from sltt.sequence.copies import copy_model
from sltt.surrogates import Above

_HAS_RESET = {kind: "v_reset" in {f.name for f in fields(kind)} for kind in (nir.IF, nir.LIF, nir.CubaLIF)}


def to_nir(model: nn.Module, x: Tensor, *, dt: float = 1e-4) -> nir.NIRGraph:
    """Return the graph of a network in evaluation mode: `nir.write(path, to_nir(model, x))`.

    `IF`, `LIF`, `PLIF` and `CubaLIF`; linear layers and convolutions, with the BatchNorm behind them folded into their
    weights; average pooling, flatten (also as `mean` and `view`), and sums, which are several edges into a node;
    `Recurrent` of these neurons and layers, which is a cycle; the readout `LI`. A `Delay` is a node for each tap. What
    reads several taps, or what `torch.cat` joins, is a node for each of them, up to the next layer with weights.

    Args:
        model: the network of one time step.
        x: an input of one time step [B, ...], for its shape.
        dt: length of a time step in seconds.

    Raises ValueError naming every layer and operation that NIR has no counterpart for.
    """
    instance("x", x, Tensor)
    check_exportable(instance("model", model, nn.Module))
    model = copy_model(model).eval()
    if x.dtype in (torch.bfloat16, torch.float16):  # NumPy has no bfloat16, and folding would round to 16 bits
        model, x = model.float(), x.float()
    dt = number("dt", dt, above=0)
    calls = reading.read_calls(model, x)
    names = [*(name for name, _ in model.named_modules()), *(call.path for call in calls)]
    return _Export(unique_names(names), dt).graph(calls)


class _Export:
    """Notes nodes and edges of calls."""

    def __init__(self, names: dict[str, str], dt: float):
        self.names, self.dt = names, dt
        self.nodes: dict[str, nir.NIRNode] = {}
        self.edges: list[tuple[str, str]] = []
        self.sources: dict[Call, list[str]] = {}  # the nodes whose sum is the output of a call
        self.parts: dict[Call, list[tuple[list[str], int]]] = {}  # of one that is joined: sources and channels of each

    def graph(self, calls: list[Call]) -> nir.NIRGraph:
        problems = []
        for call in calls:
            sources = [name for source in call.inputs for name in self.sources[source]]
            self.sources[call] = []
            try:
                self.sources[call] = self._add(call, sources)
            except ValueError as reason:
                problems.append(f"{call.place}{reason}")
        if problems:
            raise ValueError(f"NIR has no counterpart for {'; '.join(add_remedies(problems))}")
        return nir.NIRGraph(self.nodes, self.edges)

    def _add(self, call: Call, sources: list[str]) -> list[str]:
        """Add the nodes of a call that reads these; return the nodes whose sum is its output."""
        if call.kind == "cat":
            joined = [self.parts.get(source, [(self.sources[source], source.shape[1])]) for source in call.inputs]
            self.parts[call] = [part for parts in joined for part in parts]
            return []
        parts = next((self.parts[source] for source in call.inputs if source in self.parts), [])
        if parts:
            return self._add_to_parts(call, parts)
        if call.kind == "sum":
            require(len(set(sources)) == len(sources), ", which adds a value twice")
            return sources
        name, module = self.names[call.path], call.layer
        if isinstance(module, Delay):
            nodes = {n: nir.Delay(np.full(call.inputs[0].shape[1:], n * self.dt)) for n in module.taps}
            branches = [self._connect(f"{call.path}.{n}", node, sources) if n else sources for n, node in nodes.items()]
            self.parts |= {call: [(b, call.inputs[0].shape[1]) for b in branches]} if len(branches) > 1 else {}
            return branches[0]
        if isinstance(module, Recurrent):
            back = self.names[f"{call.path}.layer"]
            self.nodes[back] = self._node(reading.kind_of(module.layer), module.layer, call.inputs[0].shape)
            self.edges += [(name, back), (back, name)]
            module = module.neuron
        node = self._node(call.kind, module, call.inputs[0].shape if call.inputs else call.shape)
        return self._connect(call.path, node, sources)

    def _add_to_parts(self, call: Call, parts: list[tuple[list[str], int]]) -> list[str]:
        """Add a node for each part of what a call reads; return those whose sum is its output, which weights have."""
        layer, x, weighs, at = call.layer, call.inputs[0], call.kind in reading.WEIGHTS, 0
        alike = call.kind in (*reading.AVERAGES, nn.Flatten) or isinstance(call.layer, Neuron)
        require(weighs or alike, ", which reads what is joined: only layers with weights, pooling and neurons may")
        branches: list[tuple[list[str], int]] = []
        for sources, width in parts:
            module = reading.copy_plain(layer)
            if weighs:
                module.weight, at = nn.Parameter(module.weight[:, at : at + width]), at + width
                module.bias = None if branches else module.bias
            node = self._node(call.kind, module, torch.Size([x.shape[0], width, *x.shape[2:]]))
            names = self._connect(f"{call.path}.{len(branches)}", node, sources)
            branches.append((names, width * call.shape[1] // x.shape[1]))  # flatten joins pixels and channels
        if weighs:
            return [name for names, _ in branches for name in names]
        self.parts[call] = branches
        return []

    def _connect(self, path: str, node: nir.NIRNode, sources: list[str]) -> list[str]:
        self.names |= unique_names([*self.names, path])
        name = self.names[path]
        require(name not in self.nodes, ", which is used twice in a time step")
        self.nodes[name] = node
        self.edges += [(source, name) for source in sources]
        return [name]

    def _node(self, kind: Any, module: Any, given: torch.Size) -> nir.NIRNode:
        """Return the node of a layer on an input [B, ...] of this shape."""
        shape = tuple(given[1:])
        if kind == "input":
            return nir.Input({"input": np.array(shape)})
        if kind == "output":
            return nir.Output({"output": np.array(shape)})
        if isinstance(module, IntegrateAndFire | CubaLIF):
            return self._neuron(module, shape)
        if type(module) is LI:
            tau, r = np.full(shape, module.tau * self.dt), np.full(shape, 1.0 if module.decay_input else module.tau)
            return nir.LI(tau, r, np.zeros(shape))
        require(kind not in reading.NORMS, ", which is not behind a layer with weights of its own")
        if kind is nn.Linear:
            require(len(shape) == 1, ", whose input is not [B, features]")
            weight = _array(module.weight)
            return nir.Linear(weight) if module.bias is None else nir.Affine(weight, _array(module.bias))
        if kind in reading.WEIGHTS:
            return _convolution(module, shape)
        if kind is nn.AdaptiveAvgPool2d:
            out = [n or size for n, size in zip(pair(module.output_size), shape[-2:], strict=True)]
            require(all(size % n == 0 for size, n in zip(shape[-2:], out, strict=True)), " of windows of several sizes")
            window = np.array([size // n for size, n in zip(shape[-2:], out, strict=True)])
            return nir.AvgPool2d(window, window, np.zeros(2, dtype=int))
        if kind is nn.AvgPool2d:
            plain = not module.ceil_mode and module.divisor_override is None
            require(plain and (module.count_include_pad or not np.any(module.padding)), " with these options")
            return nir.AvgPool2d(*(np.array(pair(v)) for v in (module.kernel_size, module.stride, module.padding)))
        if kind is nn.Flatten:
            start, end = (d % len(given) - 1 for d in (module.start_dim, module.end_dim))
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
        require(getattr(neuron, "subtract", None) is None, " with subtract, for which NIR has no parameter")
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
    """Return for each name one that a module may have: of letters, digits and _, since it may enter source code."""
    names_of: dict[str, str] = {}
    used, empty = set(), nn.ModuleDict()
    for name in dict.fromkeys(names):
        key = re.sub(r"\W", "_", name)
        while not key or hasattr(empty, key) or key in used:
            key += "_"
        used.add(key)
        names_of[name] = key
    return names_of


def _array(x: Tensor) -> np.ndarray:
    return x.detach().cpu().numpy().copy()


def _convolution(module: Any, shape: tuple[int, ...]) -> nir.NIRNode:
    padding = reading.padding_of(module)  # in numbers, since readers differ in what they make of words
    require(module.groups == 1, ", which has several groups: NIR's types count the channels of one")
    weight = _array(module.weight)
    bias = np.zeros(len(weight), weight.dtype) if module.bias is None else _array(module.bias)
    size: Any = shape[1:]
    if isinstance(module, nn.Conv1d):
        return nir.Conv1d(size[0], weight, module.stride[0], padding[1], module.dilation[0], module.groups, bias)
    return nir.Conv2d(size, weight, module.stride, padding, module.dilation, module.groups, bias)
