"""Write the operations of a network as C11: a struct of the state, constant weights, a function a kind of layer."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sltt.interop.c_buffers import plan
from sltt.interop.c_network import LIMIT, Active, Affine, Fire, Network, Operation, Pool, Spread, Sum, Value, Weights

_TYPES = {
    "float32": {"number": "float", "weight": "float", "value": "float", "factor": "float"},
    "int8": {"number": "int32_t", "weight": "int8_t", "value": "int16_t", "factor": "int16_t"},
}
_BYTES = {"float": 4, "int32_t": 4, "int16_t": 2, "uint16_t": 2, "int8_t": 1}


class Program:
    """The C of a network.

    Attributes:
        network: its operations.
        name: the first part of all names that others see.
        flash: bytes of weights and parameters, without those of the code.
        ram: bytes of the struct.
    """

    def __init__(self, network: Network, name: str, events: bool):
        self.network, self.name, self.events = network, name, events
        self.types = dict(_TYPES["int8" if network.integers else "float32"])
        if any(network.bounds.get(op.inputs[0], 0) >= 2**15 for op in network.operations if isinstance(op, Weights)):
            self.types["value"] = self.types["number"]
        largest = max([value.size for op in network.operations for value in (*op.inputs, op.output)])
        self.index = "uint16_t" if largest < 2**16 else "int32_t"
        self.parts: set[tuple[str, str]] = set()  # functions that the network calls, and "_16" for states of 16 bits
        self.constants: dict[str, tuple[str, Tensor]] = {}  # C's type and values, by name
        self.layers: list[str] = []
        self.names = _identifiers(network.operations, name)
        parameters = [(name, tensor) for op in network.neurons for name, tensor in op.arrays().items()]
        self.each = {name for name, tensor in parameters if len(tensor) > 1} - {"start"}  # those given by channel
        made = {op.output for op in network.operations if isinstance(op, Weights) and network.readers(op.output) == 1}
        self.narrow = made & {op.inputs[0] for op in network.neurons if op.limit < 2**15}  # currents of 16 bits
        self.buffers, self.places = plan(network, self.narrow)
        self.fields = self._fields()
        self.steps = [line for op in network.operations for line in self._call(op)]
        self.resets = [line for op in network.neurons for line in self._start(op)]
        self.flash = sum(_BYTES[kind] * values.numel() for kind, values in self.constants.values())
        self.ram = -(-sum(_BYTES[kind] * size for kind, _, size in self.fields) // 4) * 4

    def source(self) -> str:
        """Return NAME.c."""
        name, T = self.name, self.network.steps
        body = "\n".join(f"    {line}" for line in self.steps)
        code = [
            f"/* {name}: one time step of a spiking network, called {T} times for a sample; see {name}.h.\n\n"
            "   Images are [height][width][channels]. Spikes are lists of the active indices: layers add the weights\n"
            "   of these alone. Weights and parameters are at the end. */\n\n"
            f'#include "{name}.h"\n\n#include <string.h>',
            "\n".join(f"static const {kind} {key}[{len(values)}];" for key, (kind, values) in self.constants.items()),
            *self._functions(),
            "/* The layers. */\n\n" + "\n".join(self.layers),
            f"void {name}_reset({name}_net *net)\n{{\n    memset(net, 0, sizeof *net);\n"
            + "".join(f"    {line}\n" for line in self.resets)
            + "}",
            f"void {name}_step({name}_net *net, const {name}_input *input, {name}_logit *logits)\n{{\n{body}\n}}",
            *([self._events()] if self.events else []),
            "/* Weights and parameters. */",
            *(
                f"static const {k} {key}[{len(v)}] = {{\n{lines_of(v, k)}\n}};"
                for key, (k, v) in self.constants.items()
            ),
        ]
        return "\n\n".join(part for part in code if part) + "\n"

    def header(self) -> str:
        """Return NAME.h."""
        name, N = self.name, self.name.upper()
        channels, height, width = self.network.input.shape
        number = self.types["number"]
        scales = (
            f"#define {N}_INPUT_SCALE {self.network.input_scale:.9g}f /* an input of 1 stands for this */\n"
            f"#define {N}_LOGIT_SCALE {self.network.logit_scale:.9g}f /* a logit of 1 stands for this */\n"
        )
        fields = "\n".join(f"    {kind} {field}[{size}];" for kind, field, size in self.fields)
        return f"""#ifndef {N}_H
#define {N}_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {{
#endif

