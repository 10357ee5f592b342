"""Tables of docs/paper.md and docs/results.md, from what docs/results keeps; `tables.py` puts them into the pages."""

import csv
import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from advice_tables import calibration, fields, judged, of_tasks
from advice_tables import verdict as judge
from scipy.stats import t as student

from sltt.commands.fscil import SCORES, percent
from sltt.commands.results import scores_text
from sltt.commands.verdict import MARGIN
from sltt.training.console import megabytes

# GB of BPTT and of SLTT, as the paper measured them
PAPER_MEMORY = {"ResNet-18": (3.00, 1.09), "VGG-11": (3.70, 1.07), "NF-ResNet-34": (28.41, 8.47)}
JUDGED = ["worst cosine", "SLTT's share", "SLTT loses, points"]  # cells of `judged`
Cells = Sequence[Sequence[str]]


def markdown(headings: Sequence[str], rows: Cells) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def load(results: Path, name: str) -> Any:
    return json.loads((results / "paper" / f"{name}.json").read_text())


def seeds(results: Path, name: str) -> dict[str, list[float]]:
    """Test accuracies of each rule in a CSV of runs, one for each seed."""
    found: dict[str, dict[str, float]] = {}
    with (results / f"{name}.csv").open() as file:
        for row in csv.DictReader(file):
            found.setdefault(row["rule"], {})[row["seed"]] = float(row["test_accuracy"])
    return {rule: list(values.values()) for rule, values in found.items()}


def tasks(results: Path, task: str) -> dict[str, Any]:
    """Rows of a task in tasks.json, by rule."""
    return {row["rule"]: row for row in json.loads((results / "tasks.json").read_text()) if row["task"] == task}


def of_task(task: str, *rules: str) -> Callable[[Path], str]:
    """A line for each rule in tasks.json, or for these alone."""

    def table(results: Path) -> str:
        rows = [
            [shown(rule), scores_text(row["accuracies"]), megabytes(row["peak_memory"]), f"{row['cosine']:.3f}"]
            for rule, row in tasks(results, task).items()
            if rule in rules or not rules
        ]
        return markdown(["rule", "test accuracy", "memory", "cosine"], rows)

    return table


def summary(results: Path) -> str:
    """The first table: data with BPTT, SLTT and SLTT-1."""
    found = {
        "[N-MNIST](#n-mnist-1000-training-recordings), 1,000 recordings, T = 10": seeds(results, "nmnist"),
        "[CIFAR-10](#the-rules-compared), two epochs, T = 4": seeds(results, "cifar10-rules"),
    }
    for label, task in (
        ("[the digits' events](#all-rules-on-six-tasks), T = 9", "digits-events"),
        ("[Delayed recall](recall.md), needs the gradient through time", "recall"),
    ):
        found[label] = {shown(rule): row["accuracies"] for rule, row in tasks(results, task).items()}
    rows = []
    for label, accuracies in found.items():
        of = {shown(rule): reached for rule, reached in accuracies.items()}
        rows.append([label, *(scores_text(of.get(rule, [])) for rule in ("BPTT", "SLTT", "SLTT-1"))])
    return markdown(["data", "BPTT", "SLTT", "SLTT-1"], rows)


def recurrent(results: Path) -> str:
    """Sequential digits with recurrent layers."""
    found = json.loads((results / "recurrent.json").read_text())
    return markdown(
        ["rule", "test accuracy, seeds 0 to 2"],
        [[shown(row["rule"]), ", ".join(f"{one:.1%}" for one in row["accuracies"])] for row in found],
    )


def shown(rule: str) -> str:
    """A rule as the text names it: SLTT-1, TBPTT(window=2)."""
    rule = rule.replace("SLTT:k=", "SLTT-").replace("SLTT(k=1)", "SLTT-1").removesuffix("()")
    name, _, options = rule.partition(":")
    return f"{name}({options})" if options else rule


def all_tasks(results: Path) -> str:
    """A line for each task and rule."""
    rows = []
    for row in json.loads((results / "tasks.json").read_text()):
        seconds = "–" if row["seconds"] is None else f"{row['seconds']:.1f}"
        reached = scores_text(row["accuracies"]), str(len(row["accuracies"]))
        cells = megabytes(row["peak_memory"]), seconds, f"{row['cosine']:.3f}"
        rows.append([row["task"], row["rule"], *reached, *cells])
    headings = ["task", "rule", "test accuracy", "seeds", "memory", "seconds per epoch", "cosine"]
    return markdown(headings, rows)


