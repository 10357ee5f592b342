"""Seconds of a training batch of the recipe `cifar10-hour`, and of batches with one change.

    python benchmarks/hour_seconds.py RUN [--repeats 9]

RUN is a training of the recipe by hour.py: its images, and its weights, which set the firing rates. A batch has 125
images, the share of one of two processes. The cases take turns, after one that is not counted. One thread, on a CPU
with bfloat16. It writes docs/results/hour-seconds.json, and ends with the table of docs/results.md.
"""

import argparse
import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peer_workers import hardware
from tables import DOCS, fill
from torch import nn
from trainings import built_run
from turns import in_turns

import sltt
from sltt.kernels import using
from sltt.parallel.devices import keep_freed_memory
from sltt.training.phases import freeze_norm

PATH = DOCS / "results" / "hour-seconds.json"
BATCH = 125


def cases(run: Path) -> dict[str, dict[str, Callable[[], None]]]:
    """A batch of each, by what it is a change of."""
    built = built_run(run)
    splits = built.data.splits(built.steps)
    x, y = splits.collate([splits.train[i] for i in range(BATCH)])
    rates: Any = sltt.load(run, checkpoint="last").train()
    rates.to(memory_format=torch.channels_last)
    spikes = copy.deepcopy(rates)
    freeze_norm(spikes)

    def batch(model: nn.Module, rule: sltt.Rule, steps: int, crop: int = 32, sparse: str = "auto") -> None:
        model.zero_grad()
        images = x[..., :crop, :crop].contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16), using(sparse=sparse):  # type: ignore[arg-type]
            rule(model, images, y, built.loss, steps=steps, seed=0)

    steady = partial(batch, rates, sltt.RateBased(steady=True))
    slttk = partial(batch, spikes, sltt.SLTT(k=1, rescale=True, hoist=True))
    return {
        "steady currents, T = 16": {
            "": partial(steady, 16),
            "T = 4": partial(steady, 4),
            "crops of 24 pixels": partial(steady, 16, crop=24),
            'sparse="off"': partial(steady, 16, sparse="off"),
        },
        "SLTT-1, T = 32": {
            "": partial(slttk, 32),
            "T = 16": partial(slttk, 16),
            'sparse="off"': partial(slttk, 32, sparse="off"),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    every = [(batch, change, run) for batch, of in cases(options.run).items() for change, run in of.items()]
    seconds = in_turns([run for *_, run in every], options.repeats)
    rows = [
        {"batch": batch, "change": change, "seconds": times}
        for (batch, change, _), times in zip(every, seconds, strict=True)
    ]
    PATH.write_text(json.dumps({"hardware": hardware(1), "rows": rows}, indent=1) + "\n")
    fill()


if __name__ == "__main__":
    main()
