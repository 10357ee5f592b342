"""Fill the tables of docs from docs/results.

    python benchmarks/tables.py

A table stands between `<!-- table NAME -->` and `<!-- end -->`. NAME is one of `TABLES`, or a file of
benchmarks/peers.py: NAME.json, with a table for each setting. `<!-- table NAME over T -->` has a column for each T.
"""

import re
import statistics
from collections.abc import Callable
from functools import partial
from itertools import groupby
from pathlib import Path

import advice_tables
import paper_tables
from cells import Row, by, grouped, is_series, load, markdown, shown
from peer_cases import CASES
from peers import ratio
from turns import quotient, spread

from sltt.commands.results import scores_text
from sltt.training.console import megabytes

DOCS = Path(__file__).parents[1] / "docs"
NAMES = "performance", "paper", "results", "when-not", "recall", "own-neuron", "gpu"
PAGES = [DOCS / f"{name}.md" for name in NAMES]
BLOCK = re.compile(r"(<!-- table (\S+)( over T)? -->\n).*?(<!-- end -->)", re.DOTALL)
LABELS = {
    "SpikingJelly SLTT": "SpikingJelly 2.0, `SLTTLIFNode`",
    "SpikingJelly BPTT": "SpikingJelly 2.0, `LIFNode`, layer by layer",
    "SpikingJelly memopt, units": "the same, `memopt` of level 1 on each weight, norm and neuron",
    "SpikingJelly memopt, blocks": "the same, `memopt` of level 1 on residual blocks",
}
NETWORKS = {
    "resnet18": "ResNet-18",
    "vgg11": "VGG-11",
    "vgg11-max": "VGG-11 with max pooling",
    "spikformer": "Spikformer",
    "shd": "MLP 700-256-256-20",
    "digits": "DigitsNet",
}
RULES = (
    "BPTT",
    "TBPTT(window=2)",
    "OTTT",
    "OTTT(inputs=false)",
    "RateBased",
    "Mixed",
    "SLTT",
    "SLTT-1",
)  # in the table of tasks
Rows = list[Row]


def filled(page: str, results: Path = DOCS / "results") -> str:
    """The page with its tables."""

    def table(block: re.Match[str]) -> str:
        start, name, over_steps, end = block.groups()
        try:
            found = TABLES[name](results) if name in TABLES else of_cases(results, name, bool(over_steps))
        except FileNotFoundError:
            found = "Not measured yet.\n"
        return f"{start}\n{found}\n{end}"

    return BLOCK.sub(table, page)


def of_cases(results: Path, name: str, over_steps: bool) -> str:
    """A table for each setting of the cases that peers.py measured, or one with a column for each T."""
    rows: Rows = [row for row in load(results, name) if "error" not in row]
    tables = [steps_table(rows)] if over_steps else [cases_table(list(g)) for _, g in groupby(rows, setting)]
    return "\n".join(tables) + f"\n[All values](results/{name}.json)\n"


def setting(row: Row) -> tuple[object, ...]:
    """What rows of one table have in common."""
    return row["network"], row["steps"], str(row.get("input")), row.get("hardware"), row.get("clock")


def cases_table(rows: Rows) -> str:
    """Cases of one setting."""
    floors = {CASES[row["case"]].floor for row in rows}
    floor = "ReLU" if all(name.startswith("relu") for name in floors) else floors.pop()
    columns = {
        "time": [f"{row['seconds']:.3g} s" for row in rows],
        f"ratio to {floor}": [spread(ratio(rows, row, CASES[row["case"]].floor)) for row in rows],
        "ratio to SpikingJelly": [spread(ratio(rows, row, CASES[row["case"]].peer)) for row in rows],
        "memory": [megabytes(row["memory"]) if "memory" in row else "" for row in rows],
        "resident set": [megabytes(row["resident"]) if "resident" in row else "" for row in rows],
    }
    return conditions(rows, steps=True) + lines(rows, {name: cells for name, cells in columns.items() if any(cells)})


