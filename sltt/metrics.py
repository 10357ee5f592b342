"""Metrics: how good predictions are. A training selects its best epoch by one.

A metric is a mean over samples, or an object with `update`, `compute` and `reset`, as those of torchmetrics are.
"""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sltt.checks import function, instance


class Metric(ABC):
    """Base class of metrics: how good predictions are, as a mean over samples. In Python any such callable works too.

    So does an `nn.Module` with `update(prediction, target)`, `compute()` and `reset()`: it scores all samples at once.

    Attributes:
        higher_is_better: False for an error.
    """

    higher_is_better: bool = True

    @abstractmethod
    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor | float:
        """Return the mean over the samples of a batch.

        Args:
            prediction: mean logits [B, C, ...], or what the loss predicts by: of each step [T, B, ...], say. Where each
                step has a class, all steps are samples: [T·B, C, ...].
            target: as the data has it.
        """


class Accuracy(Metric):
    """The share of samples, of time steps or of pixels with a class, whose largest logit is that of the class."""

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Logits [B, C, ...] and class indices [B, ...]; others, such as those that a loss ignores, do not count."""
        right, counted = self.count(prediction, target)
        return right / counted.clamp(min=1)

    def count(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return how many predictions are right, and how many labels are class indices: [2]."""
        _check_classes(self, target, prediction)
        counted = (target >= 0) & (target < prediction.shape[1])
        shares = [_mean(values, prediction) for values in (prediction.argmax(1) == target, counted)]
        return (torch.stack(shares) * target.numel()).round()


class MultiLabelAccuracy(Metric):
    """The share of labels that are right: logits above 0 where the target is 1, below where it is 0."""

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Logits [..., C] and labels 0 or 1 [..., C]."""
        _check_shape(self, target, prediction.shape)
        return _mean((prediction > 0) == (target > 0.5), prediction)


class _Error(Metric):
    higher_is_better = False
    power: int

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Compare values with targets of one shape."""
        _check_shape(self, target, prediction.shape)
        return _mean((prediction - target).abs() ** self.power, prediction)


class MeanAbsoluteError(_Error):
    """Mean of |o − y|."""

    power = 1


class MeanSquaredError(_Error):
    """Mean of (o − y)²."""

    power = 2


def _mean(values: Tensor, prediction: Tensor) -> Tensor:
    """Return the mean in float64, which Apple's GPUs do not have; NaN where a prediction is."""
    mean = (values.cpu() if values.device.type == "mps" else values).double().mean()
    return mean.masked_fill(prediction.isnan().any().to(mean.device), math.nan)


def _check_classes(metric: Any, target: Tensor, prediction: Tensor) -> None:
    """Raise ValueError for what is no class index for each prediction [B, C, ...]."""
    shape = instance("prediction", prediction, Tensor).shape
    if instance("target", target, Tensor).is_floating_point():
        remedy = "give target.long(); for numbers, choose metric=sltt.metrics.MeanAbsoluteError()"
        raise ValueError(f"{type(metric).__name__} takes class indices, got {target.dtype}: {remedy}")
    _check_shape(metric, target, shape[:1] + shape[2:])


def _check_shape(metric: Any, target: Tensor, expected: Any) -> None:
    """Raise ValueError for a target of another shape, which would be broadcast to wrong pairs."""
    if instance("target", target, Tensor).shape != expected:
        got = f"{list(target.shape)}: give such targets, or choose another metric=…"
        raise ValueError(f"{type(metric).__name__} compares predictions with targets {list(expected)}, got {got}")


def collects(metric: Any) -> bool:
    """Return whether a metric takes in batches and computes its score at the end, as those of torchmetrics do."""
    methods = (getattr(metric, name, None) for name in ("update", "compute", "reset"))
    return not isinstance(metric, type) and all(map(callable, methods))


def check_metric(metric: Any) -> None:
    """Raise ValueError for what is no metric, or has a name that is taken."""
    if not collects(metric):
        function("metric", metric, "the prediction and the target")
    if (name := name_of(metric)) == "loss":
        raise ValueError(f"the metric is called {name}, as what is trained: give its function another name")


def name_of(metric: Callable[..., Any]) -> str:
    """Return the name that a metric is reported by: mean_absolute_error, auroc."""
    name = getattr(metric, "__name__", type(metric).__name__)
    return re.sub("(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower().lstrip("_")


def higher_is_better(metric: Callable[..., Any]) -> bool:
    """Return whether more is better; true for a metric that does not say, unless it is named as a loss or an error."""
    flag = getattr(metric, "higher_is_better", None)
    return not name_of(metric).endswith(("loss", "error", "entropy", "mse")) if flag is None else bool(flag)


def is_share(name: str) -> bool:
    """Return whether the metric of a name is a share, which is shown in per cent."""
    return name.endswith("accuracy")


def score_text(name: str, score: float) -> str:
    """Write a score for people: a share in per cent, others as they are."""
    return f"{score:.2%}" if is_share(name) else f"{score:.4g}"


def finite_scores(scores: Sequence[float | None]) -> list[float]:
    """Return the scores without those that are no number: NaN, which JSON keeps as null."""
    return [score for score in scores if score is not None and math.isfinite(score)]
