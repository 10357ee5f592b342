"""Compile the C++ kernels: here, or for a wheel. The build of a wheel loads this file by its path: no imports.

A wheel has a library for each architecture of its platform, in the folder `shipped`, with the digest of the sources in
its name: a library of other sources is not found. The last bytes of a library are a digest of the rest.
"""

import hashlib
import subprocess
from pathlib import Path

SOURCES = sorted(path for path in Path(__file__).parent.glob("**/*") if path.suffix in (".cpp", ".h"))
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-fno-exceptions", "-ffp-contract=off")
SHIPPED = Path(__file__).with_name("shipped")
_DIGEST = hashlib.sha256().digest_size


def shipped_name(architecture: str) -> str:
    """Return the file name of a wheel's library."""
    return f"{architecture}-{hashlib.sha256(sources()).hexdigest()[:16]}.so"


def sources() -> bytes:
    """Return all of the sources."""
    return b"\0".join(source.read_bytes() for source in SOURCES)


def compile_library(compiler: str, flags: tuple[str, ...], new: Path) -> str | None:
    """Compile the kernels into the file `new`; return the first line of the compiler's errors, or None."""
    command = [compiler, *flags, *(str(source) for source in SOURCES if source.suffix == ".cpp"), "-o", str(new)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode or not new.exists():
        return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[0]
    with new.open("ab") as file:
        file.write(hashlib.sha256(new.read_bytes()).digest())
    return None


def is_intact(path: Path) -> bool:
    """Return whether a library is there and whole."""
    try:
        data = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(data[:-_DIGEST]).digest() == data[-_DIGEST:]