def steps_table(rows: Rows) -> str:
    """Time and memory of each case, a pair of columns for each T."""
    cases = [{row["steps"]: row for row in of} for of in grouped(rows, "case").values()]
    columns: dict[str, list[str]] = {}
    for steps in sorted({row["steps"] for row in rows}):
        mine = [case.get(steps) for case in cases]
        columns[f"T = {steps}: time"] = [f"{row['seconds']:.3g} s" if row else "" for row in mine]
        columns["memory" + " " * len(columns)] = [megabytes(row["memory"]) if row else "" for row in mine]
    return conditions(rows, steps=False) + lines([next(iter(case.values())) for case in cases], columns)


def lines(rows: Rows, columns: dict[str, list[str]]) -> str:
    """Markdown: a line for each row, with the name of its case."""
    names = [LABELS.get(row["case"], row["case"].replace("relu", "ReLU")) for row in rows]
    table = markdown(["", *(name.strip() for name in columns)], list(zip(names, *columns.values(), strict=True)))
    return table.replace("|  |", "| |").replace("|  |", "| |")


def conditions(rows: Rows, steps: bool) -> str:
    """A line over the table: what was measured, and on what."""
    words = [NETWORKS[rows[0]["network"]]]
    if "input" in rows[0]:  # files of an earlier version do not say
        batch, *shape = rows[0]["input"]
        words += [f"batch {batch} × {'×'.join(map(str, shape))}"]
    words += [f"T = {rows[0]['steps']}"] * steps
    words += [rows[0]["hardware"]] if "hardware" in rows[0] else []
    words += ["processor time" if rows[0].get("clock") == "process" else "wall-clock time"]
    counts = sorted({len(row["times"]) for row in rows})
    words += [f"medians of {counts[0]}" if len(counts) == 1 else f"medians of {counts[0]} to {counts[-1]}"]
    return f"{', '.join(words)}:\n\n"


def tasks(results: Path, cell: Callable[[Row], str], series: bool = False) -> str:
    """Fill a line for each rule and a column for each task in tasks.json: those on time series, or the others."""
    rows = [row for row in load(results, "tasks") if is_series(row) is series]
    names = list(grouped(rows, "task"))
    cells = {(shown(row["rule"]).partition("(windows")[0], row["task"]): cell(row) for row in rows}
    lines = [[rule, *(cells.get((rule, name), "") for name in names)] for rule in RULES]
    return markdown(["rule", *(f"`{name}`" for name in names)], lines)


def recurrent(results: Path) -> str:
    """Sequential digits with recurrent layers."""
    found = load(results, "recurrent")
    rows = [[shown(row["rule"]), ", ".join(f"{one:.1%}" for one in row["accuracies"])] for row in found]
    return markdown(["rule", "test accuracy, seeds 0 to 2"], rows)


def rules_over_t(results: Path) -> str:
    """Memory and time of a batch of the digits over T, as rules.py measured them."""
    found = sorted(grouped(load(results, "rules"), "steps").items())
    rows = []
    rules = list(by(found[0][1], "rule"))
    for T, of in found:
        one = by(of, "rule")
        cells = (f"{megabytes(one[rule]['peak_memory'])}, {one[rule]['seconds']:.2g} s" for rule in rules)
        rows.append([str(T), *cells])
    return markdown(["T", *(f"`{rule}`" for rule in rules)], rows)


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
    return f"{found['hardware']}, {found['batch']} images, medians of {found['repeats']}:\n\n{table}"


def exact(results: Path) -> str:
    """Memory of exact gradients, and their time beside SpikingJelly's BPTT, on each network and T."""
    settings = grouped(load(results, "exact"), "network", "steps")
    columns = {}
    for (network, steps), rows in settings.items():
        cells = {row["case"]: (row, ratio(rows, row, "SpikingJelly BPTT")) for row in rows if "error" not in row}
        columns[f"{NETWORKS[network]}, T = {steps}"] = {
            case: f"{megabytes(row['memory'])}, {found[0]:.2f}" for case, (row, found) in cells.items() if found
        }
    first = next(iter(settings.values()))[0]
    over = f"{first['hardware']}, batch {first['batch']}, processor time, medians of {len(first['times'])}:"
    cases = dict.fromkeys(case for column in columns.values() for case in column)
    lines = [[LABELS.get(case, case), *(column.get(case, "") for column in columns.values())] for case in cases]
    return f"{over}\n\n{markdown(['', *columns], lines).replace('|  |', '| |')}"


