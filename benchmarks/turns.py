"""Run commands of `sltt` once, and cases in turns: what slows the machine meets all of them alike."""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sltt.commands import main as command


def call(words: Sequence[str]) -> None:
    """Run a command of `sltt`; end the script where it fails."""
    if code := command(list(words)):
        raise SystemExit(code)


def saved(words: Sequence[str], folder: Path) -> Any:
    """Run a command and return what it saves in a folder."""
    call([*words, "--device", "cpu", "--save", str(folder)])
    return json.loads((folder / f"{words[0]}.json").read_text())


def train(words: Sequence[str], run: Path) -> None:
    """Run `sltt train` in a folder, or continue the run that it holds."""
    begun = (run / "config.yaml").exists()
    call(["train", *(["--resume", str(run)] if begun else [*words, "--device", "cpu", "--run", str(run)])])


def in_turns(
    cases: Sequence[Callable[[], object]], turns: int, clock: Callable[[], float] = time.perf_counter
) -> list[list[float]]:
    """Measure the seconds of each case, one for each turn, after a turn that is not counted."""
    times: list[list[float]] = [[] for _ in cases]
    for turn in range(turns + 1):
        for one, case in zip(times, cases, strict=True):
            began = clock()
            case()
            one.extend([clock() - began] * (turn > 0))
    return times


def quotient(times: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """Divide times within a turn; return the median, the smallest and the largest ratio."""
    ratios = [a / b for a, b in zip(times, other, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def spread(found: tuple[float, float, float] | None) -> str:
    """Write a quotient as a table shows it: median (smallest – largest)."""
    return "" if found is None else "1" if found == (1, 1, 1) else f"{found[0]:.2f} ({found[1]:.2f} – {found[2]:.2f})"
