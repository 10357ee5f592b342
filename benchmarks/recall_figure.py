"""Accuracy against memory on delayed recall, one dot for each rule, at T = 16, 64 and 256.

    python benchmarks/recall_figure.py [--steps 16 64 256] [--rules …] [--seeds 1]

The recipe `recall` with a longer delay: the cue, T/2 − 1 silent steps, T/2 steps of the probe. τ grows with the delay,
so that 70% of the membrane potential is left after it at every T. Neurons have to fire at more steps where T is larger,
and need larger weights: the learning rate is 0.005 · T/16. Accuracy is that of 2,000 test samples after six epochs.

Each training is written to docs/results when it ends, and the same command goes on where it stopped.
"""

import argparse
import itertools
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from cells import recorded, write
from matplotlib.ticker import LogLocator, NullLocator
from torch import nn

import sltt
from sltt.training.console import Console

DOCS = Path(__file__).parents[1] / "docs"
RESULTS, FIGURE = DOCS / "results" / "recall-memory.json", DOCS / "figures" / "recall-memory.png"
# the rule, its marker and its colour
RULES: dict[str, tuple[sltt.Rule, str, str]] = {
    "BPTT": (sltt.BPTT(), "o", "#9aa0a6"),
    "TBPTT(8)": (sltt.TBPTT(window=8), "s", "#c2703d"),
    "OTTT": (sltt.OTTT(), "D", "#3c8d5a"),
    "OTTT(inputs=False)": (sltt.OTTT(inputs=False), "d", "#9fce9f"),
    "RateBased": (sltt.RateBased(), "P", "#8c6bb1"),
    "SLTT": (sltt.SLTT(), "^", "#2f6f9f"),
    "SLTT-1": (sltt.SLTT(k=1), "v", "#7fb2d6"),
}
CLASSES, LEFT = 4, 0.7


def train(name: str, steps: int, seed: int, epochs: int = 6, samples: int = 8000) -> dict[str, Any]:
    """One training, and what it reached."""
    torch.manual_seed(seed)
    delay = steps // 2 - 1
    data = sltt.data.Recall(validation=0, delay=delay, samples=samples)
    neuron = sltt.LIF(tau=1 / (1 - LEFT ** (1 / delay)), detach_reset=True)
    model = nn.Sequential(nn.Linear(data.channels, 64, bias=False), neuron, nn.Linear(64, CLASSES))
    loss = sltt.losses.CrossEntropyMSE(alpha=0.0)
    optimizer = partial(torch.optim.AdamW, lr=0.005 * steps / 16, weight_decay=0.0)
    how: dict[str, Any] = {"steps": steps, "epochs": epochs, "batch_size": 128, "seed": seed, "device": "cpu"}
    with tempfile.TemporaryDirectory() as folder:  # the run is not kept
        how |= {"run": Path(folder) / "run", "report": Console(quiet=True)}
        found = sltt.fit(model, data, RULES[name][0], loss=loss, optimizer=optimizer, **how)
    accuracy = sltt.evaluate(model, data, "test", loss=loss, steps=steps, device="cpu").accuracy
    reached = {"accuracy": accuracy, "memory": found.history[-1]["peak_memory"]}
    return {"rule": name, "steps": steps, "seed": seed, "epochs": epochs, "samples": samples, **reached}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """A panel for each T: the mean over the seeds, with the smallest and the largest."""
    all_steps = sorted({row["steps"] for row in rows})
    figure = plt.figure(figsize=(1 + 3 * len(all_steps), 3.6), layout="constrained")
    (axes,) = figure.subplots(1, len(all_steps), sharex=True, sharey=True, squeeze=False)
    for axis, steps in zip(axes, all_steps, strict=True):
        for name, (_, marker, colour) in RULES.items():
            if mine := [row for row in rows if (row["rule"], row["steps"]) == (name, steps)]:
                reached = [100 * row["accuracy"] for row in mine]
                mean, memory = statistics.mean(reached), statistics.mean(row["memory"] for row in mine) / 1e6
                spread = [[mean - min(reached)], [max(reached) - mean]]
                style = {"marker": marker, "color": colour, "markersize": 9, "capsize": 3, "ls": ""}
                axis.errorbar(memory, mean, spread, label=name, **style)
        axis.axhline(100 / CLASSES, color="#9aa0a6", linestyle=":", linewidth=1)
        axis.set(title=f"T = {steps}", xlabel="memory of a training batch, MB", xscale="log", ylim=(15, 105))
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#e4e6e8")
        axis.set_axisbelow(True)
    axes[0].xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes[0].xaxis.set_major_formatter("{x:g}")
    axes[0].xaxis.set_minor_locator(NullLocator())
    axes[0].set_ylabel("test accuracy, %")
    axes[0].text(0.02, 100 / CLASSES, "chance", transform=axes[0].get_yaxis_transform(), va="bottom", fontsize=8)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=(len(RULES) + 1) // 2, frameon=False)
    figure.savefig(path, dpi=150, facecolor="white")
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = recorded(RESULTS)
    for steps, seed, name in itertools.product(options.steps, range(options.seeds), options.rules):
        if not any((row["rule"], row["steps"], row["seed"]) == (name, steps, seed) for row in rows):
            rows.append(train(name, steps, seed))
            print(rows[-1], flush=True)
            write(RESULTS, rows)
    draw(rows, FIGURE)


if __name__ == "__main__":
    main()
