"""Ctrl-C and SIGTERM that lose nothing."""

import signal
import threading
from pathlib import Path
from shlex import quote
from types import FrameType, TracebackType
from typing import Any, Self

# EX_TEMPFAIL of sysexits.h: run the same again. Slurm can be told to requeue on it.
PREEMPTED = 75


class Preempted(SystemExit):
    """SIGTERM, after a checkpoint was saved; ends the process with the code 75."""

    def __init__(self, message: str):
        super().__init__(message)
        self.code = PREEMPTED


class Interrupt:
    """Turns the first Ctrl-C or SIGTERM into a request to stop after the batch; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.requested = 0  # or the signal
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {n: signal.signal(n, self._request) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, previous in self._previous.items():
            # once it has stopped this process, which is ending in order, another SIGTERM is not to kill it
            stopped = number == signal.SIGTERM and isinstance(error, Preempted)
            signal.signal(number, signal.SIG_IGN if stopped else previous)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = number

    def stop(self, requested: float, run: Path) -> None:
        """Raise what belongs to the signal `requested`, if any; call it after a checkpoint was saved."""
        on = f"continue with --resume {quote(str(run))}, in Python with resume=True"
        if requested == signal.SIGTERM:
            raise Preempted(f"stopped by SIGTERM; {on}")
        if requested:
            raise KeyboardInterrupt(f"stopped by Ctrl-C; {on}")
