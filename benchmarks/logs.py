"""Which logs of docs/results are of older code, and how to measure them again.

    python benchmarks/logs.py [--compare [COUNT]]

`docs/results/measured.json` has for each log the machine, and a digest of the sources that change what it measures.
`write` makes the entry. A log to which an older version contributed has none: delete the log, and measure it whole.

Accuracies and gradients take hours. `--compare` runs the version that wrote such a log beside this one, on so many
random networks (tests/versions.py). Where logits, losses, gradients and statistics of all rules are the same, the log
counts as measured now; its entry names that version. Only the logs of PENALTY need the same penalties on firing rates
too. It does not see data sets and recipes: delete the logs of one that changes.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

import torch
from turns import hardware

ROOT = Path(__file__).parents[1]
RESULTS = Path("docs", "results")
MEASURED = "measured.json"
GRADIENTS = "sltt/rules", "sltt/neurons", "sltt/sequence", "sltt/losses.py", "sltt/surrogates.py"
COST = "sltt/kernels", "sltt/memory.py", *GRADIENTS
TRAINED = "sltt/training", "sltt/models", "sltt/data", "sltt/recipes", *GRADIENTS
PENALTY = ("sparsity",)  # its trainings have the loss `Activity`
PEERS = "python benchmarks/peers.py --json docs/results/{name}.json, with the options that the page of the table gives"
PAPER = "python benchmarks/paper.py {step} --data DIR, after its entry in runs/paper is deleted"
# of the first pattern that a log's name has: how it is measured, and which sources change what it measures
LOGS: dict[str, tuple[str, Sequence[str]]] = {
    "tasks": ("python benchmarks/tasks.py --data DIR", TRAINED),
    "advice": ("python benchmarks/tasks.py --advice, with the trials of docs/when-not.md", TRAINED),
    "recall-memory": ("python benchmarks/recall_figure.py --seeds 3", (*COST, *TRAINED)),
    "layers": ("python benchmarks/sparse.py --json docs/results/layers.json", ("sltt/kernels",)),
    "sequences": ("python benchmarks/open_neuromorphic.py", COST),
    "libraries": ("python benchmarks/libraries.py --json docs/results/libraries.json", (*COST, "sltt/interop")),
    "networks": ("python benchmarks/networks.py --json docs/results/networks.json", COST),
    "rates": ("python benchmarks/open_neuromorphic.py --rates 2,5,10,20,40", COST),
    **dict.fromkeys(("rules", "exact", "exact-over-t", "own-neuron", "resnet18-*", "vgg11*"), (PEERS, COST)),
    **dict.fromkeys(("paper/memory", "paper/seconds"), (PAPER, COST)),
    "paper/operations": (PAPER, ("sltt/analysis/operations.py", "sltt/models", "sltt/rules")),
    "paper/*gradients*": (PAPER, GRADIENTS),
    "paper/*": (PAPER, TRAINED),
    "gpu/*": ("make gpu", COST),
    "*": ("as the page that links the log says", TRAINED),
}


def entry(name: str) -> tuple[str, Sequence[str]]:
    """How a log is measured, and its sources."""
    how, sources = next(LOGS[pattern] for pattern in LOGS if fnmatch(name, pattern))
    return how.format(name=name, step=name.removeprefix("paper/")), sources


def digest(sources: Sequence[str], root: Path) -> str:
    """Twelve hexadecimal digits of a hash of files, and of all files in folders."""
    of = hashlib.sha256()
    found = (file for one in sources for file in [root / one, *(root / one).rglob("*")])
    for file in sorted(file for file in found if file.suffix in (".py", ".cpp", ".c", ".h", ".yaml")):
        of.update(f"{file.relative_to(root).as_posix()}\n{file.read_text(encoding='utf-8')}".encode())
    return of.hexdigest()[:12]


def marks(root: Path = ROOT) -> dict[str, dict[str, str]]:
    """The entries of all logs."""
    file = root / RESULTS / MEASURED
    return json.loads(file.read_text()) if file.exists() else {}


def mark(path: Path, root: Path = ROOT) -> None:
    """Enter a log that is about to be written, unless a part of it may be older."""
    results = root / RESULTS
    if not path.resolve().is_relative_to(results):
        return
    name, known = path.resolve().relative_to(results).with_suffix("").as_posix(), marks(root)
    on = hardware(torch.get_num_threads(), "cuda" if name.startswith("gpu/") else "cpu")
    now = {"sources": digest(entry(name)[1], root), "hardware": on}
    if path.exists() and known.get(name, {}).get("sources") != now["sources"]:
        known.pop(name, None)
    else:
        known[name] = now
    (results / MEASURED).write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


def stale(root: Path = ROOT) -> dict[str, str]:
    """The logs of older code, and how each is measured."""
    results, known, found = root / RESULTS, marks(root), {}
    for path in sorted([*results.rglob("*.json"), *results.rglob("*.csv")]):
        name = path.relative_to(results).with_suffix("").as_posix()
        how, sources = entry(name)
        if path.name != MEASURED and (name not in known or known[name]["sources"] != digest(sources, root)):
            found[path.relative_to(results).as_posix()] = how
    return found


def compare(count: int, root: Path = ROOT) -> None:
    """Enter the logs of accuracies and gradients whose version gives what this one does."""
    written: dict[tuple[str, bool], list[str]] = {}
    for file in stale(root):
        name = Path(file).with_suffix("").as_posix()
        if entry(name)[1] in (TRAINED, GRADIENTS):
            done = subprocess.run(
                ["git", "log", "-1", "--format=%h", "--", RESULTS / file], cwd=root, capture_output=True, text=True
            )
            written.setdefault((done.stdout.strip(), name in PENALTY), []).append(name)
    for (commit, penalty), names in written.items():
        with tempfile.TemporaryDirectory() as folder:
            old = str(Path(folder, "old"))
            subprocess.run(["git", "worktree", "add", "--quiet", "--detach", old, commit], cwd=root, check=True)
            try:
                command = [sys.executable, "tests/versions.py", old, str(root), "--count", str(count)]
                command += [] if penalty else ["--no-penalty"]
                done = subprocess.run(command, cwd=root, capture_output=True, text=True)
            finally:
                subprocess.run(["git", "worktree", "remove", "--force", old], cwd=root, check=True)
        print(f"{commit} ({', '.join(names)}): {(done.stdout or done.stderr).strip().splitlines()[-1]}", flush=True)
        if done.returncode == 0:
            known = marks(root)
            known |= {name: {"sources": digest(entry(name)[1], root), "same as": commit} for name in names}
            (root / RESULTS / MEASURED).write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
        else:
            print("".join(f"  {line}\n" for line in done.stdout.splitlines()[:-1]), end="", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", type=int, nargs="?", const=200, metavar="COUNT")
    if count := parser.parse_args().compare:
        compare(count)
    if old := stale():
        lines = "".join(f"\n  {name}: {how}" for name, how in old.items())
        raise SystemExit(f"{len(old)} logs of docs/results are of older code. Delete each, measure it again:{lines}")
