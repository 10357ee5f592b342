"""Write the operations of a network as C11: a struct of the state, constant weights, a function a kind of layer."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from sltt.interop import c_network
from sltt.interop.c_buffers import count_padded, find_fused, memory_kind, plan_buffers
from sltt.interop.c_network import Affine, Fire, Keep, Network, Operation, Pool, Spread, Sum, Taps, Value, Weights

_WORDS = ("input", "number", "weight", "row", "factor", "state")
_INTEGERS = ("int8_t", "int32_t", "int8_t", "uint32_t", "int16_t", "int16_t")
_TYPES = {"float32": dict.fromkeys(_WORDS, "float"), "int8": dict(zip(_WORDS, _INTEGERS, strict=True))}
_KINDS = {"values": "number", "small": "input", "kept": "state", "spikes": "input"}  # of buffers; of one spike
_OF_NEURONS = ("decay", "threshold", "synapse", "adaptation", "rise", "subtract")
_BYTES = {"float": 4, "int32_t": 4, "uint32_t": 4, "int16_t": 2, "int8_t": 1}


class Program:
    """The C of a network.

    Attributes:
        network: its operations.
        name: the first part of all names that others see.
        flash: bytes of weights and parameters, without those of the code.
        ram: bytes of the struct.
    """

    def __init__(self, network: Network, name: str, events: bool):
        self.network, self.name = network, name
        self.events = events and network.input_scale <= 1  # else an event is less than 1 in the input
        self.types = dict(_TYPES["int8" if network.integers else "float32"])
        self.parts: dict[tuple[str, str], dict[str, str]] = {}  # functions that the network calls; IN and OUT of each
        self.constants: dict[str, tuple[str, Tensor, str]] = {}  # C's type, values, and layer, by name
        self.layers: list[str] = []
        paths = (re.sub(r"\W", "_", op.name.split(" (")[0], flags=re.ASCII) for op in network.operations)
        self.names = dict(zip(network.operations, (f"layer{k}_{path}" for k, path in enumerate(paths)), strict=True))
        parameters = [(name, tensor) for op in network.neurons for name, tensor in op.arrays().items()]
        self.each = {name for name, tensor in parameters if len(tensor) > 1} - {"start"}  # those given by channel
        self.has = {name for name, _ in parameters} | {"shift" for op in network.neurons if op.shift}
        self.has |= {"levels" for op in network.neurons if op.output.levels}
        input_argument = f", const {name}_input *input"
        at_reset, at_step = (input_argument, "") if network.once else ("", input_argument)
        self.reset = f"{name}_reset({name}_net *net{at_reset})"
        self.step = f"{name}_step({name}_net *net{at_step}, {name}_logit *logits)"
        self.fused = find_fused(network)
        self.buffers, self.places = plan_buffers(network, self.fused)
        self.fields = self._fields()
        calls = [self._call(op) for op in network.operations]
        self.resets = [line for op in network.neurons for line in self._start(op)]
        self.resets += [line for lines in calls[: network.once] for line in lines]
        self.steps = [line for lines in calls[network.once :] for line in lines]
        if (buffer := self.places.get(network.output)) is not None:
            self.steps.append(f"memcpy(logits, net->{buffer.name}, {network.output.size} * sizeof *logits);")
        self.ram, self.flash = (sum(sizes.values()) for sizes in self.by_layer().values())
        self.ram += -self.ram % 4

    def by_layer(self) -> dict[str, Counter[str]]:
        """Return the bytes of "RAM" and of "flash" that each layer takes, by name."""
        ram, flash = Counter[str](), Counter[str]()
        for kind, _, size, layer in self.fields:
            ram[layer] += _BYTES[kind] * size
        for kind, values, layer in self.constants.values():
            flash[layer] += _BYTES[kind] * values.numel()
        return {"RAM": ram, "flash": flash}

    def source(self) -> str:
        """Return NAME.c."""
        name, T = self.name, self.network.steps
        arrays = {f"static const {k} {key}[{len(v)}]": lines_of(v, k) for key, (k, v, _) in self.constants.items()}
        reset, step = ("".join(f"    {line}\n" for line in lines) for lines in (self.resets, self.steps))
        code = [
            f"/* {name}: one time step of a spiking network, called {T} times for a sample; see {name}.h.\n\n"
            "   Images are [height][width][channels]. Spikes are bits; layers add the weights of active inputs alone.\n"
            "   Weights and parameters are at the end. */\n\n"
            f'#include "{name}.h"\n\n#include <string.h>',
            "\n".join(f"{array};" for array in arrays),
            *self._functions(),
            "/* The layers. */\n\n" + "\n".join(self.layers),
            f"void {self.reset}\n{{\n    memset(net, 0, sizeof *net);\n{reset}}}",
            f"void {self.step}\n{{\n{step}}}",
            *([self._quantise()] if self.network.integers else []),
            *([self._events()[1]] if self.events else []),
            "/* Weights and parameters. */",
            *(f"{array} = {{\n{lines}\n}};" for array, lines in arrays.items()),
        ]
        return "\n\n".join(part for part in code if part) + "\n"

    def header(self) -> str:
        """Return NAME.h."""
        name, N = self.name, self.name.upper()
        how = "The largest sum" if self.network.output.size > 1 else "The mean"
        begin, inputs = "", f": {N}_INPUTS inputs"
        if self.network.once:
            begin, inputs = f", whose input of {N}_INPUTS values all time steps see", ""
        fits = ": a sum fits in 32 bits" if self.network.integers else ""
        (channels, height, width), logits = self.network.input.shape, self.network.output.shape
        of_pixels = f" /* [{logits[1]}][{logits[2]}][{logits[0]}]: height, width, classes */" * (logits[1:] != (1, 1))
        scales = f"""#define {N}_INPUT_SCALE {_literal(self.network.input_scale)} /* an input of 1 stands for this */
