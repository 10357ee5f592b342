"""All rules on all tasks that tell them apart: accuracy, memory, time and cosine, and the table of docs/results.md.

    python benchmarks/tasks.py [--tasks recall …] [--rules BPTT,SLTT,…] [--seeds 5] [--runs runs/tasks]

Each task is an `sltt compare` with one thread, kept in `runs/tasks`: the same command goes on where it stopped. What it
measured replaces the rows of the same task and rule in docs/results/tasks.json. The table is made of that file.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from tables import DOCS, fill

from sltt.commands import main as sltt

ROWS = DOCS / "results" / "tasks.json"
# the recipe, its options, and the layer of neurons whose gradient through time `Mixed` keeps
TASKS = {
    "digits": ("features.2", ["digits", "--epochs", "6"]),
    "digits-events": ("features.2", ["digits-events", "--epochs", "6"]),
    "recall": ("hidden.1", ["recall"]),
    "recall, detach_reset: false": ("hidden.1", ["recall", "--model.neuron.detach_reset", "false"]),
    "sequential-digits": ("hidden.4", ["sequential-digits"]),
    "recall-marked": ("hidden.4", ["recall-marked"]),
}
RULES = "BPTT,OTTT,SLTT,TBPTT:window=2,RateBased,OTTT:inputs=false,SLTT:k=1,Mixed"
Rows = list[dict[str, Any]]


def compare(task: str, rules: str, seeds: int, folder: Path) -> Rows:
    """Train the rules on a task, and what they reached."""
    save = folder / task.replace(", ", "-").replace(": ", "-")
    layer, recipe = TASKS[task]
    rules = rules.replace("Mixed", f"Mixed:windows={{{layer}: all}}")
    options = ["--rules", rules, "--seeds", str(seeds), "--device", "cpu", "--save", str(save)]
    if code := sltt(["compare", *recipe, *options]):
        raise SystemExit(code)
    kept = "rule", "accuracies", "seconds", "peak_memory", "cosine"
    rows = json.loads((save / "compare.json").read_text())["rows"]
    return [{"task": task, **{key: row[key] for key in kept}} for row in rows]


def merged(rows: Rows, new: Rows) -> Rows:
    """The rows with the new ones in place of those of the same task and rule, in the order of the tasks."""
    found = {(row["task"], row["rule"]): row for row in [*rows, *new]}
    return sorted(found.values(), key=lambda row: list(TASKS).index(row["task"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--rules", default=RULES)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--runs", type=Path, default=Path("runs/tasks"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    for task in options.tasks:
        new = compare(task, options.rules, options.seeds, options.runs)
        rows = merged(json.loads(ROWS.read_text()) if ROWS.exists() else [], new)
        ROWS.write_text(json.dumps(rows, indent=1) + "\n")
        fill()


if __name__ == "__main__":
    main()
