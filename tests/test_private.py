"""Names of PyTorch and Lightning that are not public are imported in one file."""

import ast
import re
from pathlib import Path

import sltt
from sltt import _torch

PACKAGES = ("torch", "lightning_fabric")


def private(path):
    """The private names of PyTorch and Lightning that a file takes: by an import, or by a path such as torch._C.x."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            found.append(ast.unparse(node))
    return {name for name in found if name.startswith(PACKAGES) and re.search(r"\._[^_]", name)}


def test_no_other_file_takes_a_private_name():
    assert private(Path(_torch.__file__))
    others = [path for path in Path(sltt.__file__).parent.rglob("*.py") if path.name != "_torch.py"]
    assert {str(path): found for path in others if (found := private(path))} == {}
