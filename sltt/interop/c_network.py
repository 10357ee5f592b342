"""One time step of a network as a list of operations, which C and the reference here both carry out.

Shapes: B samples, C channels, H×W pixels; what is no image has one pixel. C stores the channels last.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

SHIFT = 14  # a factor is an integer over 2^14
LIMIT = 2**29  # no sum of integers goes beyond it, so that none of two leaves 32 bits
PEAK = 2**15 - 1  # no state goes beyond it, in 16 bits


@dataclass(eq=False)
class Value:
    """Output of one operation, which others read: an image [C, H, W].

    Attributes:
        shape: C, H, W.
        spikes: it is 0 or 1, and C keeps it as bits.
        levels: of graded spikes, the largest; else 0.
    """

    shape: tuple[int, int, int]
    spikes: bool = False
    levels: int = 0

    @property
    def size(self) -> int:
        """C·H·W."""
        return self.shape[0] * self.shape[1] * self.shape[2]


@dataclass(eq=False)
class Operation:
    """Work of a layer in a time step.

    An operation that reads a value of a later one reads that of the step before, as recurrent layers do.

    Attributes:
        name: of the layer, for messages.
        inputs: the values that it reads.
        output: the value that it gives.
    """

    name: str
    inputs: list[Value]
    output: Value
    tensors: ClassVar[tuple[str, ...]] = ()
    counts: ClassVar[bool] = False  # the output has small integers if the inputs have

    def run(self, states: dict[str, Tensor], *inputs: Tensor) -> Tensor:
        """Return the output [B, C, H, W] of one time step; `states` are those of this operation."""
        raise NotImplementedError

    def arrays(self) -> dict[str, Tensor]:
        """Return the weights and parameters, by name."""
        return {name: getattr(self, name) for name in self.tensors if getattr(self, name) is not None}


@dataclass(eq=False)
class Weights(Operation):
    """A convolution, or a linear layer, whose kernel is the whole image: weight [O, C/groups, h, w], bias [O]."""

    weight: Tensor
    bias: Tensor
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    groups: int = 1
    dilation: tuple[int, int] = (1, 1)
    tensors = ("weight", "bias")

    @property
    def linear(self) -> bool:
        """Return whether each output reads the whole image."""
        return self.weight.shape[1:] == self.inputs[0].shape and self.padding == (0, 0)

    def run(self, states: dict[str, Tensor], *inputs: Tensor) -> Tensor:
        if self.linear:
            return F.linear(inputs[0].flatten(1), self.weight.flatten(1), self.bias)[..., None, None]
        return F.conv2d(inputs[0], self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


@dataclass(eq=False)
class Affine(Operation):
    """gain x + shift, both [C]: a BatchNorm that no layer could take, or a factor."""

    gain: Tensor
    shift: Tensor
    tensors = ("gain", "shift")

    def run(self, states: dict[str, Tensor], *inputs: Tensor) -> Tensor:
        return _channels(self.gain) * inputs[0] + _channels(self.shift)


@dataclass(eq=False)
class Fire(Operation):
    """Neurons; potentials are counted from the reset of a hard one, and inputs are scaled before.

        i = α i + x        with `synapse`; else i is x
        u = λ v + i
        s = [u ≥ θ + a]    a is 0 without `adaptation`
        v = u − r s, or u (1 − s) with `hard`; r is θ without `subtract`
        a = ρ a + β s

    Graded spikes are the sum of [u ≥ θ + k r] for k below `output.levels`; with `negative` less [−u ≥ θ].

    All parameters are [C], or [1] where channels share one. In integers, x counts 2^-shift; states have 16 bits.
    """

    decay: Tensor
    threshold: Tensor
    start: Tensor
    hard: bool = False
    synapse: Tensor | None = None
    adaptation: Tensor | None = None
    rise: Tensor | None = None
    subtract: Tensor | None = None
    negative: bool = False
    above: bool = False  # θ is the next number above what u must exceed
    integers: bool = False
    shift: int = 0
    tensors = ("decay", "threshold", "start", "synapse", "adaptation", "rise", "subtract")
    counts = True

    @property
    def states(self) -> list[str]:
        """The names of what is kept from step to step."""
        return ["v"] + ["i"] * (self.synapse is not None) + ["a"] * (self.adaptation is not None)

    def run(self, states: dict[str, Tensor], *inputs: Tensor) -> Tensor:
        (x,), none = inputs, torch.zeros_like(inputs[0])
        x = _shift_right(x, self.shift) if self.shift else x
        if self.synapse is not None:
            states["i"] = x = self._charge(self.synapse, states.get("i", none), x)
        u = self._charge(self.decay, states.get("v", none + _channels(self.start)), x)
        threshold, raised = _channels(self.threshold), states.get("a", none)
        amount = threshold if self.subtract is None else _channels(self.subtract)
        levels, v = [], u
        for _ in range(self.output.levels or 1):  # one after the other, as in C
            levels.append(v - (threshold + raised))
            v = torch.where(levels[-1] >= 0, v - amount, v)
        above = torch.stack(levels)
        below = (-u - threshold).expand(int(self.negative), *u.shape)
        s = (above >= 0).sum(0).to(u.dtype) - (below >= 0).sum(0).to(u.dtype)
        if "margin" in states:
            apart = torch.cat([above, below]).abs().transpose(0, 1).flatten(1).amin(1)
            states["margin"] = torch.minimum(states["margin"], apart)
        states["v"] = u * (1 - s) if self.hard else torch.where(s < 0, u + amount, v)
        if self.adaptation is not None and self.rise is not None:
            states["a"] = self._charge(self.adaptation, raised, _channels(self.rise) * s)
        return s

    def _charge(self, factor: Tensor, v: Tensor, x: Tensor) -> Tensor:
        if not self.integers:
            return _channels(factor) * v + x
        return (_shift_right(_channels(factor) * v, SHIFT) + x).clamp(-PEAK - 1, PEAK)


@dataclass(eq=False)
class Pool(Operation):
    """Max pooling, whose last windows may with `ceil` reach over the border; or the sum of each window times `factor`.

    With `adaptive`, averages over windows of several sizes: only a linear layer behind it can take these in.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] = (0, 0)
    factor: float = 1.0
    largest: bool = False
    ceil: bool = False
    adaptive: bool = False
    counts = True

    def run(self, states: dict[str, Tensor], *inputs: Tensor) -> Tensor:
        x = inputs[0]
        if self.largest:
            return F.max_pool2d(x, self.kernel, self.stride, self.padding, ceil_mode=self.ceil)
        return F.avg_pool2d(x, self.kernel, self.stride, self.padding, divisor_override=1) * self.factor


