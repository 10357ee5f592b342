"""Which logs of docs/results are of older code, and how to measure them again.

    python benchmarks/logs.py [--compare [COUNT]] [--compare-costs [TURNS]]

`docs/results/measured.json` has for each log the machine, and a digest of the code that changes what it measures:
docstrings, comments, layout and names of locals do not count. `write` makes the entry. A log to which an older version
contributed has none: delete the log, and measure it whole.

Accuracies and gradients take hours. `--compare` runs the last version of which such a log was beside this one, on so
many random networks (tests/versions.py). Where logits, losses, gradients and statistics of all rules are the same, the
log counts as measured now; its entry names that version. Only the logs of PENALTY need the same penalties on firing
rates too. It does not see data sets and recipes: delete the logs of one that changes.

Times take hours too, of peers more than of this library. `--compare-costs` runs the cases of COSTS in this version and
in that which wrote the log, since many small steps would add up: in so many turns, with nothing beside it. Where a
batch takes up to 5% more time (the median of the ratios), or 15% less, and the same memory to 2%, the log counts as
measured now. Ratios to peers are then not too good; those between rules may be off by as much. A case beyond this is
measured again, in three times as many turns. For the logs of memory, time does not count.
"""

import argparse
import ast
import contextlib
import functools
import hashlib
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import torch
from turns import EndedError, Worker, hardware, in_turns, quotient

