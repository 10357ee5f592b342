"""The layers of the package: CONTRIBUTING.md draws those that `make check` keeps; no two files import each other."""

import ast
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import sltt

ROOT = Path(sltt.__file__).parents[1]


def test_the_drawing_is_that_of_the_contract():
    (contract,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    drawing = (ROOT / "CONTRIBUTING.md").read_text().split("```text\n")[1].split("```")[0]
    assert [line.split("  ")[0] for line in drawing.splitlines()] == contract["layers"]


def test_no_files_import_each_other_in_a_ring():
    """Imports within functions, and those for types alone, count too."""
    paths = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in (ROOT / "sltt").rglob("*.py")}
    files = {name.removesuffix(".__init__"): path.read_text() for name, path in paths.items()}
    graph = {}
    for name, text in files.items():
        lines = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom) and node.module]
        pairs = [(line.module, f"{line.module}.{alias.name}") for line in lines for alias in line.names]
        graph[name] = {file if file in files else home for home, file in pairs} & files.keys() - {name}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names a ring
