"""Choose how many time steps go into one call of the network, within a memory budget."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from sltt.memory import available_memory, counts_peak, parse_bytes, peak_memory

# Of the memory that is free when the first batch comes; the rest is for the optimizer's state and fragmentation.
SHARE_OF_FREE = 0.7
MEASURED = 3  # so many batches, with 1, 2 and 3 steps in a call


# What was measured of a model belongs to the model, not to a rule, which may train several.
_peaks: WeakKeyDictionary[nn.Module, dict[Any, tuple[int, list[int]]]] = WeakKeyDictionary()


def run_within(
    budget: str | int | None, key: Any, model: nn.Module, x: Tensor, steps: int, run: Callable[[int], Any]
) -> Any:
    """Call `run` with the largest fold, at most T = `steps`, whose memory is within the budget.

    The first three batches of each shape are measured, with one, two and three steps in a call. Peak memory grows by a
    constant for each further step; that from one to two may be another. Results depend on the fold by rounding only.

    Args:
        budget: bytes that a batch may take above what is allocated before it, such as "8GB"; None is 70% of what is
            free at the first batch.
        key: what else the memory depends on: the rule.
        model: of the batch.
        x: input, whose shape and type the memory depends on.
        steps: T.
        run: runs the batch with so many time steps in a call, and gives what this function returns.
    """
    key = key, budget, x.shape, x.dtype, x.device, steps, model.training
    found = _peaks.setdefault(model, {})
    if not counts_peak(x.device):
        raise ValueError(
            f"fold='auto' measures memory, which PyTorch does not count on {x.device.type}: take a number, fold=2"
        )
    if key not in found:
        free = int(SHARE_OF_FREE * available_memory(x.device)) if budget is None else parse_bytes(budget)
        found[key] = free, []
    limit, peaks = found[key]
    fold, results = 1 + len(peaks), []
    if fold > min(MEASURED, steps) or (peaks and peaks[-1] + peaks[0] > limit):
        return run(largest_fold(peaks, limit, steps))
    # gradients that are there already would be a part of the peak in a batch that makes them
    held = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    peaks.append(held + peak_memory(lambda: results.append(run(fold)), x.device))
    return results[0]


def largest_fold(peaks: list[int], limit: int, most: int) -> int:
    """The largest fold whose peak is within the limit; at least 1.

    Args:
        peaks: bytes at the peak with one step in a call, and with two and three if they were measured.
        limit: bytes.
        most: the largest fold that there is a use for.
    """
    if len(peaks) < 2:
        return 1
    slope = max(1, *(after - before for before, after in pairwise(peaks)))
    return int(min(most, max(1, 1 + (limit - peaks[0]) // slope)))
