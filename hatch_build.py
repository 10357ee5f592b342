"""With SLTT_KERNELS=win_amd64 or another of PLATFORMS, a wheel of that platform, with kernels; else one for all."""

import os
import runpy
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Kernels(BuildHookInterface):
    """Compiles the kernels for the wheel's platform."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        target = os.environ.get("SLTT_KERNELS")
        if not target or version == "editable":
            return
        kernels = runpy.run_path(str(Path(self.root, "sltt", "kernels", "compiling.py")))
        compiler, *options = kernels["compiler_for"](target)
        self.folder = tempfile.TemporaryDirectory()
        for name, processor in kernels["PLATFORMS"][target].items():
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
