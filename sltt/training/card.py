"""The model card of a run: what was trained, on which data, with what, and what came out."""

import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from sltt.analysis import measure_energy
from sltt.analysis.energy import as_text
from sltt.metrics import score_text
from sltt.sequence.modes import evaluation_mode
from sltt.sequence.padding import lengths_of
from sltt.training.console import metric_of
from sltt.training.files import write_atomically
from sltt.training.loop import Loop
from sltt.training.runs import load_call

CARD = "card.md"
NOT_MEASURED = "not measured"


def write_card(loop: Loop, row: dict[str, Any]) -> None:
    """Write the card of a finished training; `row` is the epoch whose weights the model has."""
    folder, model, splits, settings = loop.folder, loop.learner.model, loop.splits, loop.settings
    samples = ", ".join(f"{size:,} {name}" for name, size in splits.sizes.items() if size)
    classes = "" if splits.classes is None else f"; {splits.classes} classes"
    metric = metric_of(row)
    score = row[f"validation_{metric}"]
    rules = dict.fromkeys(f"{stage.rule} at T = {stage.steps}" for stage in loop.stages)
    facts = {
        "network": f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters",
        "rule": ", then ".join(rules),
        "data": f"{settings.data}, split {splits.fingerprint}: {samples} samples{classes}",
        "epoch": f"{row['epoch']} of {settings.epochs}, seed {settings.seed}",
        f"validation {metric}": "nothing was held out" if score is None else score_text(metric, score),
        f"test {metric}": NOT_MEASURED,
        **({} if settings.ema is None else {"weights": f"exponential moving average, decay {settings.ema:g}"}),
        **({} if settings.quantised is None else {"weights": f"rounded to {settings.quantised}, for the export to C"}),
        "firing rate": f"{row['firing_rate']:.4f} spikes per neuron and time step, in training",
        "made with": f"sltt {version('sltt')}, PyTorch {torch.__version__}, Python {platform.python_version()}, "
        f"on {loop.learner.session.fabric.device}",
        "finished": time.strftime("%Y-%m-%d %H:%M"),
    }
    lines = [f"# {type(model).__name__} in {folder.name}", "", "| | |", "| --- | --- |"]
    lines += [f"| {name} | {value} |" for name, value in facts.items()]
    lines += ["", f"Load it: `model = {load_call(folder, loop.config)}`, then `sltt.predict(model, x)`.", ""]
    lines += _energy(loop, loop.trained(row["epoch"]).steps)
    write_atomically(folder / CARD, lambda file: file.write("\n".join(lines).encode()))


def add_test_score(folder: Path, score: str) -> None:
    """Write the metric on the test samples into the card."""
    text = (folder / CARD).read_text(encoding="utf-8").replace(NOT_MEASURED, score)
    write_atomically(folder / CARD, lambda file: file.write(text.encode()))


def _energy(loop: Loop, steps: int) -> list[str]:
    """Return the tables of `sltt profile` for the mean inference of some samples, without augmentation."""
    if loop.processes.count > 1:
        return ["Energy: not estimated by several processes: sltt profile"]
    try:
        splits = loop.splits
        split = next(name for name in ("validation", "test", "unaugmented_train") if getattr(splits, name))
        samples = getattr(splits, split)
        chosen = range(0, len(samples), -(-len(samples) // 32))
        x, y = loop.learner.session.batch(*splits.collate_of(samples)([samples[i] for i in chosen]))
        repeat = steps if splits.static else None
        with evaluation_mode(loop.learner.model):
            tables = measure_energy(loop.learner.model, x, steps=repeat, lengths=lengths_of(y)).tables()
    except Exception as error:  # the training is done, and not lost for a layer that cannot be counted
        return [f"Energy: not estimated: {error}"]
    lines = [f"One inference, the mean over {len(chosen)} {split.removeprefix('unaugmented_')} samples:", ""]
    for rows in tables.values():
        texts = [[*rows[0]], ["---"] * len(rows[0]), *([as_text(value) for value in row.values()] for row in rows)]
        lines += [*(f"| {' | '.join(row)} |" for row in texts), ""]
    return lines
