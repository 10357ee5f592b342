"""Tables of docs/paper.md, from docs/results."""

import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path

from cells import accuracies, by, compared, grouped, load, markdown, seeds, tasks
from scipy.stats import t as student
from turns import quotient, spread

from sltt.commands.fscil import SCORES, percent
from sltt.commands.results import scores_text
from sltt.commands.verdict import MARGIN
from sltt.training.console import megabytes

# GB of BPTT and of SLTT, as the paper measured them
PAPER_MEMORY = {
    "ResNet-18": (3.00, 1.09),
    "VGG-11, 48×48": (3.70, 1.07),
    "VGG-11, 128×128": (5.82, 1.07),
    "NF-ResNet-34": (28.41, 8.47),
}
# hours of its trainings: CIFAR-10, DVS-CIFAR10, ImageNet; it does not have those of DVS-Gesture
PAPER_HOURS = {
    "ResNet-18": {"BPTT": 6.35, "SLTT": 4.58},
    "VGG-11, 48×48": {"BPTT": 4.47, "SLTT": 3.43},
    "VGG-11, 128×128": {},
    "NF-ResNet-34": {"BPTT": 73.8, "SLTT": 66.9, "SLTT-1": 32.0},
}


def difference(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Mean of the second less that of the first, and half its 90% interval (Welch)."""
    parts = [statistics.variance(one) / len(one) for one in (first, second)]
    squared, half = sum(parts), 0.0
    if squared:
        freedom = squared**2 / sum(p**2 / (len(one) - 1) for p, one in zip(parts, (first, second), strict=True))
        half = float(student.ppf(0.95, freedom)) * math.sqrt(squared)
    return statistics.mean(second) - statistics.mean(first), half


def verdict(middle: float, half: float) -> str:
    """Two one-sided tests at 5%: is the difference within the margin?"""
    if abs(middle) + half <= MARGIN:
        return "equal"
    return "less" if middle + half < 0 else "more" if middle - half > 0 else "open"


def accuracy(results: Path) -> str:
    """SLTT beside BPTT with the same budget."""
    of = {
        "digits": accuracies(compared(results, "accuracy-digits")),
        "digits-events": accuracies(compared(results, "accuracy-digits-events")),
        "CIFAR-10, τ = 1.1, 2 epochs": accuracies(compared(results, "accuracy-cifar10")),
        "N-MNIST": seeds(results, "nmnist"),
        "CIFAR-10, no leak, 2 epochs": seeds(results, "cifar10-rules"),
    }
    rows = []
    for name, reached in of.items():
        bptt, sltt = reached["BPTT"], reached["SLTT"]
        middle, half = difference(bptt, sltt)
        points = f"{100 * middle:+.1f} ± {100 * half:.1f}"
        counts = f"{len(bptt)}, {len(sltt)}"
        rows.append([name, counts, scores_text(bptt), scores_text(sltt), points, verdict(middle, half)])
    return markdown(["data", "seeds", "BPTT", "SLTT", "SLTT − BPTT, points", "within one point"], rows)


K = {"SLTT-1": "K = 1", "SLTT-2": "2", "SLTT-3": "3", "SLTT-4": "4", "SLTT-5": "5", "SLTT": "K = T"}


def k(results: Path) -> str:
    """SLTT-K over K."""
    of = {
        "the digits, T = 6": accuracies(compared(results, "k-digits")),
        "the digits' events, T = 9": accuracies(tasks(results, "digits-events")),
        "N-MNIST, T = 10": seeds(results, "nmnist"),
        "CIFAR-10, no leak, T = 4, 2 epochs": seeds(results, "cifar10-rules"),
        "CIFAR-10, τ = 1.1, T = 4, 2 epochs": accuracies(compared(results, "accuracy-cifar10")),
    }
    return over_k({name: {rule: scores_text(one) for rule, one in reached.items()} for name, reached in of.items()})


def over_k(cells: dict[str, dict[str, str]]) -> str:
    """A line for each data, a column for each K, and BPTT."""
    rows = [[name, *(of.get(rule, "") for rule in (*K, "BPTT"))] for name, of in cells.items()]
    return markdown(["data", *K.values(), "BPTT"], rows)


def operations(results: Path) -> str:
    """Multiplications of an image."""
    found = grouped(sorted(load(results, "paper/operations"), key=itemgetter("steps")), "rule")
    parts = "forward", "backward"
    rows = [[rule, *(f"{row[part] / 1e9:.2f}" for row in of for part in parts)] for rule, of in found.items()]
    headings = (f"T = {row['steps']}: {part}" for row in next(iter(found.values())) for part in parts)
    return markdown(["10⁹ multiplications", *headings], rows)


def memory(results: Path) -> str:
    """Memory of BPTT over that of SLTT, of a batch alone and with weights, gradients and momentum."""
    rows = []
    for name, of in grouped(load(results, "paper/memory"), "network").items():
        one = by(of, "rule")
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
    """Seconds of a batch of each rule, and the ratio to BPTT beside the paper's."""
    found, rows = load(results, "paper/seconds"), []
    for name, of in grouped(found["rows"], "network").items():
        label, bptt = f"{name}, T = {of[0]['steps']}, batch {of[0]['batch']}", of[0]["seconds"]
        for row in of:
            hours = PAPER_HOURS[name].get(row["rule"])
            theirs = f"{hours / PAPER_HOURS[name]['BPTT']:.2f}" if hours else ""
            ratio = spread(quotient(row["seconds"], bptt))
            rows.append([label, row["rule"], f"{statistics.median(row['seconds']):.2f} s", ratio, theirs])
            label = ""
    table = markdown(["network", "rule", "batch", "of BPTT's", "paper: of BPTT's"], rows).replace("|  |", "| |")
    return f"{found['hardware']}, medians of {len(found['rows'][0]['seconds'])} turns:\n\n{table}"


GRADIENTS = {"nmnist": "N-MNIST", "cifar10": "CIFAR-10, ResNet-18", "cifar10-training": "CIFAR-10, small network"}


def gradients(results: Path) -> str:
    """Cosine of SLTT's gradient with BPTT's over τ, T and epochs."""
    lines, taus = [], ("1.1", "2", "5")
    for name, label in GRADIENTS.items():
        for (epochs, steps), of in grouped(load(results, f"paper/gradients-{name}")["rows"], "epochs", "steps").items():
            cosines = {f"{row['tau']:g}": row["agreement"][0]["cosine"] for row in of}
            lines.append([label, str(steps), str(epochs), *(f"{cosines[tau]:.3f}" for tau in taus)])
    return markdown(["data", "T", "epochs", *(f"τ = {tau}" for tau in taus)], lines)


def stages(results: Path, prefix: str, first: int, second: int, steps: int) -> str:
    """T = 1 alone, T = 1 and then a larger T (`steps`), that T alone; `first` and `second` are epochs."""
    trainings = {
        "stage-1-alone": f"{first} epochs at T = 1",
        "stage-1": f"{first + second} epochs at T = 1",
        "stages": f"{first} at T = 1, then {second} at T = {steps}",
        "stage-2": f"{first + second} epochs at T = {steps}",
    }
    rows = []
    for name, label in trainings.items():
        if not (results / "paper" / f"{prefix}{name}.json").exists():
            continue  # not measured yet
        for rule, row in compared(results, prefix + name).items():
            rows.append([label, "any" if name.startswith("stage-1") else rule, scores_text(row["accuracies"])])
    return markdown(["training", "rule", "test accuracy"], rows)


def few_shots(results: Path) -> str:
    """Scores of each rule, and of the mean of the pixels."""
    rows = []
    for name, label in {"digits": "digits", "nmnist": "N-MNIST", "cifar10": "CIFAR-10"}.items():
        for rule, row in compared(results, f"fscil-{name}").items():
            if rule != "chance":
                rows.append([label, rule, *(percent(row[score]) for score in SCORES)])
    return markdown(["data", "rule", *SCORES.values()], rows)


TABLES: dict[str, Callable[[Path], str]] = {
    "accuracy": accuracy,
    "k": k,
    "operations": operations,
    "paper-memory": memory,
    "paper-time": time,
    "gradients": gradients,
    "stages": partial(stages, prefix="", first=6, second=2, steps=6),
    "stages-cifar10": partial(stages, prefix="cifar10-", first=3, second=1, steps=4),
    "few-shots": few_shots,
}
