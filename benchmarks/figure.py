"""The figure of what benchmarks/peers.py measured.

    python benchmarks/figure.py JSON FIGURE

Time and memory of each case: bars for one T, lines over T for several, also of a run that is not finished.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator

from sltt.training.console import megabytes


def colour(case: str) -> str:
    if case.startswith("relu"):
        return "#9aa0a6"
    return "#c2703d" if case.startswith(("SpikingJelly", "snnTorch", "Norse")) else "#2f6f9f"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars for one T, lines over T for several, of the first network; what was not measured is named in the title."""
    rows = sorted((row for row in rows if row["network"] == rows[0]["network"]), key=lambda row: row["steps"])
    measured = [row for row in rows if "error" not in row]
    several = len({row["steps"] for row in measured}) > 1
    height = 4.8 if several else 0.4 * len(measured) + 1.6
    figure, axes = plt.subplots(1, 2, figsize=(10, height), sharey=not several, layout="constrained")
    (draw_over_steps if several else draw_bars)(measured, axes)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    if several:
        handles, labels = axes[1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(title(rows), fontsize=10)
    figure.savefig(path, dpi=150, facecolor="white")
    plt.close(figure)


def title(rows: list[dict[str, Any]]) -> str:
    """Network, batch, T if it is one, and precision; the hardware; cases without a measurement."""
    steps = {row["steps"] for row in rows}
    words = [rows[0]["network"]]
    if "input" in rows[0]:  # files of an earlier version do not say
        batch, *shape = rows[0]["input"]
        words += [f"batch {batch} × {'×'.join(map(str, shape))}"]
    words += [f"T = {rows[0]['steps']}"] * (len(steps) == 1)
    words += ["float32"] * (not any("bf16" in row["case"] for row in rows))
    lines = [", ".join(words), *dict.fromkeys(row["hardware"] for row in rows if "hardware" in row)]
    lines += [f"{row['case']} at T = {row['steps']}: {row['error']}" for row in rows if "error" in row]
    return "\n".join(lines)


def draw_bars(rows: list[dict[str, Any]], axes: Any) -> None:
    names = [row["case"] for row in rows]
    values = ([row["seconds"] for row in rows], [row["memory"] / 1e6 for row in rows])
    labels = ("seconds per iteration", "peak memory, MB")
    for axis, value, label, form in zip(axes, values, labels, ("%.2f", "%.0f"), strict=True):
        axis.bar_label(axis.barh(names, value, color=[colour(name) for name in names]), fmt=form, padding=3)
        axis.set_xlabel(label)
        axis.margins(x=0.12)
    axes[0].invert_yaxis()


def draw_over_steps(rows: list[dict[str, Any]], axes: Any) -> None:
    """The time of a step, with the smallest and the largest; and memory, on a logarithmic scale."""
    for case, marker in zip(dict.fromkeys(row["case"] for row in rows), "osD^vPX*<>" * 2, strict=False):
        mine = [row for row in rows if row["case"] == case]
        steps = [row["steps"] for row in mine]
        style = {"marker": marker, "color": colour(case), "linestyle": "--" if "BPTT" in case else "-", "label": case}
        seconds = [row["seconds"] / row["steps"] for row in mine]
        below = [(row["seconds"] - row["min"]) / row["steps"] for row in mine]
        above = [(row["max"] - row["seconds"]) / row["steps"] for row in mine]
        axes[0].errorbar(steps, seconds, [below, above], capsize=3, **style)
        memory = [row["memory"] for row in mine]
        axes[1].plot(steps, memory, **style)
        place = {"textcoords": "offset points", "va": "center", "fontsize": 9}
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axes[1].annotate(megabytes(memory[-1]), (steps[-1], memory[-1]), (8, 0), bbox=box, **place)
    ticks = sorted({row["steps"] for row in rows})
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, ticks, minor=False)
        axis.set_xlabel("T, time steps")
        axis.grid(axis="y", color="#e4e6e8")
    axes[0].set(ylabel="seconds for each time step", ylim=(0, None))
    axes[1].set(ylabel="peak memory", yscale="log")
    axes[1].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[1].yaxis.set_major_formatter(FuncFormatter(lambda nbytes, _: megabytes(nbytes)))
    axes[1].minorticks_off()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path, help="what peers.py wrote")
    parser.add_argument("figure", type=Path, help="file to draw, .png or .svg")
    options = parser.parse_args()
    draw(json.loads(options.json.read_text()), options.figure)


if __name__ == "__main__":
    main()