#define {N}_INPUTS {self.network.input.size} /* [{height}][{width}][{channels}]: height, width, channels */
#define {N}_CLASSES {self.network.output.size}
#define {N}_STEPS {self.network.steps} /* time steps of a sample in training */
{scales if self.network.integers else ""}
typedef {number} {name}_input;
typedef {number} {name}_logit;

/* The state of one network: neurons, and what passes between layers in a step. */
typedef struct {{
{fields}
}} {name}_net;

/* Begin a sample. */
void {name}_reset({name}_net *net);

/* Take one time step: {N}_INPUTS inputs to {N}_CLASSES logits. The prediction is their mean over the steps. */
void {name}_step({name}_net *net, const {name}_input *input, {name}_logit *logits);
{self._event_header() if self.events else ""}
#ifdef __cplusplus
}}
#endif

#endif
"""

    def _event_header(self) -> str:
        name, image = self.name, self.network.input.shape[1:] != (1, 1)
        of = "the pixel x, y; the polarity is the channel" if image else "an input"
        where = "int x, int y, int polarity" if image else "int i"
        return f"""
/* Count an event of {of}. One outside is ignored. */
void {name}_event({name}_net *net, {where});

/* Take one time step with the events since the last. */
void {name}_tick({name}_net *net, {name}_logit *logits);
"""

    def _events(self) -> str:
        name, (channels, height, width) = self.name, self.network.input.shape
        one = max(round(1 / self.network.input_scale), 1)  # an event, in units of the input
        full = f"net->events[i] <= {127 - one if self.network.integers else '16777215.0f'}"
        if (height, width) == (1, 1):
            head = f"int i)\n{{\n    if (i >= 0 && i < {channels} && {full})\n        net->events[i] += {one};"
        else:
            head = f"""int x, int y, int polarity)
{{
    const int i = (y * {width} + x) * {channels} + polarity;

    if (x >= 0 && x < {width} && y >= 0 && y < {height} && polarity >= 0 && polarity < {channels} && {full})
        net->events[i] += {one};"""
        return f"""void {name}_event({name}_net *net, {head}
}}

void {name}_tick({name}_net *net, {name}_logit *logits)
{{
    {name}_step(net, net->events, logits);
    memset(net->events, 0, sizeof net->events);
}}"""

    def _functions(self) -> list[str]:
        """Return the parts of c_layers.c that the network calls, with what these need, in C's types."""
        arithmetic = "int8" if self.network.integers else "float32"
        parts = _parts()
        needed, todo = set(self.parts), [*self.parts]
        while todo:
            name, suffix = todo.pop()
            given = [(f"{need} {'int16' if suffix else arithmetic}", need) for need in parts[name][0]]
            more = [(long if long in parts else need, suffix) for long, need in given]
            todo += more
            needed.update(more)
        return [self._set_types(parts[name][1], end) for name in parts for end in ("", "_16") if (name, end) in needed]

    def _set_types(self, text: str, suffix: str) -> str:
        lines = [line.partition("//?") for line in text.replace("$", suffix).splitlines()]
        text = "\n".join(line.rstrip() for line, _, only in lines if not only or (only.strip(), suffix) in self.parts)
        for field in ("decay", "threshold", "synapse", "adaptation", "rise"):
            declared, one = (rf"const \1 *{field}", rf"{field}[\1]") if field in self.each else (rf"\1 {field}", field)
            text = re.sub(rf"FIELD\((\w+), {field}\)", declared, text)
            text = re.sub(rf"AT\({field}, ([^()]+)\)", one, text)
        by_channel = "for (int i = 0; i < l->size;)\n        for (int c = 0; c < l->channels; c++, i++)"
        text = text.replace("EACH", by_channel if self.each else "for (int i = 0; i < l->size; i++)")
        text = text.replace("SIZES", "int size, channels;" if self.each else "int size;").replace("LIMIT", str(LIMIT))
        types = self.types | {"index": self.index, "input": self.types["number"]}
        for kind, name in (types | ({"number": "int16_t"} if suffix else {})).items():
            text = re.sub(rf"\b{kind.upper()}\b", name, text)
        return re.sub(r"^(    [^/\n]*;) +(?=/\*)", lambda m: m[1].ljust(45), text, flags=re.MULTILINE)

    def _fields(self) -> list[tuple[str, str, int]]:
        """List the arrays of the struct, wide types first so that nothing is padded between them."""
        number = self.types["number"]
        fields = [
            (self._number(op.inputs[0]), f"{self.names[op]}_{s}", op.output.size)
            for op in self.network.neurons
            for s in op.states
        ]
        kinds = {"values": number, "currents": "int16_t", "spikes": self.index}
        fields += [(kinds[b.kind], b.name, b.size + (b.kind == "spikes")) for b in self.buffers]
        if self.events:
            fields.append((number, "events", self.network.input.size))
        return sorted(fields, key=lambda field: -_BYTES[field[0]])

    def _start(self, op: Fire) -> list[str]:
        """Return the lines that set potentials before the first step, if these are not 0."""
        if not op.start.any():
            return []
        name, kind = self.names[op], self._number(op.inputs[0])
        value = _literal(op.start[0], kind)
        if len(op.start) > 1:
            value = f"{self._constant(op, 'start', op.start, kind)}[i % {len(op.start)}]"
        return [f"for (int i = 0; i < {op.output.size}; i++)", f"    net->{name}_v[i] = {value};"]

    def _constant(self, op: Operation, field: str, values: Tensor, kind: str = "number") -> str:
        key = f"{self.names[op]}_{field}"
        self.constants[key] = self.types.get(kind, kind), values.flatten()
        return key

    def _layer(self, kind: str, op: Operation, value: Value, **fields: Any) -> str:
        """Note the constant that describes a layer, of currents `value`, and return its address."""
        kind += "_16" if value in self.narrow else ""
        given = "\n".join(_lines([f".{field} = {value}," for field, value in fields.items()]))
        self.layers.append(f"/* {op.name} */\nstatic const {kind} {self.names[op]} = {{\n{given}\n}};")
        return f"&{self.names[op]}"

    def _place(self, value: Value) -> str:
        if value is self.network.input:
            return "input"
        return "logits" if value is self.network.output else f"net->{self.places[value].name}"

    def _number(self, value: Value) -> str:
        """Return the type of a value, and of the neurons that read it."""
        return "int16_t" if value in self.narrow else self.types["number"]

    def _function(self, name: str, value: Value | None = None) -> str:
        """Note that the network calls a function, on currents `value` of 16 bits or not, and return its name."""
        suffix = "_16" if value in self.narrow else ""
        self.parts.add((name, suffix))
        return name + suffix

    def _call(self, op: Operation) -> list[str]:
        """Return the statements of an operation."""
        places, out = [self._place(value) for value in op.inputs], self._place(op.output)
        x, size, channels = op.inputs[0], op.output.size, op.output.shape[0]
        given = f"{places[0]}, NULL" if x.spikes else f"{places[-1]}, {places[0]}"  # the list, and values
        if isinstance(op, Weights):
            function = self._function("linear" if op.linear else "conv", op.output)
            return [f"{function}({self._weights(op)}, {given}, {out});"]
        if isinstance(op, Pool):
            function, given = ("largest", places[0]) if op.largest else ("average", given)
            return [f"{self._function(function)}({self._pool(op)}, {given}, {out});"]
        if isinstance(op, Fire):
            function = "cuba_lif" if op.synapse is not None else "alif" if op.rise is not None else "lif"
            states = ", ".join(f"net->{self.names[op]}_{s}" for s in reversed(op.states))
            by_channel = {"channels": channels} if self.each else {}
            layer = self._layer("neuron_layer", op, x, size=size, **by_channel, **self._parameters(op))
            return [f"{self._function(function, x)}({layer}, {states}, {places[0]}, {out});"]
        if isinstance(op, Affine):
            gain = self._constant(op, "gain", op.gain.expand(channels), "weight")
            shift = self._constant(op, "shift", op.shift.expand(channels))
            return [f"{self._function('affine')}({places[0]}, {gain}, {shift}, {out}, {size}, {channels});"]
        if isinstance(op, Spread | Active):
            return [f"{self._function(type(op).__name__.lower())}({places[0]}, {out}, {size});"]
        assert isinstance(op, Sum)
        return self._sum(op, places, out)

    def _sum(self, op: Sum, places: list[str], out: str) -> list[str]:
        lines = []
        order = sorted(range(len(places)), key=lambda i: places[i] != out)  # in place first
        for k, i in enumerate(order):
            size, channels, factor = op.output.size, op.output.shape[0], op.factors[i]
            if factor is not None:
                key = self._constant(op, f"factor{i}", factor, "int32_t")
                function = self._function("add_scaled" if k else "scale")
                lines.append(f"{function}({places[i]}, {key}, {out}, {size}, {channels});")
            elif k:
                lines.append(f"{self._function('add')}({places[i]}, {out}, {size});")
            elif places[i] != out:
                lines.append(f"memcpy({out}, {places[i]}, {size} * sizeof *{out});")
        return lines

    def _weights(self, op: Weights) -> str:
        outputs, inside, height, width = op.weight.shape
        grouped = op.weight.view(op.groups, outputs // op.groups, inside, height, width)
        weights = self._constant(op, "weight", grouped.permute(3, 4, 0, 2, 1), "weight")
        bias = self._constant(op, "bias", op.bias, self._number(op.output))
        given = {"outputs": outputs, "weights": weights, "bias": bias}
        if op.linear:
            return self._layer("linear_layer", op, op.output, **given)
        given = {"dilation_y": op.dilation[0], "dilation_x": op.dilation[1], "groups": op.groups} | given
        return self._layer("conv_layer", op, op.output, **_window(op, (height, width)), **given)

    def _pool(self, op: Pool) -> str:
        factor = _literal(torch.tensor(op.factor), self.types["number"])
        return self._layer("pool_layer", op, op.output, **_window(op, op.kernel), factor=factor)

    def _parameters(self, op: Fire) -> dict[str, Any]:
        """Return the fields of a layer of neurons: numbers, or arrays where a layer of the network has them."""
        fields: dict[str, Any] = {"hard": int(op.hard)} if op.hard else {}
        for field in ("decay", "threshold", "synapse", "adaptation", "rise"):
            if (values := getattr(op, field)) is not None:
                kind = self._number(op.inputs[0]) if field in ("threshold", "rise") else self.types["factor"]
                if field in self.each:
                    fields[field] = self._constant(op, field, values.expand(op.output.shape[0]), kind)
                else:
                    fields[field] = _literal(values[0], kind)
        return fields


def _window(op: Weights | Pool, kernel: tuple[int, int]) -> dict[str, int]:
    (channels, height, width), (_, out_height, out_width) = op.inputs[0].shape, op.output.shape
    names = ("channels", "height", "width", "out_height", "out_width", "kernel_height", "kernel_width")
    given = dict(zip(names, (channels, height, width, out_height, out_width, *kernel), strict=True))
    pairs = {"stride_y": op.stride[0], "stride_x": op.stride[1]}
    if op.padding != (0, 0):
        pairs |= {"padding_y": op.padding[0], "padding_x": op.padding[1]}
    return given | pairs


def _parts() -> dict[str, tuple[list[str], str]]:
    """Return the parts of c_layers.c by name, each with the names of those that it needs."""
    parts = {}
    for part in Path(__file__).with_name("c_layers.c").read_text().split("// part ")[1:]:
        head, _, text = part.partition("\n")
        name, _, needs = head.partition(": ")
        parts[name] = needs.split(), text.rstrip()
    return parts


def _identifiers(operations: Iterable[Operation], program: str) -> dict[Operation, str]:
    """Give each operation a name in C: its layer's behind layer_, which no name of C or of a compiler begins with."""
    taken = {f"{program}_{end}" for end in ("net", "input", "logit", "reset", "step", "event", "tick")}
    found: dict[Operation, str] = {}
    for op in operations:
        if not isinstance(op, Active | Spread):  # which have no constants
            path = name = "layer_" + re.sub(r"\W", "_", op.name.split(" (")[0], flags=re.ASCII)
            n = 2
            while taken & (names := {name, *(f"{name}_{field}" for field in op.arrays())}):
                name, n = f"{path}_{n}", n + 1
            found[op] = name
            taken |= names
    return found


def _literal(value: Tensor, kind: str) -> str:
    if kind != "float":
        return str(int(value))
    return f"{value.float().numpy().astype(str)}f"


def lines_of(values: Tensor, kind: str) -> str:
    """Return the numbers of an array in lines."""
    array = values.detach().flatten().numpy()
    if kind == "float":
        return "\n".join(_lines([f"{text}f," for text in array.astype("float32").astype(str)]))
    return "\n".join(_lines([f"{number}," for number in array.astype("int64").tolist()]))


def _lines(texts: list[str], width: int = 116) -> list[str]:
    lines, line, length = [], [], 0
    for text in texts:
        if length + len(text) + 1 > width:
            lines.append("    " + " ".join(line))
            line, length = [], 0
        line.append(text)
        length += len(text) + 1
    return [*lines, "    " + " ".join(line)]