@dataclass(eq=False)
class Sum(Operation):
    """The sum of the inputs, each times its factor [C] if it has one; of integers, in float64, over 2^bits."""

    factors: list[Tensor | None]
    bits: int = SHIFT

    def run(self, states: dict[str, Tensor], *inputs: Tensor) -> Tensor:
        terms = [
            x if factor is None else _shift_right(_channels(factor) * x, self.bits)
            for x, factor in zip(inputs, self.factors, strict=True)
        ]
        return torch.stack(terms).sum(0)

    def arrays(self) -> dict[str, Tensor]:
        return {f"factor{i}": factor for i, factor in enumerate(self.factors) if factor is not None}


@dataclass(eq=False)
class Integrate(Sum):
    """v = x + λ v of a readout: the second input is its output in the step before, and λ its factor."""


@dataclass(eq=False)
class Join(Operation):
    """The inputs one behind the other along the channels; a vector takes all pixels of a channel before the next."""

    counts = True

    def run(self, states: dict[str, Tensor], *inputs: Tensor) -> Tensor:
        flat = self.output.shape[1:] == (1, 1)
        return torch.cat([x.flatten(1)[..., None, None] if flat else x for x in inputs], 1)


@dataclass(eq=False)
class Spread(Operation):
    """Spikes as zeros and ones, for what reads no bits."""

    counts = True

    def run(self, states: dict[str, Tensor], *inputs: Tensor) -> Tensor:
        return inputs[0]


@dataclass(eq=False)
class Keep(Operation):
    """A value that stays for all time steps of a sample; in integers, as neurons read it, over 2^shift."""

    shift: int = 0

    def run(self, states: dict[str, Tensor], *inputs: Tensor) -> Tensor:
        return _shift_right(inputs[0], self.shift) if self.shift else inputs[0]


@dataclass(eq=False)
class Taps(Operation):
    """The inputs of some time steps ago, joined along the channels; they are kept in a ring of the last `depth`."""

    taps: tuple[int, ...]
    depth: int
    counts = True

    def run(self, states: dict[str, Tensor], *inputs: Tensor) -> Tensor:
        (x,) = inputs
        frames = torch.cat([states.get("past", x.new_zeros(self.depth, *x.shape)), x[None]])
        states["past"] = frames[1:]
        return torch.cat([frames[self.depth - n] for n in self.taps], 1)


