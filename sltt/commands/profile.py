"""Measure a training iteration with each rule and T: peak memory, seconds, multiplications.

Estimate the energy of the inference of one sample. With --budget, find the largest batch that fits. Other options are
those of sltt train.
"""

import itertools
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from sltt.analysis import (
    Memory,
    PeakModel,
    Seconds,
    count_operations,
    firing_rates,
    fit_peak,
    iteration_seconds,
    layer_paths,
    measure_energy,
)
from sltt.analysis.energy import LayerOperations, as_text
from sltt.commands.failures import cause
from sltt.commands.parsing import CommandOptions, Recipe, count, numbers
from sltt.commands.prepared import Prepared
from sltt.commands.results import give
from sltt.commands.tables import Cell, Row, Table, bytes_cell, numeral
from sltt.interop.adapted import find_own_code
from sltt.memory import available_memory, parse_bytes
from sltt.rules import Mixed, Rule
from sltt.rules.segments import repeated_segments
from sltt.sequence.padding import lengths_of
from sltt.training.console import Console, megabytes
from sltt.training.session import Session, session

WARMUP = 2
PHASES = "total", "data", "forward", "backward", "step"
TOLERANCE = 0.03  # of the peak model, before it is fitted again


def options() -> CommandOptions:
    parser = CommandOptions("sltt profile [RECIPE]", __doc__)
    parser.add_rules()
    parser.add_argument("--steps", type=numbers(int), default=[], help="numbers of time steps; default: the recipe's")
    parser.add_argument("--repeats", type=count, default=5, help="iterations that are timed; default: 5")
    parser.add_argument("--budget", type=parse_bytes, help="such as 8GB: find the largest batch, and the largest T")
    parser.add_output()
    return parser


def run(words: Sequence[str]) -> None:
    args, recipe = options().parse_recipe(words)
    report = Console(quiet=args.json)
    result = profile(recipe, args.rules, args.steps, args.repeats, args.budget, report)
    give(result, args, "profile.json", lambda report: print_profile(result, report))


def profile(
    recipe: Recipe, rules: Sequence[str], steps: Sequence[int], repeats: int, budget: int | None, report: Console
) -> dict[str, Any]:
    """Measure a recipe at several T, timing `repeats` iterations; return what `profile.json` has.

    * batch: samples in an iteration.
    * trained: the layers are measured with weights of a run, in evaluation mode; else with random weights, in training
      mode, since the statistics of a BatchNorm are not there yet.
    * costs: for each rule and T the memory and seconds of an iteration, the multiplications of its batch, and the
      `Fold` of its time steps.
    * layers: of the largest T, in the order of the model: operations in the inference of one sample, of a convolution
      or linear layer; firing rate, and spikes in all time steps, of a layer of neurons.
    * paths: of a training batch of the largest T: which layers run sparse.
    * own_code: neurons of other libraries that run by their own code, and why.
    * fits: for each rule, if there is a budget in bytes: the largest batch with the recipe's T, and the largest T
      with the recipe's batch, None where there is no limit. Of a run of that batch, the bytes that the model predicts
      and those measured: None where it was not run, since it needs more than is free.
    * energy: of one sample's inference, see `sltt.analysis.Energy.tables`.
    """
    own = recipe.build()
    steps = steps or [own.steps]
    costs, fits = [], []
    for rule in rules:
        recipe.build(rule=rule).rule.check(own.model, min(steps))  # what is wrong is told now
    with session(own) as here:
        for T, rule in itertools.product(steps, rules):
            report.line(f"{rule}, T = {T}")
            costs.append(_cost(here, recipe, rule, T, own.size, repeats))
        layers = _layers(here, own, max(steps), own.size)
        for rule in rules if budget else ():
            report.line(f"{rule}: what fits")
            try:
                fits.append(_fits(here, recipe, rule, own.steps, own.size, budget or 0))
                exact = _exact_within(here, recipe, own.steps, own.size, budget or 0) if rule == "BPTT" else None
                if exact not in (None, *rules):
                    costs.append(_cost(here, recipe, exact, own.steps, own.size, repeats))
            # data that takes no other T, say, or a full GPU: what was measured before is there
            except (ValueError, torch.OutOfMemoryError) as error:
                report.warn(f"{rule}: what fits cannot be measured: {cause(error)}")
        about = {"recipe": recipe.name, "device": str(here.fabric.device)}
    about |= {"batch": own.size, "trained": own.weights is not None, "model": recipe.resolve()["model"]}
    return {**about, "costs": costs, **layers, "fits": fits}


