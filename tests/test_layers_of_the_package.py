"""The contract between the layers of the package: kept, drawn in CONTRIBUTING.md, and broken by an import upwards."""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import sltt

ROOT = Path(sltt.__file__).parents[1]


def test_the_drawing_is_that_of_the_contract():
    (contract,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    drawing = (ROOT / "CONTRIBUTING.md").read_text().split("```text\n")[1].split("```")[0]
    assert [line.split("  ")[0] for line in drawing.splitlines()] == contract["layers"]


def test_an_import_against_the_layers_is_caught(tmp_path):
    """`make check` shows that there is none."""
    shutil.copytree(ROOT / "sltt", tmp_path / "sltt", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "sltt" / "kernels" / "spikes" / "bits.py").open("a") as file:
        file.write("from sltt.rules import SLTT\n")
    linter = "import sys; sys.path.insert(0, '.'); from importlinter.cli import lint_imports_command as run; run()"
    words = [sys.executable, "-c", linter, "--no-cache"]
    result = subprocess.run(words, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert result.returncode == 1, result.stdout
    assert "sltt.kernels is not allowed to import sltt.rules" in result.stdout
