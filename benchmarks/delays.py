"""Networks with delays on the tasks that need memory: accuracy and memory of the rules, and the table of docs.

    python benchmarks/delays.py [--seeds 3] [--runs runs/delays] [--tasks recall …]
    python benchmarks/delays.py --cost

Each case is an `sltt compare` with one thread, kept in `--runs`: the same command goes on where it stopped. Networks of
a task have about as many weights. With --cost, it prints memory at T and 4 T, and processor time at T.
"""

import argparse
import statistics
import time
from functools import partial
from itertools import product
from pathlib import Path
from typing import Literal

import torch
from cells import recorded, write
from tables import DOCS, fill
from torch import nn
from turns import in_turns, saved, timed

import sltt
from sltt.analysis import peak_memory

PATH = DOCS / "results" / "delays.json"
TAPS = f"[{','.join(map(str, range(32)))}]"
# the network, the command for each task, and the rules
CASES = [
    ("recurrent", "BPTT,OTTT,SLTT", {
        "recall": "recall --model.recurrent true",
        "recall-marked": "recall-marked --model.recurrent true",
        "recall-far": "recall-far --model.features [21,64,64,2] --model.delays [] --model.recurrent true",
    }),
    ("feed-forward", "OTTT,OTTT:k=4,SLTT", {"recall": "recall"}),
    ("feed-forward", "OTTT,OTTT:k=2,SLTT", {"recall-marked": "recall-marked"}),
    ("delays on the input", "SLTT", {
        "recall": "recall --model.features [200,40,4] --model.delays [[0,8]]",
        "recall-marked": "recall-marked --model.delays [[0,1,2,3,4]]",
        "recall-far": f"recall-far --model.features [21,20,20,2] --model.delays [{TAPS}]",
    }),
    ("delays between layers", "SLTT,SLTT:credit=none,OTTT,BPTT", {
        "recall": "recall-delays",
        "recall-marked": "recall-marked --model.features [21,50,50,2] --model.delays [null,[0,1,2,3,4]]",
        "recall-far": "recall-far",
    }),
]  # fmt: skip


NETWORKS = {
    "linear layers, T = 100 and 400": (100, (64, 128), lambda: nn.Sequential(
        nn.Linear(128, 200), sltt.LIF(tau=2.0), sltt.Delay([0, 3, 6]), nn.Linear(600, 200), sltt.LIF(tau=2.0),
        sltt.Delay([0, 3, 6]), nn.Linear(600, 20),
    )),
    "convolutions, T = 20 and 80": (20, (16, 2, 16, 16), lambda: nn.Sequential(
        nn.Conv2d(2, 32, 3, padding=1), nn.BatchNorm2d(32), sltt.LIF(tau=2.0), sltt.Delay([0, 3]),
        nn.Conv2d(64, 32, 3, padding=1), nn.BatchNorm2d(32), sltt.LIF(tau=2.0), sltt.Delay([0, 3]),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 20),
    )),
}  # fmt: skip
KINDS = {
    "BPTT": sltt.BPTT, "SLTT(credit='none')": partial(sltt.SLTT, credit="none"), "SLTT": sltt.SLTT,
    "OTTT": sltt.OTTT, "OTTT(k=T/4)": lambda fold: sltt.OTTT(k=5, fold=fold),
}  # fmt: skip


def cost(name: str, fold: int | Literal["auto"]) -> None:
    """Print memory at T and 4 T, and processor time at T, of rules on a network with delays."""
    torch.manual_seed(0)
    steps, shape, make = NETWORKS[name]
    model, x, y = make(), 2 * torch.randn(4 * steps, *shape), torch.randint(20, shape[:1])
    rules = {kind: rule(fold=fold) for kind, rule in KINDS.items() if kind != "OTTT(k=T/4)" or steps == 20}
    batch = partial(partial, target=y, loss=nn.CrossEntropyLoss(), mean_logits=True)
    times = in_turns([timed(batch(rule, model, x[:steps]), time.process_time) for rule in rules.values()], 5)
    for (kind, rule), seconds in zip(rules.items(), times, strict=True):
        peaks = [f"{peak_memory(batch(rule, model, x[:t])) / 1e6:.1f} MB" for t in (steps, 4 * steps)]
        print(f"{name}, fold = {fold}: {kind}", *peaks, f"{1e3 * statistics.median(seconds):.0f} ms", sep=", ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("runs/delays"))
    parser.add_argument("--tasks", nargs="+", default=["recall", "recall-marked", "recall-far"])
    parser.add_argument("--cost", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.cost:
        for name, fold in product(NETWORKS, ("auto", 1)):
            cost(name, fold)  # pyright: ignore[reportArgumentType]
        return
    for network, rules, commands in CASES:
        for task in [task for task in commands if task in asked.tasks]:
            words = ["compare", *commands[task].split(), "--rules", rules, "--seeds", str(asked.seeds)]
            rows = saved(words, asked.runs / f"{task}-{network.replace(' ', '-')}")["rows"]
            kept = "rule", "accuracies", "seconds", "peak_memory", "cosine"
            new = [{"task": task, "network": network, **{key: row[key] for key in kept}} for row in rows]
            before = [row for row in recorded(PATH) if (row["task"], row["network"]) != (task, network)]
            write(PATH, before + new)
    fill()


if __name__ == "__main__":
    main()
