"""Read a network of PyTorch into the operations of one time step, with BatchNorm and factors in the weights."""

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sltt.interop import reading
from sltt.interop.c_network import Active, Affine, Fire, Network, Operation, Pool, Spread, Sum, Value, Weights, describe
from sltt.interop.conversion import require
from sltt.interop.reading import pair
from sltt.neurons import ALIF, IF, LIF, PLIF, ChannelLIF, CubaLIF, Neuron, Recurrent
from sltt.sequence.hooks import own_forward
from sltt.sequence.state import reset
from sltt.surrogates import Above, Surrogate

_NEURONS = (LIF, IF, PLIF, ChannelLIF, CubaLIF, ALIF)
_CALLS: dict[Any, type[nn.Module]] = {
    F.adaptive_avg_pool1d: nn.AdaptiveAvgPool1d,
    F.adaptive_avg_pool2d: nn.AdaptiveAvgPool2d,
    F.avg_pool1d: nn.AvgPool1d,
    F.avg_pool2d: nn.AvgPool2d,
}
_TIMES = (operator.mul, operator.imul, torch.mul, "mul")
_OVER = (operator.truediv, torch.div, "div")


def read(model: nn.Module, x: Tensor, steps: int) -> Network:
    """Read a network of T = `steps`, in evaluation mode, from its forward on a frame x [B, ...].

    Raises:
        ValueError: naming every layer and operation that C has not.
    """
    network = _Reader(model, reading.trace(model)).network(x, steps)
    _fold(network)
    _add_lists(network)
    wide = [op for op in network.operations if isinstance(op, Pool) and op.adaptive]
    _refuse([f"{op.name}, whose windows have several sizes with no linear layer behind it" for op in wide])
    for op in network.operations:
        for name, tensor in op.arrays().items():
            setattr(op, name, tensor.float())
    return network


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ValueError(
            f"C has no counterpart for {'; '.join(problems)}. Train a network of the layers that "
            "docs/to-a-microcontroller.md lists, or export one step by sltt.interop.to_onnx"
        )


