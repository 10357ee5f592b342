"""Read the results of commands, and runs, from folders: the report shows them."""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sltt import rules
from sltt.commands.failures import cause
from sltt.commands.tables import Cell
from sltt.commands.vary import label_row
from sltt.frozen import arguments_of
from sltt.metrics import finite_scores, is_share
from sltt.training.checkpoints import load_checkpoint
from sltt.training.console import Console, as_json
from sltt.training.files import CONFIG, LAST, write_atomically
from sltt.training.runs import find_last


def give(result: Any, args: argparse.Namespace, name: str, show: Callable[[Console], None]) -> None:
    """Print what a command found, as JSON or for people, and keep it where --save says."""
    text = as_json(result)
    if args.save:
        args.save.mkdir(parents=True, exist_ok=True)
        write_atomically(args.save / name, lambda file: file.write(text.encode()))
    if args.json:
        print(text)
        return
    report = Console()
    show(report)
    if args.save:
        report.line(f"written to {args.save / name}")


def scores_text(scores: Sequence[float | None], metric: str = "accuracy") -> str:
    """Return the mean of a metric over seeds, ± the standard deviation where there are several."""
    finite = finite_scores(scores)
    form = ".1%" if is_share(metric) else ".3g"
    spread = f" ± {statistics.stdev(finite):{form}}" if len(finite) > 1 else ""
    return f"{statistics.mean(finite):{form}}{spread}" if finite else "–"


def scores_cell(scores: Sequence[float | None], metric: str = "accuracy") -> Cell:
    """Return the same as a cell of a table, with the mean as its value."""
    finite = finite_scores(scores)
    return Cell(scores_text(scores, metric), statistics.mean(finite) if finite else None)


# of the files that commands write, the attribute of `Gathered`
KINDS = {"compare": "comparisons", "profile": "profiles", "agreement": "agreements", "fscil": "fewshots"}


@dataclass(frozen=True)
class Curve:
    """A run: its rule, a row of metrics an epoch, and the epoch whose weights it selected."""

    rule: str
    history: list[dict[str, Any]]
    best: int


@dataclass
class Gathered:
    """Results of each command, trainings with at least one epoch by their folders, and what was left out and why."""

    comparisons: list[dict[str, Any]] = field(default_factory=list)
    profiles: list[dict[str, Any]] = field(default_factory=list)
    agreements: list[dict[str, Any]] = field(default_factory=list)
    fewshots: list[dict[str, Any]] = field(default_factory=list)
    runs: dict[Path, Curve] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def gather(folders: Sequence[Path]) -> Gathered:
    """Read the folders of runs, and those that the commands' --save named, with the runs in them.

    What is damaged is left out, with a note. No class is made, and no code of a run or a result runs.

    Raises ValueError for a folder that is not there, or where nothing can be shown.
    """
    results = Gathered()
    for folder in (one if one.name.strip(".") else one.resolve() for one in folders):  # . has no name
        if not folder.is_dir():
            raise ValueError(f"there is no folder {folder}: name one of a run, or one given to --save")
        runs = sorted({path.parent for name in (CONFIG, LAST) for at in ("", "*/") for path in folder.glob(at + name)})
        files = [(folder / f"{name}.json", kind) for name, kind in KINDS.items() if (folder / f"{name}.json").is_file()]
        if not runs and not files:
            raise ValueError(f"{folder} has nothing to report: neither a run nor what a command wrote with --save")
        for path, kind in files:
            try:
                getattr(results, kind).append(_read(path))
            except Exception as error:  # a file may hold anything
                results.notes.append(f"{path} is left out: {cause(error)}")
        for run in runs:
            try:
                results.runs[run] = _read_run(run)
            except Exception as error:
                results.notes.append(f"The run {run} is left out: {cause(error)}")
    if not any([results.runs, *(getattr(results, kind) for kind in KINDS.values())]):
        raise ValueError(" ".join(results.notes))
    return results


def _read_run(run: Path) -> Curve:
    """Read what the report shows of a run, from its last checkpoint."""
    checkpoint = load_checkpoint(last) if (last := find_last(run)) else None
    if checkpoint is None or not checkpoint["progress"]["history"]:
        raise ValueError("it has not finished an epoch")
    progress = checkpoint["progress"]
    return Curve(rule_of(checkpoint["config"]), progress["history"], progress["best_epoch"] or progress["epoch"])


def _read(path: Path) -> dict[str, Any]:
    """Read a command's result; a number that is not finite is None, and what varied is in a rule's name."""
    result = json.loads(path.read_bytes(), parse_constant=lambda name: None)
    for row in [*result.get("costs", ()), *result.get("fits", ()), *result.get("rows", ())]:
        if "rule" in row:
            row["rule"] = label_row(row["rule"], row.get("varied", {}))
    return result


def run_names(results: Gathered) -> dict[Path, str]:
    """Return a name of each run: of its row, if it is one of a comparison, or of its folder."""
    rows = [row for comparison in results.comparisons for row in comparison["rows"]]
    compared = {run: row["rule"] for row in reversed(rows) for run in results.runs if run.name in row["runs"]}
    return {run: compared.get(run, run.name) for run in results.runs}


def rule_of(config: dict[str, Any]) -> str:
    """Return the rule of a run's settings, of a recipe or made in Python, as for `sltt compare`: SLTT:k=1.

    It has the settings that are not the defaults. The rule is not made.
    """
    if not isinstance(rule := config.get("rule"), dict):
        return str(rule or "own rule")
    own = {name: value for name, value in rule.items() if name not in ("class_path", "class")}
    settings: dict[str, Any] = own.get("init_args", own) or {}
    name = str(rule.get("class_path") or rule.get("class") or "own rule").rpartition(".")[2]
    kind = getattr(rules, name, None)
    parameters = arguments_of(kind) if isinstance(kind, type) else {}
    defaults = {key: argument.default for key, argument in parameters.items()}
    defaults |= {key: None for key in settings if key not in defaults}
    options = (f"{key}={settings[key]}" for key in defaults if settings.get(key, defaults[key]) != defaults[key])
    return ":".join([name, *options])
