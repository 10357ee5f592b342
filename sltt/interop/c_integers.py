"""The operations of a network in integers: weights of 8 bits, sums of 32, states of 16.

Weights have a scale for each output channel. Each value has a unit for each channel: the number that 1 stands for.
Neurons need no multiplication for it, since their thresholds are in the same unit; neither does BatchNorm, whose gain
becomes a part of the unit. Average pooling sums, and the next layer takes the factor into its weights. A sum of two
paths brings them to one unit. Inputs and spikes are multiplied where a BatchNorm or a neuron reads them, which would
round shifts and potentials to whole ones.

States have 16 bits. Where thresholds are large, a layer of neurons shifts its currents, so that most thresholds are at
most 2^8 to 2^9 and states reach 64 times as far. Channels with a larger one than most have a larger unit.
"""

import copy
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sltt.interop import c_network
from sltt.interop.c_network import LIMIT, PEAK, SHIFT, Affine, Fire, Join, Network, Operation, Pool, Sum, Value, Weights

_FINE = 2**26  # a bias or a shift has no more units than this
_GAIN = 64  # units of an input or a spike behind which there are no weights
_FIRES = PEAK // 64  # units of most thresholds, at most
_Units = dict[Value, Tensor]
_Bounds = dict[Value, Tensor]  # of the channels
_Threshold = Tensor | None


def in_integers(network: Network, x: Tensor) -> Network:
    """Return a network in integers that does nearly the same; the input of `x` [T, B, ...] sets that of its scale.

    Raises ValueError for a layer whose sums would leave 32 bits, and for an input of zeros.
    """
    if not x.any():
        raise ValueError("the example sets the scale of the input in int8, and is zero everywhere: give real samples")
    for gain, narrow in ((_GAIN, False), (8, False), (_GAIN, True)):
        with suppress(ValueError):  # with fewer units, sums may stay in 32 bits
            return _in_integers(network, x, gain, narrow)
    return _in_integers(network, x, 1, narrow=True)


def _in_integers(network: Network, x: Tensor, gain: int, narrow: bool) -> Network:
    rounded = copy.copy(network)
    rounded.operations, rounded.integers = [], True
    counts = bool((x == x.round()).all()) and x.abs().max() <= 127
    rounded.input_scale = 1.0 if counts else x.abs().max().item() / 127
    units = {network.input: torch.full(network.input.shape[:1], rounded.input_scale).double()}
    bounds = {network.input: torch.full(network.input.shape[:1], 127.0).double()}
    counted = {network.input}  # values that count whole inputs or spikes
    thresholds: dict[Value, Tensor] = {}  # of the neurons that read a value
    for op in reversed(network.operations):
        if isinstance(op, Fire):
            thresholds[op.inputs[0]] = op.threshold.double()
        elif isinstance(op, Pool) and op.output in thresholds:
            thresholds[op.inputs[0]] = thresholds[op.output] / op.factor

    def add(op: Operation, gain: int = 1, last: int = 0) -> None:
        last = network.steps if op.output is rounded.output else last
        threshold = thresholds.get(op.output)
        rule = _RULES.get(type(op), _keep)
        rule = partial(_affine, gain=gain) if isinstance(op, Affine) else rule
        if not isinstance(op, Affine | Weights) and counted.issuperset(op.inputs):
            counted.add(op.output)
        units[op.output] = rule(op, units, bounds, threshold, last)
        if (reach := bounds[op.output].max()) >= LIMIT:
            raise ValueError(f"{op.name} would leave 32 bits, with sums of up to {reach:.3g}: use weights='float32'")
        rounded.operations.append(op)

    joined = {op.output for op in network.operations if isinstance(op, Join) and not op.output.spikes}
    for op in map(copy.copy, network.operations):
        for value in op.inputs:
            if value.spikes or value.levels:
                units[value] = torch.ones(value.shape[0]).double()
                bounds[value] = units[value] * (value.levels or 1)
                counted.add(value)
        for name, tensor in op.arrays().items():
            setattr(op, name, tensor.double())
        op.inputs = [*op.inputs]
        name, joins = f"input of {op.name}", op.output in joined
        least = min(units[value].median() for value in op.inputs) if joins and gain > 1 else None
        counted |= {op.output} if joins and counted.intersection(op.inputs) else set()
        for i, value in enumerate([*op.inputs]):
            threshold, times = getattr(op, "threshold", None), 1
            if least is not None:  # weights behind it have one scale for all parts
                times = int((units[value].median() / least).round())
            elif value in counted and isinstance(op, Fire | c_network.Integrate):
                times = gain
            if times > 1:
                ones, op.inputs[i] = torch.ones_like(units[value]), Value(value.shape)
                thresholds |= {} if threshold is None or value in joined else {op.inputs[i]: threshold}
                add(Affine(name, [value], op.inputs[i], ones, 0 * ones), times)
            if threshold is not None and value in joined:  # its channels have units of their own
                before, op.inputs[i] = op.inputs[i], Value(value.shape)
                thresholds[op.inputs[i]] = threshold
                add(Sum(name, [before], op.inputs[i], [None]))
        most = 127 * op.weight[0].numel() if isinstance(op, Weights) else 0
        if narrow and bounds[op.inputs[0]].max() * most >= LIMIT:
            before, op.inputs = op.inputs, [Value(op.inputs[0].shape)]
            add(Sum(name, before, op.inputs[0], [None]), last=4 * most)
        add(op, gain if op.inputs[0] in counted else 1)
    unit, reach = units[rounded.output], bounds[rounded.output].max()
    if unit.ne(unit[0]).any() or reach * network.steps >= 2**31:  # logits are compared with each other, and summed
        last = Sum("logits", [rounded.output], Value(rounded.output.shape), [None])
        rounded.output = last.output
        add(last)
    rounded.bounds = {value: bound.max().item() for value, bound in bounds.items()}
    rounded.logit_scale = units[rounded.output][0].item()
    return rounded


