"""Make the sections of `sltt report`: the answer first, then figures and tables of measurements and of runs."""

import itertools
import statistics
from pathlib import Path
from typing import Any

from sltt.commands import figures
from sltt.commands.agreement import agreement_table, gradient_table, where
from sltt.commands.compare import comparison_table, ratio_tables
from sltt.commands.failures import cause
from sltt.commands.fscil import score_table
from sltt.commands.page import Chart, Section
from sltt.commands.profile import cost_tables, energy_tables, layer_table
from sltt.commands.results import Gathered, run_names, scores_text
from sltt.commands.tables import Cell, Table, bytes_cell, number
from sltt.commands.verdict import advice_on, answers, shared_steps, verdicts
from sltt.metrics import is_share, score_text
from sltt.training.console import metric_of
from sltt.training.sample import read_sample

MEMORY = "Memory is the peak of one training batch, above what is allocated before it."
RASTER_NEURONS = 60  # of each layer
RATE = "share of neurons that spike in a step"


def sections(found: Gathered) -> list[Section]:
    """Make tables and figures of what was gathered, in the order in which a reader asks."""
    asked = [row["rule"] for one in found.comparisons for row in one["rows"]]
    asked += [row["rule"] for one in found.profiles for row in one["costs"]]
    asked += [row["rule"] for one in found.fewshots for row in one["rows"]]
    names = run_names(found)
    colours = figures.palette([*asked, *names.values()])
    made = [_summary(found)] if verdicts(found) or found.agreements else []
    made += [_comparison(one) for one in found.comparisons]
    if found.runs:
        made.append(_training(found, names, colours))
    for one in found.profiles:
        made += [_costs(one, colours), _energy(one)]
    made += [_agreement(one, found) for one in found.agreements]
    made += [_few_shots(one, colours) for one in found.fewshots]
    if found.runs:
        made.append(_spikes(found))
    for place, section in enumerate(made, 1):  # two profiles do not write to the same file
        for part in [*section.tables, *section.charts]:
            part.name = f"{place}-{part.name}"
    return made


def _summary(found: Gathered) -> Section:
    """Give the verdict in words, and three numbers for each rule."""
    metric = next((one["metric"] for one in found.comparisons), "accuracy").replace("_", " ")
    unit = "s / epoch" if found.comparisons else "s / batch"
    rules = verdicts(found)
    steps = shared_steps(rules)
    heading = "memory of a batch" + (f", T = {steps}" if steps else "")
    rows = [
        {
            "rule": one.rule,
            f"test {metric}": Cell(scores_text(one.scores, one.metric), one.score),
            heading: bytes_cell(one.memory[steps]) if one.memory.get(steps) else number(None),
            unit: number(one.seconds and one.seconds[0], ".2f"),
        }
        for one in rules
    ]
    return Section("In short", answers(found), [Table(rows, "short")] if rows else [])


def _comparison(found: dict[str, Any]) -> Section:
    sweep = any(row.get("varied") for row in found["rows"])
    trained = "All" if sweep else "All rules"
    text = [
        f"{trained} train the same network on the same data, with the same epochs and seeds. {MEMORY} Multiplications "
        "are those of one batch. The cosine compares the rule's gradient with BPTT's, after the training."
    ]
    title = f"{'Values' if sweep else 'Rules'} compared on {found['recipe']}"
    return Section(title, text, [comparison_table(found["rows"], found["metric"]), *ratio_tables(found["rows"])])


def _training(found: Gathered, names: dict[Path, str], colours: dict[str, str]) -> Section:
    scores: dict[str, dict[str, list[figures.Points]]] = {}  # by metric and label
    loss: dict[str, list[figures.Points]] = {}
    rows = []
    for run, label in names.items():
        history = found.runs[run].history
        epochs = [row["epoch"] for row in history]
        metric = metric_of(history[0])
        part = "train" if history[0][f"validation_{metric}"] is None else "validation"
        key = f"{part}_{metric}"
        scores.setdefault(metric, {}).setdefault(label, []).append((epochs, [row[key] for row in history]))
        loss.setdefault(label, []).append((epochs, [row["train_loss"] for row in history]))
        best = next(row for row in history if row["epoch"] == found.runs[run].best)
        seconds = statistics.median(row["seconds"] for row in history)
        rows.append(
            {
                "run": run.name,
                "rule": label if label != run.name else found.runs[run].rule,
                "epochs": number(len(epochs)),
                f"best {metric}": Cell(score_text(metric, best[key]), best[key]),
                "last loss": number(history[-1]["train_loss"], ".4f"),
                "firing rate": number(history[-1]["firing_rate"], ".3f"),
                "s / epoch": number(seconds, ".2f"),
            }
        )
    titles = {metric: metric.replace("_", " ") for metric in scores}
    over = [
        Chart(
            metric.replace("_", "-"),
            f"{titles[metric].capitalize()} over epochs; a line for each seed",
            figures.lines(curves, colours, "epoch", metric, percent=is_share(metric)),
        )
        for metric, curves in scores.items()
    ]
    measured = " and ".join(titles.values()).capitalize()
    return Section(
        "Training",
        [f"{measured} on the validation samples, or on the training samples if there are no others."],
        [Table(rows, "runs")],
        [*over, Chart("loss", "Training loss over epochs", figures.lines(loss, colours, "epoch", "loss"))],
    )


