"""Files that are written whole or not at all, and names of files as a terminal shows them."""

import csv
import io
import os
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def write_atomically(path: Path, write: Callable[[io.BufferedRandom], Any]) -> None:
    """Write a file by `write(file)` such that `path` holds either the old content or the whole new one.

    Raises OSError, with the path and the state of the old file, when the disk is full or the folder not writable.
    """
    part = part_of(path)
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


def printable(text: str) -> str:
    """Escape what a terminal would obey, or could not show, such as colours in the name of a folder."""
    return "".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in text)


def part_of(path: Path) -> Path:
    """A name beside `path`, of its own in each process and thread, for what is not whole yet."""
    return path.parent / f".{path.name}.{secrets.token_hex(4)}.part"


def write_table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows of equal keys as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def read_table(path: Path) -> list[dict[str, Any]]:
    """Rows that `write_table` wrote, with numbers, and None where a cell is empty."""
    with path.open(newline="", encoding="utf-8") as file:
        return [{key: float(value) if value else None for key, value in row.items()} for row in csv.DictReader(file)]
