"""Frames on disk: made once, by one process, and then mapped into the memory of all."""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Part of every key: a change in what the frames are makes the caches of before unused.
VERSION = 1


def cached(
    folder: Path,
    settings: dict[str, Any],
    sources: Sequence[str],
    shape: tuple[int, ...],
    make: Callable[[int], NDArray[Any] | None],
    title: str,
) -> tuple[NDArray[Any], dict[str, Any]]:
    """Arrays [N, *shape], made once and kept in `folder`; and the mark of the finished cache.

    The cache is keyed by `settings` and by the sources' names, sizes and times of change. It is written under another
    name, moved into place as a whole, and counts only with the mark that is written last. One process makes it, others
    wait for that one; if it is killed, the next begins again.

    Args:
        folder: of all caches.
        settings: everything that changes the arrays.
        sources: files that the arrays are made from.
        shape: of one array.
        make: array i, of counts below 65,536; None leaves it out.
        title: shown while the cache is made.

    Returns:
        The arrays, mapped read-only; and the mark, whose "kept" lists the sources that they are of.
    """
    stamps = [(name, (stat := os.stat(name)).st_size, stat.st_mtime_ns) for name in sources]
    key = hashlib.sha256(repr((VERSION, sorted(settings.items()), shape, stamps)).encode()).hexdigest()[:16]
    home = folder / key
    home.mkdir(parents=True, exist_ok=True)
    array, mark = home / "frames.npy", home / "complete.json"
    with _lock(home / "lock"):
        if not mark.exists():
            _build(array, mark, settings, sources, shape, make, title)
    return np.load(array, mmap_mode="r"), json.loads(mark.read_text())


def _build(
    array: Path,
    mark: Path,
    settings: dict[str, Any],
    sources: Sequence[str],
    shape: tuple[int, ...],
    make: Callable[[int], NDArray[Any] | None],
    title: str,
) -> None:
    from rich.console import Console
    from rich.progress import track

    part = array.with_name(".frames.part.npy")
    frames = np.lib.format.open_memmap(part, "w+", np.uint16, (len(sources), *shape))
    kept: list[int] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = pool.map(make, range(len(sources)))
        console = Console(stderr=True)
        for i, one in enumerate(track(made, title, len(sources), console=console, disable=not console.is_terminal)):
            if one is not None:
                frames[len(kept)] = np.minimum(one, 2**16 - 1)
                kept.append(i)
    frames.flush()
    del frames
    os.replace(part, array)
    text = json.dumps({"kept": kept, "settings": settings, "version": VERSION})
    mark.with_suffix(".part").write_text(text)
    os.replace(mark.with_suffix(".part"), mark)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Held by one process at a time; freed by the system when the process ends, however it does."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