class _Reader(fx.Interpreter):
    """Runs the network once, layer by layer, for the shapes, and notes the operations."""

    def __init__(self, model: nn.Module, graph: fx.Graph):
        self.model = model
        self.operations: list[Operation] = []
        self.values: dict[fx.Node, Value] = {}
        self.problems: list[str] = []
        self.seen: set[nn.Module] = set()
        super().__init__(fx.GraphModule(model, graph))

    def network(self, x: Tensor, steps: int) -> Network:
        """Return the operations of the network's step on a frame x [B, ...]."""
        reset(self.model)
        with torch.no_grad():
            logits = self.run(x)
        _refuse(self.problems)
        inputs = [node for node in self.values if node.op == "placeholder"]
        end: Any = next(node for node in self.values if node.op == "output")
        output = self.values[end]
        if logits.ndim != 2 or logits.shape[1] < 2 or output.size != output.shape[0]:
            raise ValueError(
                f"expected a network that gives logits [B, classes] of 2 classes or more, got {list(logits.shape)}: "
                "train it with a logit for each class"
            )
        return Network(self.operations, self.values[inputs[0]], output, steps)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op == "placeholder":
            self.values[n] = Value(_image(value.shape[1:]))
        elif n.op == "output":
            end = n.args[0]
            if not isinstance(end, fx.Node) or end not in self.values:
                raise ValueError("expected a network that gives its logits alone, got several results")
            self.values[n] = self.values[end]
        elif isinstance(value, Tensor) and n.op != "get_attr":
            try:
                self.values[n] = self._read(n)
            except ValueError as reason:
                called = n.op == "call_module"
                path = str(n.target) if called else reading.calling_module(n)
                where = "" if called else f"the operation {n.name} in "
                self.problems.append(f"{where}{describe(path, self.model.get_submodule(path))}{reason}")
                self.values[n] = Value(_image(value.shape[1:]))
        return value

    def _read(self, n: fx.Node) -> Value:
        inputs = [self.values[node] for node in n.all_input_nodes if node in self.values]
        if n.op == "call_module":
            module: Any = self.fetch_attr(str(n.target))
            return self._layer(describe(str(n.target), module), module, inputs[0], self.env[n.all_input_nodes[0]])
        args = dict(enumerate(n.args)) | n.kwargs
        numbers = [value for value in args.values() if isinstance(value, int | float)]
        if n.target in reading.FLATTEN:
            return self._layer(n.name, reading.flatten_of(n), inputs[0], self.env[n.all_input_nodes[0]])
        if n.target in _CALLS and len(inputs) == 1:
            module = _CALLS[n.target](*n.args[1:], **{k: v for k, v in n.kwargs.items() if k != "input"})  # pyright: ignore
            return self._layer(n.name, module, inputs[0], self.env[n.all_input_nodes[0]])
        if n.target in reading.ADD and len(inputs) == 2 and len(args) == 2:
            require(inputs[0].shape == inputs[1].shape, ", a sum of two shapes")
            return self._add(Sum(n.name, inputs, Value(inputs[0].shape), [None, None]))
        divides = n.target in _OVER and isinstance(n.args[0], fx.Node)
        if len(inputs) == len(numbers) == 1 and (divides or n.target in _TIMES):
            factor = 1 / numbers[0] if divides else float(numbers[0])
            return self._affine(n.name, inputs[0], torch.tensor([factor]), torch.zeros(1))
        raise ValueError("")

    def _add(self, operation: Operation) -> Value:
        self.operations.append(operation)
        return operation.output

    def _layer(self, name: str, module: nn.Module, x: Value, given: Tensor) -> Value:
        """Read a layer of PyTorch or of ours, `name` for messages, on x, which `given` is."""
        if isinstance(module, Recurrent):
            return self._recurrent(name, module, x)
        if isinstance(module, Neuron):
            return self._neuron(name, module, x)
        kind = reading.kind_of(module)
        layer: Any = module
        require(kind is not None, "")
        if kind in reading.NOTHING:
            return x
        if kind is nn.Flatten:
            require((layer.start_dim, layer.end_dim % given.ndim) == (1, given.ndim - 1), ", which keeps a dimension")
            return x
        if kind in reading.NORMS:
            require(layer.running_mean is not None, ", which has no running statistics")
            require(layer.num_features == x.shape[0], " behind flatten: put it before")
            return self._affine(name, x, *reading.gain_and_shift(layer))
        if kind in reading.WEIGHTS:
            return self._add(_weights(name, layer, x, given))
        return self._add(_pool(name, layer, kind in reading.MAXIMA, x))

    def _affine(self, name: str, x: Value, gain: Tensor, shift: Tensor) -> Value:
        gain, shift = (vector.detach().double().expand(x.shape[0]) for vector in (gain, shift))
        return self._add(Affine(name, [x], Value(x.shape), gain, shift))

    def _recurrent(self, name: str, module: Recurrent, x: Value) -> Value:
        require(not own_forward(module, Recurrent), "")
        require(isinstance(module.layer, reading.WEIGHTS), f" with a layer of type {type(module.layer).__name__}")
        before, total = Value(x.shape, spikes=True), Value(x.shape)
        frame = torch.zeros(1, *(x.shape[:1] if x.size == x.shape[0] else x.shape))
        path = name.removesuffix(" (Recurrent)")
        back = self._add(_weights(describe(f"{path}.layer", module.layer), module.layer, before, frame))
        self._add(Sum(f"{path}.sum", [x, back], total, [None, None]))
        spikes = self._neuron(name, module.neuron, total)
        for op in self.operations:
            op.inputs = [spikes if value is before else value for value in op.inputs]
        return spikes

    def _neuron(self, name: str, module: Any, x: Value) -> Value:
        require(module not in self.seen, ", which runs twice in a time step")
        require(type(module) in _NEURONS and not own_forward(module, Neuron), "")
        require(type(module.surrogate).fires in (Surrogate.fires, Above.fires), ", which fires in a way of its own")
        self.seen.add(module)
        given = module.arguments()

        def vector(value: Any) -> Tensor:
            tensor = torch.as_tensor(value).detach().double().flatten()
            require(len(tensor) in (1, x.shape[0]), " behind flatten: put it before")
            return tensor

        reset_to, decay = given.get("v_reset"), vector(given["decay"])
        rest = reset_to or 0.0
        threshold = vector(given["threshold"] if "threshold" in given else given["v_threshold"]) - rest
        if isinstance(module.surrogate, Above):
            threshold = torch.nextafter(threshold.float(), torch.tensor(torch.inf)).double()
        if (gain := 1 - decay if given.get("decay_input") else vector(given.get("gain", 1.0))).ne(1).any():
            x = self._affine(name, x, gain, torch.zeros(1))
        fire = Fire(name, [x], Value(x.shape, spikes=True), decay, threshold, vector(module.first_states()["v"]) - rest)
        fire.hard = reset_to is not None
        if isinstance(module, CubaLIF):
            fire.synapse = vector(given["synaptic_decay"])
        if isinstance(module, ALIF):
            fire.adaptation, fire.rise = vector(given["threshold_decay"]), vector(given["beta"])
        return self._add(fire)


