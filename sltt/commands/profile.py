"""What `sltt profile` does: memory, time, operations and energy of a recipe under several rules, and what fits."""

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table

from sltt.analysis import (
    LayerOperations,
    LayerPath,
    Memory,
    Operations,
    PeakModel,
    Seconds,
    available_memory,
    count_operations,
    firing_rates,
    fit_peak,
    iteration_seconds,
    layer_paths,
    memory_parts,
    parse_bytes,
    synaptic_operations,
)
from sltt.analysis.energy import PICOJOULES_ACCUMULATE, PICOJOULES_MULTIPLY_ACCUMULATE
from sltt.commands.failures import cause
from sltt.commands.parsing import CommandOptions, Recipe, begin, count, numbers, time_steps, unfolded
from sltt.commands.prepared import Prepared, prepared
from sltt.commands.results import give
from sltt.rules import Truncated
from sltt.rules.folding import largest_fold
from sltt.training.checkpoints import start_from
from sltt.training.console import Console, megabytes
from sltt.training.session import Session, session
from sltt.training.settings import Execution

WARMUP = 2
TOLERANCE = 0.03  # of the peak model, before it is fitted again

HELP = (
    "Measure a training iteration with each rule and T: peak memory, seconds, multiplications. Estimate the energy of "
    "the inference of one sample. With --budget, find the largest batch that fits. "
    "Other options are those of sltt train."
)


def options() -> CommandOptions:
    """What `sltt profile` takes."""
    parser = CommandOptions("sltt profile [RECIPE]", HELP)
    parser.add_rules()
    parser.add_argument(
        "--steps", type=numbers(time_steps), default=[], help="numbers of time steps; default: the recipe's"
    )
    parser.add_argument("--repeats", type=count, default=5, help="iterations that are timed; default: 5")
    parser.add_argument(
        "--budget", type=parse_bytes, help="a memory such as 8GB: the largest batch, T and fold that fit it"
    )
    parser.add_output()
    return parser


def run(words: Sequence[str]) -> None:
    """`sltt profile [RECIPE] [OPTION ...]`: memory, seconds, operations and energy, and what fits a budget."""
    name, words = begin(words, "digits")
    known, overrides = options().parse_known_args(words)
    recipe = Recipe("sltt profile", name, overrides)
    report = Console(quiet=known.json)
    found = profile(recipe, known.rules, known.steps, known.repeats, known.budget, report)
    give(found.as_dict(), known, "profile.json", lambda report: print_profile(found, report))


@dataclass
class Cost:
    """One rule with one T: the iteration's memory and seconds, and the multiplications of its batch."""

    rule: str
    steps: int
    memory: Memory
    seconds: Seconds
    operations: Operations


@dataclass
class LayerCost:
    """A layer in the inference of one sample: a convolution or linear layer, or a layer of neurons.

    Attributes:
        name: of the layer in the model.
        operations: of a convolution or linear layer.
        firing_rate: of a layer of neurons.
        spikes: of a layer of neurons, in all time steps of a sample.
    """

    name: str
    operations: LayerOperations | None = None
    firing_rate: float | None = None
    spikes: float | None = None


@dataclass
class Fits:
    """What fits a budget under a rule; None where there is no limit.

    Attributes:
        rule: as it was asked for.
        budget: bytes, with parameters and the optimizer's state.
        batch: the largest with the recipe's T.
        steps: the largest T with the recipe's batch.
        fold: the most time steps in one call of the network, with the recipe's batch and T; None for a rule without.
        predicted: bytes of the checked run, by the fitted model.
        measured: bytes of the checked run; None if it was not made, since it needs more than is free.
    """

    rule: str
    budget: int
    batch: int | None
    steps: int | None
    fold: int | None
    predicted: int = 0
    measured: int | None = None


@dataclass
class Profile:
    """All that was measured.

    Attributes:
        recipe: its name.
        device: where.
        batch: samples in an iteration.
        trained: the layers are measured with weights of a run, in evaluation mode; else with random weights, in
            training mode, since the statistics of a BatchNorm are not there yet.
        costs: a row for each rule and T.
        layers: of the largest T, in the order of the model.
        paths: of a training batch of the largest T: which layers run sparse, and what that saves.
        fits: a row for each rule, if there is a budget.
    """

    recipe: str
    device: str
    batch: int
    trained: bool
    costs: list[Cost] = field(default_factory=list)
    layers: list[LayerCost] = field(default_factory=list)
    paths: list[LayerPath] = field(default_factory=list)
    fits: list[Fits] = field(default_factory=list)

    def picojoules(self) -> tuple[float, float]:
        """The estimated energy of one sample's inference, and that of the same network as an ANN."""
        layers = [layer.operations for layer in self.layers if layer.operations is not None]
        return sum(one.picojoules for one in layers), sum(one.picojoules_as_ann for one in layers)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        spiking, ann = self.picojoules()
        costs = [{**asdict(one), "operations": one.operations._asdict()} for one in self.costs]
        for row, one in zip(costs, self.costs, strict=True):
            row["memory"]["total"], row["seconds"]["total"] = one.memory.total, one.seconds.total
        return {**asdict(self), "costs": costs, "picojoules": spiking, "picojoules_as_ann": ann}


