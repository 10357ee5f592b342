"""Figures of the report, drawn by matplotlib: each as SVG for the page, and as PNG and SVG in files.

The SVG in a page takes the colour of its text from the page, so that it fits a light and a dark one.
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from sltt.training.files import write_atomically

if TYPE_CHECKING:
    from sltt.training.sample import Sample

# Okabe & Ito 2008: told apart by colour-blind people, and on white as on black
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C8C00", "#8A8A8A")
INK = "#010203"  # stands for the colour of the page's text
WIDTH = 4.8  # inches: letters of 11 points are 10 pixels or more on a page of 360
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "sltt",  # the same file from the same data
    "font.family": "sans-serif",
    "font.size": 11,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor"), "none"),
}
Points = tuple[Sequence[float], Sequence[float]]


def palette(labels: Iterable[str]) -> dict[str, str]:
    """Return a colour for each label, so that a rule has the same in every figure."""
    return {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(dict.fromkeys(labels))}


@rc_context(STYLE)
def lines(
    series: Mapping[str, Sequence[Points]], colours: Mapping[str, str], x: str, y: str, *, percent: bool = False
) -> Figure:
    """Return lines over whole numbers x; a label may have several, such as one for each seed."""
    rows = -(-len(series) // _columns(list(series)))
    figure, axes = _figure(3.4 + 0.2 * max(rows - 2, 0))
    for label, curves in series.items():
        for i, (xs, ys) in enumerate(curves):
            style = {"color": colours[label], "marker": "o" if len(xs) < 20 else "", "markersize": 4, "alpha": 0.85}
            axes.plot(xs, ys, label=None if i else _text(label), **style)
    axes.set(xlabel=x, ylabel=_text(y))
    if percent:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
    else:
        axes.axhline(0, linewidth=0)  # so that points of one height have room above
        axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    _legend(axes, len(series))
    return figure


@rc_context(STYLE)
def stacked_bars(parts: Mapping[str, Sequence[float]], rows: Sequence[str], x: str) -> Figure:
    """Return a horizontal bar for each row, of several parts."""
    figure, axes = _figure(0.9 + 0.5 * (len(parts) > 1) + 0.35 * len(rows))  # a legend takes half an inch
    left = np.zeros(len(rows))
    colours = palette(parts)
    for label, lengths in parts.items():
        axes.barh(range(len(rows)), lengths, left=left, color=colours[label], label=_text(label), height=0.7)
        left += np.asarray(lengths)
    axes.set_yticks(range(len(rows)), [*map(_text, rows)])
    axes.invert_yaxis()
    axes.set(xlabel=x)
    _legend(axes, len(parts))
    return figure


def bars(values: Mapping[str, float], x: str) -> Figure:
    """Return a horizontal bar for each label."""
    return stacked_bars({"": list(values.values())}, list(values), x)


@rc_context(STYLE)
def raster(sample: "Sample", neurons: int) -> Figure:
    """Draw input, spikes of about `neurons` of each layer, and output of one sample over time, one above the other."""
    fields = len(sample.spikes) + 2
    figure = Figure(figsize=(WIDTH, 0.8 + fields), layout="constrained")
    all_axes: Any = figure.subplots(fields, 1, sharex=True)
    steps = len(sample.logits)
    x = np.broadcast_to(sample.x, (steps, sample.x.shape[1])).T
    shades = LinearSegmentedColormap.from_list("input", [f"{COLOURS[0]}00", COLOURS[0]])  # no white on a dark page
    all_axes[0].imshow(x, aspect="auto", cmap=shades, extent=(0.5, steps + 0.5, len(x), 0), interpolation="none")
    for axes, fired in zip(all_axes[1:-1], sample.spikes.values(), strict=True):
        spikes = fired[:, :: max(1, fired.shape[1] // neurons)]
        t, n = np.nonzero(spikes)
        axes.scatter(t + 1, n, marker="|", s=max(4, 900 / max(spikes.shape[1], 1)), color=COLOURS[0], linewidths=1.5)
        axes.set(ylim=(-1, spikes.shape[1]))
    for label, logits in enumerate(sample.logits.T):
        true = label == sample.label
        all_axes[-1].plot(range(1, steps + 1), logits, color=COLOURS[3] if true else COLOURS[7], zorder=1 + true)
    for axes, name in zip(all_axes, ("input", *sample.spikes, "output"), strict=True):
        axes.set(xlim=(0.5, steps + 0.5), yticks=[])
        axes.set_ylabel(_text(name), rotation=0, ha="right", va="center")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    all_axes[-1].set_xlabel("time step")
    return figure


def _text(name: str) -> str:
    """Return a name of the user's as text, of which dollars do not make a formula."""
    return name.replace("$", r"\$")


def svg(figure: Figure, title: str) -> str:
    """Return the figure as an SVG element, with the page's colour for text and `title` for screen readers."""
    buffer = io.StringIO()
    with rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    return text.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)


def save_figure(figure: Figure, folder: Path, name: str) -> None:
    """Write `name`.png and `name`.svg, on white."""
    with rc_context({**STYLE, "savefig.facecolor": "white"}):
        for kind, metadata in (("png", None), ("svg", {"Date": None})):
            saved = partial(figure.savefig, format=kind, dpi=150, metadata=metadata)
            write_atomically(folder / f"{name}.{kind}", saved)


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _legend(axes: Axes, entries: int) -> None:
    if entries > 1:
        labels = [str(label) for label in axes.get_legend_handles_labels()[1]]
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=_columns(labels))


def _columns(labels: Sequence[str]) -> int:
    """Return the columns of a legend: three, or as many as there is room for."""
    return max(1, min(len(labels), 3, 50 // (max(map(len, labels), default=1) + 4)))
