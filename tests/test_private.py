"""Names of other packages that are not public stand in one file, and are there."""

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest
import torch

import sltt
from sltt import _torch

ROOT = Path(sltt.__file__).parent
PACKAGES = ("torch", "lightning_fabric")


def imports(path):
    """(module, name) of all that a file imports, also within functions."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    return [(node.module, alias.name) for node in nodes for alias in node.names if node.module.startswith(PACKAGES)]


@pytest.mark.parametrize(("module", "name"), imports(Path(_torch.__file__)))
def test_what_is_private_is_there(module, name):
    assert hasattr(import_module(module), name), f"PyTorch {torch.__version__} has no {module}.{name} any more"


def private(path):
    """The private names of PyTorch and Lightning that a file takes: by an import, or by a path such as torch._C.x."""
    found = [".".join(pair) for pair in imports(path)]
    found += [ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]
    return {name for name in found if name.startswith(PACKAGES) and re.search(r"\._[^_]", name)}


def test_no_other_file_takes_a_private_name():
    assert private(Path(_torch.__file__))
    assert {
        str(path): found for path in ROOT.rglob("*.py") if path.name != "_torch.py" and (found := private(path))
    } == {}