def profile(
    recipe: Recipe,
    rules: Sequence[str],
    steps: Sequence[int],
    repeats: int,
    budget: int | None,
    report: Console,
) -> Profile:
    """Measure a recipe.

    Args:
        recipe: what is measured.
        rules: as for `rule_options`.
        steps: numbers of time steps; none is the recipe's.
        repeats: iterations that are timed, for each rule and T.
        budget: bytes; None asks for nothing.
        report: shows the progress.
    """
    own = recipe.build()
    steps = steps or [own.steps]
    with session(Execution.of(vars(own))) as here:
        found = Profile(recipe.name, str(here.fabric.device), own.batch_size, own.weights is not None)
        for T, rule in itertools.product(steps, rules):
            report.line(f"{rule}, T = {T}")
            found.costs.append(_cost(here, recipe, rule, T, found.batch, repeats))
        found.layers, found.paths = _layers(here, own, max(steps), found.batch)
        for rule in rules if budget else ():
            report.line(f"{rule}: what fits")
            try:
                found.fits.append(_fits(here, recipe, rule, own.steps, found.batch, budget or 0))
            except ValueError as error:  # data that takes no other T, say: what was measured before is there
                report.warn(f"{rule}: what fits cannot be measured: {cause(error)}")
    return found


def print_profile(found: Profile, report: Console) -> None:
    """Tables of all that was measured."""
    memory = _table("rule", "T", "memory", "states", "saved", "rest", "weights", "grads", "optim", "input", "all")
    seconds = _table("rule", "T", "total", "data", "forward", "backward", "step", "mult. fwd", "mult. bwd")
    for one in found.costs:
        parts = one.memory
        before = parts.parameters, parts.gradients, parts.optimizer, parts.input
        sizes = parts.batch, parts.states, parts.saved, parts.rest, *before, parts.total
        memory.add_row(one.rule, str(one.steps), *(f"{size / 1e6:.2f}" for size in sizes))
        times = one.seconds.total, *vars(one.seconds).values()
        seconds.add_row(one.rule, str(one.steps), *(f"{t:.3f}" for t in times), *(f"{n:.2e}" for n in one.operations))
    layers = _table("layer", "MAC a step", "activity", "synaptic op.", "firing rate", "spikes")
    for layer in found.layers:
        if one := layer.operations:
            kind = "" if one.spiking else " MAC"
            cells = f"{one.macs:,}", f"{one.density:.1%}", f"{one.synaptic_operations:,.0f}{kind}", "", ""
        else:
            cells = "", "", "", f"{layer.firing_rate:.3f}", f"{layer.spikes:,.0f}"
        layers.add_row(layer.name, *cells)
    network = "with the weights given" if found.trained else "untrained; --weights RUN takes those of a run"
    for title, table in (
        (
            f"memory of a batch of {found.batch} above what is there before it: states + saved + rest;\n"
            f"all that is allocated at the peak; in MB, on {found.device}",
            memory,
        ),
        ("seconds of an iteration, and multiplications of its batch", seconds),
        (f"one sample, T = {found.costs[-1].steps}, {network}", layers),
        (
            f"a training batch of {found.batch}: layers on active inputs only (sparse), or dense\n"
            "saved: estimate for one thread; convolutions need --channels_last true",
            _paths(found.paths),
        ),
    ):
        report.line(title)
        report.table(table)
        report.line("")
    spiking, ann = found.picojoules()
    report.line(
        f"energy of one sample, estimated: {spiking / 1e6:.3g} µJ; the same network as an ANN: {ann / 1e6:.3g} µJ\n"
        f"(45 nm, 32 bits: {PICOJOULES_MULTIPLY_ACCUMULATE} pJ a multiply-accumulate, {PICOJOULES_ACCUMULATE} pJ an "
        "accumulate)"
    )
    if found.fits:
        report.line("")
        _print_fits(found.fits, report)


def _paths(paths: Sequence[LayerPath]) -> Table:
    table = _table("layer", "inputs ≠ 0", "forward", "weight gradient", "saved, ms", "share saved")
    for one in paths:
        ways = (_way(sparse, one.calls) for sparse in (one.sparse_forward, one.sparse_gradient))
        share = f"{one.saved_seconds / one.dense_seconds:.0%}" if one.dense_seconds else ""
        saved = f"{1e3 * one.saved_seconds:.1f}" if one.dense_seconds else ""
        table.add_row(one.name, f"{one.density:.1%}", *ways, saved, share)
    if saved := sum(one.saved_seconds for one in paths):
        table.add_row("all", "", "", "", f"{1e3 * saved:.1f}", "")
    return table


