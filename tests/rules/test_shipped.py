"""What every rule of `sltt.rules.SHIPPED` needs besides its file."""

import inspect
import pkgutil
from pathlib import Path

import pytest

import sltt
from sltt.commands.fit_parser import MATTER_FIRST
from sltt.rules import SHIPPED
from tests.conftest import RULES

DOCS = Path(sltt.__file__).parents[1] / "docs"


def test_every_rule_of_the_folder_is_entered():
    modules = [pkgutil.resolve_name(f"sltt.rules.{found.name}") for found in pkgutil.iter_modules(sltt.rules.__path__)]
    classes = {one for module in modules for one in vars(module).values() if inspect.isclass(one)}
    rules = {one for one in classes if issubclass(one, sltt.Rule) and not inspect.isabstract(one)}
    bases = {base for one in rules for base in one.__mro__[1:]}
    assert rules - bases == {*SHIPPED}


@pytest.mark.parametrize("rule", SHIPPED)
def test_a_rule_is_public_tested_and_explained(rule):
    name = rule.__name__
    assert getattr(sltt, name) is rule, "enter it in sltt/__init__.py"
    assert any(type(one) is rule for one in RULES.values()), "give an instance in RULES of tests/conftest.py"
    assert f"\n## {name}\n" in (DOCS / "rules.md").read_text(), "give it a section"
    assert f"`sltt.{name}`" in (DOCS / "api.md").read_text(), "give it a line"
    assert name in MATTER_FIRST
