"""Turn errors of a command into one line of cause, one of remedy, and an exit code."""

import os
import re
import sys
import traceback
from pathlib import Path

from sltt.system import escape

FAILED, MISUSED = 1, 2
SAID = (ValueError, OSError, ArithmeticError, RuntimeError, ImportError)  # their messages are written for the user
PACKAGE = str(Path(__file__).parents[1])
OUTSIDE = (PACKAGE, "site-packages", str(Path(os.__file__).parent), "<frozen", "<string>")
# what to do about errors of PyTorch and of the system: the first pattern in the class and the message counts
REMEDIES = {
    r"MemoryError|OutOfMemory|out of memory|can't allocate memory": (
        "use a smaller --batch_size, fewer --steps, or the rule SLTT; `sltt profile --budget` says what fits"
    ),
    r"\[Errno (2|20|21)\]": "correct the path",  # of the system alone
    r"\[Errno (13|28|30)\]": "correct the path or its permissions, or free space; --data.cache FOLDER moves frames",
    r"shared memory|Bus error|/dev/shm": "use --workers 0, or a larger /dev/shm (docker run --shm-size=8g)",
    r"DataLoader worker.* (exited|killed)": "--workers 0 shows what ended it; where that works, use fewer --workers",
    r"gloo.*by peer|remote process exited": "another process ended: its output says why, unless memory ran out",
    r"shapes cannot be multiplied|to have \d+ channels|must match the size|size mismatch,|Expected \d[^ ]*D": (
        "the network does not fit the data: compare the options --model.… and --data.…"
    ),
}


class UsageError(Exception):
    """The command line cannot be understood; the message says why, and what to write instead."""


def tell(error: Exception, command: str) -> int:
    """Print why a command fails and what to do about it; returns the exit code."""
    for line in (" ".join(cause(error).split()), *getattr(error, "__notes__", ()), remedy(error, command)):
        print(f"sltt: {escape(line)}", file=sys.stderr)
    return MISUSED if isinstance(error, UsageError) else FAILED


def cause(error: Exception) -> str:
    """Return the message of an error, with its class and place where it was not written for the user."""
    text = str(error)
    if "Original Traceback" in text:  # of a worker of the data loader
        first, *_, last = text.strip().strip("'\"").replace("\\n", "\n").splitlines()
        return f"{first.rstrip('.')}: {last}"
    if isinstance(error, UsageError) or (isinstance(error, SAID) and text):
        return text
    place = _user_line(error) or (_places(error) or [""])[-1]
    return f"{type(error).__name__}{text and ': '}{text}{place and f' ({place})'}"


def remedy(error: Exception, command: str) -> str:
    """Return the remedy of an error. For an error of sltt, which says it, return where to read on."""
    explains = f"`sltt {command} --help` explains the options" if command else "`sltt --help` lists the commands"
    if isinstance(error, UsageError):
        return explains
    message = f"{type(error).__name__}: {error}"
    if advice := next((advice for pattern, advice in REMEDIES.items() if re.search(pattern, message)), None):
        return advice
    if place := _user_line(error):
        return f"correct {place}; SLTT_TRACEBACK=1 shows what called it"
    if isinstance(error, SAID) and "".join(_places(error)[-1:]).startswith(PACKAGE):
        return f"{explains}; the page “Errors and remedies” of the documentation has more"
    return "SLTT_TRACEBACK=1 shows where this happened: report it with the output, if network and data are right"


def _user_line(error: Exception) -> str | None:
    """Return the innermost line of the user's own code."""
    own = [place for place in _places(error) if not any(part in place for part in OUTSIDE)]
    return own[-1] if own else None


def _places(error: Exception) -> list[str]:
    """Return the lines of code that an error came through, also in a worker of the data loader, the innermost last."""
    frames = [(frame.filename, frame.lineno, frame.name) for frame in traceback.extract_tb(error.__traceback__)]
    frames += re.findall(r'File "(.+?)", line (\d+), in (\w+)', str(error))
    return [f"{file}, line {line}, in {name}" for file, line, name in frames]
