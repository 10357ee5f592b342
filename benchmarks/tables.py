"""Fill the tables of docs from docs/results.

    python benchmarks/tables.py

A table stands between `<!-- table NAME -->` and `<!-- end -->`. NAME is one of `TABLES`, or a file of
benchmarks/peers.py: NAME.json, with a table for each setting. `<!-- table NAME over T -->` has columns for each T, with
the time of each case; `<!-- table NAME over T of CASE -->` has ratios to the time of CASE instead.
"""

import re
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

from advice_tables import advice, calibrated
from cells import Row, by, compared, family, fastest, grouped, last_epochs, load, markdown, of_task, shown, spread
from peer_cases import NETWORKS
from peer_tables import Rows, cases_table, ratio, steps_table
from scipy.stats import ttest_ind
from turns import quotient

from sltt.commands.fscil import SCORES
from sltt.commands.results import scores_text
from sltt.commands.verdict import MARGIN
from sltt.training.console import megabytes

DOCS = Path(__file__).parents[1] / "docs"
NAMES = "performance", "paper", "results", "when-not", "recall", "remember", "own-neuron", "gpu"
PAGES = [DOCS / f"{name}.md" for name in NAMES]
BLOCK = re.compile(r"(<!-- table (\S+)( over T)?(?: of ([^>]+))? -->\n).*?(<!-- end -->)", re.DOTALL)
# in the table of tasks
RULES = "BPTT", "TBPTT(window=2)", "OTTT", "OTTT(inputs=false)", "RateBased", "Mixed", "SLTT", "SLTT-1"


def filled(page: str, results: Path = DOCS / "results") -> str:
    """The page with its tables."""

    def table(block: re.Match[str]) -> str:
        start, name, over_steps, of, end = block.groups()
        try:
            found = TABLES[name](results) if name in TABLES else of_cases(results, name, bool(over_steps), of)
        except FileNotFoundError:
            found = "Not measured yet.\n"
        return f"{start}\n{found}\n{end}"

    return BLOCK.sub(table, page)


def of_cases(results: Path, name: str, over_steps: bool, of: str | None) -> str:
    """Make a table for each setting of the cases that peers.py measured, over T or for each T."""
    rows: Rows = [row for row in load(results, name) if "error" not in row]
    make = partial(steps_table, of=of) if over_steps else cases_table
    settings = grouped(rows, "network", "batch", *([] if over_steps else ["steps"]))
    return "\n".join(make(one) for one in settings.values()) + f"\n[All values](results/{name}.json)\n"


def tasks(results: Path, cell: Callable[[Row], str], of: str = "") -> str:
    """Fill a line for each rule and a column for each task in tasks.json."""
    rows = [row for row in load(results, "tasks") if family(row) == of]
    names = list(grouped(rows, "task"))
    cells = {(shown(row["rule"]).partition("(windows")[0], row["task"]): cell(row) for row in rows}
    lines = [[rule, *(cells.get((rule, name), "") for name in names)] for rule in RULES]
    return markdown(["rule", *(f"`{name}`" for name in names)], [line for line in lines if any(line[1:])])


def delays(results: Path) -> str:
    """Accuracies of rules on networks with and without delays."""
    rows, tasks = load(results, "delays"), ("recall", "recall-marked", "recall-far")
    for row in rows:
        row["name"] = "OTTT(k=T/4)" if row["rule"].startswith("OTTT:k") else shown(row["rule"])
    lines = []
    for (network, rule), of in grouped(rows, "network", "name").items():
        one = by(of, "task")
        lines.append([network, rule, *(scores_text(one[t]["accuracies"]) if t in one else "" for t in tasks)])
    return markdown(["network", "rule", *(f"`{task}`" for task in tasks)], lines)


def speech(results: Path) -> str:
    """Accuracies of networks on spoken digits, by known and by unknown speakers, and the memory of a batch."""
    lines = []
    for (network, rule), of in grouped(load(results, "speech"), "network", "rule").items():
        splits = ([row for row in of if row["split"] == split] for split in ("own", "speakers"))
        own, six = ([row["accuracies"] for row in rows] for rows in splits)
        seeds, each = [statistics.mean(one) for one in zip(*six, strict=True)], [statistics.mean(one) for one in six]
        worst = f"{min(each):.1%} to {max(each):.1%}"
        memory = megabytes(max(row["peak_memory"] for row in of))
        lines.append([network, rule, scores_text(own[0]), scores_text(seeds), worst, memory])
    return markdown(["network", "rule", "own split", "unseen speaker, mean", "the six", "memory"], lines)


