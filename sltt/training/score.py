"""A metric over the batches of an epoch or a split: a mean over samples, or what it computes from all of them."""

import copy
import numbers
from typing import Any

from torch import Tensor, nn

from sltt.losses import is_per_step
from sltt.metrics import Accuracy, collects, name_of
from sltt.parallel.processes import Processes
from sltt.sequence.padding import Padded
from sltt.training.progress import Progress


class Score:
    """A metric that sees batches.

    One that `collects`, such as those of torchmetrics, sees the samples of all processes in each of them, on the CPU.
    So its value is that of all samples, whatever the number of processes and the size of the batches. The user's object
    stays as it is: a copy collects.
    A score that `selects` an epoch is one number. In an epoch that is resumed, the batches before are in `progress`;
    `partial` says that the metric could not be saved, and sees those after the resume only.
    """

    def __init__(self, metric: Any, processes: Processes, progress: Progress, selects: bool = True):
        self.metric, self.processes, self.selects, self.collecting = metric, processes, selects, collects(metric)
        self.counts = type(metric) is Accuracy  # of labels that a loss ignores, a batch may have any number
        self.empty = not progress.score
        self.partial = self.collecting and progress.batch > 0 and self.empty
        # of a mean; the first process takes over the sums of all
        sums = progress.score if processes.rank == 0 and not self.collecting else {}
        self.total, self.samples = sums.get("total", 0.0), sums.get("samples", 0)
        if self.collecting:
            self.metric = _empty(metric)
            if progress.score:
                self.metric.load_state_dict(progress.score)

    def measure(self, prediction: Tensor, target: Any, samples: int) -> Any:
        """Return what to `add` of a batch, of which so many samples count here."""
        if not self.collecting:
            return (self.metric.count if self.counts else self.metric)(prediction, target)
        own = (prediction.detach().cpu(), target.cpu() if isinstance(target, Tensor) else target) if samples else None
        for part in self.processes.gather(own):
            if part is not None:
                self.empty = False
                self.metric.update(*part)

    def add(self, value: Any, samples: int) -> None:
        """Add what `measure` has found of so many samples."""
        if samples and not self.collecting:
            total, count = map(float, value) if self.counts else (self._number(value) * samples, samples)
            self.total += total
            self.samples += count

    def value(self) -> Any:
        """Return the score of all samples, of all processes; None of a metric that has seen none after a resume."""
        if self.collecting:
            return None if self.empty else self._number(self.metric.compute())
        sums = self.state()
        return sums["total"] / max(sums["samples"], 1)

    def state(self) -> dict[str, Any]:
        """Return what all processes have collected, for a checkpoint; nothing of a metric that cannot save it."""
        if self.collecting:
            return dict(self.metric.state_dict()) if hasattr(self.metric, "load_state_dict") else {}
        return dict(zip(("total", "samples"), self.processes.sum([self.total, self.samples]), strict=True))

    def _number(self, value: Any) -> Any:
        """Return a number as a float; raise ValueError for another value by which an epoch would be selected."""
        if isinstance(value, numbers.Real) or (isinstance(value, Tensor) and value.numel() == 1):
            return float(value)
        if self.collecting and not self.selects:
            return value
        got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        mean = "the mean over samples; of torchmetrics, average='macro' is over classes; sltt.evaluate takes any value"
        raise ValueError(f"the metric {name_of(self.metric)} gives {got}, expected one number: {mean}")


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
