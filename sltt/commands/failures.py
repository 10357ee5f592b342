"""How a command that fails ends: one line of cause, one of remedy, and an exit code."""

import os
import sys
import traceback
from pathlib import Path

FAILED, MISUSED = 1, 2
SAID = (ValueError, OSError, ArithmeticError, RuntimeError)  # their messages are written for the user
OUTSIDE = (str(Path(__file__).parents[1]), "site-packages", str(Path(os.__file__).parent), "<frozen")


class UsageError(Exception):
    """The command line cannot be understood; the message says why, and what to write instead."""


def tell(error: Exception) -> int:
    """Print why a command fails and what to do about it; returns the exit code."""
    lines = [" ".join(cause(error).split()), *getattr(error, "__notes__", ())]
    if not isinstance(error, UsageError):
        lines.append(_remedy(error))
    for line in lines:
        print(f"sltt: {line}", file=sys.stderr)
    return MISUSED if isinstance(error, UsageError) else FAILED


def cause(error: Exception) -> str:
    """What went wrong: the message, with its class and place where it was not written for the user."""
    text = str(error)
    if "Original Traceback" in text:  # of a worker of the data loader
        first, *_, last = text.strip().strip("'\"").replace("\\n", "\n").splitlines()
        return f"{first.rstrip('.')}: {last}"
    if isinstance(error, MemoryError):
        return f"out of memory{text and ': '}{text}"
    if isinstance(error, UsageError) or (isinstance(error, SAID) and text):
        return text
    return f"{type(error).__name__}{text and ': '}{text}{_place(error)}"


def _remedy(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "use a smaller --batch_size, fewer --steps, or the rule SLTT; `sltt profile --budget` says what fits"
    return "set SLTT_TRACEBACK=1 to see where this happened"


def _place(error: Exception) -> str:
    """The innermost line of the user's own code, or else of any code."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not any(part in frame.filename for part in OUTSIDE)]
    last = next(iter([*reversed(own), *reversed(frames)]), None)
    return f" ({last.filename}, line {last.lineno}, in {last.name})" if last else ""