#define {N}_LOGIT_SCALE {_literal(self.network.logit_scale)} /* a logit of 1 stands for this */
"""
        quantise = f"""
/* Return the input that stands for a value: in ±127, which values beyond become. */
{name}_input {name}_quantise(float value);
"""
        fields = "\n".join(f"    {kind} {field}[{size}];" for kind, field, size, _ in self.fields)
        return f"""#ifndef {N}_H
#define {N}_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {{
#endif

#define {N}_INPUTS {self.network.input.size} /* [{height}][{width}][{channels}]: height, width, channels */
#define {N}_CLASSES {self.network.output.size}{of_pixels}
#define {N}_STEPS {self.network.steps} /* time steps of a sample in training */
{scales if self.network.integers else ""}
typedef {self.types["input"]} {name}_input;
typedef {self.types["number"]} {name}_logit;

/* The state of one network: neurons, and what passes between layers in a step. */
typedef struct {{
{fields}
}} {name}_net;

/* Begin a sample{begin}. */
void {self.reset};

/* Take one time step{inputs} to {N}_CLASSES logits. {how} over {N}_STEPS steps is the prediction{fits}. */
void {self.step};
{quantise if self.network.integers else ""}{self._events()[0] if self.events else ""}
#ifdef __cplusplus
}}
#endif

#endif
"""

    def _events(self) -> tuple[str, str]:
        """Return what NAME.h and NAME.c have for events."""
        name, (channels, height, width) = self.name, self.network.input.shape
        of, where = "the pixel x, y; the polarity is the channel", "int x, int y, int polarity"
        i = f"(y * {width} + x) * {channels} + polarity"
        inside = f"x >= 0 && x < {width} && y >= 0 && y < {height} && polarity >= 0 && polarity < {channels}"
        if (height, width) == (1, 1):
            of, where, i, inside = "an input", "int i", "i", f"i >= 0 && i < {channels}"
        unit = min(max(round(1 / self.network.input_scale), 1), 127) if self.network.integers else 1
        most = 127 if self.network.integers else "16777216.0f"
        more = f": {unit} more in its input, up to 127" if self.network.integers else ""
        declared = f"""
/* Count an event of {of}{more}. One outside is ignored. */
void {name}_event({name}_net *net, {where});

/* Take one time step with the events since the last. */
void {name}_tick({name}_net *net, {name}_logit *logits);
"""
        return (
            declared,
            f"""void {name}_event({name}_net *net, {where})
{{
    if ({inside})
        net->events[{i}] = ({name}_input)(net->events[{i}] < {most} - {unit} ? net->events[{i}] + {unit} : {most});
}}

