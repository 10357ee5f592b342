"""Frames on disk: made once, by one process, and then mapped into the memory of all."""

import hashlib
import os
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray


class CacheError(ValueError):
    """A damaged cache; the message says which folder to delete."""

    def __init__(self, folder: Path, problem: str):
        super().__init__(f"the cache of frames {folder} is damaged: {problem}. Delete this folder; it is made again.")


class CachedArrays:
    """Arrays on disk, mapped read-only; each is compared with its checksum when a process reads it first.

    Args:
        folder: of the cache.
        arrays: [N, ...].
        checksums: CRC-32 of the bytes of each.
    """

    def __init__(self, folder: Path, arrays: NDArray[Any], checksums: Sequence[int]):
        self.folder, self.arrays, self.checksums = folder, arrays, checksums
        self._right = bytearray(len(checksums))

    def __len__(self) -> int:
        return len(self.checksums)

    def __getitem__(self, index: int) -> NDArray[Any]:
        array = self.arrays[index]
        if not self._right[index]:
            if zlib.crc32(array) != self.checksums[index]:
                raise CacheError(self.folder, f"array {index} has another checksum than when it was written")
            self._right[index] = True
        return array


def cache_frames(
    folder: Path,
    settings: dict[str, Any],
    sources: Sequence[str],
    shape: tuple[int, ...],
    make: Callable[[int], NDArray[Any] | None],
    title: str,
) -> tuple[CachedArrays, list[int]]:
    """Return N arrays of a shape, made once and kept in `folder`, and the indices of the sources that they are of.

    The cache is keyed by `settings` and by the sources' names, sizes and times of change. It counts only with the mark
    that is written last. One process makes it, others wait for that one; if it is killed, the next begins again.

    Args:
        folder: of all caches.
        settings: everything that changes the arrays.
        sources: files that the arrays are made from.
        shape: of one array.
        make: array i, of counts below 65,536; None leaves it out.
        title: shown while the cache is made.

    Raises CacheError if what is on disk is not what was written.
    """
    stamps = [(os.path.abspath(name), (stat := os.stat(name)).st_size, stat.st_mtime_ns) for name in sources]
    home = folder / hashlib.sha256(repr((sorted(settings.items()), shape, stamps)).encode()).hexdigest()[:16]
    home.mkdir(parents=True, exist_ok=True)
    if link := next((path for path in (home, *home.iterdir()) if path.is_symlink()), None):
        raise CacheError(home, f"{link.name} is a link, through which frames would be written somewhere else")
    array, mark = home / "frames.npy", home / "complete.npz"
    if not mark.exists():  # a finished one is only read, from a folder of somebody else's too
        with FileLock(home / "lock"):
            if not mark.exists():
                kept, checksums = _build(array, (len(sources), *shape), make, title)
                part = home / "part.npz"
                np.savez(part, kept=np.array(kept, int), checksums=np.array(checksums, int))
                os.replace(part, mark)
    try:
        with mark.open("rb") as file, np.load(file) as written:  # a zip, which has checksums of its own
            kept, checksums = written["kept"].tolist(), written["checksums"].tolist()
        arrays = np.load(array, mmap_mode="r")
        if (arrays.dtype, arrays.shape) != (np.uint16, (len(sources), *shape)):  # the checksums are of the bytes alone
            raise ValueError(f"it holds {arrays.dtype.str} {list(arrays.shape)}")
    except Exception as error:  # whatever NumPy raises on files that are not its own
        raise CacheError(home, f"it cannot be read ({error})") from error
    return CachedArrays(home, arrays, checksums), kept


def _build(
    array: Path, shape: tuple[int, ...], make: Callable[[int], NDArray[Any] | None], title: str
) -> tuple[list[int], list[int]]:
    """Write the arrays; return which of them there are, and their checksums."""
    from rich.console import Console
    from rich.progress import track

    frames = np.lib.format.open_memmap(array, "w+", np.uint16, shape)
    if hasattr(os, "posix_fallocate"):  # a full disk shows here, and not by the end of the process
        with array.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, array.stat().st_size)
    kept: list[int] = []
    checksums: list[int] = []
    workers, indices = os.cpu_count() or 1, range(len(frames))
    parts = [indices[i : i + 4 * workers] for i in range(0, len(frames), 4 * workers)]  # what waits to be written
    with ThreadPoolExecutor(workers) as pool:
        made = chain.from_iterable(pool.map(make, part) for part in parts)
        console = Console(stderr=True)
        for i, frame in enumerate(track(made, title, len(frames), console=console, disable=not console.is_terminal)):
            if frame is not None:
                frames[len(kept)] = np.minimum(frame, 2**16 - 1)
                checksums.append(zlib.crc32(frames[len(kept)]))
                kept.append(i)
    frames.flush()
    return kept, checksums
