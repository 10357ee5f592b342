"""What the commands kept in folders, and the runs in them: what the report shows."""

import argparse
import json
import re
import statistics
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sltt.commands.hints import locate
from sltt.commands.parsing import rule_settings
from sltt.commands.tables import Cell
from sltt.commands.vary import labelled
from sltt.metrics import Accuracy, finite, improves, is_share
from sltt.training.checkpoints import CheckpointError, saved_part
from sltt.training.console import Console, as_json
from sltt.training.files import read_table, write_atomically
from sltt.training.runs import CONFIG, LAST, METRICS

NOT_HERE = (ValueError, TypeError, AttributeError, ImportError)  # what it raises to make a class that is not here


def give(found: Any, known: argparse.Namespace, name: str, show: Callable[[Console], None]) -> None:
    """Print what a command found, as JSON or for people, and keep it where --save says."""
    text = as_json(found)
    if known.save:
        known.save.mkdir(parents=True, exist_ok=True)
        write_atomically(known.save / name, lambda file: file.write(text.encode()))
    if known.json:
        print(text)
        return
    report = Console()
    show(report)
    if known.save:
        report.line(f"written to {known.save / name}")


def scores_text(scores: Sequence[float | None], metric: str = "accuracy") -> str:
    """The mean of a metric over seeds, ± the standard deviation where there are several."""
    known = finite(scores)
    form = ".1%" if is_share(metric) else ".3g"
    spread = f" ± {statistics.stdev(known):{form}}" if len(known) > 1 else ""
    return f"{statistics.mean(known):{form}}{spread}" if known else "–"


def scores_cell(scores: Sequence[float | None], metric: str = "accuracy") -> Cell:
    """The same as a cell of a table, which is sorted by the mean."""
    known = finite(scores)
    return Cell(scores_text(scores, metric), statistics.mean(known) if known else None)


@dataclass
class Gathered:
    """What folders hold.

    Attributes:
        comparisons: of `sltt compare`.
        profiles: of `sltt profile`.
        agreements: of `sltt agreement`.
        fewshots: of `sltt fscil`.
        rates: of `sltt lr`.
        runs: folders of trainings with at least one epoch.
        notes: what was left out, and why.
    """

    comparisons: list[dict[str, Any]] = field(default_factory=list)
    profiles: list[dict[str, Any]] = field(default_factory=list)
    agreements: list[dict[str, Any]] = field(default_factory=list)
    fewshots: list[dict[str, Any]] = field(default_factory=list)
    rates: list[dict[str, Any]] = field(default_factory=list)
    runs: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def gather(folders: Sequence[Path]) -> Gathered:
    """Read the folders of runs, and those that the commands' --save named, with the runs in them.

    Raises ValueError for a folder that is not there or holds nothing of the kind, or a file that is damaged.
    """
    found = Gathered()
    kinds = {"compare": found.comparisons, "profile": found.profiles, "agreement": found.agreements}
    kinds |= {"fscil": found.fewshots, "lr": found.rates}
    for folder in (one if one.name.strip(".") else one.resolve() for one in folders):  # . has no name
        if not folder.is_dir():
            raise ValueError(f"there is no folder {folder}: name one of a run, or one given to --save")
        runs = [path.parent for path in sorted([*folder.glob(CONFIG), *folder.glob(f"*/{CONFIG}")])]
        there = [(folder / f"{kind}.json", into) for kind, into in kinds.items() if (folder / f"{kind}.json").is_file()]
        if not runs and not there:
            raise ValueError(
                f"{folder} has nothing to report: expected the folder of a run, or one that sltt compare, profile, "
                "agreement, fscil or lr wrote with --save"
            )
        for path, into in there:
            try:
                into.append(_read(path))
            except ValueError as error:
                raise ValueError(f"{path} is damaged: {error}; run the command that wrote it again") from error
        for run in runs:
            if (run / METRICS).is_file() and read_table(run / METRICS):
                found.runs.append(run)
            else:
                found.notes.append(f"The run {run} is left out: it has not finished an epoch.")
    return found


def _read(path: Path) -> dict[str, Any]:
    """What a command kept; a number that is not finite is None, and each rule has the name that runs have."""
    found = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda name: None)
    for row in [*found.get("costs", ()), *found.get("fits", ()), *found.get("rows", ())]:
        if "rule" in row:
            row["rule"] = labelled(_asked_label(row["rule"]), row.get("varied", {}))
    if path.name == "compare.json":
        found = {"metric": "accuracy", "higher_is_better": True, **found}  # what an earlier version did not say
        found["rows"] = [{"scores": row.pop("accuracies", []), **row} for row in found["rows"]]
    return found


def run_names(found: Gathered) -> dict[Path, str]:
    """The rule of each run, with the data, the network or T where runs of that rule differ in them.

    A run of a comparison has the name of its row, which has the values of what varied.
    """
    rows = [row for one in found.comparisons for row in one["rows"]]
    compared = {run: row["rule"] for row in reversed(rows) for run in found.runs if run.name in row.get("runs", ())}
    rules, about = {run: rule_label(run) for run in found.runs}, {run: _about(run) for run in found.runs}
    names = {}
    for run, rule in rules.items():
        alike = [about[other] for other in found.runs if rules[other] == rule]
        told = [part for i, part in enumerate(about[run]) if any(other[i] != part for other in alike)]
        names[run] = compared.get(run, ", ".join([rule, *told]))
    return names


def rule_label(run: Path) -> str:
    """The rule of a run as it is written for `sltt compare`: SLTT:k=1."""
    return rule_of(_config(run))


def _about(run: Path) -> tuple[str, ...]:
    """Data, network and T of a run."""
    config = _config(run)
    objects = ((config.get(name) or {}).get("class_path", "its own") for name in ("data", "model"))
    return (*(path.rpartition(".")[2] for path in objects), f"T = {config.get('steps')}")


def best_epoch(run: Path, epochs: Sequence[dict[str, Any]], column: str) -> dict[str, Any]:
    """The epoch whose weights a run selected; without a checkpoint, that whose metric, in this column, is the best."""
    with suppress(CheckpointError, FileNotFoundError, StopIteration):
        progress = saved_part(run / LAST, "progress")
        return next(row for row in epochs if row["epoch"] == (progress["best_epoch"] or progress["epoch"]))
    try:
        metric = locate(_config(run)["metric"]["class_path"])
    except (KeyError, TypeError, ImportError, AttributeError):  # an earlier version, or a class that is not here
        metric = Accuracy
    return max(epochs, key=lambda row: improves(metric, row[column]))


def _config(run: Path) -> dict[str, Any]:
    return yaml.safe_load((run / CONFIG).read_text(encoding="utf-8"))


def rule_of(config: dict[str, Any]) -> str:
    """The rule of a configuration, likewise; of a class that is not here its name."""
    rule = config["rule"]
    if rule is None:  # of a script
        return "own rule"
    try:
        return _label(rule["class_path"], rule.get("init_args") or {})
    except NOT_HERE:
        return rule["class_path"].rpartition(".")[2]


def _asked_label(rule: str) -> str:
    """The same for a rule as it was asked for: settings that are defaults, or in another order, make no other rule."""
    name, settings = rule_settings(rule)
    values = {key: yaml.safe_load(text) for key, text in settings.items()}
    try:
        return _label(name if "." in name else f"sltt.{name}", values)
    except NOT_HERE:  # a rule that died
        return rule


def _label(path: str, settings: dict[str, Any]) -> str:
    name, shown = repr(locate(path)(**settings)).removesuffix(")").split("(", 1)
    return ":".join([name, *re.split(r", (?![^{]*})", shown)]) if shown else name
