"""Networks with delays on the tasks that need memory: accuracy and memory of the rules, and the table of docs.

    python benchmarks/delays.py [--seeds 3] [--runs runs/delays] [--tasks recall …]

Each case is an `sltt compare` with one thread, kept in `--runs`: the same command goes on where it stopped. Networks of
a task have about as many weights.
"""

import argparse
from pathlib import Path

import torch
from cells import recorded, write
from tables import DOCS, fill
from turns import saved

PATH = DOCS / "results" / "delays.json"
FAR = "recall-far --model.features [21,64,64,2] --model.delays []"
TAPS = f"[{','.join(map(str, range(32)))}]"
# the network, the command for each task, and the rules
CASES = [
    ("recurrent", "BPTT,OTTT,SLTT", {
        "recall": "recall --model.recurrent true",
        "recall-marked": "recall-marked --model.recurrent true",
        "recall-far": f"{FAR} --model.recurrent true",
    }),
    ("feed-forward", "OTTT,OTTT:k=4,SLTT", {"recall": "recall"}),
    ("feed-forward", "OTTT,OTTT:k=2,SLTT", {"recall-marked": "recall-marked"}),
    ("feed-forward", "OTTT,OTTT:k=8,SLTT", {"recall-far": FAR}),
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("runs/delays"))
    parser.add_argument("--tasks", nargs="+", default=["recall", "recall-marked", "recall-far"])
    asked = parser.parse_args()
    torch.set_num_threads(1)
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
