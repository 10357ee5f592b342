"""Draws the memory of SLTT and BPTT over T, for the README and the landing page: `python docs/draw_memory.py`."""

import json
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

DOCS = Path(__file__).parent
INK = "#777777"  # readable on a light and on a dark page
CASES = {
    "SpikingJelly BPTT": ("SpikingJelly, BPTT", "#c2703d", 0.0),
    "BPTT": ("sltt, BPTT", "#2b83ba", 0.0),
    "SpikingJelly SLTT": ("SpikingJelly, SLTT", "#c2703d", 1.5),
    "SLTT": ("sltt, SLTT", "#2b83ba", 0.2),
}  # name in the results: label, colour, and how far the label stands above the end of its line, in GB


def draw(rows: list[dict]) -> Figure:
    """Lines of memory over T, each with a label at its end; rows are those of `benchmarks/peers.py`."""
    figure = Figure(figsize=(5.8, 3.3), layout="constrained")
    axes = figure.subplots()
    for case, (label, colour, above) in CASES.items():
        mine = sorted((row["steps"], row["memory"] / 1e9) for row in rows if row["case"] == case)
        steps, memory = zip(*mine, strict=True)
        axes.plot(steps, memory, color=colour, linestyle="--" if "BPTT" in case else "-", marker="o", linewidth=2.2)
        size = f"{memory[-1]:.1f} GB" if memory[-1] >= 1 else f"{1000 * memory[-1]:.0f} MB"
        axes.text(steps[-1] + 1.5, memory[-1] + above, f"{label}: {size}", color=colour, va="center")
    axes.set(xticks=steps, xlabel="T, time steps", ylabel="peak memory of a batch, GB", xlim=(0, 104), ylim=(0, 15))
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines["bottom"].set_bounds(0, steps[-1] + 1)
    return figure


if __name__ == "__main__":
    colours = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    with rc_context({"svg.hashsalt": "memory", "font.size": 13, **colours}):
        rows = json.loads((DOCS / "results" / "resnet18-over-t.json").read_text())
        draw(rows).savefig(DOCS / "figures" / "memory-over-t.svg", transparent=True, metadata={"Date": None})
