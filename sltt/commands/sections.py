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
from sltt.commands.tables import Cell, Table, bytes_cell, numeral
from sltt.commands.verdict import advice_on, answers, shared_steps, verdicts
from sltt.metrics import is_share, score_text
from sltt.training.console import metric_of
from sltt.training.sample import read_sample

MEMORY = "Memory is the peak of one training batch, above what is allocated before it."
RASTER_NEURONS = 60  # of each layer
RATE = "share of neurons that spike in a step"


def sections(results: Gathered) -> list[Section]:
    """Make tables and figures of what was gathered, in the order in which a reader asks."""
    rules = [row["rule"] for comparison in results.comparisons for row in comparison["rows"]]
    rules += [row["rule"] for profile in results.profiles for row in profile["costs"]]
    rules += [row["rule"] for few_shots in results.fewshots for row in few_shots["rows"]]
    names = run_names(results)
    colours = figures.palette([*rules, *names.values()])
    page = [_summary(results)] if verdicts(results) or results.agreements else []
    page += [_comparison(comparison) for comparison in results.comparisons]
    if results.runs:
        page.append(_training(results, names, colours))
    for profile in results.profiles:
        page += [_costs(profile, colours), _energy(profile)]
    page += [_agreement(agreements, results) for agreements in results.agreements]
    page += [_few_shots(few_shots, colours) for few_shots in results.fewshots]
    if results.runs:
        page.append(_spikes(results))
    for place, section in enumerate(page, 1):  # two profiles do not write to the same file
        for part in [*section.tables, *section.charts]:
            part.name = f"{place}-{part.name}"
    return page


def _summary(results: Gathered) -> Section:
    """Give the verdict in words, and three numbers for each rule."""
    metric = next((comparison["metric"] for comparison in results.comparisons), "accuracy").replace("_", " ")
    unit = "s / epoch" if results.comparisons else "s / batch"
    rules = verdicts(results)
    steps = shared_steps(rules)
    heading = "memory of a batch" + (f", T = {steps}" if steps else "")
    rows = [
        {
            "rule": verdict.rule,
            f"test {metric}": Cell(scores_text(verdict.scores, verdict.metric), verdict.score),
            heading: bytes_cell(verdict.memory[steps]) if verdict.memory.get(steps) else numeral(None),
            unit: numeral(verdict.seconds and verdict.seconds[0], ".2f"),
        }
        for verdict in rules
    ]
    return Section("In short", answers(results), [Table(rows, "short")] if rows else [])


def _comparison(comparison: dict[str, Any]) -> Section:
    sweep = any(row.get("varied") for row in comparison["rows"])
    trained = "All" if sweep else "All rules"
    text = [
        f"{trained} train the same network on the same data, with the same epochs and seeds. {MEMORY} Multiplications "
        "are those of one batch. The cosine compares the rule's gradient with BPTT's, after the training."
    ]
    title = f"{'Values' if sweep else 'Rules'} compared on {comparison['recipe']}"
    rows = comparison["rows"]
    return Section(title, text, [comparison_table(rows, comparison["metric"]), *ratio_tables(rows)])


def _training(results: Gathered, names: dict[Path, str], colours: dict[str, str]) -> Section:
    scores: dict[str, dict[str, list[figures.Points]]] = {}  # by metric and label
    loss: dict[str, list[figures.Points]] = {}
    rows = []
    for run, label in names.items():
        history = results.runs[run].history
        epochs = [row["epoch"] for row in history]
        metric = metric_of(history[0])
        part = "train" if history[0][f"validation_{metric}"] is None else "validation"
        key = f"{part}_{metric}"
        scores.setdefault(metric, {}).setdefault(label, []).append((epochs, [row[key] for row in history]))
        loss.setdefault(label, []).append((epochs, [row["train_loss"] for row in history]))
        best = next(row for row in history if row["epoch"] == results.runs[run].best)
        seconds = statistics.median(row["seconds"] for row in history)
        rule, last = label if label != run.name else results.runs[run].rule, history[-1]
        scored = {f"best {metric}": Cell(score_text(metric, best[key]), best[key])}
        of_last = {"last loss": numeral(last["train_loss"], ".4f"), "firing rate": numeral(last["firing_rate"], ".3f")}
        named = {"run": run.name, "rule": rule, "epochs": numeral(len(epochs))}
        rows.append(named | scored | of_last | {"s / epoch": numeral(seconds, ".2f")})
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