def layers(results: Path) -> str:
    """Milliseconds of the dense gradients of some layers, PyTorch's and ours."""
    found = load(results, "layers")
    rows = []
    for (dtype, layer), of in grouped(found["rows"], "dtype", "layer").items():
        if layer in ("64→64, 32×32", "512→512, 4×4"):
            one = {row["pass"]: row["milliseconds"] for row in of}
            name = f"{layer}, {dtype}"
            for part in ("input gradient", "weight gradient"):
                times = (f"{one[part][column][0]:.1f}" for column in ("dense", "dense, ours"))
                rows.append([name, part, *times])
                name = ""
    table = markdown(["channels, pixels", "", "PyTorch", "ours"], rows).replace("|  |", "| |")
    return measured(found, table, f"{found['batch']} images", f"medians of {found['repeats']}")


def measured(found: Row, table: str, *how: str) -> str:
    """Put a line over a table that says on what it was measured, and how."""
    return f"{', '.join([found['hardware'], *how])}:\n\n{table}"


def other_networks(results: Path) -> str:
    """Ratios of times and memory of SLTT on networks other than ResNet-18."""
    lines = []
    for name in ("vgg11-t10", "vgg11-max-t10"):
        rows: Rows = load(results, name)
        one = by(rows, "case")
        row = one[case := "SLTT"]
        network = f"{NETWORKS[row['network']][2]}, T = {row['steps']}, batch {row['input'][0]}"
        ratios = (spread(ratio(rows, row, other)) for other in ("relu", "SpikingJelly SLTT", "BPTT"))
        sizes = (megabytes(one[other]["memory"]) if "memory" in one.get(other, {}) else "" for other in (case, "BPTT"))
        lines.append([f"[{network}](results/{name}.json)", *ratios, *sizes])
    headings = "SLTT's time ÷ ReLU's", "÷ SpikingJelly SLTT's", "÷ BPTT's", "SLTT's memory", "BPTT's memory"
    return markdown(["network", *headings], lines)


def sequences(results: Path, name: str = "sequences") -> str:
    """Small networks and long sequences, as open_neuromorphic.py measured them beside libraries' fastest forms."""
    found, libraries = load(results, name), ("JAX", "SpikingJelly", "snnTorch", "Norse", "sinabs")
    pairs = [("SLTT", "JAX SLTT"), ("SLTT", "SLTT, fold = 1"), *(("BPTT", f"{library} BPTT") for library in libraries)]
    lines = []
    for work, of in grouped(found["rows"], "work").items():
        one, peaks = ({row["case"]: row[key] for row in of} for key in ("seconds", "peak_MB"))
        seconds = [f"{statistics.median(one[case]):.3g} s, {peaks[case]:.3g} MB" for case in ("SLTT", "BPTT")]
        rates = ", ".join(f"{100 * rate:.1f}%" for rate in found["rates"][work])
        lines.append([f"`{work}`", rates, *seconds, *(over_fastest(one, *pair) for pair in pairs)])
    headings = "SLTT ÷ JAX's SLTT", "SLTT ÷ `SLTT(fold=1)`", *(f"BPTT ÷ {library}'s" for library in libraries)
    return measured(found, markdown(["", "firing rates", "SLTT", "BPTT", *headings], lines), "processor time")


def libraries(results: Path) -> str:
    """Networks of other libraries, as libraries.py measured them beside the library's own BPTT."""
    rows: Rows = load(results, "libraries")
    lines = []
    for row in rows:
        own = row["own"]
        ratios = (spread(quotient(row[rule], own)) for rule in ("SLTT", "BPTT"))
        size = f"batch {row['batch']}, T = {row['steps']}"
        lines.append([LIBRARIES[row["network"]], size, f"{1e3 * statistics.median(own):.0f} ms", *ratios])
    table = markdown(["network", "", "its own BPTT", "SLTT ÷ its own BPTT", "BPTT ÷ its own"], lines)
    return measured(rows[0], table, "processor time", f"{len(rows[0]['own'])} turns")


