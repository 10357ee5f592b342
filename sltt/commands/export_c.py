"""`sltt export RUN --to c`: a trained network in C, and what it costs on a device."""

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from sltt.analysis import synaptic_operations
from sltt.data import Splits
from sltt.interop.c import Arithmetic, Exported, to_c
from sltt.losses import predict_from, prediction_of
from sltt.rules import unroll
from sltt.sequence.modes import evaluation_mode
from sltt.training.console import Console

MEASURED = 1000  # samples that an accuracy is measured on, at most
SEEN = 64  # samples that set the scale of the input, and whose operations are counted
# energy of an operation in a 45 nm process: a sum, and a product with its sum (Horowitz, ISSCC 2014)
PICOJOULES = {"float32": (0.9, 4.6), "int8": (0.1, 0.3)}


def default_name(run: Path) -> str:
    """Return the name of the recipe that made a run, as a name in C: digits_events of digits-events-sltt-DATE-TIME."""
    recipe = re.sub(r"-[^-]+-\d{8}-\d{6}(-\d+)?$", "", run.resolve().name)
    name = re.sub(r"\W", "_", recipe, flags=re.ASCII)
    return name if name[:1].isalpha() else f"net_{name}"


def export(built: Any, splits: Splits, folder: Path, name: str, weights: Arithmetic, report: Console) -> None:
    """Write the network that a run built, and report its size, operations and accuracy."""
    samples, of = (
        (splits.unaugmented_train, "training") if splits.validation is None else (splits.validation, "validation")
    )
    x = _batch(splits, samples, SEEN)[0]
    steps = built.steps if splits.static else None
    made = to_c(built.model, x, folder, name=name, steps=steps, weights=weights)
    report.line(f"written to {folder}: `make -C {folder}` tests it")
    report.line(f"flash        {made.flash:,} bytes of weights and parameters, without the code")
    report.line(f"RAM          {made.ram:,} bytes, sizeof({name}_net)")
    add, multiply = PICOJOULES[weights]
    with evaluation_mode(built.model):
        layers = synaptic_operations(built.model, x, steps=steps)
    sums = sum(layer.synaptic_operations for layer in layers) / built.steps
    energy = sum(op.synaptic_operations * (add if op.spiking else multiply) for op in layers) / built.steps
    report.line(f"operations   {sums:,.0f} a step; {energy / 1000:.3g} nJ in a 45 nm process, memory not counted")
    if splits.classes is not None and not splits.per_step:
        before, after, count = _accuracies(built, splits, samples, made)
        report.line(f"accuracy     {after:.2%} in C, {before:.2%} in PyTorch, on {count} {of} samples")


def _batch(splits: Splits, samples: Any, count: int) -> tuple[Tensor, Any]:
    return splits.collate_of(samples)([samples[i] for i in range(min(count, len(samples)))])


def _accuracies(built: Any, splits: Splits, samples: Any, made: Exported) -> tuple[float, float, int]:
    """Return the accuracy in PyTorch and of the operations in C, on the first samples, and how many these are."""
    x, y = _batch(splits, samples, MEASURED)
    steps = built.steps if splits.static else None
    right = [0, 0]
    for part, target in zip(x.split(50, 0 if splits.static else 1), y.split(50), strict=True):
        whole = part.expand(built.steps, *part.shape) if splits.static else part
        with evaluation_mode(built.model):
            logits = unroll(built.model, part, steps=steps), made.network.unroll(whole)
        for i, one in enumerate(logits):
            right[i] += int((predict_from(prediction_of(built.loss), one).argmax(1) == target).sum())
    return right[0] / len(y), right[1] / len(y), len(y)
