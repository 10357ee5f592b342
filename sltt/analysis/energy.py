"""Count what the inference of a sample takes, and estimate its energy beside ANNs of 32 bits and of matched bits."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sltt import kernels
from sltt._torch import tree_leaves, tree_map_only
from sltt.rules import unroll
from sltt.sequence.hooks import keep_hooks
from sltt.sequence.layout import spiking_layers
from sltt.sequence.modes import evaluation_mode
from sltt.sequence.padding import check_lengths, lengths_of, real_steps, target_of
from sltt.sequence.spikes import observe_spikes
from sltt.sequence.state import state_tensors

# Picojoules of a multiply-accumulate, an accumulate and a neuron's update (a product, a sum, a comparison); bytes of a
# weight. 45 nm: M. Horowitz, "Computing's energy problem", ISSCC 2014. With 8 bits, sums and neurons have 32.
FLOAT32 = 3.7 + 0.9, 0.9, 3.7 + 0.9 + 0.9, 4
INT8 = 0.2 + 0.1, 0.1, 3.1 + 0.1 + 0.1, 1
SRAM, DRAM = 2.5, 160.0  # a byte: in a memory of 32 KB, and outside of the chip


@dataclass
class LayerOperations:
    """A convolution or linear layer in the inference of one sample, or the matrix products in another module.

    NeuroBench's: `dense`, all connections in all time steps, without those to the zeros of a padding. Of these, those
    with nonzero input and weight are `effective_acs` in steps whose input is 0 and ±1, else `effective_macs`. Products
    of two tensors have none.
    Those of the energy: `macs` of a layer that reads data, in one step with `sltt.once`; `acs` of others, one for each
    spike or event and connection; `ann_macs` of an ANN, in one pass for a static input, else in each step. `spiking`
    layers read what comes from neurons.
    """

    name: str
    dense: float = 0.0
    effective_macs: float = 0.0
    effective_acs: float = 0.0
    macs: float = 0.0
    acs: float = 0.0
    ann_macs: float = 0.0
    spiking: bool = False

    synaptic_operations = property(lambda self: self.macs + self.acs)
    picojoules = property(lambda self: self.macs * FLOAT32[0] + self.acs * FLOAT32[1])


@dataclass
class Energy:
    """Cost of the inference of one sample, as the mean over a batch.

    `steps` is T without padding. An ANN makes 1 of `passes` for a static input, else T. Neurons have `updates`,
    `active` (nonzero) outputs, and `spikes`: one of size k counts k. `zeros` of the `weights` are zero. `footprint` has
    parameters and buffers, in bytes.
    """

    layers: list[LayerOperations]
    steps: float
    passes: float
    updates: float
    spikes: float
    active: float
    weights: int
    zeros: int
    footprint: int

    rate = property(lambda self: self.spikes / max(self.updates, 1))

    def total(self, name: str) -> float:
        """Return the sum of a count over layers."""
        return sum(getattr(layer, name) for layer in self.layers)

    def picojoules(self) -> dict[str, tuple[float, float, float, float]]:
        """Return E_ops, E_neurons, E_memory on chip and E_memory from DRAM of docs/energy.md, by the network."""
        macs, acs, ann, bits = *map(self.total, ("macs", "acs", "ann_macs")), math.ceil(math.log2(self.steps + 1))
        outputs, energies = self.updates / self.steps * self.passes, {}
        matched = f"w8a{bits}", 0.2 * bits / 8 + 0.1, bits / 8
        networks = ("32 bits", FLOAT32, "32 bits", FLOAT32[0], 4), ("8 bits", INT8, *matched)
        for snn, (mac, ac, update, weight), name, ann_mac, activation in networks:
            held = (2 * (macs + acs) + 12 * self.updates + 4 * self.spikes) * SRAM
            memory = held + (macs + acs) * weight * SRAM, held + self.weights * weight * self.steps * DRAM
            energies[f"SNN {snn}"] = macs * mac + acs * ac, self.updates * update + self.spikes * ac, *memory
            held = (ann / 2 + outputs) * activation * SRAM
            memory = held + ann / 2 * weight * SRAM, held + self.weights * weight * self.passes * DRAM
            energies[f"ANN {name}"] = ann * ann_mac, 0.0, *memory
        return energies

    def tables(self) -> dict[str, list[dict[str, Any]]]:
        """Return the rows of two tables: counts and energies of networks, and ratios of their energies.

        The ratio to the matched ANN is 1 at the firing rate of the last column: None where a silent SNN takes more.
        """
        counts = "dense", "ann_macs", "effective_macs", "effective_acs", "macs", "acs"
        dense, ann, effective_macs, effective_acs, macs, acs = map(self.total, counts)
        small, zeros, joules = self.footprint - 3 * self.weights, self.zeros / max(self.weights, 1), self.picojoules()
        parts = "E_ops, nJ", "E_neurons, nJ", "E_memory on chip, nJ", "E_memory from DRAM, nJ"
        rows = [
            ("footprint, bytes", self.footprint, self.footprint, small, small),
            ("connection sparsity", *[zeros] * 4),
            ("activation sparsity", *[1 - self.active / max(self.updates, 1), None] * 2),
            ("firing rate", *[self.rate, None] * 2),
            ("Dense", *[dense, ann] * 2),
            ("Eff_MACs", *[effective_macs, None] * 2),
            ("Eff_ACs", *[effective_acs, 0] * 2),
            ("MACs in E_ops", *[macs, ann] * 2),
            ("ACs in E_ops", *[acs, 0] * 2),
            ("neuron updates", *[self.updates, 0] * 2),
            *((part, *(pj / 1e3 for pj in row)) for part, *row in zip(parts, *joules.values(), strict=True)),
        ]
        energy = [dict(zip(("of one sample", *joules), row, strict=True)) for row in rows]
        silent = replace(self, spikes=0, layers=[replace(o, acs=0) if o.spiking else o for o in self.layers])
        parts = *joules.values(), silent.picojoules()["SNN 8 bits"]
        totals = [(ops, ops + update, ops + update + chip, ops + update + dram) for ops, update, chip, dram in parts]
        ratios = []
        for i, name in enumerate(("operations", "+ neurons", "+ memory on chip", "+ memory from DRAM")):
            snn, ann, small, matched, low = (total[i] for total in totals)
            even = self.rate * (matched - low) / (small - low) if small > low and matched > low else None
            ratio = {"ANN / SNN": name, "32 bits": ann / (snn or 1), "matched bits": matched / (small or 1)}
            ratios.append({**ratio, "equal at a firing rate of": even})
        return {"energy": energy, "ratios": ratios}


def as_text(value: float | str | None) -> str:
    """Return what stands in a cell of these tables."""
    if isinstance(value, str):
        return value
    return "–" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def measure_energy(model: nn.Module, x: Tensor, *, steps: int | None = None, lengths: Any = None) -> Energy:
    """Measure on a batch what the inference of one sample takes.

        measure_energy(model, x).tables()

    The values of a layer's input in a time step, and where they come from, say what it reads. Spikes of neurons keep
    their size through pooling, sums and reshapes: an average over 4 spikes counts as 4, its factor is taken into the
    weights. Other whole numbers that are mostly zero are events, and so are values of one size, unless that costs more
    than data. Each costs an accumulate for each unit and connection. All else is data, and costs a multiply-accumulate
    for each connection.
    Weights that are zero cost as others do. Products of two tensors, as in attention, cost an accumulate where both
    factors are not zero and one is spikes; PyTorch's own attention with softmax does not count.

    Args:
        model: maps one time step to logits; in the mode that it is in, so call `model.eval()` before.
        x: sequence [T, B, ...], or with `steps` a static input [B, ...].
        steps: T for a static input.
        lengths: of the samples, where sequences are padded at the end; the padding does not count.
    """
    return _Counter(model, x, steps, lengths).run()[0]


def neurobench(model: nn.Module, data: Iterable[tuple[Tensor, Any]], *, steps: int | None = None) -> dict[str, Any]:
    """Return the metrics of NeuroBench, named and defined as in its harness; neurons are its activation layers.

        neurobench(model, [(x, y)])["SynapticOperations"]["Effective_ACs"]

    The network is measured in evaluation mode, on batches (x, target) as of a rule; padding does not count. `steps` is
    T for static inputs. ClassificationAccuracy is there where each target is a class.

    Source: Yik et al., Nature Communications 2025 (neurobench.readthedocs.io).
    """
    samples, sums = 0, defaultdict(float)
    energy: Any = None
    for x, y in data:
        with evaluation_mode(model):
            counter = _Counter(model, x, steps, lengths_of(y))
            energy, logits = counter.run()
        size, y = logits.shape[1], target_of(y)
        samples += size
        sums["ActivationSparsity"] += size * (1 - energy.active / max(energy.updates, 1))
        sums["MembraneUpdates"] += counter.changed
        if y.shape == (size,) and not y.is_floating_point():
            sums["ClassificationAccuracy"] += int((logits.mean(0).argmax(1) == y).sum())
        for name in ("Effective_MACs", "Effective_ACs", "Dense"):
            sums[name] += size * energy.total(name.lower())
    means = {name: total / samples for name, total in sums.items()}
    operations = {name: means.pop(name) for name in ("Effective_MACs", "Effective_ACs", "Dense")}
    return {
        "Footprint": energy.footprint,
        "ParameterCount": sum(p.numel() for p in model.parameters()),
        "ConnectionSparsity": round(energy.zeros / max(energy.weights, 1), 4),
        **means,
        "SynapticOperations": operations,
    }


LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class _Counter(TorchFunctionMode):
    """Runs a batch step by step, and counts: hooks show layers, neurons and modules, the mode all functions.

    What is made of spikes alone has an attribute `counts`: how many spikes are in each of its values.
    """

    def __init__(self, model: nn.Module, x: Tensor, steps: int | None, lengths: Sequence[int] | None):
        super().__init__()
        self.model, self.x, self.static = model, x, steps
        self.length, self.batch = (len(x), x.shape[1]) if steps is None else (steps, len(x))
        self.lengths = [self.length] * self.batch if lengths is None else lengths
        check_lengths(self.lengths, self.length, self.batch)
        self.real = None if lengths is None else real_steps(lengths, self.length, x)
        self.step, self._inside = -1, []  # names of the modules that are running
        self.layers: dict[str, LayerOperations] = {}
        self.last: dict[str, int] = {}  # the step in which each ran last
        self.updates = self.spikes = self.active = self.changed = 0.0  # of all samples
        self.neurons = spiking_layers(model)
        self._fans: dict[Any, list[Tensor]] = {}
        self._before: dict[str, list[Tensor]] = {}  # membrane potentials

    @torch.no_grad()
    def run(self) -> tuple[Energy, Tensor]:
        """Return the energy and the logits [T, B, C]."""
        modules = dict(self.model.named_modules())
        hooks = [m.register_forward_pre_hook(partial(self._enter, name)) for name, m in modules.items()]
        hooks += [m.register_forward_hook(self._leave, always_call=True) for m in modules.values()]
        spiking = observe_spikes(self.neurons, self._fire)
        with keep_hooks(*hooks), spiking, kernels.using(bits=False), self:  # no kernel stands for what the mode sees
            logits = unroll(self.model, self.x, steps=self.static, fold=1)
        for name, layer in self.layers.items():
            if not self.static or self.last[name]:
                layer.ann_macs /= self.static or 1
            else:  # it ran `once`; NeuroBench calls it in each step
                layer.dense, layer.effective_macs = layer.dense * self.static, layer.effective_macs * self.static
                layer.effective_acs *= self.static
        steps, weights = sum(self.lengths) / self.batch, [m.weight for m in modules.values() if isinstance(m, LAYERS)]
        updates, spikes, active = (count / self.batch for count in (self.updates, self.spikes, self.active))
        size, zeros = sum(w.numel() for w in weights), sum(int((w == 0).sum()) for w in weights)
        footprint = sum(tensor.nbytes for tensor in [*self.model.parameters(), *self.model.buffers()])
        passes, layers = 1 if self.static else steps, [*self.layers.values()]
        return Energy(layers, steps, passes, updates, spikes, active, size, zeros, footprint), logits

    def _enter(self, name: str, module: nn.Module, args: Any) -> None:
        self._inside.append(name)
        self.step += module is self.model
        if self.step and name in self.neurons:  # one of Norse has its state elsewhere
            self._before[name] = [state.clone() for state in state_tensors(module)[:1]]

    def _leave(self, *call: Any) -> None:
        self._inside.pop()

    def _fire(self, name: str, spikes: Any) -> None:
        """Count the spikes of neurons, and mark them."""
        unit = 1.0 if (spikes == spikes.round()).all() else float(spikes.abs().max())  # the threshold, in a twin
        spikes.counts = spikes.float() / unit
        real, before = self._real(spikes), self._before.get(name)
        self.updates += real.numel()
        self.active += int(real.count_nonzero())
        self.spikes += float(self._real(spikes.counts).abs().sum(dtype=torch.float64))
        changes = before[0] != state_tensors(self.neurons[name])[0] if before else spikes == spikes
        self.changed += int(self._real(changes).sum())

    def _layer(self, func: Any, x: Tensor, weight: Tensor, *settings: Any) -> None:
        """Count the operations of a convolution or linear layer."""
        if (key := (self._inside[-1], x.shape[1:], weight.shape)) not in self._fans:
            weights = torch.ones_like(weight), weight != 0
            self._fans[key] = [_fan_out(func, x, w.double(), *settings[1:]) for w in weights]
        (fan, nonzero), units = self._fans[key], getattr(x, "counts", None)
        x, units = self._real(x), None if units is None else self._real(units)
        dense, effective = len(x) * float(fan.sum()), float(((x != 0) * nonzero).sum())
        counts = _count_spikes(x, units)
        acs = None if counts is None else float((counts * fan).sum())
        if units is None and acs and acs * FLOAT32[1] > dense * FLOAT32[0]:  # pixels of 0 … 255, say, are no events
            acs = None
        charged = {"macs": dense} if acs is None else {"acs": acs}
        charged["effective_acs" if ((x == 0) | (x.abs() == 1)).all() else "effective_macs"] = effective
        self._add(units is not None, dense=dense, ann_macs=dense, **charged)

    def _add(self, spiking: bool, **counts: float) -> None:
        name = self._inside[-1]
        layer = self.layers.setdefault(name, LayerOperations(name))
        self.last[name] = self.step
        layer.spiking |= spiking
        for key, count in counts.items():
            setattr(layer, key, getattr(layer, key) + count / self.batch)

    def _real(self, x: Tensor) -> Tensor:
        """Return the rows of the samples whose sequences have not ended, in a tensor with one or more a sample."""
        if self.real is None or len(x) % self.batch:
            return x
        return x[self.real[self.step].repeat_interleave(len(x) // self.batch)]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not self._inside:
            return out
        if func in _LAYERS:
            named = {name: value for name, value in kwargs.items() if name not in ("input", "weight", "bias")}
            inputs = *args, *(kwargs[name] for name in ("input", "weight") if name in kwargs)
            self._layer(partial(func, **named), *inputs)
        elif func in _MATRIX_PRODUCTS:
            a, b = (*args, *(kwargs[name] for name in ("input", "other", "mat2") if name in kwargs))
            self._product(torch.matmul, a, b)
        elif func is torch.einsum and len(args) == 3 and _sums(args[0]):
            self._product(partial(torch.einsum, args[0]), *args[1:])
        else:
            _pass_counts(func, args, kwargs, out)
        return out

    def _product(self, product: Callable[..., Tensor], a: Tensor, b: Tensor) -> None:
        a, b = self._real(a), self._real(b)
        dense, pairs = (float(product(f(a).double(), f(b).double()).sum()) for f in (torch.ones_like, Tensor.bool))
        spiking = _has_one_value(a) or _has_one_value(b)
        self._add(spiking, ann_macs=dense, **({"acs": pairs} if spiking else {"macs": dense}))


def _fan_out(func: Any, x: Tensor, weight: Tensor, *settings: Any) -> Tensor:
    """Return the sum of the weights that each input of a sample reaches, [1, ...]: connections, where weights are 1."""
    with torch.enable_grad():
        z = torch.zeros(1, *x.shape[1:], dtype=weight.dtype, device=x.device, requires_grad=True)
        return torch.autograd.grad(func(z, weight, None, *settings).sum(), z)[0]


def _count_spikes(x: Tensor, units: Tensor | None) -> Tensor | None:
    """Return the spikes or events in each input of a layer; None where it reads data."""
    counts, one = (x if units is None else units).abs().double(), _has_one_value(x.abs())  # the weights may hold it
    whole = bool(((counts - counts.round()).abs() < 1e-3).all())
    if whole and (units is not None or (not one and x.count_nonzero() < x.numel() / 2)):
        return counts.round()
    return (x != 0).double() if one else None


def _pass_counts(func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Do with the counts of spikes what a function of spikes alone does with these; an average becomes a sum."""
    tensors: list[Any] = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)]
    outputs: list[Any] = [t for t in (out if isinstance(out, list | tuple) else [out]) if isinstance(t, Tensor)]
    if not (spikes := tensors and all(hasattr(tensor, "counts") for tensor in tensors)):
        for tensor in outputs:
            vars(tensor).pop("counts", None)  # it was changed in place
    if not spikes or not outputs or "dropout" in (name := func.__name__):
        return
    args, kwargs = tree_map_only(Tensor, lambda tensor: vars(tensor)["counts"], (args, kwargs))
    of_outputs, times = func(*args, **kwargs), 1
    if name.startswith("avg_pool"):
        size = torch.tensor(args[1] if len(args) > 1 else kwargs["kernel_size"]).expand(int(name[-2]))
        times = (args[6] if len(args) > 6 else kwargs.get("divisor_override")) or int(size.prod())
    elif name == "mean" or name.startswith("adaptive_avg_pool"):
        times = tensors[0].numel() / max(outputs[0].numel(), 1)
    of_outputs = of_outputs if isinstance(of_outputs, list | tuple) else [of_outputs]
    for tensor, counts in zip(outputs, of_outputs, strict=True):
        tensor.counts = counts * times


def _sums(equation: Any) -> bool:
    """Return whether an equation of einsum sums over an index that both tensors have."""
    terms, _, result = str(equation).replace(" ", "").partition("->")
    first, _, second = terms.partition(",")
    return bool((set(first) & set(second)) - set(result) - {"."})


def _has_one_value(x: Tensor) -> bool:
    """Return whether all values are 0 or one other, as of spikes."""
    values = x[x != 0]
    return bool((values == values[:1]).all())


_LAYERS = {F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d}
_MATRIX_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm}
