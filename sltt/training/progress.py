"""Metrics and progress of a training."""

import math
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Self, TypeVar

import torch

from sltt.memory import counts_peak, is_profiled, peak_memory
from sltt.parallel.processes import Processes
from sltt.sequence.padding import Padded

A = TypeVar("A")


@dataclass
class Metrics:
    """Measurements of an epoch or an evaluation.

    Attributes:
        loss: mean over samples of the sequence's loss; over real steps of `Padded` ones.
        score: mean over samples of the metric, or what a metric of all samples computes.
        metric: its name: accuracy, say, of mean logits over time.
        firing_rate: mean over all neurons and time steps.
        seconds: wall-clock time.
        peak_memory: bytes of one batch at its peak, above those before it; the most of any process, None without one.
        layers: firing rate of each layer of neurons.
        scores: each metric of an evaluation by its name.
    """

    loss: float
    score: float
    metric: str
    firing_rate: float
    seconds: float
    peak_memory: int | None
    layers: dict[str, float] = field(default_factory=dict)
    scores: dict[str, Any] = field(default_factory=dict)

    @property
    def accuracy(self) -> float:
        """Return the score; raise ValueError where the metric is another."""
        if self.metric != "accuracy":
            raise ValueError(f"the metric is {self.metric}, not accuracy: its value is `score`")
        return self.score

    def to_dict(self) -> dict[str, Any]:
        """Return all that was measured, scores by the names of their metrics."""
        values = asdict(self)
        scores = {values.pop("metric"): values.pop("score")} | values.pop("scores")
        return {"loss": values.pop("loss"), **scores, **values}


@dataclass
class Progress:
    """Progress of a training; saved and restored as a whole. Sums are of this process, until `sum_over`."""

    epoch: int = 0  # finished epochs
    batch: int = 0  # finished batches of the epoch in progress, and what they sum to
    loss: float = 0.0
    score: dict[str, Any] = field(default_factory=dict)  # of `Score`, of all processes
    terms: float = 0  # what the loss is a mean over: samples, or their real steps
    seconds: float = 0.0
    firing: dict[str, tuple[int, int]] = field(default_factory=dict)  # spikes, and neurons times steps, by layer
    history: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int | None = None
    best: list[float] = field(default_factory=list)
    first: int = 0  # row of the history with which the present T began
    stopped: str | None = None  # why a callback ended the training
    pending: bool = False  # callbacks have yet to see the last epoch

    def count(self, loss: float, samples: int, target: Any) -> None:
        """Add a batch of so many samples; 0 where another process counts them."""
        terms = target.steps if samples and isinstance(target, Padded) else samples
        self.batch, self.loss, self.terms = self.batch + 1, self.loss + loss * terms, self.terms + terms

    def sum_over(self, processes: Processes) -> Self:
        """Return a copy, with the sums over all processes."""
        loss, terms = processes.sum([self.loss, self.terms])
        counts = processes.sum([number for pair in self.firing.values() for number in pair])
        pairs = zip(map(int, counts[::2]), map(int, counts[1::2]), strict=True)
        firing = dict(zip(self.firing, pairs, strict=True))
        return type(self)(
            **asdict(self) | {"loss": loss, "terms": terms, "firing": firing}
        )  # in plain types: a metric's state may have dataclasses

    def metrics(self, metric: str, score: Any, processes: Processes, seconds: float, peak: int | None) -> Metrics:
        """Return the measurements of all processes, with the score by a metric."""
        total = self.sum_over(processes)
        spikes, neurons = map(sum, zip((0, 0), *total.firing.values(), strict=True))
        rate, peak = spikes / neurons if neurons else 0.0, int(processes.highest(peak or 0)[0]) or None
        layers = {name: spikes / count for name, (spikes, count) in total.firing.items() if count}
        return Metrics(total.loss / max(total.terms, 1), score, metric, rate, seconds, peak, layers)

    def end_epoch(self, row: dict[str, Any], validation: Metrics | None, sign: int) -> bool:
        """Start the next epoch; true if this one is the best so far: in `sign` times the score, then in loss."""
        self.history = [*self.history, row]
        self.epoch += 1
        self.batch, self.loss, self.terms, self.seconds, self.firing, self.score = 0, 0.0, 0, 0.0, {}, {}
        if validation is None:
            return False
        score = [-math.inf if math.isnan(figure) else figure for figure in (sign * validation.score, -validation.loss)]
        if self.best and score <= self.best:
            return False
        self.best, self.best_epoch = score, self.epoch
        return True


class BatchMemory:
    """Measures the peak memory of a full batch, of the longest where they differ, as `sltt.analysis.peak_memory` does.

    `peak` is in bytes above those before the batch; None until one was measured. The first batch may run copies of the
    network, to try what is faster: the second one takes its place; on a GPU, where that one is watched, the third.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.peak: int | None = None
        self._longest = self._left = 0

    def is_due(self, size: int, full: bool = True) -> bool:
        """Return whether to measure the next batch, which may be `full`.

        `size` is that of the input: padded batches have T of their own.
        """
        if size > self._longest and full:
            self._longest, self._left = size, 3 if self.device.type == "cuda" else 2
        due = size == self._longest and full and self._left > 0
        due &= threading.current_thread() is threading.main_thread()  # parallel trials would disturb each other
        return due and counts_peak(self.device) and not is_profiled(self.device)

    def measure(self, batch: Callable[[], A]) -> A:
        """Call `batch` and count its peak memory; return its result."""
        results: list[A] = []
        self.peak = peak_memory(lambda: results.append(batch()), self.device)
        self._left -= 1
        return results[0]


def epoch_row(epoch: int, optim: Any, training: Metrics, validation: Metrics | None) -> dict[str, Any]:
    """Return an epoch in the table of metrics."""
    metric, loss, score = training.metric, None, None
    if validation:
        loss, score = validation.loss, validation.score
    train = {"train_loss": training.loss, f"train_{metric}": training.score}
    costs = {name: getattr(training, name) for name in ("firing_rate", "seconds", "peak_memory")}
    held_out = {"validation_loss": loss, f"validation_{metric}": score}
    return {"epoch": epoch, "learning_rate": optim.param_groups[0]["lr"], **train, **held_out, **costs}