@dataclass(eq=False)
class Network:
    """One time step: operations in their order.

    Attributes:
        operations: those of all layers.
        input: what a sample gives.
        output: the logits.
        steps: T.
        shape: of the logits of a sample, as PyTorch has them.
        input_scale: the number that 1 stands for in an input of integers.
        logit_scale: the same of logits.
        integers: weights are int8, sums int32, and states int16.
        bounds: no integer of a value is larger.
        once: how many operations at the begin run once for a sample, whose input is static; 0 for sequences.
    """

    operations: list[Operation]
    input: Value
    output: Value
    steps: int
    shape: tuple[int, ...]
    input_scale: float = 1.0
    logit_scale: float = 1.0
    integers: bool = False
    bounds: dict[Value, float] = field(default_factory=dict)
    once: int = 0

    @property
    def neurons(self) -> list[Fire]:
        """The layers of neurons."""
        return [op for op in self.operations if isinstance(op, Fire)]

    def readers(self, value: Value) -> int:
        """Count the readers of a value, the caller of the network among them."""
        return sum(op.inputs.count(value) for op in self.operations) + (value is self.output)

    def keep(self, compute: bool) -> "Network":
        """Return the network of a static input, which it keeps; or, with `compute`, what it computes before states."""
        operations, bounds, computed = [copy.copy(op) for op in self.operations], dict(self.bounds), {self.input}
        first: list[Operation] = []
        for op in operations if compute else ():
            if computed.issuperset(op.inputs) and not isinstance(op, Fire | Taps) and op.output is not self.output:
                first.append(op)
                computed.add(op.output)
        rest, begin = [op for op in operations if op not in first], [*first]
        for value, maker in [(self.input, None), *((op.output, op) for op in first)]:
            if not (readers := [op for op in rest if value in op.inputs]):
                continue
            shifts = {op.shift if isinstance(op, Fire) else 0 for op in readers}
            name = f"the output of {maker.name}" if maker else "the input"
            keep = Keep(name, [value], Value(value.shape), shifts.pop() if len(shifts) == 1 else 0)
            bounds[keep.output] = bounds.get(value, 0.0) / 2**keep.shift
            for op in readers:
                op.inputs = [keep.output if reader_input is value else reader_input for reader_input in op.inputs]
                if isinstance(op, Fire):
                    op.shift -= keep.shift
            begin.insert(begin.index(maker) + 1 if maker else 0, keep)
        return replace(self, operations=[*begin, *rest], bounds=bounds, once=len(begin))

    def to_integers(self, x: Tensor) -> Tensor:
        """Return an input as integers in ±127, in units of `input_scale`, as NAME_quantise does."""
        units = x.float() * torch.tensor(1 / self.input_scale)
        return ((units.abs() + 0.5).floor() * units.sign()).clamp(-127, 127).double()

    @torch.no_grad()
    def unroll(self, x: Tensor, margin: Tensor | None = None) -> Tensor:
        """Run x by plain operations of PyTorch, and return the logits [T, B, classes, ...].

        x is as `to_c` took it: sequences [T, B, ...], or a static input [B, ...]. Integers are computed in float64,
        which holds each of them exactly. `margin` [B] takes how near any potential came to its threshold.
        """
        x = x.expand(self.steps, *x.shape) if self.once else x
        start = {} if margin is None else {"margin": torch.full_like(margin, torch.inf)}
        states: dict[Operation, dict[str, Tensor]] = {op: dict(start) for op in self.operations}
        logits = torch.stack([values[self.output].reshape(-1, *self.shape) for values in self.run(x, states=states)])
        if margin is not None:
            margin.copy_(torch.stack([states[op]["margin"] for op in self.operations]).amin(0))
        return logits

    def run(
        self,
        x: Tensor,
        change: Callable[[Operation, Tensor], Tensor] = lambda op, output: output,
        states: dict[Operation, dict[str, Tensor]] | None = None,
    ) -> Iterator[dict[Value, Tensor]]:
        """Yield the values of each time step; `change` returns what others read of an operation's output."""
        x = self.to_integers(x) if self.integers else x.float()
        values: dict[Value, Tensor] = {}
        states = states or {op: {} for op in self.operations}
        for frame in x:
            values[self.input] = frame.reshape(len(frame), *self.input.shape)
            for op in self.operations:
                before = [values.get(v, x.new_zeros(x.shape[1], *v.shape)) for v in op.inputs]
                values[op.output] = change(op, op.run(states[op], *before))
            yield values


def _channels(vector: Tensor) -> Tensor:
    return vector.view(-1, 1, 1)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Return x / 2^bits, rounded to the nearest integer, as an arithmetic shift does it; x of a network in floats."""
    return ((x + 2 ** (bits - 1)) / 2**bits).floor() if x.dtype is torch.float64 else x