def _image(shape: Any) -> tuple[int, int, int]:
    """Return [C], [C, L] or [C, H, W] as an image; other shapes as a vector, since only flatten takes them."""
    shape = tuple(shape)
    if len(shape) in (2, 3):
        return shape[0], (1 if len(shape) == 2 else shape[1]), shape[-1]
    return int(torch.Size(shape).numel()), 1, 1


def _weights(name: str, module: Any, x: Value, given: Tensor) -> Weights:
    weight = module.weight.detach().double()
    bias = torch.zeros(len(weight)).double() if module.bias is None else module.bias.detach().double()
    if isinstance(module, nn.Linear):
        require(given.ndim == 2, ", whose input is not [B, features]")
        return Weights(name, [x], Value((len(weight), 1, 1)), weight.view(len(weight), *x.shape), bias)
    stride, padding, dilation = pair(module.stride, 1), reading.padding_of(module), pair(module.dilation, 1)
    weight = weight.unsqueeze(2) if isinstance(module, nn.Conv1d) else weight
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, weight.shape[2:], strict=True)]
    size = _count_windows(x.shape, reach, stride, padding)
    return Weights(name, [x], Value((len(weight), *size)), weight, bias, stride, padding, module.groups, dilation)


def _count_windows(shape: Any, kernel: Any, stride: Any, padding: Any) -> tuple[int, int]:
    height, width = ((n + 2 * p - k) // s + 1 for n, k, s, p in zip(shape[1:], kernel, stride, padding, strict=True))
    return height, width


def _pool(name: str, module: Any, largest: bool, x: Value) -> Pool:
    flat = isinstance(module, nn.MaxPool1d | nn.AvgPool1d | nn.AdaptiveAvgPool1d)

    def sides(value: Any, first: int) -> tuple[int, int]:
        return pair((value,) if flat and isinstance(value, int) else value, first)

    if isinstance(module, reading.ADAPTIVE):
        out = sides(module.output_size, 1)
        out = out[0] or x.shape[1], out[1] or x.shape[2]
        kernel = x.shape[1] // out[0], x.shape[2] // out[1]
        adaptive = (kernel[0] * out[0], kernel[1] * out[1]) != x.shape[1:]
        shape = Value((x.shape[0], *out))
        return Pool(name, [x], shape, kernel, kernel, factor=1 / max(kernel[0] * kernel[1], 1), adaptive=adaptive)
    kernel, stride, padding = sides(module.kernel_size, 1), sides(module.stride, 1), sides(module.padding, 0)
    require(not module.ceil_mode, " with ceil_mode")
    value = Value((x.shape[0], *_count_windows(x.shape, kernel, stride, padding)))
    if largest:
        require(set(sides(module.dilation, 1)) == {1} and not module.return_indices, " with these options")
        return Pool(name, [x], value, kernel, stride, padding, largest=True)
    plain = getattr(module, "divisor_override", None) is None and (module.count_include_pad or padding == (0, 0))
    require(plain, " with these options")
    return Pool(name, [x], value, kernel, stride, padding, 1 / (kernel[0] * kernel[1]))


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


def _add_lists(network: Network) -> None:
    """Put a `Spread` behind spikes that others than weights and average pooling read; an `Active` before these two."""
    for op in network.neurons:
        others = [
            reader
            for reader in network.operations
            if op.output in reader.inputs and not isinstance(reader, Weights) and getattr(reader, "largest", True)
        ]
        if others or op.output is network.output:
            spread = Spread(f"{op.name} as values", [op.output], Value(op.output.shape))
            network.operations.insert(network.operations.index(op) + 1, spread)
            for reader in others:
                reader.inputs = [spread.output if value is op.output else value for value in reader.inputs]
            network.output = spread.output if op.output is network.output else network.output
    lists: dict[Value, Value] = {}
    for op in [*network.operations]:
        (x, *_) = op.inputs
        if isinstance(op, Weights | Pool) and not x.spikes and not getattr(op, "largest", False):
            if x not in lists:
                lists[x] = Value(x.shape, spikes=True)
                network.operations.insert(network.operations.index(op), Active(f"{op.name} active", [x], lists[x]))
            op.inputs = [x, lists[x]]


def _weights_of(function: Callable[[Tensor], Tensor], weight: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the weights [O, *shape] of a linear layer that does what `function` and then `weight` do."""
    zeros = torch.zeros(len(weight), *shape, dtype=weight.dtype, requires_grad=True)
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad((function(zeros) * weight).sum(), zeros)
    return gradient