def runs(name: str) -> Callable[[Path], str]:
    """A line for each rule in a CSV that results.py wrote."""

    def table(results: Path) -> str:
        found: dict[str, list[dict[str, str]]] = {}
        with (results / f"{name}.csv").open() as file:
            for row in csv.DictReader(file):
                found.setdefault(row["rule"], []).append(row)
        rows = []
        for rule, epochs in found.items():
            by_seed = {row["seed"]: row for row in epochs}.values()
            reached = ([float(row[key]) for row in by_seed] for key in ("test_accuracy", "last_epoch_test"))
            seconds = statistics.median(float(row["seconds"]) for row in epochs)
            rows.append([rule, str(len(by_seed)), *map(scores_text, reached), f"{seconds:.3g}"])
        return markdown(["rule", "seeds", "test accuracy", "after the last epoch", "seconds per epoch"], rows)

    return table


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
    pairs = {f"{name}": tasks(results, name) for name in ("digits", "digits-events")}
    of = {name: (rows["BPTT"]["accuracies"], rows["SLTT"]["accuracies"]) for name, rows in pairs.items()}
    of |= {"N-MNIST": (nmnist["BPTT"], nmnist["SLTT"]), "CIFAR-10, 2 epochs": (cifar10["BPTT"], cifar10["SLTT"])}
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
        ("CIFAR-10, T = 4, 2 epochs", seeds(results, "cifar10-rules"), from_csv),
    ]
    if (results / "paper" / "k-digits.json").exists():
        digits = {row["rule"]: row["accuracies"] for row in load(results, "k-digits")["rows"]}
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


def stages(results: Path) -> str:
    """T = 1 alone, T = 1 and then T = 6, T = 6 alone."""
    rows = []
    for name, label in (("stage-1", "8 epochs at T = 1"), ("stages", "6 at T = 1, then 2 at T = 6"),
                        ("stage-2", "8 epochs at T = 6")):  # fmt: skip
        for row in load(results, name)["rows"]:
            rule = "any" if name == "stage-1" else shown(row["rule"])
            rows.append([label, rule, scores_text(row["accuracies"])])
    return markdown(["training", "rule", "test accuracy"], rows)


def trained_map(results: Path) -> str:
    """Accuracy and cosine over T and τ, after a training on sequential digits."""
    rows = []
    for cell in sorted(load(results, "map").values(), key=lambda cell: (cell["T"], cell["tau"])):
        of = {row["rule"]: row for row in cell["rows"]}
        reached = (scores_text(of[rule]["accuracies"]) for rule in ("BPTT", "SLTT"))
        rows.append([str(cell["T"]), f"{cell['tau']:g}", *reached, f"{of['SLTT']['cosine']:.2f}"])
    return markdown(["T", "τ", "BPTT", "SLTT", "cosine after the training"], rows)


def map_advice(results: Path) -> str:
    """What `sltt agreement` says in the fields of the map, and whether it is right."""
    rows = [
        [str(T), f"{tau:g}", *judged(case), shown(said), judge(said, [case])]
        for (T, tau), (said, case) in fields(results).items()
    ]
    return markdown(["T", "τ", *JUDGED, "advice", "it is"], rows)


def advice(results: Path) -> str:
    """What `sltt agreement` says on the tasks, and whether it is right."""
    rows = []
    for task, (said, cases) in of_tasks(results).items():
        first, *others = cases.values()
        traces = [judged(one) for one in others] or [[""] * 3]
        rows.append(
            [task, str(first.trial.epochs), *judged(first), *traces[0][1:], shown(said), judge(said, [*cases.values()])]
        )
    return markdown(["task", "epochs", *JUDGED, "OTTT's share", "OTTT loses", "advice", "it is"], rows)


def sparsity(results: Path) -> str:
    """Accuracy, energy and time over the weight of a penalty on firing rates."""
    rows = []
    for task, found in json.loads((results / "sparsity.json").read_text()).items():
        for row in found:
            reached = scores_text(row["validation"]), scores_text(row["accuracies"])
            counted = f"{row['firing_rate']:.3f}", f"{row['synaptic_operations'] / 1e6:.3g}"
            energy = f"{row['picojoules'] / 1e6:.3g}", f"{row['picojoules_of_data'] / 1e6:.3g}"
            time = (f"{row[part] / found[0][part]:.2f}" for part in ("training", "inference"))
            rows.append([f"`{task}`", f"{row['weight']:g}", *reached, *counted, *energy, *time])
    headings = ["recipe", "weight", "validation", "test accuracy", "firing rate", "10⁶ synaptic operations", "µJ",
                "µJ of the input", "time of training", "of inference"]  # fmt: skip
    return markdown(headings, rows)


