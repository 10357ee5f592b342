"""What `sltt report` shows: the answer first, then figures and tables of what the commands measured and of runs."""

import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sltt.commands.compare import Compared
from sltt.commands.failures import cause
from sltt.commands.fscil import SCORES
from sltt.commands.lr import advice
from sltt.commands.page import Cell, Chart, Section, TableOfCells
from sltt.commands.results import Gathered, best_epoch, rule_label, scores_text
from sltt.commands.verdict import answers, batch_memory, layers, verdicts
from sltt.metrics import finite, is_share, shown
from sltt.training.console import megabytes, metric_of
from sltt.training.files import read_table
from sltt.training.runs import METRICS

MEMORY = "Memory is the peak of one training batch, above what is allocated before it."
RASTER_NEURONS = 60  # of each layer
RATE = "share of neurons that spike in a step"


def sections(found: Gathered) -> list[Section]:
    """Tables and figures of what was gathered, in the order in which a reader asks."""
    from sltt.commands.figures import palette

    asked = [row["rule"] for one in found.comparisons for row in one["rows"]]
    asked += [row["rule"] for one in found.profiles for row in one["costs"]]
    asked += [row["rule"] for one in found.fewshots for row in one["rows"]]
    names = {run: _name_of(run, found) for run in found.runs}
    colours = palette([*asked, *names.values()])
    made = [_short(found)] if verdicts(found) or found.agreements else []
    made += [_comparison(one) for one in found.comparisons]
    if found.runs:
        made.append(_training(names, colours))
    for one in found.profiles:
        made += [_costs(one, colours), _energy(one)]
    made += [_agreement(one) for one in found.agreements]
    made += [_few_shots(one, colours) for one in found.fewshots]
    made += [_rates(one) for one in found.rates]
    if found.runs:
        made.append(_spikes(found))
    for number, section in enumerate(made, 1):  # two profiles do not write to the same file
        for part in [*section.tables, *section.charts]:
            part.name = f"{number}-{part.name}"
    return made


def _short(found: Gathered) -> Section:
    """The verdict in words, three numbers for each rule, and the network with its layers."""
    rows = []
    for one in verdicts(found):
        most = max(one.memory, key=lambda steps: steps or 0, default=None)
        memory = one.memory.get(most)
        rows.append(
            [
                Cell(one.rule, one.rule),
                Cell("–" if one.score is None else scores_text(one.scores, one.metric), one.score),
                Cell("–", "") if memory is None else _bytes_cell(memory, f", T = {most}" if most else ""),
                _number(one.seconds, ".2f"),
            ]
        )
    unit = "s / epoch" if found.comparisons else "s / batch"
    metric = next((one["metric"] for one in found.comparisons), "accuracy").replace("_", " ")
    tables = [TableOfCells("short", "", ("rule", f"test {metric}", "memory of a batch", unit), rows)] if rows else []
    return Section("In short", answers(found), tables, layers=layers(found))


def _comparison(found: dict[str, Any]) -> Section:
    sweep, metric = any(row.get("varied") for row in found["rows"]), found["metric"]
    name = metric.replace("_", " ")
    headings = (
        "rule",
        *([f"validation {name}"] if sweep else []),
        f"test {name}",
        "seeds",
        "s / epoch",
        "memory",
        "mult. forward",
        "mult. backward",
        "cosine",
    )
    rows = []
    for row in found["rows"]:
        one = Compared(**row)
        if not one.scores or row["operations"] is None:
            rows.append([Cell(one.rule, one.rule), Cell("died", ""), *[Cell("", "")] * (len(headings) - 2)])
            continue
        forward, backward = row["operations"]["forward"], row["operations"]["backward"]
        rows.append(
            [
                Cell(one.rule, one.rule),
                *([_score(one.validation, metric)] if sweep else []),
                _score(one.scores, metric),
                Cell(str(len(one.scores)), len(one.scores)),
                _number(one.seconds, ".2f"),
                Cell(megabytes(one.peak_memory), one.peak_memory),
                Cell(f"{forward:.2e}", forward),
                Cell(f"{backward:.2e}", backward),
                _number(one.cosine, ".3f"),
            ]
        )
    trained = "All" if sweep else "All rules"
    text = [
        f"{trained} train the same network on the same data, with the same budget and seeds. {MEMORY} Multiplications "
        "are those of one batch. The cosine compares the rule's gradient with that of BPTT, after the training."
    ]
    return Section(
        f"{'Values' if sweep else 'Rules'} compared on {found['recipe']}",
        text,
        [TableOfCells("comparison", "one row a rule", headings, rows)],
    )


