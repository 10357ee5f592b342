"""Read a network of PyTorch into the operations of one time step, with BatchNorm and factors in the weights."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sltt.interop import c_network, reading
from sltt.interop.c_network import Affine, Fire, Network, Operation, Pool, Spread, Sum, Taps, Value, Weights
from sltt.interop.conversion import add_remedies, layer_title, require
from sltt.interop.reading import Call, pair
from sltt.neurons import ALIF, IF, LI, LIF, PLIF, ChannelLIF, CubaLIF, Delay, IntegerLIF, Neuron, Recurrent, TernaryLIF
from sltt.sequence.hooks import own_forward
from sltt.sequence.state import Stateful
from sltt.surrogates import Above, Surrogate

_NEURONS = (LIF, IF, PLIF, ChannelLIF, CubaLIF, ALIF, IntegerLIF, TernaryLIF)


def read_network(model: nn.Module, x: Tensor, steps: int) -> Network:
    """Read a network of T = `steps`, in evaluation mode, from its forward on a frame x [B, ...].

    Raises ValueError naming every layer and operation that C has not.
    """
    reader, values, problems = _Reader(), {}, []
    calls = reading.read_calls(model, x)
    for call in calls:
        try:
            values[call] = reader.value(call, [values[source] for source in call.inputs])
        except ValueError as reason:
            problems.append(f"{call.place}{reason}")
            values[call] = Value(_image(call.shape))
    _refuse(problems)
    output, shape = values[calls[-1]], calls[-1].shape
    output = reader.vector(output) if len(shape) == 2 else output
    network = Network(reader.operations, values[calls[0]], output, steps, shape[1:])
    _fold(network)
    _add_values(network)
    wide = [op for op in network.operations if isinstance(op, Pool) and op.adaptive]
    _refuse([f"{op.name}, whose windows have several sizes with no linear layer behind it" for op in wide])
    for op in network.operations:
        if isinstance(op, Fire) and op.subtract is None and any(n.subtract is not None for n in network.neurons):
            op.subtract = op.threshold  # C has one kind of layer for all
        for name, tensor in op.arrays().items():
            setattr(op, name, tensor.float())
    return network


def _refuse(problems: list[str]) -> None:
    if problems:
        remedy = "the layers that docs/to-a-microcontroller.md lists, or export one step by sltt.interop.to_onnx"
        raise ValueError(f"C has no counterpart for {'; '.join(add_remedies(problems))}. Train a network of {remedy}")


class _Reader:
    """Notes the operations of calls."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self.seen: set[nn.Module] = set()

    def value(self, call: Call, inputs: list[Value]) -> Value:
        """Return the output of a call whose inputs are these."""
        kind, layer, name = call.kind, call.layer, call.path
        if kind == "input":
            return Value(_image(call.shape))
        if kind == "sum":
            inputs = inputs if inputs[0].shape == inputs[1].shape else [*map(self.vector, inputs)]
            return self._add(Sum(name, inputs, Value(inputs[0].shape), [None, None]))
        if kind == "cat":
            return self._add(c_network.Join(name, inputs, Value(_image(call.shape), all(x.spikes for x in inputs))))
        require(len(inputs) == 1, "")
        (x,), in_shape = inputs, call.inputs[0].shape
        if kind == "output":
            return x
        if kind == "image":
            require(not self.operations, ", which is not the first")
            x.shape = _image(call.shape)
            return x
        if kind == "affine":
            return self._affine(name, x, *layer)
        name = layer_title(name, layer)
        if isinstance(call.layer, Stateful):
            require(layer not in self.seen, ", which runs twice in a time step")
            self.seen.add(layer)
        if isinstance(layer, Recurrent):
            return self._recurrent(name, layer, x, in_shape)
        if isinstance(layer, Neuron):
            return self._neuron(name, layer, x)
        if isinstance(layer, Delay):
            shape = len(layer.taps) * x.shape[0], *x.shape[1:]
            late = Value(shape, x.spikes, x.levels)
            return self._add(Taps(name, [x], late, layer.taps, layer.depth)) if layer.depth else x
        require(kind is not None, "")
        if kind is nn.Flatten:
            last = len(in_shape) - 1
            require((layer.start_dim, layer.end_dim % len(in_shape)) == (1, last), ", which keeps a dimension")
            return x
        if kind in reading.NORMS:
            require(layer.running_mean is not None, ", which has no running statistics")
            gain = (layer.running_var.double() + layer.eps).rsqrt() * (1 if layer.weight is None else layer.weight)
            shift = (0 if layer.bias is None else layer.bias) - layer.running_mean * gain
            return self._affine(name, x, gain, shift)
        if kind in reading.WEIGHTS:
            return self._add(_weights(name, layer, x, in_shape, Value(_image(call.shape))))
        return self._add(_pool(name, layer, kind in reading.MAXIMA, x, Value(_image(call.shape))))

    def _add(self, operation: Operation) -> Value:
        self.operations.append(operation)
        return operation.output

    def vector(self, x: Value) -> Value:
        """Return an image that was flattened as a vector, in PyTorch's order."""
        vector = Value((x.size, 1, 1), x.spikes, x.levels)
        return x if x.shape == vector.shape else self._add(c_network.Join("flatten", [x], vector))

    def _affine(self, name: str, x: Value, gain: Tensor, shift: Tensor) -> Value:
        x = x if {*gain.shape, *shift.shape} <= {1, x.shape[0]} else self.vector(x)
        gain, shift = (vector.detach().double().expand(x.shape[0]) for vector in (gain, shift))
        return self._add(Affine(name, [x], Value(x.shape), gain, shift))

    def _recurrent(self, name: str, module: Recurrent, x: Value, shape: torch.Size) -> Value:
        require(not own_forward(module, Recurrent), "")
        require(isinstance(module.layer, reading.WEIGHTS), f" with a layer of type {type(module.layer).__name__}")
        x = self.vector(x) if isinstance(module.layer, nn.Linear) else x
        before, total = _spikes(x, module.neuron), Value(x.shape)
        path = name.removesuffix(" (Recurrent)")
        title = layer_title(f"{path}.layer", module.layer)
        back = self._add(_weights(title, module.layer, before, shape, Value(x.shape)))
        self._add(Sum(f"{path}.sum", [x, back], total, [None, None]))
        spikes = self._neuron(name, module.neuron, total)
        for op in self.operations:
            op.inputs = [spikes if value is before else value for value in op.inputs]
        return spikes

    def _neuron(self, name: str, module: Any, x: Value) -> Value:
        if type(module) is LI and not own_forward(module, Neuron):
            decay, v = torch.full(x.shape[:1], module.decay()), Value(x.shape)
            x = self._affine(name, x, 1 - decay, torch.zeros(1)) if module.decay_input else x
            return self._add(c_network.Integrate(name, [x, v], v, [None, decay]))
        require(type(module) in _NEURONS and not own_forward(module, Neuron), "")
        surrogate: Any = type(module.surrogate)
        require(surrogate.fires in (Surrogate.fires, Above.fires), ", which fires in a way of its own")
        values = module.arguments()
        counts = {value.numel() for value in values.values() if isinstance(value, Tensor)}
        x = x if counts <= {1, x.shape[0]} else self.vector(x)
        reset_to, decay = values.get("v_reset"), _flat(values["decay"])
        rest = reset_to or 0.0
        threshold, subtract = _flat(values.get("threshold", values.get("v_threshold"))) - rest, values.get("subtract")
        if isinstance(module, IntegerLIF):
            threshold, subtract = threshold / 2, threshold
        if isinstance(module.surrogate, Above):
            threshold = torch.nextafter(threshold.float(), torch.tensor(torch.inf)).double()
        if (gain := 1 - decay if values.get("decay_input") else _flat(values.get("gain", 1.0))).ne(1).any():
            x = self._affine(name, x, gain, torch.zeros(1))
        fire = Fire(name, [x], _spikes(x, module), decay, threshold, _flat(module.first_states()["v"]) - rest)
        fire.hard, fire.negative = reset_to is not None, isinstance(module, TernaryLIF)
        fire.above = isinstance(module.surrogate, Above)
        fire.subtract = None if subtract is None else _flat(subtract)
        if isinstance(module, CubaLIF):
            fire.synapse = _flat(values["synaptic_decay"])
        if isinstance(module, ALIF):
            fire.adaptation, fire.rise = _flat(values["threshold_decay"]), _flat(values["beta"])
        return self._add(fire)