def calibrated(results: Path) -> str:
    """How often the advice is right, over its thresholds."""
    tasks = [case for _, cases in of_tasks(results).values() for case in cases.values()]
    rows = calibration([*tasks, *(case for _, case in fields(results).values())])
    return markdown(["a rule is advised where", "right", "BPTT is not needed", "wrong"], rows)


def training(results: Path) -> str:
    """A whole training of the digits: accuracy, and memory, multiplications and cosine of a batch after it."""
    rows = []
    for row in load(results, "training-digits")["rows"]:
        counted = (f"{row['operations'][part]:.2e}" for part in ("forward", "backward"))
        reached = scores_text(row["accuracies"]), megabytes(row["peak_memory"])
        rows.append([shown(row["rule"]), *reached, *counted, f"{row['cosine']:.3f}"])
    headings = ["rule", "test accuracy", "memory", "multiplications, forward", "backward", "cosine with BPTT"]
    return markdown(headings, rows)


def rules_over_t(results: Path) -> str:
    """Memory and time of a batch of the digits over T, as rules.py measured them."""
    found = json.loads((results / "rules.json").read_text())
    cells = {(row["steps"], row["rule"]): f"{megabytes(row['peak_memory'])}, {row['seconds']:.2g} s" for row in found}
    names = list(dict.fromkeys(rule for _, rule in cells))
    lengths = sorted({T for T, _ in cells})
    rows = [[str(T), *(cells[T, name] for name in names)] for T in lengths]
    return markdown(["T", *(f"`{name}`" for name in names)], rows)


def short(name: str) -> Callable[[Path], str]:
    """A line for each case that short.py trained, with the mean and the deviation over seeds."""

    def table(results: Path) -> str:
        found: list[dict[str, Any]] = json.loads((results / f"short-{name}.json").read_text())
        cases: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        names = [key for key in found[0] if key not in ("seed", "test", "validation", "peak_memory")]
        for row in found:
            cases.setdefault(tuple(row[key] for key in names), []).append(row)
        rows = []
        for case, seeds in cases.items():
            reached = (scores_text([row[key] for row in seeds]) for key in ("validation", "test"))
            what = (shown(str(value)) for value in case)
            rows.append([*what, str(len(seeds)), *reached, megabytes(seeds[0]["peak_memory"])])
        headings = ({"norm": "normalisation", "steps": "T"}.get(key, key) for key in names)
        return markdown([*headings, "seeds", "validation", "test accuracy", "memory"], rows)

    return table


def twin(results: Path) -> str:
    """An ANN and its twins on validation images; the best of each kind on test images too."""
    forms = {"percentile": "{:g}", "lr": "{:g}", "validation": "{:.1%}", "test": "{:.1%}", "minutes": "{:.1f}"}
    found = json.loads((results / "twin.json").read_text())
    rows = [[row["network"], *(f.format(row[key]) if key in row else "" for key, f in forms.items())] for row in found]
    return markdown(["network", "percentile", "learning rate", "validation", "test", "minutes"], rows)


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
    "tasks": all_tasks,
    **{task: of_task(task) for task in ("recall", "recall-marked", "sequential-digits")},
    **{f"short-{name}": short(name) for name in ("stabilised", "transformer")},
    "twin": twin,
    "summary": summary,
    "recall-short": of_task("recall", "BPTT", "OTTT", "SLTT", "SLTT:k=1"),
    "recurrent": recurrent,
    "sparsity": sparsity,
    "advice": advice,
    "calibration": calibrated,
    "training": training,
    "rules": rules_over_t,
    **{name: runs(name) for name in ("nmnist", "nmnist-rules", "cifar10-rules")},
    "accuracy": accuracy,
    "k": k,
    "operations": operations,
    "paper-memory": memory,
    "paper-time": time,
    "gradients-nmnist": gradients("nmnist"),
    "gradients-cifar10": gradients("cifar10"),
    "trained-cosines": trained_cosines,
    "stages": stages,
    "few-shots": few_shots("digits"),
    "map": trained_map,
    "map-advice": map_advice,
}
