"""Names of other packages that are not public stand in one file, and are there."""

import ast
import re
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from pkgutil import resolve_name

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import sltt
from sltt import _torch

ROOT = Path(sltt.__file__).parent
PACKAGES = ("torch", "lightning_fabric")
DOCUMENTED = {"_asdict", "_exit", "_fields", "_replace"}  # names of Python


@cache
def tree(path):
    return list(ast.walk(ast.parse(path.read_text())))


def nodes(path, *kinds):
    return [node for node in tree(path) if isinstance(node, kinds)]


def imports(path):
    """(module, name) of all that a file imports, also within functions."""
    return [
        (node.module, alias.name)
        for node in nodes(path, ast.ImportFrom)
        for alias in node.names
        if node.module.startswith(PACKAGES)
    ]


@pytest.mark.parametrize(("module", "name"), imports(Path(_torch.__file__)))
def test_what_is_private_is_there(module, name):
    assert hasattr(import_module(module), name), f"PyTorch {torch.__version__} has no {module}.{name} any more"


def fabric():
    from lightning_fabric import Fabric

    return Fabric(accelerator="cpu", devices=1).setup_module(nn.Identity())


def memory_module():
    return resolve_name("spikingjelly.activation_based.base.MemoryModule")()


# objects, where the class has no such attribute
EXAMPLES = {
    "torch.nn.Module": lambda: nn.Module()._replicate_for_data_parallel(),
    "torch.nn.Conv2d": lambda: nn.Conv2d(1, 1, 3, padding="same"),
    "torch.autograd.graph.Node": lambda: torch.ones(1, requires_grad=True).exp().grad_fn,
    "torch.compile": lambda: torch.compile(nn.Identity()),
    "torch.utils.data.DataLoader": lambda: DataLoader([0]),
    "torch._ops.OpOverload": lambda: torch.ops.aten.add.Tensor,
    "lightning_fabric.Fabric": fabric,
    "spikingjelly.activation_based.base.MemoryModule": memory_module,
}


@pytest.mark.parametrize(
    ("owner", "name"), [(owner, name) for owner in _torch.ATTRIBUTES for name in _torch.ATTRIBUTES[owner]]
)
def test_attributes_that_are_private_are_there(owner, name):
    package = owner.partition(".")[0]
    pytest.importorskip(package)
    thing = EXAMPLES.get(owner, lambda: resolve_name(owner))()
    reason = _torch.ATTRIBUTES[owner][name]
    found = version(package.replace("_", "-"))
    assert hasattr(thing, name), f"{package} {found} has no {name} of {owner} any more, which {reason}"


def private(path):
    """The private names of PyTorch and Lightning that a file takes: by an import, or by a path such as torch._C.x."""
    found = [".".join(pair) for pair in imports(path)]
    found += [ast.unparse(node) for node in nodes(path, ast.Attribute) if node.attr.startswith("_")]
    return {name for name in found if name.startswith(PACKAGES) and re.search(r"\._[^_]", name)}


def test_no_other_file_takes_a_private_name():
    assert private(Path(_torch.__file__))
    assert {
        str(path): found for path in ROOT.rglob("*.py") if path.name != "_torch.py" and (found := private(path))
    } == {}


def of_classes(path):
    """The names that a file's classes and their objects have."""
    for kind in nodes(path, ast.ClassDef):
        for node in kind.body:
            yield getattr(node, "name", None)  # of a method
            for target in getattr(node, "targets", [getattr(node, "target", None)]):
                yield getattr(target, "id", None)
        for node in ast.walk(kind):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                yield node.attr if ast.unparse(node.value) in ("self", "cls") else None


def attributes(path):
    """(place, name) of each private attribute that a file uses, also by its name in a string."""
    for node in nodes(path, ast.Attribute, ast.Constant):
        name = node.attr if isinstance(node, ast.Attribute) else str(node.value).removesuffix(".")
        if re.fullmatch(r"_[a-z]\w*", name):
            yield f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}", name


def test_each_private_attribute_is_our_own_or_in_the_table():
    paths = sorted(ROOT.rglob("*.py"))
    listed = set().union(*_torch.ATTRIBUTES.values())
    known = {name for path in paths for name in of_classes(path)} | DOCUMENTED | listed
    used = [pair for path in paths for pair in attributes(path)]
    strange = [place for place, name in used if name not in known and not name.startswith("_sltt_")]
    assert not strange, f"neither ours nor in sltt._torch.ATTRIBUTES: {'; '.join(strange)}"
    names = [name for _, name in used]
    assert {name for name in listed if names.count(name) == 1} == set()  # in the table only
