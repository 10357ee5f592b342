"""Tables of docs/paper.md, from docs/results."""

import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cells import compared, load, markdown, seeds, shown, tasks
from scipy.stats import t as student

from sltt.commands.fscil import SCORES, percent
from sltt.commands.results import scores_text
from sltt.commands.verdict import MARGIN
from sltt.training.console import megabytes

# GB of BPTT and of SLTT, as the paper measured them
PAPER_MEMORY = {"ResNet-18": (3.00, 1.09), "VGG-11": (3.70, 1.07), "NF-ResNet-34": (28.41, 8.47)}


def difference(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Mean of the second less that of the first, and half its 90% interval (Welch)."""
    parts = [statistics.variance(one) / len(one) for one in (first, second)]
    squared = sum(parts)
    spread = 0.0
    if squared:
        freedom = squared**2 / sum(p**2 / (len(one) - 1) for p, one in zip(parts, (first, second), strict=True))
        spread = float(student.ppf(0.95, freedom)) * math.sqrt(squared)
    return statistics.mean(second) - statistics.mean(first), spread


def verdict(middle: float, spread: float) -> str:
    """Two one-sided tests at 5%: is the difference within the margin?"""
    if abs(middle) + spread <= MARGIN:
        return "equal"
    return "less" if middle + spread < 0 else "more" if middle - spread > 0 else "open"


def accuracy(results: Path) -> str:
    """SLTT beside BPTT with the same budget."""
    nmnist, cifar10 = seeds(results, "nmnist"), seeds(results, "cifar10-rules")
    pairs = {
        "digits": compared(results, "accuracy-digits"),
        "digits-events": compared(results, "accuracy-digits-events"),
        "CIFAR-10, τ = 1.1, 2 epochs": compared(results, "accuracy-cifar10"),
    }
    of = {name: (rows["BPTT"]["accuracies"], rows["SLTT"]["accuracies"]) for name, rows in pairs.items()}
    of |= {"N-MNIST": (nmnist["BPTT"], nmnist["SLTT"])}
    of |= {"CIFAR-10, no leak, 2 epochs": (cifar10["BPTT"], cifar10["SLTT"])}
    rows = []
    for name, (bptt, sltt) in of.items():
        middle, spread = difference(bptt, sltt)
        shown = f"{100 * middle:+.1f} ± {100 * spread:.1f}"
        counts = f"{len(bptt)}, {len(sltt)}"
        rows.append([name, counts, scores_text(bptt), scores_text(sltt), shown, verdict(middle, spread)])
    return markdown(["data", "seeds", "BPTT", "SLTT", "SLTT − BPTT, points", "within one point"], rows)


def k(results: Path) -> str:
    """SLTT-K over K, where it was trained: the digits' row is there once `paper.py k-digits` has run."""
    from_csv, from_task = ("SLTT(k={})", "SLTT", "BPTT"), ("SLTT:k={}", "SLTT", "BPTT")
    events = {rule: row["accuracies"] for rule, row in tasks(results, "digits-events").items()}
    found = [
        ("the digits' events, T = 9", events, from_task),
        ("N-MNIST, T = 10", seeds(results, "nmnist"), from_csv),
        ("CIFAR-10, no leak, T = 4, 2 epochs", seeds(results, "cifar10-rules"), from_csv),
    ]
    cifar10 = {rule: row["accuracies"] for rule, row in compared(results, "accuracy-cifar10").items()}
    found.append(("CIFAR-10, τ = 1.1, T = 4, 2 epochs", cifar10, from_task))
    if (results / "paper" / "k-digits.json").exists():
        digits = {rule: row["accuracies"] for rule, row in compared(results, "k-digits").items()}
        found.insert(0, ("the digits, T = 6", digits, from_task))
    rows = []
    for name, accuracies, (some, *others) in found:
        names = [*(some.format(n) for n in (1, 2, 4)), *others]
        rows.append([name, *(scores_text(accuracies[rule]) if rule in accuracies else "" for rule in names)])
    return markdown(["data", "K = 1", "K = 2", "K = 4", "K = T", "BPTT"], rows)


def operations(results: Path) -> str:
    """Multiplications of an image."""
    found = load(results, "operations")
    lengths = sorted({row["steps"] for row in found})
    rows = [
        [rule, *(f"{row[part] / 1e9:.2f}" for T in lengths for row in found if row["rule"] == rule and row["steps"] == T
                 for part in ("forward", "backward"))]
        for rule in dict.fromkeys(row["rule"] for row in found)
    ]  # fmt: skip
    return markdown(["10⁹ multiplications", *(f"T = {T}: {p}" for T in lengths for p in ("forward", "backward"))], rows)


def memory(results: Path) -> str:
    """Memory of BPTT over that of SLTT, of a batch alone and with weights, gradients and momentum."""
    found: dict[str, dict[str, Any]] = {}
    for row in load(results, "memory"):
        found.setdefault(row["network"], {})[row["rule"]] = row
    rows = []
    for name, one in found.items():
        bptt, sltt = one["BPTT"], one["SLTT"]
        whole = (bptt["peak"] + bptt["state"]) / (sltt["peak"] + sltt["state"])
        theirs = PAPER_MEMORY[name]
        rows.append(
            [f"{name}, T = {bptt['steps']}, batch {bptt['batch']}", megabytes(bptt["peak"]), megabytes(sltt["peak"]),
             f"{bptt['peak'] / sltt['peak']:.1f}", f"{whole:.1f}",
             f"{theirs[0]:.2f} GB, {theirs[1]:.2f} GB", f"{theirs[0] / theirs[1]:.1f}"]
        )  # fmt: skip
    headings = ["network", "BPTT", "SLTT", "ratio", "ratio with weights", "paper: BPTT, SLTT", "paper: ratio"]
    return markdown(headings, rows)


def time(results: Path) -> str:
    """Seconds of a batch, and what the paper measured of a training."""
    found = {row["case"]: row["seconds"] for row in json.loads((results / "resnet18-t6-all.json").read_text())}
    theirs = {"BPTT": ("6.35 h", "73.8 h"), "SLTT": ("4.58 h", "66.9 h"), "SLTT, k = 1": ("", "32.0 h")}
    rows = [
        [rule.replace("SLTT, k = 1", "SLTT-1"), f"{found[rule]:.2f} s", f"{found[rule] / found['BPTT']:.2f}", *hours]
        for rule, hours in theirs.items()
    ]
    return markdown(["rule", "batch", "of BPTT's", "paper: CIFAR-10", "paper: ImageNet"], rows)


def gradients(name: str) -> Callable[[Path], str]:
    """Cosine of SLTT's gradient with BPTT's over τ, T and epochs; and that of the layer where it is least."""

    def table(results: Path) -> str:
        rows = []
        for row in load(results, f"gradients-{name}")["rows"]:
            one = row["agreement"][0]
            layers = {layer: cosine for layer, (cosine, _) in one["layers"].items() if cosine is not None}
            worst = min(layers, key=lambda layer: layers[layer])
            cells = [f"{row['tau']:g}", str(row["steps"]), str(row["epochs"]), f"{one['cosine']:.3f}"]
            rows.append([*cells, f"{one['norm_ratio']:.2f}", f"{layers[worst]:.3f} (`{worst}`)"])
        return markdown(["τ", "T", "epochs", "cosine", "norm / BPTT", "least of a layer"], rows)

    return table


def trained_cosines(results: Path) -> str:
    """Cosines after the training of the tasks."""
    rows = []
    for name in ("digits", "digits-events", "sequential-digits", "recall"):
        found = tasks(results, name)
        rows.append([f"`{name}`", f"{found['SLTT']['cosine']:.3f}", f"{found['OTTT']['cosine']:.3f}"
                     if "OTTT" in found else ""])  # fmt: skip
    return markdown(["recipe", "SLTT", "OTTT"], rows)


def stages(prefix: str, first: int, second: int, steps: int) -> Callable[[Path], str]:
    """T = 1 alone, T = 1 and then a larger T (`steps`), that T alone; `first` and `second` are epochs."""
    trainings = {
        "stage-1": f"{first + second} epochs at T = 1",
        "stages": f"{first} at T = 1, then {second} at T = {steps}",
        "stage-2": f"{first + second} epochs at T = {steps}",
    }

    def table(results: Path) -> str:
        rows = []
        for name, label in trainings.items():
            for rule, row in compared(results, prefix + name).items():
                rows.append([label, "any" if name == "stage-1" else shown(rule), scores_text(row["accuracies"])])
        return markdown(["training", "rule", "test accuracy"], rows)

    return table


def few_shots(name: str) -> Callable[[Path], str]:
    """Scores, and the accuracy after each session."""

    def table(results: Path) -> str:
        rows = [
            [shown(row["rule"]), *(percent(row[score]) for score in SCORES)]
            for row in load(results, f"fscil-{name}")["rows"]
        ]
        return markdown(["rule", *SCORES.values()], rows)

    return table


TABLES: dict[str, Callable[[Path], str]] = {
    "accuracy": accuracy,
    "k": k,
    "operations": operations,
    "paper-memory": memory,
    "paper-time": time,
    **{f"gradients-{name}": gradients(name) for name in ("nmnist", "cifar10")},
    "trained-cosines": trained_cosines,
    "stages": stages("", 6, 2, 6),
    "stages-cifar10": stages("cifar10-", 3, 1, 4),
    **{f"few-shots-{name}": few_shots(name) for name in ("digits", "nmnist", "cifar10")},
}