ROOT = Path(__file__).parents[1]
RESULTS = Path("docs", "results")
MEASURED = "measured.json"
SCOPES = ast.FunctionDef, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp
GRADIENTS = "sltt/rules", "sltt/neurons", "sltt/sequence", "sltt/losses.py", "sltt/surrogates.py"
COST = "sltt/kernels", "sltt/memory.py", *GRADIENTS
TRAINED = "sltt/training", "sltt/models", "sltt/data", "sltt/recipes", *GRADIENTS
PENALTY = ("sparsity",)  # its trainings have the loss `Activity`
PEERS = "python benchmarks/peers.py --json docs/results/{name}.json, with the options that the page of the table gives"
PAPER = "python benchmarks/paper.py {step} --data DIR, after its entry in runs/paper is deleted"
# of the first pattern that a log's name has: what stands for its cases, the arguments of a benchmark's worker
PEER = {"threads": 1, "clock": "process", "device": "cpu"}
RESNET, VGG, DIGITS = (
    ("peers.py", json.dumps({"network": network, "steps": steps, "batch": batch, **PEER}))
    for network, steps, batch in (("resnet18", 6, 8), ("vgg11", 6, 8), ("digits", 16, 128))
)
SEQUENCES = [
    ("open_neuromorphic.py", work, case, "cpu")
    for work in ("mlp", "recurrent-256", "linear-512", "static")
    for case in ("SLTT", "BPTT")
]
COSTS: dict[str, list[tuple[str, ...]]] = {
    "sequences": SEQUENCES,
    **{name: [case for case in SEQUENCES if case[1] in ("mlp", "recurrent-256")] for name in ("rates", "widths")},
    "rules": [(*DIGITS, case) for case in ("BPTT", "SLTT", "SLTT, k = 1", "OTTT", "RateBased", "Mixed")],
    "recall-memory": [(*DIGITS, case) for case in ("BPTT", "SLTT", "OTTT", "RateBased")],
    "own-neuron": [(*RESNET, case) for case in ("SLTT, compiled", "SLTT, own neuron", "SLTT, ALIF")],
    "exact-over-t": [(*RESNET, case) for case in ("SLTT", "SLTT, fold = 1", "BPTT, segment = auto")],
    "exact": [
        (*one, case) for one in (RESNET, VGG) for case in ("SLTT", "BPTT", "BPTT, recompute", "BPTT, segment = 2")
    ],
    "networks": [
        ("networks.py", name, rule)
        for name in ("resnet18-64", "vgg-64", "audio", "dvs-128", "transformer")
        for rule in ("SLTT", "BPTT")
    ],
    "vgg11*": [(*VGG, case) for case in ("SLTT", "SLTT, dense", "BPTT")],
    "resnet18-*": [
        (*RESNET, case) for case in ("SLTT", "SLTT, dense", "SLTT, k = 1", "BPTT", "OTTT", "SLTT, bf16", "evaluation")
    ],
    "paper/[ms]e*": [(*one, case) for one in (RESNET, VGG) for case in ("SLTT", "SLTT, k = 1", "BPTT")],
}
# of the first pattern: how a log is measured, and which sources change what it measures
LOGS: dict[str, tuple[str, Sequence[str]]] = {
    "tasks": ("python benchmarks/tasks.py --data DIR", TRAINED),
    "advice": ("python benchmarks/tasks.py --advice, with the trials of docs/when-not.md", TRAINED),
    "recall-memory": ("python benchmarks/recall_figure.py --seeds 3", (*COST, *TRAINED)),
    "layers": ("python benchmarks/sparse.py --json docs/results/layers.json", ("sltt/kernels",)),
    "sequences": ("python benchmarks/open_neuromorphic.py", COST),
    "libraries": ("python benchmarks/libraries.py --json docs/results/libraries.json", (*COST, "sltt/interop")),
    "networks": ("python benchmarks/networks.py --json docs/results/networks.json", COST),
    "rates": ("python benchmarks/open_neuromorphic.py --rates 2,5,10,20,40", COST),
    "widths": ("python benchmarks/open_neuromorphic.py --widths 64,256,1024,4096", COST),
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
    """Return twelve hexadecimal digits of a hash of files, and of all files in folders, without what explains them."""
    of = hashlib.sha256()
    files = (file for source in sources for file in [root / source, *(root / source).rglob("*")])
    kinds = ".py", ".cpp", ".c", ".h", ".yaml"
    for file in sorted(file for file in files if file.suffix in kinds and file.is_file()):
        text = file.read_text(encoding="utf-8")
        of.update(f"{file.relative_to(root).as_posix()}\n{code_of(text) if file.suffix == '.py' else text}".encode())
    return of.hexdigest()[:12]


@functools.cache
def code_of(text: str) -> str:
    """Return what Python's code does: its syntax tree, without docstrings, and with numbers for names of locals."""
    return syntax(ast.parse(text), {})


def syntax(node: Any, names: dict[str, str]) -> str:
    """Return a part of a syntax tree as text; `names` has the locals of the scopes around it."""
    if isinstance(node, list):
        return f"[{','.join(syntax(child, names) for child in node if not is_docstring(child))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    if isinstance(node, SCOPES):
        names = names | {name: f"local {len(names) + i}" for i, name in enumerate(bound(node))}
    texts = []
    for field, value in ast.iter_fields(node):
        if field in ("id", "arg") and not isinstance(node, ast.keyword):
            texts.append(names.get(value, value))
        elif field not in ("ctx", "kind", "type_comment") and value not in (None, []):  # others are new in some Pythons
            texts.append(f"{field}={syntax(value, names)}")
    return f"{type(node).__name__}({','.join(texts)})"


def bound(scope: ast.AST) -> list[str]:
    """Return the names that a function or comprehension binds, those inside of others left out."""
    names, outer, nodes = [], set(), [*ast.iter_child_nodes(scope)]
    while nodes:
        node = nodes.pop(0)
        if isinstance(node, ast.arg):
            names.append(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.append(node.id)
        elif isinstance(node, ast.Global | ast.Nonlocal):
            outer.update(node.names)
        if not isinstance(node, SCOPES):
            nodes += ast.iter_child_nodes(node)
        elif not isinstance(node, ast.FunctionDef | ast.Lambda):  # := in a comprehension binds a name around it
            names += [inner.target.id for inner in ast.walk(node) if isinstance(inner, ast.NamedExpr)]
    return [name for name in dict.fromkeys(names) if name not in outer]


def is_docstring(node: Any) -> bool:
    """Return whether a statement is a string alone."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


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


def last_versions(root: Path, sources: Sequence[Sequence[str]]) -> dict[str, list[str]]:
    """The older logs with one of these sources, by the newest commit whose code they are of."""
    known, of = marks(root), {}
    names = [Path(file).with_suffix("").as_posix() for file in stale(root)]
    names = [name for name in names if name in known and entry(name)[1] in sources]
    log = ["git", "log", "--format=%h", "--max-count=200", "--", "sltt"]
    for commit in subprocess.run(log, cwd=root, capture_output=True, text=True, check=True).stdout.split():
        if names:
            with checkout(commit, root) as old:
                now = {tuple(source): digest(source, Path(old)) for source in sources}
            of[commit] = [name for name in names if known[name]["sources"] == now[tuple(entry(name)[1])]]
            names = [name for name in names if name not in of[commit]]
    return {commit: found for commit, found in of.items() if found}


def blob(path: Path) -> str:
    """Git's name of what a file has: with it, the first commit of a log is found, also where it went and came back."""
    return subprocess.run(["git", "hash-object", path], capture_output=True, text=True, check=True).stdout.strip()


def written_by(root: Path, sources: Sequence[Sequence[str]]) -> dict[str, list[str]]:
    """The older logs with one of these sources, by the first commit that has them."""
    of: dict[str, list[str]] = {}
    for file in stale(root):
        if entry(name := Path(file).with_suffix("").as_posix())[1] in sources:
            log = ["git", "log", f"--find-object={blob(root / RESULTS / file)}", "--format=%h", "--", RESULTS / file]
            done = subprocess.run(log, cwd=root, capture_output=True, text=True, check=True)
            of.setdefault(done.stdout.split()[-1], []).append(name)
    return of


@contextlib.contextmanager
def checkout(commit: str, root: Path) -> Iterator[str]:
    """A folder with a version of the code."""
    with tempfile.TemporaryDirectory() as folder:
        old = str(Path(folder, "old"))
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", old, commit], cwd=root, check=True)
        try:
            yield old
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", old], cwd=root, check=True)


def enter(names: Sequence[str], commit: str, root: Path) -> None:
    """Enter logs whose version does what this one does."""
    known = marks(root)
    known |= {name: {"sources": digest(entry(name)[1], root), "same as": commit} for name in names}
    (root / RESULTS / MEASURED).write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


def compare(count: int, root: Path = ROOT) -> None:
    """Enter the logs of accuracies and gradients whose last version gives what this one does."""
    for commit, all_names in last_versions(root, (TRAINED, GRADIENTS)).items():
        for penalty in (False, True):
            if not (names := [name for name in all_names if (name in PENALTY) == penalty]):
                continue
            with checkout(commit, root) as old:
                command = [sys.executable, "tests/versions.py", old, str(root), "--count", str(count)]
                command += [] if penalty else ["--no-penalty"]
                done = subprocess.run(command, cwd=root, capture_output=True, text=True)
            print(f"{commit} ({', '.join(names)}): {(done.stdout or done.stderr).strip().splitlines()[-1]}", flush=True)
            if done.returncode == 0:
                enter(names, commit, root)
            else:
                print("".join(f"  {line}\n" for line in done.stdout.splitlines()[:-1]), end="", flush=True)


def compare_costs(turns: int, root: Path = ROOT) -> None:
    """Enter the logs of times and memory whose version takes what this one does."""
    for commit, names in written_by(root, (COST, (*COST, *TRAINED))).items():
        with checkout(commit, root) as old:
            found: dict[tuple[str, ...], list[float]] = {}
            for name in names:
                cases = next((COSTS[pattern] for pattern in COSTS if fnmatch(name, pattern)), [])
                for case in cases:
                    if case not in found:
                        found[case] = changes(case, (old, str(root)), turns)
                        if not is_within(found[case], name):
                            found[case] = changes(case, (old, str(root)), 3 * turns)
                        print(f"  {case}: {', '.join(f'{one:.2f}' for one in found[case])}", flush=True)
                within = all(is_within(found[case], name) for case in cases)
                print(f"{commit} {name}: {'the same' if cases and within else 'measure it again'}", flush=True)
                if cases and within:
                    enter([name], commit, root)


def is_within(ratios: Sequence[float], name: str) -> bool:
    """Whether a case takes the same memory, and the same time or less, as far as a log needs it."""
    limits = (0.0, math.inf) if name.endswith("memory") else (0.85, 1.05), (0.98, 1.02)
    return all(least <= ratio <= most for ratio, (least, most) in zip(ratios, limits, strict=False))


def changes(case: tuple[str, ...], versions: Sequence[str], turns: int) -> list[float]:
    """Return how a case of this version's benchmarks changes from the first version of the library to the second.

    Its time, and its memory where that is measured too.
    """
    script, *arguments = case
    keep = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name(script)), "--serve", *arguments]
    workers = [Worker(command, 600, PYTHONPATH=version, **keep) for version in versions]
    try:
        old, new = in_turns([partial(worker.ask, "time") for worker in workers], turns)
        ratios = [quotient(new, old)[0]]
        if script != "open_neuromorphic.py":
            before, now = (worker.ask("memory") for worker in workers)
            ratios.append(now / before)
    except EndedError:  # the older version has no such case
        return [math.inf]
    finally:
        for worker in workers:
            worker.close()
    return ratios


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", type=int, nargs="?", const=200, metavar="COUNT")
    parser.add_argument("--compare-costs", type=int, nargs="?", const=9, metavar="TURNS")
    asked = parser.parse_args()
    if asked.compare:
        compare(asked.compare)
    if asked.compare_costs:
        compare_costs(asked.compare_costs)
    if old := stale():
        lines = "".join(f"\n  {name}: {how}" for name, how in old.items())
        raise SystemExit(f"{len(old)} logs of docs/results are of older code. Delete each, measure it again:{lines}")
