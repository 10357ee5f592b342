"""All rules on all tasks that tell them apart: accuracy, memory, time and cosine, and tables of docs.

    python benchmarks/tasks.py [--data DIR] [--tasks recall …] [--rules BPTT,SLTT,…] [--seeds 5] [--runs runs/tasks]
    python benchmarks/tasks.py --advice [--tasks recall …] [--trial 4]
    python benchmarks/tasks.py --memory [--data DIR] [--tasks recall …]

DIR/nmnist has N-MNIST; without `--data` its task is left out. Each task is an `sltt compare` with one thread, kept in
`runs/tasks`: the same command goes on where it stopped. What it measured replaces the rows of the same task and rule in
docs/results/tasks.json. Tables are made of that file. Several may run at a time. With --advice, each task is an
`sltt agreement` with a trial, in docs/results/advice.json. With --memory, nothing is trained: the memory of a batch is
measured again, with `fold=1`.
"""

import argparse
from pathlib import Path

import torch
from advice_tables import advised
from cells import Row, recorded, write
from tables import DOCS, fill
from turns import saved

RESULTS = DOCS / "results"
SPEECH = "japanese-vowels --data.delta 0.25 --model.features [24,64,64,9] --epochs 40"
MOTIONS = "basic-motions --data.delta 0.25 --model.features [12,64,64,4]"
# the recipe, its options, and the layer of neurons whose gradient through time `Mixed` keeps
TASKS = {
    "digits": ("features.2", ["digits", "--epochs", "6"]),
    "digits-events": ("features.2", ["digits-events", "--epochs", "6"]),
    "recall": ("hidden.1", ["recall"]),
    "recall, detach_reset: false": ("hidden.1", ["recall", "--model.neuron.detach_reset", "false"]),
    "sequential-digits": ("hidden.4", ["sequential-digits"]),
    "sequential-digits, recurrent": ("", ["sequential-digits", "--model.recurrent", "true"]),
    "recall-marked": ("hidden.4", ["recall-marked"]),
    "nmnist": ("features.2", ["nmnist", "--data.root", "{data}/nmnist"]),
    "japanese-vowels": ("hidden.4", ["japanese-vowels"]),
    "japanese-vowels, spikes": ("hidden.4", SPEECH.split()),
    "basic-motions": ("hidden.4", ["basic-motions"]),
    "basic-motions, spikes": ("hidden.4", MOTIONS.split()),
}
ONE_STEP = "--rule.fold", "1"  # of rules that are compared by memory: with it, they differ on small networks too
RULES = "BPTT,OTTT,SLTT,TBPTT:window=2,RateBased,OTTT:inputs=false,SLTT:k=1,Mixed"


def compare(task: str, asked: argparse.Namespace) -> list[Row]:
    """Train the rules on a task, and what they reached; with --memory, as they did before."""
    taken = [rule for rule in asked.rules.split(",") if rule != "RateBased" or "japanese-vowels" not in task]  # padded
    rules = ",".join(taken).replace("Mixed", f"Mixed:windows={{{TASKS[task][0]}: all}}")
    if asked.memory:
        rows = [row for row in recorded(RESULTS / "tasks.json") if row["task"] == task]
    else:
        rows = run("compare", task, asked, "--rules", rules, "--seeds", str(asked.seeds))["rows"]
    stepped = [row["rule"] if row["rule"].startswith("Mixed") else f"{row['rule']}:fold=1" for row in rows]
    costs = run("profile", task, asked, "--rules", ",".join(stepped), "--repeats", "1")["costs"]
    kept = "rule", "accuracies", "seconds", "cosine"
    return [
        {"task": task, **{key: row[key] for key in kept}, "peak_memory": cost["memory"]["batch"]}
        for row, cost in zip(rows, costs, strict=True)
    ]


def advise(task: str, asked: argparse.Namespace) -> list[Row]:
    """What `sltt agreement` says about a task after an epoch of training, and after short trainings."""
    (row,) = run("agreement", task, asked, *ONE_STEP, "--at-epochs", "1", "--trial", asked.trial)["rows"]
    return [{"task": task, **advised(row)}]


def run(command: str, task: str, asked: argparse.Namespace, *options: str) -> Row:
    """What a command saves."""
    words = [word.format(data=asked.data) for word in TASKS[task][1]]
    return saved([command, *words, *options], asked.runs / task.replace(", ", "-").replace(": ", "-"))


def merged(rows: list[Row], new: list[Row]) -> list[Row]:
    """The rows with the new ones in place of those of the same task and rule, in the order of the tasks."""
    found = {(row["task"], row.get("rule")): row for row in [*rows, *new]}
    return sorted(found.values(), key=lambda row: list(TASKS).index(row["task"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--rules", default=RULES)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--runs", type=Path, default=Path("runs/tasks"))
    parser.add_argument("--advice", action="store_true", help="ask for advice instead of training all rules")
    parser.add_argument("--memory", action="store_true", help="measure the memory again, without training")
    parser.add_argument("--trial", default="4", help="epochs of the short trainings of --advice")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / ("advice.json" if asked.advice else "tasks.json")
    for task in asked.tasks:
        if not asked.data and any("{data}" in word for word in TASKS[task][1]):
            continue
        new = advise(task, asked) if asked.advice else compare(task, asked)
        # read again: another process may have written meanwhile
        write(path, merged(recorded(path), new))
        fill()


if __name__ == "__main__":
    main()
