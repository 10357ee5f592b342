"""Seconds of several cases, measured in turns, and their ratios: what slows the machine meets all of them alike."""

import statistics
import time
from collections.abc import Callable, Sequence


def in_turns(
    cases: Sequence[Callable[[], object]], turns: int, clock: Callable[[], float] = time.perf_counter
) -> list[list[float]]:
    """Seconds of each case, one for each turn, after a turn that is not counted."""
    times: list[list[float]] = [[] for _ in cases]
    for turn in range(turns + 1):
        for one, case in zip(times, cases, strict=True):
            began = clock()
            case()
            one.extend([clock() - began] * (turn > 0))
    return times


def quotient(times: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """Of the ratios within a turn: median, smallest and largest."""
    ratios = [a / b for a, b in zip(times, other, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def spread(found: tuple[float, float, float] | None) -> str:
    """A quotient as a table shows it."""
    return "" if found is None else "1" if found == (1, 1, 1) else f"{found[0]:.2f} ({found[1]:.2f} – {found[2]:.2f})"
