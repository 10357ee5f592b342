"""Accuracy, energy and time with fewer spikes: what a penalty on firing rates costs, and what it buys.

    python benchmarks/sparsity.py [--data DIR] [--tasks digits nmnist] [--runs runs/sparsity]

Each task is an `sltt compare` of weights of `sltt.losses.Activity` with one thread, kept in `runs/sparsity`: the same
command goes on where it stopped. Every trained network then classifies test samples and runs training batches, in turns
with the other weights. DIR/nmnist has N-MNIST. The rows go to docs/results/sparsity.json, the table to docs/results.md.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tables import DOCS, fill
from torch import nn
from trainings import saved
from turns import in_turns

from sltt.analysis import firing_rates, synaptic_operations
from sltt.commands.parsing import Recipe
from sltt.commands.prepared import Prepared, prepared
from sltt.losses import Activity
from sltt.rules import unroll
from sltt.training.checkpoints import start_from
from sltt.training.session import Session, session
from sltt.training.settings import Execution

ROWS = DOCS / "results" / "sparsity.json"
WEIGHTS = "0,1,3,10"
# the recipe and its options, and the number of seeds
TASKS = {
    "digits": (["digits", "--epochs", "10"], 3),
    "nmnist": (["nmnist", "--data.root", "{data}/nmnist", "--epochs", "3"], 1),
}
SAMPLES, TURNS = 100, 7  # for the rates; of a batch for the time
Rows = list[dict[str, Any]]
Run = Callable[[], None]


def measured(recipe: Recipe, folder: Path, rows: Rows) -> Rows:
    """Each weight with its accuracies; rates, synaptic operations, energy and times are those of its first seed."""
    built = [recipe.build("--weights", str(folder / row["runs"][0]), "--seed", "0") for row in rows]
    weights = [float(row["varied"]["loss.weight"]) for row in rows]
    with session(Execution.of(vars(built[0]))) as here:
        ready = [prepare(here, one, weight) for one, weight in zip(built, weights, strict=True)]
        spikes, *batches = zip(*ready, strict=True)
        seconds = [map(statistics.median, in_turns(several, TURNS, time.process_time)) for several in batches]
    kept = ({key: row[key] for key in ("accuracies", "validation")} for row in rows)
    return [
        {"weight": weight, **scores, **fired, "training": training, "inference": inference}
        for weight, scores, fired, training, inference in zip(weights, kept, spikes, *seconds, strict=True)
    ]


def prepare(here: Session, built: Any, weight: float) -> tuple[dict[str, float], Run, Run]:
    """What a trained network fires, and what runs a batch of training and of inference; weight 0 has no penalty."""
    start_from(built.model, built.weights)
    with prepared(here, built, built.steps) as ready:
        loss = Activity(ready.loss, weight) if weight else ready.loss
        x, y = ready.batch(built.batch_size)

        def training() -> None:
            built.rule(ready.model.train(), x, y, loss, steps=ready.repeat)

        def inference() -> None:
            with torch.no_grad():
                unroll(ready.model.eval(), x, steps=ready.repeat)

        return rates(ready), training, inference


def rates(ready: Prepared) -> dict[str, float]:
    """Of the first test samples: the firing rate, and the synaptic operations and energy of one."""
    model: nn.Module = ready.model.eval()
    test: Any = ready.splits.test
    x, _ = ready.splits.collate([test[i] for i in range(min(SAMPLES, len(test)))])
    with firing_rates(model) as rate:
        layers = synaptic_operations(model, x, steps=ready.repeat)
    found = {"firing_rate": rate.mean()}
    for key in ("synaptic_operations", "picojoules"):
        found[key] = sum(getattr(one, key) for one in layers if one.spiking)
    return {**found, "picojoules_of_data": sum(one.picojoules for one in layers if not one.spiking)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--runs", type=Path, default=Path("runs/sparsity"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    for task in options.tasks:
        asked, seeds = TASKS[task]
        if options.data or not any("{data}" in word for word in asked):
            words = [word.format(data=options.data) for word in asked]
            varied = ["--loss", "sltt.losses.Activity", "--vary", f"loss.weight={WEIGHTS}", "--seeds", str(seeds)]
            rows = saved(["compare", *words, *varied], options.runs / task)["rows"]
            found = measured(Recipe("sltt profile", words[0], words[1:]), options.runs / task, rows)
            every = json.loads(ROWS.read_text()) if ROWS.exists() else {}
            ROWS.write_text(json.dumps({**every, task: found}, indent=1) + "\n")
            fill()


if __name__ == "__main__":
    main()
