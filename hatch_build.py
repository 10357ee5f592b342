"""With SLTT_KERNELS=x86_64 or aarch64, a wheel of that platform, with compiled kernels; else one for all."""

import os
import platform
import runpy
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

GLIBC = "manylinux_2_17"  # the symbols that the kernels need are older


class Kernels(BuildHookInterface):
    """Compiles the kernels for the wheel's platform."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        target = os.environ.get("SLTT_KERNELS")
        if not target or version == "editable":
            return
        kernels = runpy.run_path(str(Path(self.root, "sltt", "kernels", "compiling.py")))
        compiler = "g++" if platform.machine() == target else f"{target}-linux-gnu-g++"
        self.folder = tempfile.TemporaryDirectory()
        for name, march in kernels["PLATFORMS"][target].items():
            file = Path(self.folder.name, kernels["shipped_name"](name))
            if problem := kernels["compile_library"](compiler, (*kernels["FLAGS"], f"-march={march}"), file):
                raise RuntimeError(f"compiling the kernels for {name} failed: {problem}")
            build_data["force_include"][str(file)] = f"sltt/kernels/shipped/{file.name}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{GLIBC}_{target}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if hasattr(self, "folder"):
            self.folder.cleanup()
