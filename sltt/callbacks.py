"""Callbacks: what a training calls after each batch and each epoch, and what may end it."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from sltt.checks import choice, number, whole_number


@dataclass
class Moment:
    """A training as a callback sees it.

    Attributes:
        model: the network, with the weights that are trained.
        optimizer: after its step.
        epoch: finished epochs.
        batch: finished batches of the epoch in progress; 0 after an epoch.
        loss: of the batch, in this process; None after an epoch.
        history: a row of metrics for each finished epoch at the present T, as in `metrics.csv`.
        metric: name of the metric that selects the best epoch.
        higher_is_better: of that metric.
        stopped: the reason to end the training, once a callback gave one.
    """

    model: nn.Module
    optimizer: Optimizer
    epoch: int
    batch: int
    loss: float | None
    history: list[dict[str, Any]]
    metric: str
    higher_is_better: bool
    stopped: str | None = None

    def stop(self, reason: str) -> None:
        """End the training after this epoch. A run that was stopped stays so: it does not resume."""
        self.stopped = self.stopped or reason


class Callback:
    """Base of callbacks: a callback of your own defines the methods that it needs.

        class Print(sltt.callbacks.Callback):
            def on_epoch(self, now):
                print(now.epoch, now.history[-1]["train_loss"])

    Every process calls it. If it counts something from epoch to epoch, return that from `state_dict` and take it back
    in `load_state_dict`: numbers, texts, tensors, lists and dictionaries of these. Checkpoints keep this state, so that
    a run resumes exactly.

    Attributes:
        needs_validation: the training is refused where no validation samples are held out.
    """

    needs_validation: bool = False

    def on_start(self, now: Moment) -> None:
        """Before the first batch, and when a run is resumed, which does not keep constants of layers."""

    def on_batch(self, now: Moment) -> None:
        """After each step of the optimizer."""

    def on_epoch(self, now: Moment) -> None:
        """After each epoch, when it is validated and saved. Where this fails, the resumed run calls it again."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state to checkpoint. Empty by default."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave."""


class EarlyStopping(Callback):
    """End the training when the best epoch on the validation samples is `patience` epochs ago.

    Where phases change T, the count begins anew: metrics at another T do not compare.

    Args:
        patience: epochs without a better one.
        by: the metric of the training, or the loss.
        least: an epoch is better if it improves on the best by more than this.

    Raises ValueError when the training begins, without validation samples.
    """

    needs_validation = True

    def __init__(self, patience: int = 5, by: Literal["metric", "loss"] = "metric", least: float = 0.0):
        self.patience = whole_number("patience", patience, least=1)
        self.by = choice("by", by, ("metric", "loss"))
        self.least = number("least", least, least=0)

    def on_epoch(self, now: Moment) -> None:
        """Ask to stop where the last `patience` epochs brought nothing better."""
        name = "loss" if self.by == "loss" else now.metric
        sign = 1 if self.by == "metric" and now.higher_is_better else -1
        best, lowest, since = -math.inf, math.inf, 0
        for row in now.history:
            score, loss = sign * row[f"validation_{name}"], row["validation_loss"]
            since += 1
            tie = score == best and not self.least and loss < lowest  # `fit` selects the epoch of the lower loss
            if score > best + self.least or tie:
                best, lowest, since = score, loss, 0
        if since >= self.patience:
            now.stop(f"no better validation {name.replace('_', ' ')} in {since} epochs")
