"""Files of a run, which are written whole or not at all."""

import io
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONFIG, METRICS, LAST, BEST = "config.yaml", "metrics.csv", "last.ckpt", "best.ckpt"


def write_atomically(path: Path, write: Callable[[io.BufferedRandom], Any]) -> None:
    """Write a file by `write(file)` such that `path` holds either the old content or the whole new one.

    Raises OSError, with the path and the state of the old file, when the disk is full or the folder not writable.
    """
    part = path.parent / f".{path.name}.{secrets.token_hex(4)}.part"  # of its own in each process and thread
    try:
        with open(part, "w+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError when a write fails
        kept = "the one written before is intact" if path.exists() else "nothing was written"
        raise OSError(f"could not write {path}: {error}; {kept}. Free some space or choose another folder.") from error
    finally:
        part.unlink(missing_ok=True)