def networks(results: Path) -> str:
    """Networks that nobody tuned for, as networks.py measured them beside SpikingJelly's BPTT and ReLU."""
    pairs = ("SLTT", "SpikingJelly"), ("BPTT", "SpikingJelly"), ("SLTT", "ReLU")
    tables = []
    for (where, _), rows in grouped(load(results, "networks"), "hardware", "batch").items():
        lines = []
        for row in rows:
            times, memory = row["times"], row["memory"]
            ratios = (spread(quotient(times[case], times[other])) for case, other in pairs)
            sizes = (megabytes(memory[case]) for case in ("SLTT", "BPTT", "SpikingJelly"))
            size = f"{row['batch']}, {row['steps']}"
            spent = f"{1e3 * statistics.median(times['SpikingJelly']):.0f} ms"
            lines.append([FORWARDS[row["network"]], size, f"{row['rate']:.0%}", spent, *ratios, *sizes])
        headings = "batch, T", "fire", "SpikingJelly's BPTT", "SLTT ÷ it", "BPTT ÷ it", "SLTT ÷ ReLU"
        table = markdown(["network", *headings, "memory: SLTT", "BPTT", "SpikingJelly"], lines)
        clock = "processor time" if where.startswith("1 thread ") else "wall-clock time"
        tables.append(measured({"hardware": where}, table, clock, f"{len(rows[0]['times']['SLTT'])} turns"))
    return "\n".join(tables)


FORWARDS = {
    "resnet18-64": "ResNet-18 as torchvision's, 64×64 pixels",
    "resnet18-128": "ResNet-18, 128×128",
    "sew-64": "ResNet-18, SEW blocks, 64×64",
    "ms-64": "ResNet-18, MS blocks, 64×64",
    "vgg-64": "VGG-11, max pooling, 64×64",
    "audio": "M5, convolutions in 1-D, 2,000 samples of sound a step",
    "dvs-128": "SpikingJelly's DVS network, 64 channels, 128×128",
    "mobilenet-64": "inverted residuals as MobileNetV2's, 64×64",
    "unet-64": "U-Net, logits for each of 64×64 pixels",
    "transformer": "Spikformer, 64 tokens of 192 channels",
}
LIBRARIES = {
    "sew": "SpikingJelly's SEW-ResNet-18, 64×64 pixels",
    "snntorch": "snnTorch's convolutional network, 28×28",
    "norse": "Norse, two convolutions, 28×28",
    "norse-linear": "Norse, 784-256-128-10",
    "sinabs": "sinabs, two convolutions, 28×28",
    "sinabs-linear": "sinabs, 784-256-128-10",
}


def over_fastest(times: dict[str, list[float]], case: str, other: str) -> str:
    """Divide a case's times by those of the fastest form of another, and name the form where there are several."""
    if not (form := fastest(times, other)):
        return ""
    return spread(quotient(times[case], times[form])) + form.removeprefix(other)


# the paper's GB of BPTT and of SLTT, and hours of trainings: CIFAR-10, DVS-CIFAR10, ImageNet (not DVS-Gesture)
PAPER: dict[str, tuple[tuple[float, float], dict[str, float]]] = {
    "ResNet-18": ((3.00, 1.09), {"BPTT": 6.35, "SLTT": 4.58}),
    "VGG-11, 48×48": ((3.70, 1.07), {"BPTT": 4.47, "SLTT": 3.43}),
    "VGG-11, 128×128": ((5.82, 1.07), {}),
    "NF-ResNet-34": ((28.41, 8.47), {"BPTT": 73.8, "SLTT": 66.9, "SLTT-1": 32.0}),
}


