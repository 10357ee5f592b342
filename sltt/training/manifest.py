"""The files of a folder that commands write, and its manifest: a SHA-256 digest of each, compared wherever one is read.

The first line of the manifest is the digest of the lines after it: a digest and a name each.
"""

import hashlib
from collections.abc import Callable
from io import BufferedRandom
from pathlib import Path
from shlex import quote
from typing import IO, Any

from sltt.training.files import write_atomically

MANIFEST = "manifest.txt"
CONFIG, METRICS, LAST, BEST = "config.yaml", "metrics.csv", "last.ckpt", "best.ckpt"
REMEDY = "Restore it, or delete it: the copy in the checkpoint is taken."  # of a damaged CONFIG
NO_FILE = "-"  # in place of a digest


def write_file(path: Path, write: Callable[[BufferedRandom], Any]) -> None:
    """Write a file by `write(file)`, whole or not at all, and list its digest.

    The manifest has the digests before and after while the file is replaced: a kill at any moment leaves both right.
    """

    def write_and_list(file: BufferedRandom) -> None:
        nonlocal new
        write(file)
        new = _digest(file)
        listed = _read_manifest(path.parent)
        _write_manifest(path.parent, {**listed, path.name: {*listed.get(path.name, {NO_FILE}), new}})

    new = NO_FILE
    write_atomically(path, write_and_list)
    _write_manifest(path.parent, {**_read_manifest(path.parent), path.name: {new}})


def open_file(path: Path) -> IO[bytes]:
    """Open a file to read.

    Raises FileNotFoundError for one that was never written, and ValueError, with what can be used in its place, for one
    that is not the one that was written.
    """
    if file := _open(path):
        return file
    if not was_written(path):
        raise FileNotFoundError(f"{path} is not written yet")
    why = f"damaged: {MANIFEST} has another SHA-256" if path.is_file() else f"gone, and {MANIFEST} lists it"
    raise ValueError(f"{path} is {why}. {_remedy(path)}")


def is_intact(path: Path) -> bool:
    """Return whether a file is there, and the one that was written."""
    if file := _open(path):
        file.close()
    return file is not None


def was_written(path: Path) -> bool:
    """Return whether a file is there, or should be."""
    return path.is_file() or NO_FILE not in read_manifest(path.parent).get(path.name, {NO_FILE})


def _open(path: Path) -> IO[bytes] | None:
    """Open a file; None where it is not the one that was written."""
    while True:
        listed = read_manifest(path.parent)
        if path.is_file():
            file = path.open("rb")
            if _digest(file) in listed.get(path.name, ()):
                return file
            file.close()
        if read_manifest(path.parent) == listed:  # else another process wrote the file meanwhile
            return None


def read_manifest(folder: Path) -> dict[str, set[str]]:
    """Read the digests of each file: two while a file is replaced.

    Raises FileNotFoundError for a folder without a manifest, ValueError for one that is damaged, or that holds a link,
    through which a command would write somewhere else.
    """
    if not (folder / MANIFEST).is_file():
        raise FileNotFoundError(
            f"{folder} has no {MANIFEST}: name the folder of a run or of results, with all its files. {ALONE}"
        )
    if link := next((path for path in folder.iterdir() if path.is_symlink()), None):
        raise ValueError(f"{link} is a link: put in its place what it leads to, or remove it")
    return _read_manifest(folder)


ALONE = "A checkpoint can be used without its run: copy it to another folder, and start a new run with --weights FILE."


def _read_manifest(folder: Path) -> dict[str, set[str]]:
    try:
        digest, _, lines = (folder / MANIFEST).read_bytes().partition(b"\n")
    except FileNotFoundError:
        return {}
    if digest != hashlib.sha256(lines).hexdigest().encode():
        raise ValueError(f"{folder / MANIFEST} is damaged: restore it from a copy. {ALONE}")
    listed: dict[str, set[str]] = {}
    for line in lines.decode().splitlines():
        one, _, name = line.partition("  ")
        listed.setdefault(name, set()).add(one)
    return listed


def _write_manifest(folder: Path, listed: dict[str, set[str]]) -> None:
    lines = "".join(f"{digest}  {name}\n" for name in listed for digest in sorted(listed[name])).encode()
    content = hashlib.sha256(lines).hexdigest().encode() + b"\n" + lines
    write_atomically(folder / MANIFEST, lambda file: file.write(content))


def _digest(file: IO[bytes]) -> str:
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest()  # pyright: ignore[reportArgumentType]
    file.seek(0)
    return digest


def _remedy(path: Path) -> str:
    """Say what to do about a file that is not the one that was written."""
    if path.name == CONFIG:
        return REMEDY
    if path.suffix == ".json":
        return "Restore it from a copy, or run the command that wrote it again."
    other = {LAST: BEST, BEST: LAST}.get(path.name)
    if other is None:
        return "Restore it from a copy."
    if not is_intact(path.with_name(other)):
        return "Restore it from a copy, or start a new run, with --weights from another checkpoint."
    name = other.removesuffix(".ckpt")
    return (
        f"{other} is intact: take it by --checkpoint {name}, in Python by checkpoint={name!r}, or start a new run "
        f"from it by --weights {quote(str(path.with_name(other)))}."
    )
