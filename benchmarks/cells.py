"""What the tables of docs are made of: rows of docs/results, and the names and cells that a page shows."""

import csv
import json
import re
from collections.abc import Iterable, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Cells = Sequence[Sequence[str]]
SERIES = "japanese-vowels", "basic-motions"  # tasks with a table of their own: the advice was not calibrated on them


def markdown(headings: Sequence[str], rows: Cells) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


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


def runs(results: Path, name: str) -> dict[str, list[list[Row]]]:
    """The epochs of each seed, by rule, in a CSV of runs."""
    with (results / f"{name}.csv").open() as file:
        found = grouped(csv.DictReader(file), "rule")
    return {rule: list(grouped(rows, "seed").values()) for rule, rows in found.items()}


def is_series(row: Row) -> bool:
    """Whether a row is of a task on time series."""
    return row["task"].startswith(SERIES)


def tasks(results: Path, task: str) -> dict[str, Row]:
    """Rows of a task in tasks.json, by rule."""
    return {shown(row["rule"]): row for row in load(results, "tasks") if row["task"] == task}


def compared(results: Path, name: str) -> dict[str, Row]:
    """Rows of a comparison that paper.py made, by rule."""
    return {shown(row["rule"]): row for row in load(results, f"paper/{name}")["rows"]}


def accuracies(rows: dict[str, Row]) -> dict[str, list[float]]:
    """Test accuracies of each rule, one for each seed."""
    return {rule: row["accuracies"] for rule, row in rows.items()}


def seeds(results: Path, name: str) -> dict[str, list[float]]:
    """The same in a CSV of runs."""
    found = runs(results, name)
    return {shown(rule): [float(epochs[-1]["test_accuracy"]) for epochs in of] for rule, of in found.items()}


def shown(rule: str) -> str:
    """A rule as the text names it: SLTT-1, TBPTT(window=2)."""
    rule = re.sub(r"SLTT\(k=(\d+)\)", r"SLTT-\1", rule.replace("SLTT:k=", "SLTT-")).removesuffix("()")
    name, _, options = rule.partition(":")
    return f"{name}({options})" if options else rule