def _name_of(run: Path, found: Gathered) -> str:
    """The rule of a run; with the values of what varied, where it is one of a comparison."""
    rows = [row for one in found.comparisons for row in one["rows"] if run.name in row.get("runs", ())]
    return rows[0]["rule"] if rows else rule_label(run)


def _training(runs: dict[Path, str], colours: dict[str, str]) -> Section:
    from sltt.commands import figures

    accuracy: dict[str, list[figures.Points]] = {}
    loss: dict[str, list[figures.Points]] = {}
    rows, metric = [], "accuracy"
    for run, label in runs.items():
        history = read_table(run / METRICS)
        epochs = [row["epoch"] for row in history]
        metric = metric_of(history[0])
        part = "train" if history[0][f"validation_{metric}"] is None else "validation"
        key = f"{part}_{metric}"
        accuracy.setdefault(label, []).append((epochs, [row[key] for row in history]))
        loss.setdefault(label, []).append((epochs, [row["train_loss"] for row in history]))
        best = best_epoch(run, history, key)
        seconds = statistics.median(row["seconds"] for row in history)
        rows.append(
            [
                Cell(run.name, run.name),
                Cell(label, label),
                Cell(str(len(epochs)), len(epochs)),
                Cell(shown(metric, best[key]), best[key]),
                _number(history[-1]["train_loss"], ".4f"),
                Cell(f"{history[-1]['firing_rate']:.3f}", history[-1]["firing_rate"]),
                Cell(f"{seconds:.2f}", seconds),
            ]
        )
    curves = figures.lines(accuracy, colours, "epoch", metric, percent=is_share(metric))
    name = metric.replace("_", " ").capitalize()
    headings = "run", "rule", "epochs", f"best {metric}", "last loss", "firing rate", "s / epoch"
    return Section(
        "Training",
        [f"{name} on the samples that were held out of the training set, or on that set where none were."],
        [TableOfCells("runs", "one row a run", headings, rows)],
        [
            Chart("accuracy", f"{name} over epochs; a line for each seed", curves),
            Chart("loss", "Training loss over epochs", figures.lines(loss, colours, "epoch", "loss")),
        ],
    )


def _costs(found: dict[str, Any], colours: dict[str, str]) -> Section:
    from sltt.commands import figures

    costs = found["costs"]
    parts = [key for key in costs[0]["memory"] if key != "total"]
    phases = "total", "data", "forward", "backward", "step"
    times = [
        [
            *_rule_and_steps(one),
            _bytes_cell(batch_memory(one["memory"])),
            *(Cell(f"{one['seconds'][key]:.3f}", one["seconds"][key]) for key in phases),
            *(Cell(f"{one['operations'][key]:.2e}", one["operations"][key]) for key in ("forward", "backward")),
        ]
        for one in costs
    ]
    shares = [
        [
            *_rule_and_steps(one),
            *(_bytes_cell(one["memory"][key]) for key in parts),
            _bytes_cell(one["memory"]["total"]),
        ]
        for one in costs
    ]
    memory: dict[str, list[figures.Points]] = {}
    seconds: dict[str, list[figures.Points]] = {}
    for rule in dict.fromkeys(one["rule"] for one in costs):
        own = [one for one in costs if one["rule"] == rule]
        steps = [one["steps"] for one in own]
        memory[rule] = [(steps, [batch_memory(one["memory"]) / 1e6 for one in own])]
        seconds[rule] = [(steps, [one["seconds"]["total"] for one in own])]
    most = max(one["steps"] for one in costs)
    last = [one for one in costs if one["steps"] == most]
    bars = {key: [one["memory"][key] / 1e6 for one in last] for key in parts}
    stacked = figures.stacked_bars(bars, [one["rule"] for one in last], "MB")
    charts = [
        Chart("memory", "Memory of a training batch over T", figures.lines(memory, colours, "T", "MB")),
        Chart("time", "Seconds of a training batch over T", figures.lines(seconds, colours, "T", "seconds")),
        Chart("parts", f"All that is allocated at the peak, by parts, at T = {most}", stacked),
    ]
    headings = "rule", "T", "memory", "seconds", "data", "forward", "backward", "step", "mult. fwd", "mult. bwd"
    tables = [
        TableOfCells("costs", "time and memory of a training batch", headings, times),
        TableOfCells("memory", "all that is allocated at the peak", ("rule", "T", *parts, "total"), shares),
    ]
    if found["fits"]:
        tables.append(_fits_table(found["fits"]))
    text = [f"A training batch of {found['recipe']} with {found['batch']} samples, on {found['device']}. {MEMORY}"]
    return Section("What a rule costs", text, tables, charts)


