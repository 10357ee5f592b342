"""The scripts in benchmarks/, as modules."""

import importlib
from pathlib import Path

import pytest

import sltt

BENCHMARKS = Path(sltt.__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks_on_the_path(monkeypatch):
    """As Python has it for a script there."""
    monkeypatch.syspath_prepend(BENCHMARKS)


def load(name):
    return importlib.import_module(name)