def difference(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Return the mean of the second less that of the first, and half its 90% interval (Welch)."""
    middle = statistics.mean(second) - statistics.mean(first)
    if statistics.pvariance(first) == statistics.pvariance(second) == 0:
        return middle, 0.0
    interval: Any = ttest_ind(second, first, equal_var=False).confidence_interval(0.9)  # type: ignore[attr-defined]
    return middle, float(interval.high) - middle


def within_margin(middle: float, half: float) -> str:
    """Two one-sided tests at 5%: is the difference within the margin?"""
    if abs(middle) + half <= MARGIN:
        return "equal"
    return "less" if middle + half < 0 else "more" if middle - half > 0 else "open"


def paper_accuracy(results: Path) -> str:
    """SLTT beside BPTT with the same budget."""
    of = {
        "digits": compared(results, "accuracy-digits"),
        "digits-events": compared(results, "accuracy-digits-events"),
        "CIFAR-10, τ = 1.1, 2 epochs": compared(results, "accuracy-cifar10"),
        "N-MNIST": last_epochs(results, "nmnist"),
        "CIFAR-10, no leak, 2 epochs": compared(results, "accuracy-cifar10-no-leak"),
    }
    rows = []
    for name, reached in of.items():
        bptt, sltt = reached["BPTT"], reached["SLTT"]
        middle, half = difference(bptt, sltt)
        points = f"{100 * middle:+.1f} ± {100 * half:.1f}"
        counts = f"{len(bptt)}, {len(sltt)}"
        rows.append([name, counts, scores_text(bptt), scores_text(sltt), points, within_margin(middle, half)])
    return markdown(["data", "seeds", "BPTT", "SLTT", "SLTT − BPTT, points", "within one point"], rows)


K = {"SLTT-1": "K = 1", "SLTT-2": "2", "SLTT-3": "3", "SLTT-4": "4", "SLTT-5": "5", "SLTT": "K = T", "BPTT": "BPTT"}


def k(results: Path) -> str:
    """SLTT-K over K."""
    of = {
        "the digits, T = 6": compared(results, "k-digits"),
        "the digits' events, T = 9": of_task(results, "digits-events"),
        "N-MNIST, T = 10": last_epochs(results, "nmnist"),
        "CIFAR-10, no leak, T = 4, 2 epochs": compared(results, "accuracy-cifar10-no-leak"),
        "CIFAR-10, τ = 1.1, T = 4, 2 epochs": compared(results, "accuracy-cifar10"),
    }
    rows = [[name, *(scores_text(one[rule]) if rule in one else "" for rule in K)] for name, one in of.items()]
    return markdown(["data", *K.values()], rows)


def operations(results: Path) -> str:
    """Multiplications of an image."""
    found = grouped(sorted(load(results, "paper/operations"), key=itemgetter("steps")), "rule")
    parts = "forward", "backward"
    rows = [[rule, *(f"{row[part] / 1e9:.2f}" for row in of for part in parts)] for rule, of in found.items()]
    headings = (f"T = {row['steps']}: {part}" for row in next(iter(found.values())) for part in parts)
    return markdown(["10⁹ multiplications", *headings], rows)


def paper_memory(results: Path) -> str:
    """Memory of BPTT over that of SLTT, of a batch alone and with weights, gradients and momentum."""
    rows = []
    for name, of in grouped(load(results, "paper/memory"), "network").items():
        one = by(of, "rule")
        bptt, sltt = one["BPTT"], one["SLTT"]
        whole = (bptt["peak"] + bptt["state"]) / (sltt["peak"] + sltt["state"])
        label = f"{name}, T = {bptt['steps']}, batch {bptt['batch']}"
        peaks = megabytes(bptt["peak"]), megabytes(sltt["peak"]), f"{bptt['peak'] / sltt['peak']:.1f}"
        theirs, _ = PAPER[name]
        of_paper = f"{theirs[0]:.2f} GB, {theirs[1]:.2f} GB", f"{theirs[0] / theirs[1]:.1f}"
        rows.append([label, *peaks, f"{whole:.1f}", *of_paper])
    headings = ["network", "BPTT", "SLTT", "ratio", "ratio with weights", "paper: BPTT, SLTT", "paper: ratio"]
    return markdown(headings, rows)


def paper_time(results: Path) -> str:
    """Seconds of a batch of each rule, and the ratio to BPTT beside the paper's."""
    found, rows = load(results, "paper/seconds"), []
    for name, of in grouped(found["rows"], "network").items():
        label, bptt = f"{name}, T = {of[0]['steps']}, batch {of[0]['batch']}", of[0]["seconds"]
        _, hours = PAPER[name]
        for row in of:
            theirs = f"{hours[row['rule']] / hours['BPTT']:.2f}" if row["rule"] in hours else ""
            ratio = spread(quotient(row["seconds"], bptt))
            rows.append([label, row["rule"], f"{statistics.median(row['seconds']):.2f} s", ratio, theirs])
            label = ""
    table = markdown(["network", "rule", "batch", "of BPTT's", "paper: of BPTT's"], rows).replace("|  |", "| |")
    return measured(found, table, f"medians of {len(found['rows'][0]['seconds'])} turns")


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
        for rule, reached in compared(results, prefix + name).items():
            rows.append([label, "any" if name.startswith("stage-1") else rule, scores_text(reached)])
    return markdown(["training", "rule", "test accuracy"], rows)


def few_shots(results: Path) -> str:
    """Scores of each rule, and of the mean of the pixels."""
    rows = []
    for name, label in {"digits": "digits", "nmnist": "N-MNIST", "cifar10": "CIFAR-10"}.items():
        for row in load(results, f"paper/fscil-{name}")["rows"]:
            if row["rule"] != "chance":
                scores = (scores_text(row[score]).replace("%", "") for score in SCORES)
                rows.append([label, shown(row["rule"]), *scores])
    return markdown(["data", "rule", *SCORES.values()], rows)


def gpu_steps(results: Path) -> str:
    """How the steps of gpu.py ended."""
    rows = load(results, "gpu/steps")
    ends = ("failed: " + r["last"] if r["code"] else "done" for r in rows)
    lines = [[f"`{r['step']}`", end, f"{r['seconds']:.0f} s"] for r, end in zip(rows, ends, strict=True)]
    return markdown(["step", "", "took"], lines)


def gpu_profile(results: Path) -> str:
    """A profile of one batch."""
    found = load(results, "gpu/profile")
    lines = [
        [r["what"], f"{1e3 * r['seconds']:.1f} ms", f"{1e3 * r['host']:.1f} ms", f"{r['busy']:.0%}", str(r["launches"])]
        for r in found["rows"]
    ]
    return measured(found, markdown(["batch", "time", "host", "device busy", "launches"], lines))


def gpu_kernels(results: Path) -> str:
    """The neuron step against the memory's bandwidth."""
    found = load(results, "gpu/kernels")
    lines = []
    for row in found["rows"]:
        rates = f"{row['rate'] / 1e9:.0f} GB/s", f"{row['rate'] / row['copy']:.0%}"
        lines.append([f"{row['dtype']}, T = {row['steps']}", f"{1e3 * row['seconds']:.2f} ms", *rates])
    return measured(found, markdown(["LIF", "forward and backward", "moved", "of a copy's rate"], lines))


TABLES: dict[str, Callable[[Path], str]] = {
    "tasks": partial(tasks, cell=lambda row: scores_text(row["accuracies"])),
    "tasks-memory": partial(tasks, cell=lambda row: megabytes(row["peak_memory"])),
    "tasks-cosine": partial(tasks, cell=lambda row: f"{row['cosine']:.3f}"),
    "series": partial(tasks, cell=lambda row: scores_text(row["accuracies"]), of="series"),
    "recurrent": partial(tasks, cell=lambda row: scores_text(row["accuracies"]), of="recurrent"),
    "delays": delays,
    "speech": speech,
    "layers": layers,
    "other-networks": other_networks,
    "sequences": sequences,
    "libraries": libraries,
    "networks": networks,
    "gpu-steps": gpu_steps,
    "gpu-profile": gpu_profile,
    "gpu-kernels": gpu_kernels,
    "gpu-sequences": partial(sequences, name="gpu/sequences"),
    "accuracy": paper_accuracy,
    "k": k,
    "operations": operations,
    "paper-memory": paper_memory,
    "paper-time": paper_time,
    "gradients": gradients,
    "stages": partial(stages, prefix="", first=6, second=2, steps=6),
    "stages-cifar10": partial(stages, prefix="cifar10-", first=3, second=1, steps=4),
    "few-shots": few_shots,
    "advice": advice,
    "advice-series": partial(advice, of_family="series"),
    "calibration": calibrated,
}


def fill() -> None:
    """Write the tables of all pages."""
    for page in PAGES:
        page.write_text(filled(page.read_text()))


if __name__ == "__main__":
    fill()
