"""With SLTT_KERNELS=win_amd64 or another of PLATFORMS, a wheel of that platform, with kernels; else one for all."""

import os
import platform
import runpy
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_X86 = {"x86-64-v3": "x86_64_v3", "x86-64-v4": "x86_64_v4"}
# the libraries in the wheel of a platform, each with the compiler's name of what it is compiled for
PLATFORMS = {
    "manylinux_2_17_x86_64": {name: name for name in _X86},
    "manylinux_2_17_aarch64": {"aarch64": "armv8-a"},
    "macosx_11_0_arm64": {"aarch64": "apple_m1"},
    "win_amd64": _X86,
}
_ZIG = {"macosx_11_0_arm64": "aarch64-macos.11.0", "win_amd64": "x86_64-windows-gnu"}


def compiler_for(target: str) -> tuple[str, ...]:
    """Return the command that compiles for a platform: GCC for Linux, and zig, of the package ziglang, for others."""
    if target in _ZIG:
        return sys.executable, "-m", "ziglang", "c++", "-target", _ZIG[target]
    machine = target.removeprefix("manylinux_2_17_")  # the symbols that the kernels need are older
    return ("g++" if platform.machine() == machine else f"{machine}-linux-gnu-g++",)


class Kernels(BuildHookInterface):
    """Compiles the kernels for the wheel's platform."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        target = os.environ.get("SLTT_KERNELS")
        if not target or version == "editable":
            return
        kernels = runpy.run_path(str(Path(self.root, "sltt", "kernels", "compiling.py")))
        compiler, *options = compiler_for(target)
        self.folder = tempfile.TemporaryDirectory()
        for name, processor in PLATFORMS[target].items():
            file = Path(self.folder.name, kernels["shipped_name"](name))
            flags = (*options, f"-m{'cpu' if options else 'arch'}={processor}", *kernels["FLAGS"])
            if problem := kernels["compile_library"](compiler, flags, file):
                raise RuntimeError(f"compiling the kernels for {name} failed: {problem}")
            build_data["force_include"][str(file)] = f"sltt/kernels/shipped/{file.name}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{target}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if hasattr(self, "folder"):
            self.folder.cleanup()
