"""Time over that of other libraries at several firing rates or widths: `python benchmarks/curves_figure.py [LOG]`.

The log is that of `benchmarks/open_neuromorphic.py --rates …` or `--widths …`. A point divides by the fastest form of a
library there. Without a log, it draws those of docs.
"""

import json
import sys
from pathlib import Path
from typing import Any

from cells import fastest, grouped
from matplotlib import rc_context
from matplotlib.figure import Figure
from turns import quotient

DOCS = Path(__file__).parents[1] / "docs"
LOGS = [DOCS / "results" / f"{name}.json" for name in ("rates", "widths")]
INK = "#777777"  # readable on a light and on a dark page
COLOURED = "text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"
PAIRS = {  # our case and theirs: label and colour
    ("SLTT", "JAX SLTT"): ("SLTT ÷ JAX", "#2b83ba"),
    ("BPTT", "JAX BPTT"): ("BPTT ÷ JAX", "#7fb2d6"),
    ("BPTT", "SpikingJelly BPTT"): ("BPTT ÷ SpikingJelly", "#c2703d"),
    ("BPTT", "snnTorch BPTT"): ("BPTT ÷ snnTorch", "#3c8d5a"),
    ("BPTT", "Norse BPTT"): ("BPTT ÷ Norse", "#8c6bb1"),
}


def ratios(found: dict[str, Any], work: str, case: str, other: str) -> list[tuple[float, tuple[float, float, float]]]:
    """Return each firing rate in percent, or width, with the ratio there, its least and its most."""
    points = []
    for name, rows in grouped(found["rows"], "work").items():
        times = {row["case"]: row["seconds"] for row in rows}
        if name.startswith(f"{work}@") and case in times and (form := fastest(times, other)):
            rates, width = found["rates"][name], name.partition("/")[2]
            at = float(width) if width else 100 * sum(rates) / len(rates)
            points.append((at, quotient(times[case], times[form])))
    return sorted(points)


@rc_context({"svg.hashsalt": "rates", **dict.fromkeys(COLOURED, INK)})
def draw(log: Path) -> Path:
    """Draw a panel for each network, beside the log if it is not that of docs."""
    found = json.loads(log.read_text())
    works = list(dict.fromkeys(row["work"].partition("@")[0] for row in found["rows"]))
    widths = sorted({int(width) for row in found["rows"] if (width := row["work"].partition("/")[2])})
    figure = Figure(figsize=(1 + 3.4 * len(works), 3.6), layout="constrained")
    (axes,) = figure.subplots(1, len(works), sharey=True, squeeze=False)
    for axis, work in zip(axes, works, strict=True):
        for pair, (label, colour) in PAIRS.items():
            if points := ratios(found, work, *pair):
                rates, middles = [rate for rate, _ in points], [middle for _, (middle, _, _) in points]
                spread = [[m - low for _, (m, low, _) in points], [high - m for _, (m, _, high) in points]]
                axis.errorbar(rates, middles, spread, label=label, color=colour, marker="o", capsize=3, linewidth=2)
        axis.axhline(1, color=INK, linestyle=":", linewidth=1)
        title, xlabel = (work.removesuffix("-256"), "width of hidden layers") if widths else (work, "firing rate, %")
        axis.set(title=title, xlabel=xlabel, xscale="log" if widths else "linear")
        if widths:
            axis.set_xticks(widths, map(str, widths), minor=False)
            axis.set_xticks([], minor=True)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylim(bottom=0)  # of all, whose axis it shares
    axes[0].set_ylabel("ratio of times")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    path = DOCS / "figures" / f"{log.stem}.svg" if log in LOGS else log.with_suffix(".svg")
    figure.savefig(path, transparent=True, metadata={"Date": None})
    return path


if __name__ == "__main__":
    for log in [Path(path) for path in sys.argv[1:]] or LOGS:
        print(draw(log) if log.exists() else f"not measured yet: {log}")
