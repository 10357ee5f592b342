"""`fold="auto"`: the largest number of time steps in a call of the network that fits a memory budget."""

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from sltt.analysis.memory import available_memory, parse_bytes, peak_memory
from sltt.rules.base import Output, Sequence

# Of the memory that is free when the first batch comes; the rest is for the optimizer's state and fragmentation.
SHARE_OF_FREE = 0.7


class AutoFold:
    """Measures the first two batches of each shape, with one and two steps in a call, and extrapolates to the budget.

    Peak memory grows by a constant for each further step, from the second on by a little less than from one to two, so
    that the extrapolation errs on the safe side. Results depend on the fold by rounding only.

    Args:
        budget: bytes that a batch may take above what is allocated before it, such as "8GB"; None is 70% of what is
            free at the first batch.
    """

    def __init__(self, budget: str | int | None):
        self.budget = None if budget is None else parse_bytes(budget)
        self._forget()

    def _forget(self) -> None:
        self._model: weakref.ref[nn.Module] | None = None
        self._peaks: dict[Any, list[int]] = {}
        self._limits: dict[Any, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"budget": self.budget}  # another process, or another model, measures anew

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.budget = state["budget"]
        self._forget()

    def run(self, model: nn.Module, sequence: Sequence, most: int, run: Callable[[int], Output]) -> Output:
        """Call `run` with the fold, at most `most` time steps."""
        x, results = sequence.x, []
        if self._model is None or self._model() is not model:
            self._forget()
            self._model = weakref.ref(model)
        key = x.shape, x.dtype, x.device, sequence.steps, model.training
        if key not in self._peaks:
            self._limits[key] = self.budget or int(SHARE_OF_FREE * available_memory(x.device))
        peaks = self._peaks.setdefault(key, [])
        if len(peaks) >= min(2, most) or (peaks and 2 * peaks[0] > self._limits[key]):
            return run(self.fold(peaks, self._limits[key], most))
        fold = 1 + len(peaks)
        peaks.append(peak_memory(lambda: results.append(run(fold)), x.device))
        return results[0]

    @staticmethod
    def fold(peaks: list[int], limit: int, most: int) -> int:
        """The largest fold whose peak is within the limit; at least 1.

        Args:
            peaks: bytes at the peak with one step in a call, and with two if they were measured.
            limit: bytes.
            most: the largest fold that there is a use for.
        """
        if len(peaks) < 2:
            return 1
        slope = max(peaks[1] - peaks[0], 1)
        return int(min(most, max(1, 1 + (limit - peaks[0]) // slope)))