def _fits_table(fits: Sequence[dict[str, Any]]) -> TableOfCells:
    def most(value: int | None, none: str) -> Cell:
        return Cell(none, "") if value is None else Cell(f"{value:,}", value)

    rows = [
        [
            Cell(one["rule"], one["rule"]),
            most(one["batch"], "no limit"),
            most(one["steps"], "no limit"),
            most(one["fold"], "–"),
            _bytes_cell(one["predicted"]),
            Cell("not run", "") if one["measured"] is None else _bytes_cell(one["measured"]),
        ]
        for one in fits
    ]
    title = f"What fits {megabytes(fits[0]['budget'])}: each the largest, the rest as in the recipe"
    return TableOfCells("fits", title, ("rule", "batch", "T", "fold", "predicted", "measured"), rows)


def _energy(found: dict[str, Any]) -> Section:
    from sltt.analysis import LayerOperations
    from sltt.commands import figures

    rows, rates = [], {}
    for layer in found["layers"]:
        if layer["operations"] is None:
            rates[layer["name"]] = layer["firing_rate"]
            rate, spikes = layer["firing_rate"], layer["spikes"]
            cells = [Cell("", "")] * 4 + [Cell(f"{rate:.3f}", rate), Cell(f"{spikes:,.0f}", spikes)]
        else:
            one = LayerOperations(**layer["operations"])
            cells = [
                Cell(f"{one.macs:,}", one.macs),
                Cell(f"{one.density:.1%}", one.density),
                Cell(f"{one.synaptic_operations:,.0f}{'' if one.spiking else ' MAC'}", one.synaptic_operations),
                Cell(f"{one.picojoules / 1e3:,.1f}", one.picojoules / 1e3),
                Cell("", ""),
                Cell("", ""),
            ]
        rows.append([Cell(layer["name"], layer["name"]), *cells])
    headings = ("layer", "MAC a step", "activity", "synaptic operations", "energy, nJ", "firing rate", "spikes")
    state = "with trained weights" if found["trained"] else "with random weights"
    text = [
        f"The inference of one sample, {state}. Estimated energy: {found['picojoules'] / 1e6:.3g} µJ, and "
        f"{found['picojoules_as_ann'] / 1e6:.3g} µJ for the same network without time and spikes (32-bit floating "
        "point in 45 nm: 4.6 pJ a multiply-accumulate, 0.9 pJ an accumulate). Memory accesses and the neurons "
        "themselves are not in it: compare networks by it, do not plan a chip."
    ]
    chart = Chart(
        "firing-rates-random",
        f"Firing rates by layer, {state}",
        figures.bars(rates, RATE),
    )
    return Section("Spikes and energy", text, [TableOfCells("layers", "one row a layer", headings, rows)], [chart])


def _agreement(found: dict[str, Any]) -> Section:
    from sltt.commands import figures

    rows, text = [], []
    for row in found["rows"]:
        where = f"{_tau(row['tau'])}T = {row['steps']}, after {row['epochs']} epochs"
        text.append(f"At {where}: {row['advice']}")
        for one in row["agreement"]:
            rows.append(
                [
                    Cell("recipe's" if row["tau"] is None else f"{row['tau']:g}", row["tau"]),
                    Cell(str(row["steps"]), row["steps"]),
                    Cell(str(row["epochs"]), row["epochs"]),
                    Cell(one["rule"], one["rule"]),
                    *(_number(one[key], ".3f") for key in ("cosine", "norm_ratio", "dropped")),
                ]
            )
    layers = [name for name, (cosine, _) in found["rows"][0]["agreement"][0]["layers"].items() if cosine is not None]
    columns = [f"{_tau(row['tau'])}T={row['steps']}, {row['epochs']} ep." for row in found["rows"]]
    spatial = [row["agreement"][0]["layers"] for row in found["rows"]]
    values = [[max(column[layer][0] or 0.0, 0.0) for column in spatial] for layer in layers]
    chart = Chart(
        "agreement",
        "Cosine of SLTT's gradient with that of exact BPTT, by layer",
        figures.heat_map(values, layers, [column.replace(", ", "\n") for column in columns], ""),
    )
    headings = "τ", "T", "epochs", "rule", "cosine", "norm / BPTT", "dropped"
    title = "Gradients beside that of exact BPTT"
    return Section(f"Is it safe: {found['recipe']}", text, [TableOfCells("agreement", title, headings, rows)], [chart])


