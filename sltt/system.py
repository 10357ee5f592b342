"""The machine: its terminal, and what differs between Linux, macOS and Windows: locks, owners, cores, memory."""

import ctypes
import errno
import os
import sys
from pathlib import Path


def lock_file(descriptor: int) -> bool:
    """Take the system's lock of a file, which a data worker does not inherit; False where another process has it."""
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(descriptor, 2**30, os.SEEK_SET)  # a byte beyond the text, which others may then still read
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            os.lseek(descriptor, 0, os.SEEK_SET)
        else:
            import fcntl

            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)  # some network file systems have no locks
    return True


def is_own(path: Path) -> bool:
    """Return whether a file or folder is this user's."""
    return sys.platform == "win32" or path.stat().st_uid == os.getuid()


def is_private(path: Path) -> bool:
    """Return whether a file and its folder are this user's or root's, and nobody else may write there."""
    stats = [place.stat() for place in (path, path.parent)]
    return sys.platform == "win32" or all(s.st_uid in (os.getuid(), 0) and not s.st_mode & 0o022 for s in stats)


def count_cores() -> int:
    """Return the processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def read_processor() -> bytes:
    """Return the model and the features of the processor, a line each; raise OSError where the system has no /proc."""
    lines = Path("/proc/cpuinfo").read_bytes().split(b"\n\n")[0].splitlines()
    return b"\n".join(line for line in lines if line.startswith((b"model", b"flags", b"CPU ", b"Features")))


def keep_freed_memory() -> None:
    """Have this process keep what tensors on the CPU free for the next ones, until it ends.

    The C library hands large blocks back to the system, which gives them anew, page by page and filled with zeros, in
    each batch: about a tenth of the time of a small network. What is kept stays in the resident set. Only glibc is
    asked; others, as of macOS, stay as they are, and so does another allocator that was preloaded.
    """
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def escape(text: str) -> str:
    """Escape what a terminal would obey, or could not show, such as colours in the name of a folder."""
    return "".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in text)
