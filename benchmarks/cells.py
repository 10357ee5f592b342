"""Rows of docs/results, and the names and cells that a page shows."""

import csv
import json
import re
import statistics
from collections.abc import Iterable, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from logs import mark

Row = dict[str, Any]
Cells = Sequence[Sequence[str]]
SERIES = "japanese-vowels", "basic-motions"  # tasks with a table of their own: the advice was not calibrated on them


def markdown(headings: Sequence[str], rows: Cells) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def recorded(path: Path) -> list[Row]:
    """Return the rows of a file, none if it is not there."""
    return json.loads(path.read_text()) if path.exists() else []


def write(path: Path, found: Any) -> None:
    """Write results as JSON, a value in a line; enter a log of docs with its sources and its machine."""
    mark(path)
    path.write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n")


def load(results: Path, name: str) -> Any:
    return json.loads((results / f"{name}.json").read_text())


def grouped(rows: Iterable[Row], *keys: str) -> dict[Any, list[Row]]:
    """The rows by their value of a key, or by their tuple of several."""
    found: dict[Any, list[Row]] = {}
    for row in rows:
        found.setdefault(itemgetter(*keys)(row), []).append(row)
    return found


def by(rows: Iterable[Row], key: str) -> dict[Any, Row]:
    """The rows by a key that each has another value of."""
    return {row[key]: row for row in rows}


def family(row: Row) -> str:
    """Name the table that has a row of tasks.json: "series", "recurrent", or "" for the table of all rules."""
    task = row["task"]
    return "series" if task.startswith(SERIES) else "recurrent" if task.endswith(", recurrent") else ""


def fastest(times: dict[str, list[float]], name: str) -> str | None:
    """Name the form of a case of the least median time: of `JAX SLTT, by hand` and `JAX SLTT, automatic`, say."""
    forms = (form for form in times if form.startswith(name))
    return min(forms, key=lambda form: statistics.median(times[form]), default=None)


def accuracies(rows: Iterable[Row]) -> dict[str, list[float]]:
    """Return the test accuracies of each rule, one for each seed."""
    return {shown(row["rule"]): row["accuracies"] for row in rows}


def of_task(results: Path, task: str) -> dict[str, list[float]]:
    """Return the accuracies on a task in tasks.json."""
    return accuracies(row for row in load(results, "tasks") if row["task"] == task)


def compared(results: Path, name: str) -> dict[str, list[float]]:
    """Return the accuracies in a comparison that paper.py made."""
    return accuracies(load(results, f"paper/{name}")["rows"])


def last_epochs(results: Path, name: str) -> dict[str, list[float]]:
    """Return the accuracies in a CSV of runs: each row is an epoch, and the last ones count."""
    with (results / f"{name}.csv").open() as file:
        last = {(row["rule"], row["seed"]): float(row["test_accuracy"]) for row in csv.DictReader(file)}
    return {shown(rule): [reached for (of, _), reached in last.items() if of == rule] for rule, _ in last}


def shown(rule: str) -> str:
    """A rule as the text names it: SLTT-1, TBPTT(window=2)."""
    rule = re.sub(r"SLTT\(k=(\d+)\)", r"SLTT-\1", rule.replace("SLTT:k=", "SLTT-"))
    rule = rule.removesuffix("()").removesuffix(":rescale=true")
    name, _, options = rule.partition(":")
    return f"{name}({options})" if options else rule


def spread(found: tuple[float, float, float] | None) -> str:
    """Write a quotient as a table shows it: median (smallest – largest)."""
    return "" if found is None else "1" if found == (1, 1, 1) else f"{found[0]:.2f} ({found[1]:.2f} – {found[2]:.2f})"