def _way(sparse: int, calls: int) -> str:
    return f"sparse in {sparse} of {calls}" if 0 < sparse < calls else "sparse" if sparse else "dense"


def _print_fits(fits: Sequence[Fits], report: Console) -> None:
    table = _table("rule", "batch", "T", "fold", "predicted", "measured", "error")
    for one in fits:
        batch, steps = ("no limit" if most is None else f"{most:,}" for most in (one.batch, one.steps))
        checked = "not run", ""
        if one.measured is not None:
            checked = megabytes(one.measured), f"{one.predicted / one.measured - 1:+.1%}"
        table.add_row(
            one.rule, batch, steps, "–" if one.fold is None else str(one.fold), megabytes(one.predicted), *checked
        )
    report.line(f"what fits {megabytes(fits[0].budget)}, the rest as in the recipe; and a run with that batch")
    report.table(table)


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("rule", "layer") else "right")
    return table


def _built(recipe: Recipe, rule: str, *options: str) -> Any:
    built = recipe.build(*options, rule=rule)
    start_from(built.model, built.weights)
    return built


def _memory(ready: Prepared, size: int) -> Memory:
    """Memory of an iteration with `size` samples, after one step of the optimizer."""
    x, y = ready.batch(size)
    iteration_seconds(
        ready.model, [(x, y)], ready.loss, ready.rule, ready.optimizer, steps=ready.repeat, warmup=0
    )  # makes the optimizer's state, and what is allocated once
    return memory_parts(ready.model, x, y, ready.loss, ready.rule, ready.optimizer, steps=ready.repeat)


def _cost(here: Session, recipe: Recipe, rule: str, steps: int, batch: int, repeats: int) -> Cost:
    with prepared(here, _built(recipe, rule), steps) as ready:
        memory = _memory(ready, batch)
        timed = itertools.islice(ready.batches(batch), repeats + WARMUP)
        seconds = iteration_seconds(
            ready.model, timed, ready.loss, ready.rule, ready.optimizer, steps=ready.repeat, warmup=WARMUP
        )
        operations = count_operations(ready.model, *ready.batch(batch), ready.loss, ready.rule, steps=ready.repeat)
    return Cost(rule, steps, memory, seconds, operations)


def _layers(here: Session, built: Any, steps: int, batch: int) -> tuple[list[LayerCost], list[LayerPath]]:
    start_from(built.model, built.weights)
    with prepared(here, built, steps) as ready:
        x, _ = ready.batch(batch)
        model = ready.model.train(built.weights is None)
        with firing_rates(model) as rates:
            operations = {one.name: one for one in synaptic_operations(model, x, steps=ready.repeat)}
        paths = layer_paths(model, x, steps=ready.repeat)
    spikes = {name: spikes / batch for name, (spikes, _) in rates.state_dict().items()}
    by_layer = rates.by_layer()
    names = [name for name, _ in model.named_modules() if name in operations or name in by_layer]
    return [LayerCost(name, operations.get(name), by_layer.get(name), spikes.get(name)) for name in names], paths


def _fits(here: Session, recipe: Recipe, rule: str, steps: int, batch: int, budget: int) -> Fits:
    def measure(samples: int, time_steps: int) -> int:
        with prepared(here, _built(recipe, rule), time_steps) as ready:
            return _memory(ready, samples).total

    least = max(getattr(recipe.build(rule=rule).rule, "k", None) or 1, 2)
    found = Fits(rule, budget, None, None, _fold(here, recipe, rule, steps, batch, budget))
    batches = batch, 2 * batch
    for _ in range(2):
        model: PeakModel = fit_peak(measure, batches, (least, 2 * least))
        found.batch, found.steps = model.largest_batch(budget, steps), model.largest_steps(budget, batch)
        if not found.batch:
            break
        found.predicted = int(model.peak(found.batch, steps))
        if found.predicted > available_memory(here.fabric.device):
            break
        found.measured = measure(found.batch, steps)
        if abs(found.predicted / found.measured - 1) <= TOLERANCE:
            break
        # Large layers run other kernels than small ones: fit again nearer to the budget.
        batches = max(found.batch // 4, 1), max(found.batch // 2, 2)
    return found


def _fold(here: Session, recipe: Recipe, rule: str, steps: int, batch: int, budget: int) -> int | None:
    """The largest fold; None for a rule that has none."""
    rule = unfolded(rule)
    built = recipe.build(rule=rule).rule
    if not isinstance(built, Truncated) or built.hoist:
        return None
    peaks = []
    for fold in range(1, min(steps, 3) + 1):
        with prepared(here, _built(recipe, rule, "--rule.fold", str(fold)), steps) as ready:
            peaks.append(_memory(ready, batch).total)
    return largest_fold(peaks, budget, steps)