def print_profile(result: Mapping[str, Any], report: Console) -> None:
    """Print tables of all that was measured."""
    report.line(f"batches of {result['batch']} samples, on {result['device']}")
    for table in (*cost_tables(result), layer_table(result), *energy_tables(result["energy"]), _path_table(result)):
        table.show(report)
        report.line("")
    for cost in result["costs"]:
        if why := cost["fold"]["why"]:
            line = f"{cost['rule']}, T = {cost['steps']}: one time step in a call, since the network {why}"
            report.line(textwrap.fill(line, 80))
    for line in result["own_code"]:
        report.line(textwrap.fill(f"not in our kernels: {line}", 80))


def energy_tables(rows_of: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Table]:
    """Return the tables of `Energy.tables`."""
    cells = {name: [{k: Cell(as_text(v), v) for k, v in row.items()} for row in rows] for name, rows in rows_of.items()}
    return [Table(rows, name, "estimate for 45 nm" if name == "energy" else "") for name, rows in cells.items()]


def cost_tables(result: Mapping[str, Any]) -> list[Table]:
    """Return what a batch of each rule takes: its memory by parts, its seconds and operations, and what fits."""
    memory, seconds = [], []
    for cost in result["costs"]:
        parts = cost["memory"]
        shares = {"memory": parts["batch"], "grads": parts["gradients"]}
        shares |= {name: parts[name] for name in ("states", "saved", "rest")} | {"weights": parts["parameters"]}
        shares |= {"optim": parts["optimizer"], "input": parts["input"], "all": parts["total"]}
        name: Row = {"rule": cost["rule"], "T": numeral(cost["steps"])}
        memory.append({**name, **{part: Cell(f"{share / 1e6:.2f}", share) for part, share in shares.items()}})
        phases = {phase: numeral(cost["seconds"][phase], ".3f") for phase in PHASES}
        forward, backward = (numeral(cost["operations"][key], ".2e") for key in ("forward", "backward"))
        fold = numeral(cost["fold"]["trained"])
        seconds.append({**name, **phases, "mult. fwd": forward, "mult. bwd": backward, "fold": fold})
    tables = [
        Table(memory, "memory", "memory of a batch: grads + states + saved + rest; all at the peak; in MB"),
        Table(seconds, "costs", "seconds and multiplications of a batch; fold: steps in a call"),
    ]
    return [*tables, fits_table(result["fits"])] if result["fits"] else tables


def fits_table(fits: Sequence[Mapping[str, Any]]) -> Table:
    """Return what fits under each rule, and the run that checks it."""
    rows = [
        {
            "rule": fit["rule"],
            "batch": numeral(fit["batch"], ",", none="no limit"),
            "T": numeral(fit["steps"], ",", none="no limit"),
            "predicted": bytes_cell(fit["predicted"]) if fit["predicted"] else "",
            "measured": bytes_cell(fit["measured"]) if fit["measured"] else Cell("not run", None),
            "error": numeral(fit["predicted"] / fit["measured"] - 1 if fit["measured"] else None, "+.1%", none=""),
        }
        for fit in fits
    ]
    title = f"what fits {megabytes(fits[0]['budget'])}, the rest as in the recipe; and a run with that batch"
    return Table(rows, "fits", title)


