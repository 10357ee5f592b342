"""Draws what the examples compute, for the gallery in docs/examples.md: `python docs/draw_examples.py`.

Runs the scripts in examples/, and takes network and input from their last call of `sltt.unroll`. What a script prints
goes to the page. From each notebook it takes the last figure, from the report of the demo the memory over T.
"""

import base64
import json
import re
import runpy
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from unittest import mock

import torch
from matplotlib import rc_context
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

import sltt
from sltt.sequence.layout import spiking_layers
from sltt.sequence.spikes import observe_spikes

DOCS = Path(__file__).parent
PAGE = DOCS / "examples.md"
INK, BLUE, ORANGE = "#777777", "#2b83ba", "#c2703d"  # readable on a light and on a dark page
STYLE = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    **{"svg.fonttype": "none", "svg.hashsalt": "examples", "font.size": 11},
    **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
}


def run(name: str) -> tuple[str, torch.nn.Module, torch.Tensor]:
    """What an example prints, its network after the training, and the test samples of its last batch."""
    with redirect_stdout(StringIO()) as printed, mock.patch("sltt.unroll", wraps=sltt.unroll) as unroll:
        accuracy = runpy.run_path(str(DOCS.parent / "examples" / f"{name}.py"))["main"]()
    print(f"{name}: test accuracy {accuracy:.1%}")
    own = re.findall(r"^(?:epoch \d+|\w+\(.*\)): .*\n", printed.getvalue(), re.MULTILINE)  # not what frameworks print
    PAGE.write_text(with_output(PAGE.read_text(), name, "".join([*own, f"test accuracy {accuracy:.1%}\n"])))
    model, x = unroll.call_args.args
    return printed.getvalue(), model.eval(), x


def with_output(page: str, name: str, printed: str) -> str:
    """Return the page with what an example prints, in the block behind its name."""
    block = re.compile(rf"(examples/{name}\.py\).*?```text\n).*?(```)", re.DOTALL)
    return block.sub(lambda found: found[1] + printed + found[2], page, count=1)


def spikes(figure: Figure, name: str) -> None:
    """The events of a test sample over time, and the spikes of each layer."""
    _, model, x = run(name)
    fired: dict[str, list[torch.Tensor]] = {}
    with observe_spikes(
        spiking_layers(model), lambda layer, seen: fired.setdefault(layer, []).append(seen[0].flatten())
    ):
        sltt.unroll(model, x)
    several = figure.subplots(1 + len(fired), 1, sharex=True)
    for t, (on, off) in enumerate(x[:, 0].tolist(), 1):
        for events, colour in ((on, BLUE), (off, ORANGE)):
            place = {"extent": (t - 0.4, t + 0.4, 0, 1), "aspect": "auto"}
            several[0].imshow(events, cmap=shades(colour), vmin=0, vmax=1, interpolation="none", **place)
    for i, (axes, steps) in enumerate(zip(several[1:], fired.values(), strict=True), 1):
        shown = torch.linspace(0, len(steps[0]) - 1, 20).long()  # no stride: it would divide the rows of an image
        t, neuron = torch.stack(steps)[:, shown].nonzero(as_tuple=True)
        axes.scatter(t + 1, neuron, marker="|", s=9, color=BLUE)
        axes.set_ylabel(f"layer {i}", rotation=0, ha="right", va="center")
    several[0].set_ylabel("events", rotation=0, ha="right", va="center")
    for axes in several:
        axes.set(yticks=[], xlim=(0.5, len(x) + 0.5))
    several[-1].set(xlabel="time step", xticks=range(1, len(x) + 1))


def confusion(figure: Figure, name: str) -> None:
    """How many test samples of each digit are taken for which."""
    _, model, _ = run(name)
    splits = sltt.data.DigitsEvents().splits(steps=9)
    x, y = splits.collate([splits.test[i] for i in range(len(splits.test))])
    counts = torch.zeros(10, 10).index_put((y, sltt.unroll(model, x).mean(0).argmax(1)), torch.tensor(1.0), True)
    axes = figure.subplots()
    bar = figure.colorbar(axes.imshow(counts, cmap=shades(BLUE), interpolation="none"), ax=axes)
    bar.set_label("test samples")
    axes.set(xlabel="predicted", ylabel="digit", xticks=range(10), yticks=range(0, 10, 3))


def predictions(figure: Figure, name: str) -> None:
    """The first test images, each with its prediction."""
    _, model, x = run(name)
    splits = sltt.data.Digits().splits(steps=4)
    predicted = sltt.unroll(model, x, steps=4).mean(0).argmax(1)
    for i, axes in enumerate(figure.subplots(3, 6).flat):
        axes.imshow(x[i, 0], cmap=shades(INK), interpolation="none")
        right = predicted[i] == splits.test[i][1]
        axes.set_title(f"{predicted[i]}", color=BLUE if right else ORANGE, pad=2)
        axes.axis("off")


def memory(figure: Figure, name: str) -> None:
    """The memory of a batch, as the example prints it."""
    printed, _, _ = run(name)
    rows = [(rule, float(size)) for rule, size in re.findall(r"(\w+\(.*\)): ([\d.]+) MB", printed)]
    axes = figure.subplots()
    bars = axes.barh(*zip(*rows, strict=True), color=[ORANGE, BLUE, BLUE], height=0.6)
    axes.bar_label(bars, fmt="%.1g MB", padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set(xlabel="memory of a batch, MB")


def shades(colour: str) -> LinearSegmentedColormap:
    """From transparent to a colour."""
    return LinearSegmentedColormap.from_list("shades", [f"{colour}00", colour])


def last_figure(notebook: Path) -> bytes:
    """The last figure that a notebook stores, as PNG."""
    outputs = [output for cell in json.loads(notebook.read_text())["cells"] for output in cell.get("outputs", [])]
    return base64.b64decode([one["data"]["image/png"] for one in outputs if "image/png" in one.get("data", {})][-1])


def of_the_report(title: str) -> str:
    """A figure of the demo's report, as SVG by itself."""
    page = (DOCS.parent / "runs" / "demo" / "report" / "report.html").read_text()
    return re.search(rf'<svg role="img" aria-label="{title}".*?</svg>', page, re.DOTALL)[0].replace("currentColor", INK)


if __name__ == "__main__":
    target = DOCS / "figures"
    drawn = {
        "plain_pytorch": spikes,
        "lightning_trainer": confusion,
        "accelerate_loop": predictions,
        "snntorch_network": memory,
    }
    for name, draw in drawn.items():
        with rc_context(STYLE):
            figure = Figure(figsize=(3.8, 2.4), layout="constrained")
            draw(figure, name)
            figure.savefig(target / f"example-{name}.svg", transparent=True, metadata={"Date": None})
    for notebook in (DOCS / "notebooks").glob("*.ipynb"):
        (target / f"example-{notebook.stem}.png").write_bytes(last_figure(notebook))
    (target / "example-report.svg").write_text(of_the_report("Memory of a training batch over T"))