def _keep(op: Operation, units: _Units, bounds: _Bounds, threshold: _Threshold, last: int) -> Tensor:
    times = op.output.shape[0] // op.inputs[0].shape[0]
    bounds[op.output] = bounds[op.inputs[0]].repeat(times)
    return units[op.inputs[0]].repeat(times)


def _join(op: Join, units: _Units, bounds: _Bounds, threshold: _Threshold, last: int) -> Tensor:
    times = {x: x.size // x.shape[0] if op.output.shape[1:] == (1, 1) else 1 for x in op.inputs}
    bounds[op.output] = torch.cat([bounds[x].repeat_interleave(times[x]) for x in op.inputs])
    return torch.cat([units[x].repeat_interleave(times[x]) for x in op.inputs])


def _shift(threshold: Tensor) -> int:
    """Return by how many bits to shift currents, so that half of the thresholds have at most 2^9 units."""
    return max(0, int((threshold.median().clamp(min=1) / _FIRES).log2().ceil()))


def _room(unit: Tensor, threshold: _Threshold) -> Tensor:
    """Return the units of currents, larger for channels whose threshold would be far above those of most."""
    if threshold is None:
        return unit
    return torch.maximum(unit, threshold / (16 * _FIRES) / 2 ** _shift(threshold / unit))


def _weights(op: Any, units: _Units, bounds: _Bounds, threshold: _Threshold, last: int) -> Tensor:
    outputs = len(op.weight)
    unit, bound = (
        y[op.inputs[0]].view(op.groups, 1, -1).expand(-1, outputs // op.groups, -1).reshape(outputs, -1, 1, 1)
        for y in (units, bounds)
    )
    weight = op.weight * unit
    peak = weight.abs().amax((1, 2, 3))
    peak = torch.maximum((peak.amax() if last else peak).expand(outputs) / 127, op.bias.abs().amax() / _FINE)
    unit = _room(torch.where(peak > 0, peak, 1.0), threshold)
    op.weight, op.bias = (weight / unit.view(-1, 1, 1, 1)).round(), (op.bias / unit).round()
    bounds[op.output] = (op.weight.abs() * bound).sum((1, 2, 3)) + op.bias.abs()
    return unit


def _affine(op: Any, units: _Units, bounds: _Bounds, threshold: _Threshold, last: int, gain: int = 1) -> Tensor:
    value = op.gain * units[op.inputs[0]]
    unit = value.abs() / gain
    if threshold is not None and gain > 1:  # finer where a spike is many thresholds
        unit = torch.minimum(unit, torch.maximum(threshold / gain, unit / 8))
    large = (bounds[op.inputs[0]] * value.abs() < op.shift.abs() / 256) | (gain > 1)
    fine = torch.where(large & (threshold is None), 2**13, _FINE)  # a much smaller unit would take weights to 0
    unit = torch.maximum(unit, op.shift.abs() / fine)
    unit = _room(torch.where(unit > 0, unit, 1.0), threshold)
    op.gain, op.shift = (value / unit).round(), (op.shift / unit).round()
    bounds[op.output] = bounds[op.inputs[0]] * op.gain.abs() + op.shift.abs()
    return unit


def _pool(op: Any, units: _Units, bounds: _Bounds, threshold: _Threshold, last: int) -> Tensor:
    x = op.inputs[0]
    factor, op.factor = (1.0, 1.0) if op.largest else (op.factor, 1.0)
    bounds[op.output] = bounds[x] * (1 if op.largest else op.kernel[0] * op.kernel[1])
    return units[x] * factor


def _sum(op: Any, units: _Units, bounds: _Bounds, threshold: _Threshold, last: int) -> Tensor:
    input_units, input_bounds = (torch.stack([y[x] for x in op.inputs]) for y in (units, bounds))
    most = 2**30 / max(last, 4)  # of a sum, so that those of all time steps fit in 32 bits
    fits = input_bounds.sum(0).max() < 2 * most
    same = input_units.eq(input_units[0]).all() and _room(input_units[0], threshold).eq(input_units[0]).all()
    if same and not (last and (input_units.ne(input_units[0, 0]).any() or not fits)):
        bounds[op.output] = input_bounds.sum(0)
        return input_units[0]
    reach = (input_units * input_bounds).sum(0)  # the largest sum
    unit = torch.stack([input_units.amin(0), input_units.amax(0) / 2**SHIFT, reach / most]).amax(0)
    unit = _room(unit, threshold)
    if last:
        unit = torch.stack([unit.amin(), input_units.amax() / 2**SHIFT, reach.amax() / most]).amax().expand(len(unit))
    bounds[op.output] = reach / unit + len(op.inputs)
    op.bits = int(min(30 - (input_units / unit).max().log2(), 51 - bounds[op.output].max().log2(), 40))
    op.factors = [(units[x] / unit * 2**op.bits).round() for x in op.inputs]
    return unit


def _fire(op: Any, units: _Units, bounds: _Bounds, threshold: _Threshold, last: int) -> Tensor:
    unit = units[op.inputs[0]]
    op.integers = True
    op.shift = _shift(op.threshold / unit)
    unit = unit * 2**op.shift
    op.threshold = getattr(op.threshold / unit, "ceil" if op.above else "round")().clamp(1, PEAK)
    op.start = (op.start / unit).round().clamp(-PEAK, PEAK)
    for name in {"decay", "synapse", "adaptation"} & op.arrays().keys():
        setattr(op, name, (getattr(op, name) * 2**SHIFT).round())
    for name in {"rise", "subtract"} & op.arrays().keys():
        setattr(op, name, (getattr(op, name) / unit).round().clamp(0, PEAK))
    bounds[op.output] = torch.full_like(unit, op.output.levels or 1)
    return torch.ones_like(unit)


def _integrate(op: Any, units: _Units, bounds: _Bounds, threshold: _Threshold, last: int) -> Tensor:
    decay = (op.factors[1].double() * 2**SHIFT).round().clamp(max=2**SHIFT - 1)
    op.factors = [None, decay]
    bounds[op.output] = (bounds[op.inputs[0]] + 1) / (1 - decay / 2**SHIFT)
    return units[op.inputs[0]]


_RULES = {Weights: _weights, Pool: _pool, Sum: _sum, Fire: _fire, c_network.Integrate: _integrate, Join: _join}
