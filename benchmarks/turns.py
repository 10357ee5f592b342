"""Seconds of several cases, measured in turns: what slows the machine meets all of them alike."""

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
