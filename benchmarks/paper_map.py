"""The map of τ and T on sequential digits: how near SLTT's gradient is to BPTT's, and what it loses in accuracy.

`benchmarks/paper.py map` trains and draws it; docs/results/paper/map.json has the values.
"""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from tables import DOCS

FIGURE = DOCS / "figures" / "map.svg"


def panels(cells: Sequence[dict[str, Any]]) -> dict[str, dict[tuple[int, float], float]]:
    """Of each T and τ: BPTT's test accuracy, the points that SLTT loses, and the cosine of its gradient."""
    found: dict[str, dict[tuple[int, float], float]] = {
        "BPTT's accuracy, %": {},
        "SLTT loses, points": {},
        "cosine": {},
    }
    accuracy, lost, cosine = found.values()
    for cell in cells:
        rows, where = {row["rule"]: row for row in cell["rows"]}, (cell["T"], cell["tau"])
        bptt, sltt = (100 * statistics.mean(rows[rule]["accuracies"]) for rule in ("BPTT", "SLTT"))
        accuracy[where], lost[where], cosine[where] = bptt, bptt - sltt, rows["SLTT"]["cosine"]
    return found


def draw(cells: Sequence[dict[str, Any]], path: Path) -> None:
    """Three heat maps over T and τ; what was not measured stays empty."""
    lengths, taus = (sorted({cell[name] for cell in cells}) for name in ("T", "tau"))
    limits = {
        "BPTT's accuracy, %": (0, 100, "viridis"),
        "SLTT loses, points": (-20, 20, "RdBu_r"),
        "cosine": (0, 1, "viridis"),
    }
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "sltt", "font.size": 10}):
        figure, several = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained", sharey=True)
        for axes, (title, values) in zip(several, panels(cells).items(), strict=True):
            low, high, colours = limits[title]
            grid = [[values.get((T, tau), float("nan")) for T in lengths] for tau in taus]
            axes.imshow(grid, vmin=low, vmax=high, cmap=colours, aspect="auto", origin="lower")
            for (T, tau), value in values.items():
                share = (value - low) / (high - low)
                dark = not 0.25 < share < 0.75 if colours == "RdBu_r" else share < 0.6
                text = f"{value:.2f}" if title == "cosine" else f"{value:.0f}"
                place = lengths.index(T), taus.index(tau)
                axes.text(*place, text, ha="center", va="center", color="white" if dark else "black", fontsize=9)
            axes.set(title=title, xlabel="T", xticks=range(len(lengths)), yticks=range(len(taus)))
            axes.set_xticklabels([str(T) for T in lengths])
            axes.set_yticklabels([f"{tau:g}" for tau in taus])
        several[0].set_ylabel("τ, time steps")
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


if __name__ == "__main__":
    draw(list(json.loads((DOCS / "results" / "paper" / "map.json").read_text()).values()), FIGURE)