def _spikes(x: Value, neuron: Any) -> Value:
    levels = neuron.levels if isinstance(neuron, IntegerLIF) else int(isinstance(neuron, TernaryLIF))
    return Value(x.shape, not levels, levels)


def _flat(value: Any) -> Tensor:
    return torch.as_tensor(value).detach().double().flatten()


def _image(shape: torch.Size) -> tuple[int, int, int]:
    """Return [B, C, L] or [B, C, H, W] as an image; other shapes as a vector, since only flatten takes them."""
    if len(shape) in (3, 4):
        return shape[1], (1 if len(shape) == 3 else shape[2]), shape[-1]
    return shape[1:].numel(), 1, 1


def _weights(name: str, module: Any, x: Value, shape: torch.Size, output: Value) -> Weights:
    weight = module.weight.detach().double()
    bias = torch.zeros(len(weight)).double() if module.bias is None else module.bias.detach().double()
    if isinstance(module, nn.Linear):
        require(len(shape) == 2, ", whose input is not [B, features]")
        return Weights(name, [x], output, weight.view(len(weight), *x.shape), bias)
    stride, padding, dilation = pair(module.stride, 1), reading.padding_of(module), pair(module.dilation, 1)
    weight = weight.unsqueeze(2) if isinstance(module, nn.Conv1d) else weight
    return Weights(name, [x], output, weight, bias, stride, padding, module.groups, dilation)


