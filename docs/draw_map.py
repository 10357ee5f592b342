"""The map of τ and T on sequential digits: how near SLTT's gradient is to BPTT's, and what it loses in accuracy.

    python docs/draw_map.py

`python benchmarks/paper.py map` measures it; docs/results/paper has the values.
"""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

DOCS = Path(__file__).parent
FIGURE, RESULTS = DOCS / "figures" / "map.svg", DOCS / "results" / "paper"
Grid = dict[tuple[int, float], float]  # of T and τ
BEFORE, AFTER = "cosine, before the training", "cosine, after it"
LOST, BPTT = "SLTT loses, points", "BPTT's test accuracy, %"
INK = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), "#808080")
LIMITS = {BEFORE: (0, 1), AFTER: (0, 1), LOST: (-20, 20), BPTT: (0, 100)}


def panels(gradients: Sequence[dict[str, Any]], cells: Sequence[dict[str, Any]]) -> dict[str, Grid]:
    """The four grids."""
    found: dict[str, Grid] = {name: {} for name in LIMITS}
    for row in gradients:
        found[BEFORE][row["T"], row["tau"]] = statistics.mean(row["cosines"])
    for cell in cells:
        rows, where = {row["rule"]: row for row in cell["rows"]}, (cell["T"], cell["tau"])
        bptt, sltt = (100 * statistics.mean(rows[rule]["accuracies"]) for rule in ("BPTT", "SLTT"))
        found[BPTT][where], found[LOST][where], found[AFTER][where] = bptt, bptt - sltt, rows["SLTT"]["cosine"]
    return found


def draw(path: Path) -> None:
    """Four heat maps over T and τ; what was not measured stays empty."""
    gradients = json.loads((RESULTS / "map-gradients.json").read_text())
    cells = list(json.loads((RESULTS / "map.json").read_text()).values())
    lengths, taus = (sorted({row[name] for row in gradients}) for name in ("T", "tau"))
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "sltt", "font.size": 10, **INK}):
        figure, several = plt.subplots(2, 2, figsize=(8.4, 5.6), layout="constrained", sharex=True, sharey=True)
        for axes, (title, grid) in zip(several.flat, panels(gradients, cells).items(), strict=True):
            low, high = LIMITS[title]
            colours = "RdBu_r" if title == LOST else "viridis"
            values = [[grid.get((T, tau), float("nan")) for T in lengths] for tau in taus]
            axes.imshow(values, vmin=low, vmax=high, cmap=colours, aspect="auto", origin="lower")
            for (T, tau), value in grid.items():
                share = (value - low) / (high - low)
                light = not 0.2 < share < 0.8 if title == LOST else share < 0.6
                text = f"{value:.2f}" if high == 1 else f"{value:+.1f}" if title == LOST else f"{value:.0f}"
                place = lengths.index(T), taus.index(tau)
                axes.text(*place, text, ha="center", va="center", color="white" if light else "black", fontsize=9)
            axes.set(title=title, xticks=range(len(lengths)), yticks=range(len(taus)))
            axes.set_xticklabels([str(T) for T in lengths])
            axes.set_yticklabels([f"{tau:g}" for tau in taus])
        figure.supxlabel("T")
        figure.supylabel("τ, in time steps")
        figure.savefig(path, transparent=True, metadata={"Date": None})
        plt.close(figure)


if __name__ == "__main__":
    draw(FIGURE)
