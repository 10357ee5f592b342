"""Count what the inference of a sample takes, and estimate its energy beside ANNs of 32 bits and of matched bits."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sltt import kernels
from sltt._torch import DispatchMode, StorageWeakRef, tree_leaves, tree_map_only
from sltt.losses import predict_from
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
    their size through pooling, sums and reshapes: an average over 4 spikes counts as 4, and weights take factors. Other
    whole numbers that are mostly zero are events, and so are values of one size, unless that costs more than data. Each
    costs an accumulate for each unit and connection. All else is data, and costs a multiply-accumulate for each
    connection. Weights that are zero cost as others do. Products of two tensors, as in attention, cost an accumulate
    where both factors are not zero and one is spikes.

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
        size, prediction, y = logits.shape[1], predict_from("mean", logits, lengths_of(y)), target_of(y)
        samples += size
        sums["ActivationSparsity"] += size * (1 - energy.active / max(energy.updates, 1))
        sums["MembraneUpdates"] += counter.changed
        if y.shape == (size,) and not y.is_floating_point():
            sums["ClassificationAccuracy"] += int((prediction.argmax(1) == y).sum())
        for name in ("Effective_MACs", "Effective_ACs", "Dense"):
            sums[name] += size * energy.total(name.lower())
    means = {name: total / samples for name, total in sums.items()}
    operations = {name: means.pop(name) for name in ("Effective_MACs", "Effective_ACs", "Dense")}
    return {
        "Footprint": sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]),
        "ParameterCount": sum(p.numel() for p in model.parameters()),
        "ConnectionSparsity": round(energy.zeros / max(energy.weights, 1), 4),
        **means,
        "SynapticOperations": operations,
    }


LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
aten = torch.ops.aten
_PRODUCTS = {aten.mm: 0, aten.bmm: 0, aten.mv: 0, aten.dot: 0, aten.addmm: 1, aten.baddbmm: 1, aten.addmv: 1}
_POOLS = aten.avg_pool2d, aten.avg_pool3d, aten._adaptive_avg_pool2d, aten._adaptive_avg_pool3d
_SUMS = {aten.add, aten.sub, aten.sum, aten.mean, *_POOLS}
_SCALES = {aten.mul, aten.mul_, aten.div, aten.div_, aten._to_copy}
_VIEWS = {aten.view, aten._unsafe_view}


class _Counter(DispatchMode):
    """Runs a batch step by step, and counts: hooks show neurons and modules, the mode all operations.

    What depends on the input varies; the rest is weights. What is made of spikes alone has an attribute `counts`: how
    many spikes are in each of its values, NaN where others were written.
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
        self.weights: dict[Any, tuple[int, float]] = {}  # size and zeros
        self._parameters = {p.untyped_storage()._cdata for p in model.parameters()}
        self._varying: set[Any] = set()  # storages
        self._before: dict[str, list[Tensor]] = {}  # membrane potentials

    @torch.no_grad()
    def run(self) -> tuple[Energy, Tensor]:
        """Return the energy and the logits [T, B, C]."""
        modules = dict(self.model.named_modules())
        hooks = [m.register_forward_pre_hook(partial(self._enter, name)) for name, m in modules.items()]
        hooks += [m.register_forward_hook(self._leave, always_call=True) for m in modules.values()]
        spiking, fast = observe_spikes(self.neurons, self._fire), torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # attention by products, which the mode sees
        try:
            # no kernel stands for what the mode sees
            with keep_hooks(*hooks), spiking, kernels.using(bits=False), sdpa_kernel(SDPBackend.MATH), self:
                logits = unroll(self.model, self.x, steps=self.static, fold=1)
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
        for name, layer in self.layers.items():
            if not self.static or self.last[name]:
                layer.ann_macs /= self.static or 1
            else:  # it ran `once`; NeuroBench calls it in each step
                layer.dense, layer.effective_macs = layer.dense * self.static, layer.effective_macs * self.static
                layer.effective_acs *= self.static
        steps, passes = sum(self.lengths) / self.batch, 1 if self.static else sum(self.lengths) / self.batch
        updates, spikes, active = (count / self.batch for count in (self.updates, self.spikes, self.active))
        size, zeros = (sum(column) for column in zip((0, 0), *self.weights.values(), strict=True))
        held = [*self.model.parameters(), *self.model.buffers()]
        footprint = sum(t.numel() * (4 if t.is_floating_point() else t.element_size()) for t in held)
        counted = steps, passes, updates, spikes, active, size, round(zeros), footprint
        return Energy([*self.layers.values()], *counted), logits

    def _enter(self, name: str, module: nn.Module, args: Any) -> None:
        self._inside.append(name)
        if module is self.model:
            self.step += 1
            self._vary(args)
        if self.step and name in self.neurons:  # one of Norse has its state elsewhere
            self._before[name] = [state.clone() for state in state_tensors(module)[:1]]

    def _leave(self, *call: Any) -> None:
        self._inside.pop()

    def _fire(self, name: str, spikes: Any) -> None:
        """Count the spikes of neurons, and mark them."""
        unit = 1.0 if (spikes == spikes.round()).all() else float(spikes.abs().max())  # the threshold, in a twin
        self._vary(spikes)
        spikes.counts = spikes.float() / unit
        real, before = self._real(spikes), self._before.get(name)
        self.updates += real.numel()
        self.active += int(real.count_nonzero())
        self.spikes += float(self._real(spikes.counts).abs().sum(dtype=torch.float64))
        changes = before[0] != state_tensors(self.neurons[name])[0] if before else spikes == spikes
        self.changed += int(self._real(changes).sum())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, operation = func(*args, **(kwargs or {})), func.overloadpacket
        if self._inside and operation is aten.convolution:
            self._convolution(out, *args)
        elif self._inside and operation in _PRODUCTS:
            self._product(*args[_PRODUCTS[operation] :][:2])
        if any(map(self._varies, tree_leaves((args, kwargs)))):
            self._vary(out)
        try:
            _pass_counts(func, args, kwargs or {}, out)
        except (RuntimeError, IndexError):  # of an operation that takes no counts
            _lose_counts(func, args)
        return out

    def _vary(self, tensors: Any) -> None:
        self._varying |= {*map(_storage_of, tree_leaves(tensors))} - {None}

    def _varies(self, tensor: Any) -> bool:
        return _storage_of(tensor) in self._varying

    def _convolution(self, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any) -> None:
        one, grad = x[:1].double(), torch.ones_like(out[:1], dtype=torch.float64)
        self._weigh(weight)
        fans = (
            aten.convolution_backward(grad, one, w.double(), None, *settings, [True, False, False])[0]
            for w in (torch.ones_like(weight), weight != 0)
        )
        self._layer(x, _counts_of(x), *fans, varies=self._varies(x))

    def _product(self, a: Any, b: Any) -> None:
        """Count a matrix product [..., N, K] [..., K, M]; a vector is a row on the left, a column on the right."""
        if a.layout is not torch.strided or b.layout is not torch.strided:
            return
        varies, factors = (self._varies(a), self._varies(b)), [(a, _counts_of(a)), (b, _counts_of(b))]
        if b.ndim == 1:
            factors = [(x.view(-1, len(b)).mT if x is b else x.view(-1, len(b)), n) for x, n in factors]
            factors = [(x, n if n is None else n.view(x.shape)) for x, n in factors]
        if a.ndim == 3 and len(a) == 1:
            factors = [(x[0], n if n is None else n[0]) for x, n in factors]
        if varies == (False, True):
            factors = [(x.mT, n if n is None else n.mT) for x, n in reversed(factors)]
        (a, counts), (b, _) = factors
        if all(varies):
            spiking = any(_has_one_value(x) or (n is not None and _count_spikes(x, n) is not None) for x, n in factors)
            products = (f(self._real(a)).double() @ f(self._real(b)).double() for f in (torch.ones_like, Tensor.bool))
            dense, pairs = (float(product.sum()) for product in products)
            self._add(spiking, ann_macs=dense, **({"acs": pairs} if spiking else {"macs": dense}))
            return
        self._weigh(b)
        fans = (w.double().sum(-1)[..., None, :] for w in (torch.ones_like(b), b != 0))
        self._layer(a, counts, *fans, varies=any(varies))

    def _weigh(self, weight: Tensor) -> None:
        """Note the size of a weight, once where several layers have it."""
        storage = weight.untyped_storage()
        own = storage._cdata in self._parameters
        size = min(weight.numel(), storage.nbytes() // weight.element_size())
        key = (storage._cdata, weight.storage_offset()) if own else (self._inside[-1], *sorted(weight.shape))
        self.weights[key] = size, size * float((weight == 0).double().mean())

    def _layer(self, x: Tensor, units: Tensor | None, fan: Tensor, nonzero: Tensor, varies: bool) -> None:
        """Count the operations of a layer, of which each input reaches `fan` outputs, by weights that are `nonzero`."""
        x, units = self._real(x), None if units is None else self._real(units)
        dense, effective = (float(((part != 0) * f).sum()) for part, f in ((torch.ones_like(x), fan), (x, nonzero)))
        counts = _count_spikes(x, units)
        acs = None if counts is None else float((counts * fan).sum())
        if units is None and acs and acs * FLOAT32[1] > dense * FLOAT32[0]:  # pixels of 0 … 255, say, are no events
            acs = None
        charged = {"macs": dense} if acs is None else {"acs": acs}
        charged["effective_acs" if ((x == 0) | (x.abs() == 1)).all() else "effective_macs"] = effective
        times = 1 if varies else self.batch  # what is made of weights alone runs once for all samples
        charged = {key: count * times for key, count in {"dense": dense, "ann_macs": dense, **charged}.items()}
        self._add(units is not None and counts is not None, **charged)

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


def _storage_of(value: Any) -> StorageWeakRef | None:
    """Return the memory of a tensor; None of what is none, or has a sparse layout."""
    dense = isinstance(value, Tensor) and value.layout is torch.strided
    return StorageWeakRef(value.untyped_storage()) if dense else None


def _counts_of(x: Tensor) -> Tensor | None:
    """Return the spikes in each value; None where it is not made of spikes alone."""
    counts = vars(x).get("counts")
    return None if counts is None or counts.isnan().any() else counts


def _count_spikes(x: Tensor, units: Tensor | None) -> Tensor | None:
    """Return the spikes or events in each input of a layer; None where it reads data."""
    counts, one = (x if units is None else units).double().abs(), _has_one_value(x.abs())  # the weights may hold it
    whole = bool(((counts - counts.round()).abs() < 1e-3).all())
    if whole and (units is not None or (not one and x.count_nonzero() < x.numel() / 2)):
        return counts.round()
    return (x != 0).double() if one else None


def _lose_counts(func: Any, args: Any) -> None:
    """Note that an operation wrote other values than spikes into its arguments."""
    for argument, value in zip(func._schema.arguments, args, strict=False):
        if argument.is_write and isinstance(value, Tensor) and "counts" in vars(value):
            vars(value)["counts"].fill_(torch.nan)


def _pass_counts(func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Do with the counts of spikes what an operation on spikes alone does with these; an average becomes a sum."""
    tensors: list[Any] = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)]
    operation, draws = func.overloadpacket, torch.Tag.nondeterministic_seeded in func.tags
    if draws or operation in _PRODUCTS or not tensors or not all("counts" in vars(tensor) for tensor in tensors):
        return _lose_counts(func, args)
    args, kwargs = tree_map_only(Tensor, lambda tensor: vars(tensor)["counts"], (args, kwargs))
    counts: Any = args[0] if args else None
    if operation in _SUMS:
        args = [arg.float().abs() if isinstance(arg, Tensor) else arg for arg in args]
    if operation in _SCALES and len(tensors) == 1 and out.is_floating_point():  # the weights take the factor
        of_outputs = counts if out is tensors[0] else counts.clone()
    elif operation in _VIEWS:
        of_outputs = counts.reshape(out.shape)
    elif operation in _POOLS[:2]:
        of_outputs = operation(*args[:6], *(args[1], [], 0, False, True)[len(args) - 1 :], 1)
    else:
        of_outputs = aten.add(*args[:2]) if operation is aten.sub else func(*args, **kwargs)
    if operation is aten.mean:
        of_outputs = of_outputs * (counts.numel() / max(out.numel(), 1))
    elif operation in _POOLS[2:]:
        of_outputs = of_outputs * _window_sizes(counts.shape, out.shape).to(counts)
    outputs: list[Any] = tree_leaves(out)
    for tensor, counts in zip(outputs, tree_leaves(of_outputs), strict=True):
        if isinstance(tensor, Tensor):
            vars(tensor)["counts"] = counts


def _window_sizes(inputs: Sequence[int], outputs: Sequence[int]) -> Tensor:
    """Return over how many values each output of an adaptive pooling averages."""
    sizes = torch.ones(())
    for x, y in zip(inputs, outputs, strict=True):
        sizes = sizes[..., None] * torch.tensor([-(-(i + 1) * x // y) - i * x // y for i in range(y)])
    return sizes


def _has_one_value(x: Tensor) -> bool:
    """Return whether all values are 0 or one other, as of spikes."""
    values = x[x != 0]
    return bool((values == values[:1]).all())
