"""Ctrl-C that loses nothing."""

import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self


class Interrupt:
    """Turns the first Ctrl-C into a request to stop after the batch; the second stops at once."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: Any = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._request)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def stop(self, run: Path) -> None:
        """Raise KeyboardInterrupt if a stop was requested; call it after a checkpoint was saved."""
        if self.requested:
            raise KeyboardInterrupt(f"stopped by Ctrl-C; continue with --resume {run}")
