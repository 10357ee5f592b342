"""Trained networks: loaded from a run, and what they predict."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sltt.checks import choice, folder, instance
from sltt.losses import Prediction, predict_from
from sltt.rules import unroll
from sltt.sequence.modes import evaluation_mode
from sltt.sequence.padding import check_lengths
from sltt.sequence.steps import time_steps
from sltt.training.average import select_weights
from sltt.training.checkpoints import load_best, load_weights
from sltt.training.runs import MADE_IN, compare_layers, read_config

log = logging.getLogger("sltt")


@dataclass(frozen=True)
class Trained:
    """Facts that `sltt.load` knows of a network, in its attribute `trained`.

    Attributes:
        steps: T of the training.
        static: it was trained on images, shown at every step; else on sequences.
        classes: number of classes; None for targets of another kind.
        prediction: what the loss predicts by, see `sltt.losses.Loss`.
        split: fingerprint of the data's splits.
    """

    steps: int
    static: bool
    classes: int | None
    prediction: Prediction = "mean"
    split: str | None = None


def load(
    run: str | Path, model: nn.Module | None = None, *, checkpoint: str | None = None, strict: bool = True
) -> nn.Module:
    """Return a trained network in evaluation mode: on the CPU, or `model` on the device that it is on.

        model = sltt.load("runs/digits-sltt-20250101-120000")
        classes = sltt.predict(model, x).argmax(1)

    Its attribute `trained` has T (`steps`), `static` and `classes`.

    Args:
        run: folder of the run; or a file of `sltt pack`, or a checkpoint of a run.
        model: the network to load the weights into, for a run that `sltt.fit` made; one of a recipe is made again.
        checkpoint: the best by validation, or the last; None is the best, or the last where nothing was held out.
        strict: False loads the weights of the same name and shape, and lists the others in a warning.

    Raises:
        FileNotFoundError: no run, or no finished epoch.
        ValueError: the run keeps no network, names code that is not installed, is damaged, or does not fit `model`.
    """
    if checkpoint is not None:
        choice("checkpoint", checkpoint, ("best", "last"))
    run = folder("run", run)
    path, content = load_best(run, checkpoint)
    config = read_config(run, content)
    network = _network(run, config) if model is None else instance("model", model, nn.Module)
    load_weights(network, select_weights(content), path, strict)
    if other := compare_layers(network, content.get("layers", {}) | content.get("code", {})):
        log.warning("%s was trained with other layers: %s", run, other)
    network.trained = Trained(**content["task"])  # pyright: ignore[reportArgumentType]
    return network.eval()


def _network(run: Path, config: dict[str, Any]) -> nn.Module:
    """Return the network that the recipe of a run names, with other weights."""
    if "model" not in config or MADE_IN in config:
        load = f"sltt.load({str(run)!r}, model)"
        raise ValueError(f"{run} was made in Python, and does not keep its network: make it, and call {load}")
    from jsonargparse import ArgumentParser

    from sltt.training.named import check_named

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--model", type=nn.Module)
    settings = {"model": config["model"]}
    check_named(run, settings)
    return parser.instantiate(parser.parse_object(settings)).model


def predict(model: nn.Module, x: Tensor, *, steps: int | None = None, lengths: Sequence[int] | None = None) -> Tensor:
    """Return the prediction [B, C], in evaluation mode and without a graph: the mean of the logits over time.

        ō = 1/T Σ_t o[t]

    A network of `sltt.load` predicts as its loss does (`sltt.losses.Loss.prediction`): by the mean, the last or the
    largest logits; or, with a target for each step, by the logits of all steps, [T, B, C]. With [B, C], the class is
    `argmax(1)` and its probability `softmax(1)`. Sequences [B, T, ...] for such a network give a warning.

    Args:
        model: of `sltt.load`, or any other.
        x: a batch of images [B, ...], or of sequences [T, B, ...].
        steps: T for images. A network of `sltt.load` knows its T; any other network needs it.
        lengths: real steps of each sample, for sequences that are padded at the end.

    Raises ValueError for an input of another form than the network's.
    """
    instance("model", model, nn.Module, "such as sltt.load(run)")
    instance("x", x, Tensor, "of an array, torch.from_numpy(x).float()")
    by, trained = "mean", getattr(model, "trained", None)
    if isinstance(trained, Trained):
        by = trained.prediction
        if steps is None and trained.static:
            steps = trained.steps
        elif not trained.static and len(x) != trained.steps and trained.steps in x.shape[1:2]:
            log.warning(
                "the input %s is %d time steps of %d samples, and the network was trained on %d time steps: if the "
                "batch comes first in it, give x.transpose(0, 1)", list(x.shape), *x.shape[:2], trained.steps
            )  # fmt: skip
    if lengths is not None:
        sequence = time_steps(x, steps)
        check_lengths(lengths, sequence.steps, sequence.batch)
    weights = next(model.parameters(), x)
    with evaluation_mode(model):
        logits = unroll(model, x.to(weights.device), steps=steps)
    return predict_from(by, logits, lengths)
