"""Find the largest batch and T for a rule in a memory budget, from a model of the peak fitted to four runs."""

import math
from collections.abc import Callable
from dataclasses import dataclass

# A batch, or a T, above this is said to be without a limit.
MOST_SAMPLES, MOST_STEPS = 1_000_000, 10_000


@dataclass(frozen=True)
class PeakModel:
    """The peak of an iteration, peak(B, T) = fixed + per_sample B + per_step T + per_both B T bytes.

    Attributes:
        fixed: parameters, gradients, the optimizer's state, temporaries that depend on neither.
        per_sample: grows with the batch size B.
        per_step: grows with the number of time steps T.
        per_both: grows with both, as the graph of BPTT does.
    """

    fixed: float
    per_sample: float
    per_step: float
    per_both: float

    def peak(self, batch: int, steps: int) -> float:
        """Return bytes at the peak of an iteration with `batch` samples and T = `steps`."""
        return self.fixed + self.per_sample * batch + self.per_step * steps + self.per_both * batch * steps

    def largest_batch(self, budget: int, steps: int) -> int | None:
        """Return the most samples that fit into `budget` bytes with T = `steps`; None above `MOST_SAMPLES`."""
        room = budget - self.fixed - self.per_step * steps
        return _fit_count(room, self.per_sample + self.per_both * steps, MOST_SAMPLES)

    def largest_steps(self, budget: int, batch: int) -> int | None:
        """Return the largest T that fits into `budget` bytes with `batch` samples; None above `MOST_STEPS`."""
        room = budget - self.fixed - self.per_sample * batch
        return _fit_count(room, self.per_step + self.per_both * batch, MOST_STEPS)


def fit_peak(measure: Callable[[int, int], int], batches: tuple[int, int], steps: tuple[int, int]) -> PeakModel:
    """Fit the model to `measure(batch, steps)`, bytes at the peak, at two batch sizes and two T, the smaller first."""
    (b0, b1), (t0, t1) = batches, steps
    p = {(b, t): measure(b, t) for b in batches for t in steps}
    both = (p[b1, t1] - p[b1, t0] - p[b0, t1] + p[b0, t0]) / ((b1 - b0) * (t1 - t0))
    sample = (p[b1, t0] - p[b0, t0]) / (b1 - b0) - both * t0
    step = (p[b0, t1] - p[b0, t0]) / (t1 - t0) - both * b0
    return PeakModel(p[b0, t0] - sample * b0 - step * t0 - both * b0 * t0, sample, step, both)


def _fit_count(room: float, each: float, limit: int) -> int | None:
    if room < 0:
        return 0
    most = room / each if each > 0 else math.inf
    return None if most > limit else int(most)