def _costs(found: dict[str, Any], colours: dict[str, str]) -> Section:
    costs = found["costs"]
    parts = [key for key in costs[0]["memory"] if key not in ("batch", "total")]
    peaks, times = {}, {}
    for rule in dict.fromkeys(one["rule"] for one in costs):
        own = [one for one in costs if one["rule"] == rule]
        steps = [one["steps"] for one in own]
        peaks[rule] = [(steps, [one["memory"]["batch"] / 1e6 for one in own])]
        times[rule] = [(steps, [one["seconds"]["total"] for one in own])]
    most = max(one["steps"] for one in costs)
    last = [one for one in costs if one["steps"] == most]
    bars = {key: [one["memory"][key] / 1e6 for one in last] for key in parts}
    stacked = figures.stacked_bars(bars, [one["rule"] for one in last], "MB")
    charts = [
        Chart("memory", "Memory of a training batch over T", figures.lines(peaks, colours, "T", "MB")),
        Chart("time", "Seconds of a training batch over T", figures.lines(times, colours, "T", "seconds")),
        Chart("parts", f"All that is allocated at the peak, by parts, at T = {most}", stacked),
    ]
    text = [f"A training batch of {found['recipe']} with {found['batch']} samples, on {found['device']}. {MEMORY}"]
    return Section("What a rule costs", text, cost_tables(found), charts)


def _energy(found: dict[str, Any]) -> Section:
    rates = {one["name"]: one["firing_rate"] for one in found["layers"] if one["operations"] is None}
    state = "with trained weights" if found["trained"] else "with random weights"
    text = [f"The inference of one sample, {state}. Use it to compare networks, not to plan a chip."]
    chart = Chart("firing-rates-random", f"Firing rates by layer, {state}", figures.bars(rates, RATE))
    return Section("Spikes and energy", text, [*energy_tables(found["energy"]), layer_table(found)], [chart])


def _agreement(one: dict[str, Any], found: Gathered) -> Section:
    """Show what rules drop of the gradient, with the advice from the strongest evidence."""
    text = [f"At {where(row)}: {advice_on(row, one['recipe'], found)}" for row in one["rows"]]
    tables = [agreement_table(one["rows"]), gradient_table(one["rows"][-1])]
    return Section(f"What each rule drops of the gradient: {one['recipe']}", text, tables)


def _few_shots(found: dict[str, Any], colours: dict[str, str]) -> Section:
    seen = list(itertools.accumulate(found["sizes"]))
    lines = {row["rule"]: [(seen, one) for one in row["accuracies"]] for row in found["rows"] if row["accuracies"]}
    base, way, count = found["sizes"][0], found["sizes"][1], len(found["sizes"]) - 1
    text = [
        f"The network trains on {base} base classes and is then frozen. {count} × {way} classes follow, each with "
        f"{found['shot']} samples. A test sample gets the class with the nearest mean embedding, by cosine; for "
        "pixels, with the nearest mean image. A_base and A_new are mean accuracies of a class after the last session, "
        "in %, and A_h is their harmonic mean. A_avg is over the base training and all sessions."
    ]
    chart = Chart(
        "sessions",
        "Accuracy of all classes seen, after each session; a line for each seed",
        figures.lines(lines, colours, "classes seen", "test accuracy", percent=True),
    )
    return Section(f"Few-shot classes: {found['recipe']}", text, [score_table(found["rows"])], [chart])


def _spikes(found: Gathered) -> Section:
    """Show one sample in the first run that kept it; note each run before it."""
    section = Section("Spikes of a trained network")
    preferred = sorted(found.runs, key=lambda run: not found.runs[run].rule.startswith("SLTT"))
    for run in preferred:
        try:
            sample = read_sample(run)
        except Exception as error:  # a file may hold anything
            found.notes.append(f"The spikes of {run} are left out: {cause(error)}")
            continue
        section.text.append(f"One sample in the network of {run.name}: a validation sample, if there is one.")
        section.charts = [
            Chart("raster", f"Input, spikes of about {RASTER_NEURONS} neurons of each layer, and output, over time",
                  figures.raster(sample, RASTER_NEURONS)),
            Chart("firing-rates", "Firing rates by layer, of this sample", figures.bars(sample.rates, RATE)),
        ]  # fmt: skip
        return section
    section.text.append("Left out: see the notes at the top.")
    return section