def _pool(name: str, module: Any, largest: bool, x: Value, output: Value) -> Pool:
    flat = isinstance(module, nn.MaxPool1d | nn.AvgPool1d | nn.AdaptiveAvgPool1d)

    def sides(value: Any, first: int) -> tuple[int, int]:
        return pair((value,) if flat and isinstance(value, int) else value, first)

    if isinstance(module, reading.ADAPTIVE):
        out = output.shape[1:]
        kernel = x.shape[1] // out[0], x.shape[2] // out[1]
        adaptive = (kernel[0] * out[0], kernel[1] * out[1]) != x.shape[1:]
        return Pool(name, [x], output, kernel, kernel, factor=1 / max(kernel[0] * kernel[1], 1), adaptive=adaptive)
    kernel, stride, padding = sides(module.kernel_size, 1), sides(module.stride, 1), sides(module.padding, 0)
    if largest:
        require(set(sides(module.dilation, 1)) == {1} and not module.return_indices, " with dilation or indices")
        return Pool(name, [x], output, kernel, stride, padding, largest=True, ceil=module.ceil_mode)
    plain = getattr(module, "divisor_override", None) is None and (module.count_include_pad or padding == (0, 0))
    require(plain, " with divisor_override or without count_include_pad: leave it as it is by default")
    sizes = zip(x.shape[1:], output.shape[1:], kernel, stride, padding, strict=True)
    require(all((m - 1) * s + k <= n + 2 * p for n, m, k, s, p in sizes), " with ceil_mode and windows over the border")
    return Pool(name, [x], output, kernel, stride, padding, 1 / (kernel[0] * kernel[1]))


def _fold(network: Network) -> None:
    """Fold what is linear into the weights beside it, where nothing else reads it."""
    makers = {op.output: op for op in network.operations}
    for op in [*network.operations]:
        (x, *others) = op.inputs
        before = makers.get(x)
        if others or before is None or network.readers(x) > 1:
            continue
        if isinstance(op, Affine) and isinstance(before, Weights):
            before.weight = before.weight * op.gain.view(-1, 1, 1, 1)
            before.bias = before.bias * op.gain + op.shift
        elif isinstance(op, Affine) and isinstance(before, Affine):
            before.gain, before.shift = before.gain * op.gain, before.shift * op.gain + op.shift
        elif isinstance(op, Weights) and op.linear and isinstance(before, Pool) and before.adaptive:
            pool: Callable[[Tensor], Tensor] = nn.AdaptiveAvgPool2d(before.output.shape[1:])
            op.weight = _weights_of(pool, op.weight, before.inputs[0].shape)
            op.inputs = before.inputs
            network.operations.remove(before)
            continue
        else:
            continue
        before.output = op.output
        makers[op.output] = before
        network.operations.remove(op)


def _add_values(network: Network) -> None:
    """Put a `Spread` behind spikes that others than weights, pooling and delays read."""
    for op in [op for op in network.operations if op.output.spikes]:
        readers = [reader for reader in network.operations if op.output in reader.inputs]
        others = [reader for reader in readers if not isinstance(reader, Weights | Pool | Taps | c_network.Join)]
        others += [reader for reader in readers if isinstance(reader, c_network.Join) and not reader.output.spikes]
        if others or op.output is network.output:
            spread = Spread(f"{op.name} as values", [op.output], Value(op.output.shape))
            network.operations.insert(network.operations.index(op) + 1, spread)
            for reader in others:
                reader.inputs = [spread.output if value is op.output else value for value in reader.inputs]
            network.output = spread.output if op.output is network.output else network.output


def _weights_of(function: Callable[[Tensor], Tensor], weight: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the weights [O, *shape] of a linear layer that does what `function` and then `weight` do."""
    zeros = torch.zeros(len(weight), *shape, dtype=weight.dtype, requires_grad=True)
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad((function(zeros) * weight).sum(), zeros)
    return gradient
