"""A metric over the batches of an epoch or a split: a mean over samples, or what it computes from all of them."""

import copy
import numbers
import warnings
from contextlib import suppress
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from sltt.losses import is_per_step
from sltt.metrics import collects, name_of
from sltt.parallel.processes import Processes
from sltt.sequence.padding import Padded
from sltt.training.progress import Metrics, Progress


class Score:
    """A metric that sees batches.

    One that `collects`, such as those of torchmetrics, sees the samples of all processes in each of them, on the CPU.
    So its value is that of all samples, whatever the number of processes and the size of the batches. The user's object
    stays as it is: a copy collects.

    Args:
        metric: of predictions and targets.
        processes: that share each batch.
        progress: the batches before these, in an epoch that is resumed.
        selects: an epoch is selected by the score, so that it must be one number.

    Attributes:
        partial: the metric could not be saved, and sees the batches after a resume only.
    """

    def __init__(self, metric: Any, processes: Processes, progress: Progress, selects: bool = True):
        self.selects, self.total, self.samples = selects, 0.0, 0
        self.metric, self.processes, self.collecting = metric, processes, collects(metric)
        self.looked, self.empty = progress.batch > 0, not progress.score
        self.partial = self.collecting and self.looked and self.empty
        if self.collecting:
            self.metric = _empty(metric)
            if progress.score:
                self.metric.load_state_dict(progress.score)

    def batch(self, prediction: Tensor, target: Any, samples: int) -> float:
        """Return the mean of a batch, of which so many samples count here; 0 where the metric collects them."""
        if not self.collecting:
            mean = self._number(self.metric(prediction, target))
            self.total, self.samples = self.total + mean * samples, self.samples + samples
            return mean
        own = (prediction.detach().cpu(), target.cpu() if isinstance(target, Tensor) else target) if samples else None
        for part in self.processes.gather(own):
            if part is not None:
                self.empty = False
                self.metric.update(*part)
        if not self.looked:
            self._look()
        return 0.0

    def of(self, metrics: Metrics) -> Metrics:
        """Return the measurements with the score of all samples; None where the metric has seen none after a resume."""
        if not self.collecting:
            return metrics
        return replace(metrics, score=None if self.empty else self.value())

    def value(self) -> Any:
        """Return the score of all samples since this was made, of all processes."""
        if self.collecting:
            return self._number(self.metric.compute())
        total, samples = self.processes.sum([self.total, self.samples])
        return total / max(samples, 1)

    def state(self) -> dict[str, Any]:
        """Return what was collected, for a checkpoint; nothing of a metric that cannot save it."""
        return dict(self.metric.state_dict()) if self.collecting and hasattr(self.metric, "load_state_dict") else {}

    def _look(self) -> None:
        """Raise ValueError at the first batch, and not after an epoch, where the metric gives no single number."""
        self.looked, value = True, None
        with suppress(Exception), warnings.catch_warnings():  # a batch may have too few samples for it
            warnings.simplefilter("ignore")
            value = self.metric.compute()
        if value is not None:
            self._number(value)

    def _number(self, value: Any) -> Any:
        """Return a number as a float; raise ValueError for another value by which an epoch would be selected."""
        if isinstance(value, numbers.Real) or (isinstance(value, Tensor) and value.numel() == 1):
            return float(value)
        if self.collecting and not self.selects:
            return value
        got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        if not self.collecting:
            raise ValueError(
                f"the metric {name_of(self.metric)} gives {got}, expected one number: the mean over the samples"
            )
        raise ValueError(
            f"the metric {name_of(self.metric)} computes {got}, and a training selects by one number: give a metric of "
            "one, such as the mean over classes by average='macro', and this one to sltt.evaluate"
        )


def count_scored(loss: Any, target: Any, samples: int) -> int:
    """Return of how many terms a metric is the mean: samples, or real steps where each has a target."""
    return target.steps if samples and isinstance(target, Padded) and is_per_step(loss) else samples


def _empty(metric: Any) -> Any:
    """Return a copy of a metric that collects, on the CPU, without samples."""
    copied = copy.deepcopy(metric)
    copied.reset()
    parts: list[Any] = [copied]
    if isinstance(copied, nn.Module):
        parts = list(copied.cpu().modules())
    for part in parts:
        if hasattr(part, "persistent"):  # of torchmetrics: its state dict has what it collected
            part.persistent(True)
        if hasattr(part, "distributed_available_fn"):  # likewise: it would add up what each process has of all samples
            part.distributed_available_fn = lambda: False
    return copied