void {name}_tick({name}_net *net, {name}_logit *logits)
{{
    {name}_step(net, net->events, logits);
    memset(net->events, 0, sizeof net->events);
}}""",
        )

    def _quantise(self) -> str:
        name = self.name
        return f"""{name}_input {name}_quantise(float value)
{{
    const float units = value * {_literal(1 / self.network.input_scale)};

    return ({name}_input)(units >= 127 ? 127 : units > -127 ? units + (units < 0 ? -0.5f : 0.5f) : -127);
}}"""

    def _functions(self) -> list[str]:
        """Return the parts of c_layers.c that the network calls, with what these need, in C's types."""
        arithmetic = "int8" if self.network.integers else "float32"
        needed, todo = dict(self.parts), [*self.parts]
        while todo:
            for need in _PARTS[todo.pop()[0]][0]:
                key = (long if (long := f"{need} {arithmetic}") in _PARTS else need), ""
                if key not in needed:
                    needed[key] = {}
                    todo.append(key)
        ordered = sorted(needed.items(), key=lambda item: [*_PARTS].index(item[0][0]))
        return [self._set_types(_PARTS[name][1].replace("$", suffix), types) for (name, suffix), types in ordered]

    def _set_types(self, text: str, types: dict[str, str]) -> str:
        lines = [line.partition("//?") for line in text.splitlines()]
        text = "\n".join(line.rstrip() for line, _, only in lines if not only or only.strip() in self.has)
        text = text.replace("TAKEN", "subtract" if "subtract" in self.has else "threshold")
        for field in _OF_NEURONS:
            declared, value = (rf"const \1 *{field}", rf"{field}[c]") if field in self.each else (rf"\1 {field}", field)
            text = re.sub(rf"FIELD\((\w+), {field}\)", declared, text).replace(f"AT({field})", value)
        shifted = "(in[c] + ((1 << l->shift) >> 1)) >> l->shift"  # to the nearest integer
        scaled = "(int32_t)(((int64_t)factor[c] * in[i] + (INT64_C(1) << (bits - 1))) >> bits)"
        words = {"scaled": scaled, "factors": "NUMBER *factor, int bits"}
        if not self.network.integers:
            words = {"scaled": "factor[c] * in[i]", "factors": "NUMBER *factor"}
        words |= {"current": shifted if "shift" in self.has else "in[c]"} | self.types | types
        for word, name in words.items():
            text = re.sub(rf"\b{word.upper()}\b", name, text)
        return re.sub(r"^(    [^/\n]*;) +(?=/\*)", lambda m: m[1].ljust(45), text, flags=re.MULTILINE)

    def _fields(self) -> list[tuple[str, str, int, str]]:
        """List the arrays of the struct, wide types first so that nothing is padded between them."""
        kind, neurons = self.types["state"], self.network.neurons
        fields = [(kind, f"{self.names[op]}_{s}", op.output.size, op.name) for op in neurons for s in op.states]
        kinds = {kind: self.types[word] for kind, word in _KINDS.items()} | {"spikes": "uint32_t"}
        fields += [(kinds[b.kind], b.name, b.size, b.layer) for b in self.buffers]
        for op in [op for op in self.network.operations if isinstance(op, Taps)]:
            size = -(-op.inputs[0].size // 32) if op.output.spikes else op.inputs[0].size
            ring = kinds[memory_kind(self.network, op.output)], f"{self.names[op]}_ring", op.depth * size, op.name
            fields += [ring, ("int32_t", f"{self.names[op]}_now", 1, op.name)]
        if self.events:
            fields.append((self.types["input"], "events", self.network.input.size, "events"))
        return sorted(fields, key=lambda field: -_BYTES[field[0]])

    def _start(self, op: Fire) -> list[str]:
        """Return the lines that set potentials before the first step, if these are not 0."""
        if not op.start.any():
            return []
        value = _literal(op.start[0], self.types["state"])
        if len(op.start) > 1:
            value = f"{self._constant(op, 'start', op.start, 'state')}[i % {len(op.start)}]"
        return [f"for (int i = 0; i < {op.output.size}; i++)", f"    net->{self.names[op]}_v[i] = {value};"]

    def _constant(self, op: Operation, field: str, values: Tensor, kind: str = "number") -> str:
        key = f"{self.names[op]}_{field}"
        self.constants[key] = self.types.get(kind, kind), values.flatten(), op.name
        return key

    def _layer(self, kind: str, op: Operation, **fields: Any) -> str:
        """Note the constant that describes a layer, and return its address."""
        fields_text = _lines([f".{field} = {value}," for field, value in fields.items()])
        self.layers.append(f"/* {op.name} */\nstatic const {kind} {self.names[op]} = {{\n{fields_text}\n}};")
        return f"&{self.names[op]}"

    def _place(self, value: Value) -> str:
        if value is self.network.input:
            return "input"
        return f"net->{self.places[value].name}" if value in self.places else "logits"

    def _function(self, name: str, x: Value, out: Value) -> str:
        """Note that the network calls a function, from values of the type of x to those of out; return its name."""
        types = {word: self.types[_KINDS[memory_kind(self.network, v)]] for word, v in (("in", x), ("out", out))}
        text = _PARTS[name][1]
        bits = [re.sub(r"\D", "", types[word]) for word in types if re.search(rf"\b{word.upper()}\b", text)]
        suffix = "".join(f"_{b}" for b in bits if b)
        self.parts[name, suffix] = types
        return name + suffix

    def _call(self, op: Operation) -> list[str]:
        """Return the statements of an operation."""
        places, out = [self._place(value) for value in op.inputs], self._place(op.output)
        x, size, channels = op.inputs[0], op.output.size, op.output.shape[0]
        offset = f" + i * {channels}" if size > channels else ""
        if isinstance(op, Weights):
            if op in self.fused.values():
                return []
            return _for_each(size // channels, [self._pixel(op, out + offset)])
        if isinstance(op, Pool):
            of = {"out_height": op.output.shape[1], "out_width": op.output.shape[2], "largest": int(op.largest)}
            factor = _literal(op.factor, self.types["number"])
            layer = self._layer("pool_layer", op, **_window(op, op.kernel), **of, factor=factor)
            return [f"{self._function('pool', x, op.output)}({layer}, {self._pointers(x)}, {out});"]
        if isinstance(op, Fire):
            states = {s: f"net->{self.names[op]}_{s}" for s in op.states}
            more_states = [states.get(s, "NULL") for s, has in (("i", "synapse"), ("a", "rise")) if has in self.has]
            layer = self._layer("neuron_layer", op, channels=channels, **self._parameters(op))
            before = self.fused.get(op)
            currents = places[0] + offset * (before is None)
            function = self._function("graded", x, op.output) if op.output.levels else self._function("lif", x, x)
            more_states = [] if op.output.levels else more_states
            call = f"{function}({', '.join([layer, currents, 'i', out, *more_states, states['v']])});"
            return _for_each(size // channels, [self._pixel(before, places[0]), call] if before else [call])
        if isinstance(op, Keep):
            if x is self.network.input:
                return [f"memcpy({out}, input, {size} * sizeof *input);"]
            before = self.fused.get(op)
            function = self._function("keep" if self.network.integers else "add", x, op.output)
            how = op.shift if self.network.integers else 1  # 1 begins a sum
            if before is None:
                return [f"{function}({places[0]}, {out}, {size}, {how});"]
            call = f"{function}({places[0]}, {out}{offset}, {channels}, {how});"
            return _for_each(size // channels, [self._pixel(before, places[0]), call])
        if isinstance(op, Affine):
            gain = self._constant(op, "gain", op.gain.expand(channels))
            shift = self._constant(op, "shift", op.shift.expand(channels))
            function = self._function("affine", x, op.output)
            return [f"{function}({places[0]}, {gain}, {shift}, {out}, {size}, {channels});"]
        if isinstance(op, Spread):
            return [f"{self._function('spread', x, op.output)}({places[0]}, {out}, {size});"]
        if isinstance(op, Taps):
            function = self._function("delay_spikes" if x.spikes else "delay", x, op.output)
            taps, ring = self._constant(op, "taps", torch.tensor(op.taps), "int16_t"), f"net->{self.names[op]}_ring"
            sizes = f"{len(op.taps)}, {op.depth}, {x.size}, {x.shape[0]}"
            return [f"{function}({places[0]}, {taps}, {sizes}, {ring}, net->{self.names[op]}_now, {out});"]
        if isinstance(op, c_network.Join):
            return self._join(op, places, out)
        assert isinstance(op, Sum)
        return self._sum(op, places, out)

    def _pixel(self, op: Weights, out: str) -> str:
        """Return the statement that computes pixel i of a layer with weights."""
        outputs, inside, height, width = op.weight.shape
        grouped = op.weight.view(op.groups, outputs // op.groups, inside, height, width).permute(3, 4, 0, 2, 1)
        kind, row, more = "weight", outputs // op.groups, count_padded(self.network, op) - outputs
        if op.groups == 1 and self.network.integers:  # four in a word
            kind, row = "row", (outputs + more) // 4
            four = pad(grouped + 128, (0, more), value=128).unflatten(-1, (row, 4))
            grouped = pad((four * 256 ** torch.arange(4)).sum(-1).flatten(), (0, 1))  # which the last row's end reads
        weights = self._constant(op, "weight", grouped, kind)
        fields = {"outputs": outputs + more, "out_width": op.output.shape[2], "row": row, "groups": op.groups}
        fields |= {"dilation_y": op.dilation[0], "dilation_x": op.dilation[1]} | _window(op, (height, width))
        layer = self._layer("conv_layer", op, **fields, bias=self._constant(op, "bias", pad(op.bias, (0, more))))
        function = self._function("conv" if op.groups == 1 else "grouped", op.inputs[0], op.output)
        return f"{function}({layer}, {weights}, {self._pointers(op.inputs[0])}, i, {out});"

    def _pointers(self, x: Value) -> str:
        """Return the arguments for bits and for values, of which a function reads one."""
        return f"{self._place(x)}, NULL" if x.spikes else f"NULL, {self._place(x)}"

    def _join(self, op: c_network.Join, places: list[str], out: str) -> list[str]:
        lines, at, flat = [f"memset({out}, 0, sizeof {out});"] * op.output.spikes, 0, op.output.shape[1:] == (1, 1)
        for x, place in zip(op.inputs, places, strict=True):
            channels, (pixel, channel) = x.shape[0], (1, x.size // x.shape[0]) if flat else (op.output.shape[0], 1)
            function = self._function("join_spikes" if op.output.spikes else "join", x, op.output)
            place_of_output = f"{out}, {at}" if op.output.spikes else f"{out} + {at}"
            lines.append(f"{function}({place}, {place_of_output}, {x.size}, {channels}, {pixel}, {channel});")
            at += x.size if flat else channels
        return lines

    def _sum(self, op: Sum, places: list[str], out: str) -> list[str]:
        lines = []
        order = sorted(range(len(places)), key=lambda i: places[i] != out)  # in place first
        for k, i in enumerate(order):
            size, channels, factor = op.output.size, op.output.shape[0], op.factors[i]
            begin = int(k == 0)
            if factor is not None:
                key = self._constant(op, f"factor{i}", factor)
                function = self._function("add_scaled", op.inputs[i], op.output)
                bits = f", {op.bits}" * self.network.integers
                lines.append(f"{function}({places[i]}, {key}{bits}, {out}, {size}, {channels}, {begin});")
            elif k or places[i] != out:
                lines.append(f"{self._function('add', op.inputs[i], op.output)}({places[i]}, {out}, {size}, {begin});")
        return lines

    def _parameters(self, op: Fire) -> dict[str, Any]:
        """Return the fields of a layer of neurons: numbers, or arrays where a layer of the network has them."""
        flags = {name: int(getattr(op, name)) for name in ("hard", "shift", "negative")} | {"levels": op.output.levels}
        fields: dict[str, Any] = {name: value for name, value in flags.items() if value}
        for field in _OF_NEURONS:
            if (values := getattr(op, field)) is not None:
                kind = "state" if field in ("threshold", "rise", "subtract") else "factor"
                if field in self.each:
                    fields[field] = self._constant(op, field, values.expand(op.output.shape[0]), kind)
                else:
                    fields[field] = _literal(values[0], self.types[kind])
        return fields


def _window(op: Weights | Pool, kernel: tuple[int, int]) -> dict[str, int]:
    names = ("channels", "height", "width", "kernel_height", "kernel_width")
    sizes = dict(zip(names, (*op.inputs[0].shape, *kernel), strict=True))
    pairs = {"stride_y": op.stride[0], "stride_x": op.stride[1]}
    if op.padding != (0, 0):
        pairs |= {"padding_y": op.padding[0], "padding_x": op.padding[1]}
    return sizes | pairs


def _for_each(pixels: int, calls: list[str]) -> list[str]:
    """Return the statements that make calls for each pixel i."""
    if pixels == 1:
        return [re.sub(r"\bi\b", "0", call) for call in calls]
    return [f"for (int i = 0; i < {pixels}; i++) {{", *(f"    {call}" for call in calls), "}"]


def _read_parts() -> dict[str, tuple[list[str], str]]:
    """Return the parts of c_layers.c by name, each with the names of those that it needs."""
    parts = {}
    for part in Path(__file__).with_name("c_layers.c").read_text("utf-8").split("// part ")[1:]:
        head, _, text = part.partition("\n")
        name, _, needs = head.partition(": ")
        parts[name] = needs.split(), text.rstrip()
    return parts


_PARTS = _read_parts()


def _literal(value: Tensor | float, kind: str = "float") -> str:
    return f"{torch.as_tensor(value).float().numpy().astype(str)}f" if kind == "float" else str(int(value))


def lines_of(values: Tensor, kind: str) -> str:
    """Return the numbers of an array in lines."""
    array = values.detach().flatten().numpy()
    if kind == "float":
        return _lines([f"{text}f," for text in array.astype("float32").astype(str)])
    return _lines([f"0x{n:08x}," if kind == "uint32_t" else f"{n}," for n in array.astype("int64").tolist()])


def _lines(texts: list[str]) -> str:
    each = 115 // max(map(len, texts)) or 1
    return "\n".join("    " + " ".join(texts[i : i + each]) for i in range(0, len(texts), each))
