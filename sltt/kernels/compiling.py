"""Compile the C++ kernels: here, or for a wheel. The build of a wheel loads this file by its path: no imports.

A wheel has a library for each architecture of its platform, in the folder `shipped`, with the digest of the sources in
its name: a library of other sources is not found. The last bytes of a library are a digest of the rest.
"""

import hashlib
import platform
import subprocess
import sys
from pathlib import Path

SOURCES = sorted(path for path in Path(__file__).parent.glob("**/*") if path.suffix in (".cpp", ".h"))
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-fno-exceptions", "-ffp-contract=off")
_X86 = {"x86-64-v3": "x86_64_v3", "x86-64-v4": "x86_64_v4"}
# the libraries in the wheel of a platform, each with the compiler's name of what it is compiled for
PLATFORMS = {
    "manylinux_2_17_x86_64": {name: name for name in _X86},
    "manylinux_2_17_aarch64": {"aarch64": "armv8-a"},
    "macosx_11_0_arm64": {"aarch64": "apple_m1"},
    "win_amd64": _X86,
}
_ZIG = {"macosx_11_0_arm64": "aarch64-macos.11.0", "win_amd64": "x86_64-windows-gnu"}
SHIPPED = Path(__file__).with_name("shipped")
_DIGEST = hashlib.sha256().digest_size


def shipped_name(architecture: str) -> str:
    """Return the file name of a wheel's library."""
    return f"{architecture}-{hashlib.sha256(sources()).hexdigest()[:16]}.so"


def compiler_for(target: str) -> tuple[str, ...]:
    """Return the command that compiles for a platform: GCC for Linux, and zig, of the package ziglang, for others."""
    if target in _ZIG:
        return sys.executable, "-m", "ziglang", "c++", "-target", _ZIG[target]
    machine = target.removeprefix("manylinux_2_17_")  # the symbols that the kernels need are older
    return ("g++" if platform.machine() == machine else f"{machine}-linux-gnu-g++",)


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
