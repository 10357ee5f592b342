"""Fill the tables of docs from docs/results.

    python benchmarks/tables.py

A table stands between `<!-- table NAME -->` and `<!-- end -->`: one of `doc_tables.py` or `paper_tables.py`, or the
cases of NAME.json, which benchmarks/peers.py wrote, a table for each setting. `<!-- table NAME over T -->` has a column
for each T. What a file does not have is left out.
"""

import re
from itertools import groupby
from pathlib import Path

from cells import Row, grouped, load, markdown
from doc_tables import TABLES
from peer_cases import CASES
from peers import ratio
from turns import spread

from sltt.training.console import megabytes

DOCS = Path(__file__).parents[1] / "docs"
NAMES = "performance", "paper", "results", "when-not", "recall", "interop", "transformers", "own-neuron", "several"
PAGES = [DOCS / f"{name}.md" for name in NAMES]
BLOCK = re.compile(r"(<!-- table (\S+)( over T)? -->\n).*?(<!-- end -->)", re.DOTALL)
LABELS = {
    "SpikingJelly SLTT": "SpikingJelly 2.0, `SLTTLIFNode`",
    "SpikingJelly BPTT": "SpikingJelly 2.0, `LIFNode`, layer by layer",
}
NETWORKS = {
    "resnet18": "ResNet-18",
    "vgg11": "VGG-11",
    "vgg11-max": "VGG-11 with max pooling",
    "shd": "MLP 700-256-256-20",
    "digits": "DigitsNet",
}
Rows = list[Row]


def filled(page: str, results: Path = DOCS / "results") -> str:
    """The page with its tables."""

    def table(block: re.Match[str]) -> str:
        start, name, over_steps, end = block.groups()
        try:
            found = TABLES[name](results) if name in TABLES else of_cases(results, name, bool(over_steps))
        except FileNotFoundError:
            found = "Not measured yet.\n"
        return f"{start}\n{found}\n{end}"

    return BLOCK.sub(table, page)


def of_cases(results: Path, name: str, over_steps: bool) -> str:
    """A table for each setting of the cases that peers.py measured, or one with a column for each T."""
    rows: Rows = [row for row in load(results, name) if "error" not in row]
    tables = [steps_table(rows)] if over_steps else [cases_table(list(g)) for _, g in groupby(rows, setting)]
    return "\n".join(tables) + f"\n[All values](results/{name}.json)\n"


def setting(row: Row) -> tuple[object, ...]:
    """What rows of one table have in common."""
    return row["network"], row["steps"], str(row.get("input")), row.get("hardware"), row.get("clock")


def cases_table(rows: Rows) -> str:
    """Cases of one setting."""
    floors = {CASES[row["case"]].floor for row in rows}
    floor = "ReLU" if all(name.startswith("relu") for name in floors) else floors.pop()
    columns = {
        "time": [f"{row['seconds']:.3g} s" for row in rows],
        f"ratio to {floor}": [spread(ratio(rows, row, CASES[row["case"]].floor)) for row in rows],
        "ratio to SpikingJelly": [spread(ratio(rows, row, CASES[row["case"]].peer)) for row in rows],
        "memory": [megabytes(row["memory"]) if "memory" in row else "" for row in rows],
        "resident set": [megabytes(row["resident"]) if "resident" in row else "" for row in rows],
    }
    return conditions(rows, steps=True) + lines(rows, {name: cells for name, cells in columns.items() if any(cells)})


def steps_table(rows: Rows) -> str:
    """Time and memory of each case, a pair of columns for each T."""
    cases = [{row["steps"]: row for row in of} for of in grouped(rows, "case").values()]
    columns: dict[str, list[str]] = {}
    for steps in sorted({row["steps"] for row in rows}):
        mine = [case.get(steps) for case in cases]
        columns[f"T = {steps}: time"] = [f"{row['seconds']:.3g} s" if row else "" for row in mine]
        columns["memory" + " " * len(columns)] = [megabytes(row["memory"]) if row else "" for row in mine]
    return conditions(rows, steps=False) + lines([next(iter(case.values())) for case in cases], columns)


def lines(rows: Rows, columns: dict[str, list[str]]) -> str:
    """Markdown: a line for each row, with the name of its case."""
    names = [LABELS.get(row["case"], row["case"].replace("relu", "ReLU")) for row in rows]
    table = markdown(["", *(name.strip() for name in columns)], list(zip(names, *columns.values(), strict=True)))
    return table.replace("|  |", "| |").replace("|  |", "| |")


def conditions(rows: Rows, steps: bool) -> str:
    """A line over the table: what was measured, and on what."""
    words = [NETWORKS[rows[0]["network"]]]
    if "input" in rows[0]:  # files of an earlier version do not say
        batch, *shape = rows[0]["input"]
        words += [f"batch {batch} × {'×'.join(map(str, shape))}"]
    words += [f"T = {rows[0]['steps']}"] * steps
    words += [rows[0]["hardware"]] if "hardware" in rows[0] else []
    words += ["processor time" if rows[0].get("clock") == "process" else "wall-clock time"]
    counts = sorted({len(row["times"]) for row in rows})
    words += [f"medians of {counts[0]}" if len(counts) == 1 else f"medians of {counts[0]} to {counts[-1]}"]
    return f"{', '.join(words)}:\n\n"


def fill() -> None:
    """Write the tables of all pages."""
    for page in PAGES:
        page.write_text(filled(page.read_text()))


if __name__ == "__main__":
    fill()