def _costs(profile: dict[str, Any], colours: dict[str, str]) -> Section:
    costs = profile["costs"]
    parts = [key for key in costs[0]["memory"] if key not in ("batch", "total")]
    peaks, times = {}, {}
    for rule in dict.fromkeys(cost["rule"] for cost in costs):
        own = [cost for cost in costs if cost["rule"] == rule]
        steps = [cost["steps"] for cost in own]
        peaks[rule] = [(steps, [cost["memory"]["batch"] / 1e6 for cost in own])]
        times[rule] = [(steps, [cost["seconds"]["total"] for cost in own])]
    most = max(cost["steps"] for cost in costs)
    last = [cost for cost in costs if cost["steps"] == most]
    bars = {key: [cost["memory"][key] / 1e6 for cost in last] for key in parts}
    stacked = figures.stacked_bars(bars, [cost["rule"] for cost in last], "MB")
    charts = [
        Chart("memory", "Memory of a training batch over T", figures.lines(peaks, colours, "T", "MB")),
        Chart("time", "Seconds of a training batch over T", figures.lines(times, colours, "T", "seconds")),
        Chart("parts", f"All that is allocated at the peak, by parts, at T = {most}", stacked),
    ]
    batch = f"{profile['recipe']} with {profile['batch']} samples, on {profile['device']}"
    text = [f"A training batch of {batch}. {MEMORY}"]
    return Section("What a rule costs", text, cost_tables(profile), charts)


def _energy(profile: dict[str, Any]) -> Section:
    rates = {layer["name"]: layer["firing_rate"] for layer in profile["layers"] if layer["operations"] is None}
    state = "with trained weights" if profile["trained"] else "with random weights"
    text = [f"The inference of one sample, {state}. Use it to compare networks, not to plan a chip."]
    chart = Chart("firing-rates-random", f"Firing rates by layer, {state}", figures.bars(rates, RATE))
    return Section("Spikes and energy", text, [*energy_tables(profile["energy"]), layer_table(profile)], [chart])


def _agreement(agreements: dict[str, Any], results: Gathered) -> Section:
    """Show what rules drop of the gradient, with the advice from the strongest evidence."""
    text = [f"At {where(row)}: {advice_on(row, agreements['recipe'], results)}" for row in agreements["rows"]]
    tables = [agreement_table(agreements["rows"]), gradient_table(agreements["rows"][-1])]
    return Section(f"What each rule drops of the gradient: {agreements['recipe']}", text, tables)


def _few_shots(results: dict[str, Any], colours: dict[str, str]) -> Section:
    seen = list(itertools.accumulate(results["sizes"]))
    lines = {row["rule"]: [(seen, y) for y in row["accuracies"]] for row in results["rows"] if row["accuracies"]}
    base, way, count = results["sizes"][0], results["sizes"][1], len(results["sizes"]) - 1
    text = [
        f"The network trains on {base} base classes and is then frozen. {count} × {way} classes follow, each with "
        f"{results['shot']} samples. A test sample gets the class with the nearest mean embedding, by cosine; for "
        "pixels, with the nearest mean image. A_base and A_new are mean accuracies of a class after the last session, "
        "in %, and A_h is their harmonic mean. A_avg is over the base training and all sessions."
    ]
    chart = Chart(
        "sessions",
        "Accuracy of all classes seen, after each session; a line for each seed",
        figures.lines(lines, colours, "classes seen", "test accuracy", percent=True),
    )
    return Section(f"Few-shot classes: {results['recipe']}", text, [score_table(results["rows"])], [chart])


def _spikes(results: Gathered) -> Section:
    """Show one sample in the first run that kept it; note each run before it."""
    section = Section("Spikes of a trained network")
    preferred = sorted(results.runs, key=lambda run: not results.runs[run].rule.startswith("SLTT"))
    for run in preferred:
        try:
            sample = read_sample(run)
        except Exception as error:  # a file may hold anything
            results.notes.append(f"The spikes of {run} are left out: {cause(error)}")
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