def layer_table(result: Mapping[str, Any]) -> Table:
    """Return operations and energy of each layer in one sample, or the firing rate and spikes of neurons."""
    rows = []
    for layer in result["layers"]:
        if layer["operations"] is None:
            cells = {"firing rate": numeral(layer["firing_rate"], ".3f"), "spikes": numeral(layer["spikes"], ",.0f")}
        else:
            counts = LayerOperations(**layer["operations"])
            operations = f"{counts.synaptic_operations:,.0f}{' MAC' if counts.macs else ''}"
            cells = {
                "Dense": numeral(counts.dense, ",.0f"),
                "activity": numeral((counts.effective_macs + counts.effective_acs) / max(counts.dense, 1), ".1%"),
                "operations": Cell(operations, counts.synaptic_operations),
                "nJ": numeral(counts.picojoules / 1e3, ",.1f"),
            }
        rows.append({"layer": layer["name"], **cells})
    most = max(cost["steps"] for cost in result["costs"])
    network = "with the weights given" if result["trained"] else "untrained; --weights RUN takes those of a run"
    return Table(rows, "layers", f"one sample, T = {most}, {network}")


def _path_table(result: Mapping[str, Any]) -> Table:
    rows: list[Row] = [
        {
            "layer": path["name"],
            "inputs ≠ 0": numeral(path["density"], ".1%"),
            "forward": _way(path["sparse_forward"], path["calls"]),
            "weight gradient": _way(path["sparse_gradient"], path["calls"]),
        }
        for path in result["paths"]
    ]
    return Table(rows, title="layers on active inputs only (sparse), or dense")


def _way(sparse: int, calls: int) -> Cell:
    return Cell(f"sparse in {sparse} of {calls}" if 0 < sparse < calls else "sparse" if sparse else "dense", sparse)


def _memory(ready: Prepared, size: int) -> Memory:
    """Measure the memory of an iteration with `size` samples, after a step of the optimizer, which makes its state."""
    _seconds(ready, [ready.batch(size)], 0)
    return ready.memory(size)


def _seconds(ready: Prepared, batches: Iterable[Any], warmup: int) -> Seconds:
    batch = ready.model, batches, ready.loss, ready.rule, ready.optimizer
    return iteration_seconds(*batch, steps=ready.repeat, warmup=warmup)


def _cost(here: Session, recipe: Recipe, rule: str, steps: int, batch: int, repeats: int) -> dict[str, Any]:
    ready = Prepared(here, recipe.build(rule=rule), steps)
    memory = _memory(ready, batch)
    seconds = _seconds(ready, itertools.islice(ready.batches(batch), repeats + WARMUP), WARMUP)
    counted = count_operations(ready.model, *ready.batch(batch), ready.loss, ready.rule, steps=ready.repeat)
    parts = {**vars(memory), "batch": memory.batch, "total": memory.total}
    measured = {"memory": parts, "seconds": {**vars(seconds), "total": seconds.total}, "operations": counted._asdict()}
    return {"rule": rule, "steps": steps, "fold": ready.fold._asdict(), **measured}


def _layers(here: Session, built: Any, steps: int, batch: int) -> dict[str, Any]:
    """Return `layers`, `paths`, `energy` and `own_code` of a profile."""
    ready = Prepared(here, built, steps)
    x, y = ready.batch(batch)
    model = ready.model.train(built.weights is None)
    with firing_rates(model) as rates:
        energy = measure_energy(model, x, steps=ready.repeat, lengths=lengths_of(y))
    paths = [vars(path) for path in layer_paths(model, x, steps=ready.repeat)]
    columns: dict[str, dict[str, Any]] = {
        "operations": {path.name: vars(path) for path in energy.layers},
        "firing_rate": rates.by_layer(),
        "spikes": {name: spikes / batch for name, (spikes, _) in rates.state_dict().items()},
    }
    layers = [
        {"name": name, **{key: values.get(name) for key, values in columns.items()}}
        for name, _ in model.named_modules()
        if name in columns["operations"] or name in columns["firing_rate"]
    ]
    return {"layers": layers, "paths": paths, "energy": energy.tables(), "own_code": find_own_code(model)}


