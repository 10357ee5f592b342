"""What the tables of docs are made of: rows of docs/results, and the names and cells that a page shows."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Cells = Sequence[Sequence[str]]


def markdown(headings: Sequence[str], rows: Cells) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def load(results: Path, name: str) -> Any:
    return json.loads((results / "paper" / f"{name}.json").read_text())


def seeds(results: Path, name: str) -> dict[str, list[float]]:
    """Test accuracies of each rule in a CSV of runs, one for each seed."""
    found: dict[str, dict[str, float]] = {}
    with (results / f"{name}.csv").open() as file:
        for row in csv.DictReader(file):
            found.setdefault(row["rule"], {})[row["seed"]] = float(row["test_accuracy"])
    return {rule: list(values.values()) for rule, values in found.items()}


def tasks(results: Path, task: str) -> dict[str, Any]:
    """Rows of a task in tasks.json, by rule."""
    return {row["rule"]: row for row in json.loads((results / "tasks.json").read_text()) if row["task"] == task}


def compared(results: Path, name: str) -> dict[str, Any]:
    """Rows of a comparison that paper.py made, by rule."""
    return {row["rule"]: row for row in load(results, name)["rows"]}


def shown(rule: str) -> str:
    """A rule as the text names it: SLTT-1, TBPTT(window=2)."""
    rule = rule.replace("SLTT:k=", "SLTT-").replace("SLTT(k=1)", "SLTT-1").removesuffix("()")
    name, _, options = rule.partition(":")
    return f"{name}({options})" if options else rule