def _few_shots(found: dict[str, Any], colours: dict[str, str]) -> Section:
    from sltt.commands import figures

    seen = list(itertools.accumulate(found["sizes"]))
    rows: list[list[Cell]] = []
    lines: dict[str, list[figures.Points]] = {}
    for row in found["rows"]:
        if not row["accuracies"]:
            rows.append([Cell(row["rule"], row["rule"]), Cell("died", ""), *[Cell("", "")] * (len(SCORES) - 1)])
            continue
        lines[row["rule"]] = [(seen, one) for one in row["accuracies"]]
        means = (Cell(scores_text(row[name]), statistics.mean(row[name])) for name in SCORES)
        rows.append([Cell(row["rule"], row["rule"]), *means])
    base, way, count = found["sizes"][0], found["sizes"][1], len(found["sizes"]) - 1
    text = [
        f"{base} base classes train the network, which is then frozen. {count} × {way} classes follow, each known from "
        f"{found['shot']} samples. A test sample belongs to the class whose mean embedding is nearest, by cosine; for "
        "pixels, the mean image. Base and new: mean accuracy of a class after the last session. Harmonic: their "
        "harmonic mean. Average: over the base training and all sessions."
    ]
    chart = Chart(
        "sessions",
        "Accuracy of all classes seen, after each session; a line for each seed",
        figures.lines(lines, colours, "classes seen", "test accuracy", percent=True),
    )
    table = TableOfCells("fscil", "one row a rule", ("rule", *SCORES), rows)
    return Section(f"Few-shot classes: {found['recipe']}", text, [table], [chart])


def _rates(found: dict[str, Any]) -> Section:
    from sltt.commands import figures

    text = [
        f"{found['optimizer']} with {found['rule']}, batches of {found['batch_size']}: the learning rate rises from "
        f"batch to batch. {advice(found)}"
    ]
    drawn = figures.rates(found["rates"], found["losses"], found["suggestion"])
    rows = [[Cell(f"{x:.2g}", x), Cell(f"{y:.4f}", y)] for x, y in zip(found["rates"], found["losses"], strict=True)]
    table = TableOfCells("rates", "one row a batch", ("learning rate", "loss, moving average"), rows)
    return Section(
        f"Learning rate: {found['recipe']}", text, [table], [Chart("rates", "Loss over the learning rate", drawn)]
    )


def _spikes(found: Gathered) -> Section:
    """What one test sample does in the network of the first run that loads; a note for each before it."""
    from sltt.commands import figures
    from sltt.commands.sample import first_test_sample

    section = Section("Spikes of a trained network")
    preferred = sorted(found.runs, key=lambda run: not rule_label(run).startswith("SLTT"))
    for run in preferred:
        try:
            sample = first_test_sample(run)
        except Exception as error:  # of the user's own classes too
            found.notes.append(f"The spikes of {run} are left out: {cause(error)}")
            continue
        rates = {layer: float(fired.mean()) for layer, fired in sample.spikes.items()}
        section.text.append(f"The first test sample through the network of {run.name}.")
        section.film = sample.frames()
        section.charts = [
            Chart("raster", f"Input, spikes of about {RASTER_NEURONS} neurons of each layer, and output, over time",
                  figures.raster(sample, RASTER_NEURONS)),
            Chart("firing-rates", "Firing rates by layer, of this sample", figures.bars(rates, RATE)),
        ]  # fmt: skip
        return section
    section.text.append("Left out: see the notes at the top.")
    return section


def _score(scores: Sequence[float | None], metric: str) -> Cell:
    known = finite(scores)
    return Cell(scores_text(scores, metric), statistics.mean(known) if known else "")


def _number(value: float | None, form: str) -> Cell:
    return Cell("–" if value is None else format(value, form), value)


def _bytes_cell(value: int, remark: str = "") -> Cell:
    return Cell((f"{value / 1e6:.3g} MB" if value < 1e9 else megabytes(value)) + remark, value)


def _rule_and_steps(one: dict[str, Any]) -> list[Cell]:
    return [Cell(one["rule"], one["rule"]), Cell(str(one["steps"]), one["steps"])]


def _tau(tau: float | None) -> str:
    return "" if tau is None else f"τ = {tau:g}, "
