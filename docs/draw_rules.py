"""Draws what of the graph each rule keeps, for the page on the rules: `python docs/draw_rules.py`.

Columns are time steps, rows are layers; an arrow is a path of the forward pass. Blue paths carry the gradient back,
grey ones do not.
"""

from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import Circle

STEPS, LAYERS = 4, 3
KEPT, CUT = "#2b83ba", "#8c8c8c"
INK = "#777777"  # readable on a light and on a dark page


def draw(name: str, kept_time, kept_step=lambda t: True, note: str = "", mean: bool = False) -> None:
    """Draw one rule.

    Args:
        name: of the file.
        kept_time: whether the gradient goes from step t + 1 back to step t in a layer, of (t, layer).
        kept_step: whether step t has a backward.
        note: below the drawing.
        mean: with a pass through the means over time, which has the gradient.
    """
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 13, "text.color": INK}):
        figure = Figure(figsize=(6.4, 3.1), layout="constrained")
        axes = figure.subplots()
        for t in range(STEPS + mean):
            kept = kept_step(t) or t == STEPS
            for layer in range(LAYERS + 1):
                colour = KEPT if kept else CUT
                _arrow(axes, (t, layer - 0.72), (t, layer - 0.28), colour)
                if layer == LAYERS:
                    continue
                axes.add_patch(Circle((t, layer), 0.18, fill=False, linewidth=1.8, edgecolor=colour))
                if t + 1 < STEPS:
                    _arrow(axes, (t + 0.2, layer), (t + 0.8, layer), KEPT if kept_time(t, layer) else CUT)
            axes.text(t, -1.05, f"t = {t + 1}" if t < STEPS else "mean", ha="center")
            axes.text(t, LAYERS - 0.1, "loss", ha="center", color=KEPT if kept else CUT)
        for layer in range(LAYERS):
            axes.text(-0.45, layer, f"layer {layer + 1}", ha="right", va="center")
        axes.text(-0.45, -1.05, "input", ha="right")
        if note:
            axes.text((STEPS - 1) / 2, -1.55, note, ha="center")
        axes.set(xlim=(-1.2, STEPS + mean - 0.5), ylim=(-1.75, LAYERS + 0.2))
        axes.axis("off")
        target = Path(__file__).parent / "drawings" / f"{name}.svg"
        figure.savefig(target, transparent=True, metadata={"Date": None})


def _arrow(axes, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    style = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.8, "shrinkA": 0, "shrinkB": 0}
    if colour == CUT:
        style["linestyle"] = (0, (3, 2))
    axes.annotate("", xy=end, xytext=start, arrowprops=style)


if __name__ == "__main__":
    draw("bptt", lambda t, layer: True)
    draw("tbptt", lambda t, layer: t % 2 == 0, note="window = 2")
    draw("sltt", lambda t, layer: False)
    draw("sltt-k", lambda t, layer: False, lambda t: t == 1, "K = 1: step 2 was drawn for this batch")
    draw("ottt", lambda t, layer: False, note="the weights also see a trace of earlier spikes")
    draw("mixed", lambda t, layer: layer == 0, note='the window of layer 1 is "all"')
    draw(
        "rate",
        lambda t, layer: False,
        lambda t: False,
        "no step has a graph; a pass through the means over time has",
        mean=True,
    )