def _fits(here: Session, recipe: Recipe, rule: str, steps: int, batch: int, budget: int) -> dict[str, Any]:
    def measure(samples: int, time_steps: int, *one_step: str) -> int:
        return _memory(Prepared(here, recipe.build(*one_step, rule=rule), time_steps), samples).total

    # what shares a call grows with T up to a limit only: it is measured, and not extrapolated
    one_step = ("--rule.fold", "1") if recipe.build(rule=rule).rule.fold == "auto" else ()
    least = _until_regular(recipe.build(rule=rule).rule)
    batches, fit = (batch, 2 * batch), {}
    for _ in range(2):
        model: PeakModel = fit_peak(lambda *sizes: measure(*sizes, *one_step), batches, (least, 2 * least))
        fit = {"rule": rule, "budget": budget, "steps": model.largest_steps(budget, batch)}
        fit |= _run_largest(model, steps, measure, budget, available_memory(here.fabric.device))
        if not (fit["batch"] and fit["measured"]):
            break  # nothing fits, or it was not run
        if abs(fit["predicted"] / fit["measured"] - 1) <= TOLERANCE:
            break
        # Large layers run other kernels than small ones: fit again at the budget.
        batches = max(fit["batch"] // 2, 1), max(fit["batch"], 2)
    return fit


def _exact_within(here: Session, recipe: Recipe, steps: int, batch: int, budget: int) -> str | None:
    """Return BPTT with the segments that repeat the fewest time steps of those that fit a budget in bytes; or None."""

    def rule(length: int, checkpoints: int) -> str:
        return f"BPTT:segment={length}:checkpoints={checkpoints}" if length < steps else "BPTT"

    def measure(length: int, checkpoints: int, steps: int) -> int:
        return _memory(Prepared(here, recipe.build(rule=rule(length, checkpoints)), steps), batch).total

    least, of_steps, of_states = measure(1, 1, 9), measure(4, 1, 9), measure(1, 5, 9)
    room = budget
    for _ in range(3):
        fits = [
            (length * repeated_segments(segments, checkpoints), length, checkpoints)
            for length in range(1, steps + 1)
            for segments in [math.ceil(steps / length)]
            for checkpoints in range(1, max(segments, 2))
            if least + (of_steps - least) / 3 * (length - 1) + (of_states - least) / 4 * (checkpoints - 1) <= room
        ]
        if not fits:
            break
        _, length, checkpoints = min(fits)
        measured = measure(length, checkpoints, steps)
        if measured <= budget:
            return rule(length, checkpoints)
        room *= budget / measured
    return None


def _run_largest(
    model: PeakModel, steps: int, measure: Callable[[int, int], int], budget: int, free: int
) -> dict[str, int | None]:
    """Run the largest batch, and smaller ones until one fits."""
    batch = model.largest_batch(budget, steps)
    while batch:
        predicted = int(model.peak(batch, steps))
        measured = measure(batch, steps) if predicted <= free else None
        if measured is None or measured <= budget:
            return {"batch": batch, "predicted": predicted, "measured": measured}
        batch = min(batch - 1, batch * budget // measured)
    return {"batch": batch, "predicted": None, "measured": None}


def _until_regular(rule: Rule) -> int:
    """Return the least T from which memory grows evenly with T: the time steps that a rule keeps together."""
    of_layers = (*rule.windows.values(), rule.default) if isinstance(rule, Mixed) else ()
    together = *of_layers, *(getattr(rule, name, None) for name in ("k", "window", "segment", "fold"))
    return max([2, *(steps for steps in together if isinstance(steps, int))])