def other_networks(results: Path) -> str:
    """Ratios of times and memory of SLTT on networks other than ResNet-18."""
    lines = []
    for name in ("vgg11-t10", "vgg11-max-t10"):
        rows: Rows = load(results, name)
        one = by(rows, "case")
        row = one[case := "SLTT"]
        network = f"{NETWORKS[row['network']]}, T = {row['steps']}, batch {row['input'][0]}"
        ratios = (spread(ratio(rows, row, other)) for other in ("relu", "SpikingJelly SLTT", "BPTT"))
        sizes = (megabytes(one[other]["memory"]) if "memory" in one.get(other, {}) else "" for other in (case, "BPTT"))
        lines.append([f"[{network}](results/{name}.json)", *ratios, *sizes])
    return markdown(
        ["network", "of ReLU's time", "of SpikingJelly's SLTT", "of BPTT's", "memory", "BPTT's memory"], lines
    )


def sequences(results: Path, name: str = "sequences") -> str:
    """Small networks and long sequences, as open_neuromorphic.py measured them beside other libraries."""
    found = load(results, name)
    lines = []
    for work, of in grouped(found["rows"], "work").items():
        one = by(of, "case")

        def share(case: str, other: str, one: dict[str, Row] = one) -> str:
            return spread(quotient(one[case]["seconds"], one[other]["seconds"])) if other in one else ""

        pairs = ("SLTT", "JAX SLTT"), ("SLTT", "SLTT, fold = 1"), ("BPTT", "JAX BPTT"), ("BPTT", "SpikingJelly BPTT")
        seconds = (f"{statistics.median(one[case]['seconds']):.3g} s" for case in ("SLTT", "BPTT"))
        lines.append([f"`{work}`", *seconds, *(share(*pair) for pair in pairs)])
    headings = "SLTT of JAX's SLTT", "of its own, step by step", "BPTT of JAX's BPTT", "of SpikingJelly's BPTT"
    return f"{found['hardware']}, processor time:\n\n" + markdown(["", "SLTT", "BPTT", *headings], lines)


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
    return f"{found['hardware']}:\n\n" + markdown(["batch", "time", "host", "device busy", "launches"], lines)


def gpu_kernels(results: Path) -> str:
    """The neuron step against the memory's bandwidth."""
    found = load(results, "gpu/kernels")
    lines = [
        [
            f"{r['dtype']}, T = {r['steps']}",
            f"{1e3 * r['seconds']:.2f} ms",
            f"{r['rate'] / 1e9:.0f} GB/s",
            f"{r['rate'] / r['copy']:.0%}",
        ]
        for r in found["rows"]
    ]
    return f"{found['hardware']}:\n\n" + markdown(["LIF", "forward and backward", "moved", "of a copy's rate"], lines)


TABLES: dict[str, Callable[[Path], str]] = {
    "tasks": partial(tasks, cell=lambda row: scores_text(row["accuracies"])),
    "tasks-memory": partial(tasks, cell=lambda row: megabytes(row["peak_memory"])),
    "tasks-cosine": partial(tasks, cell=lambda row: f"{row['cosine']:.3f}"),
    "series": partial(tasks, cell=lambda row: scores_text(row["accuracies"]), series=True),
    "recurrent": recurrent,
    "rules": rules_over_t,
    "layers": layers,
    "other-networks": other_networks,
    "exact": exact,
    "sequences": sequences,
    "gpu-steps": gpu_steps,
    "gpu-profile": gpu_profile,
    "gpu-kernels": gpu_kernels,
    "gpu-sequences": partial(sequences, name="gpu/sequences"),
    **paper_tables.TABLES,
    **advice_tables.TABLES,
}


def fill() -> None:
    """Write the tables of all pages."""
    for page in PAGES:
        page.write_text(filled(page.read_text()))


if __name__ == "__main__":
    fill()
