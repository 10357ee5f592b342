"""The classes that the settings of a run name. A run folder is data: nothing in it is executed.

Code comes from packages that are installed, and from folders that the user put on the path.
"""

import inspect
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from pydoc import locate
from typing import Any

import torch
import yaml
from jsonargparse import Namespace, set_parsing_settings
from torch import nn

from sltt.callbacks import Callback
from sltt.data import Data, Encoding, EventAugmentation
from sltt.metrics import Metric
from sltt.rules import Rule
from sltt.schedules import Schedule
from sltt.surrogates import Surrogate
from sltt.training.logs import Logger

KINDS = (
    *(nn.Module, Data, Encoding, Rule, torch.optim.Optimizer, Schedule, Metric, Callback, Logger, Surrogate),
    *(EventAugmentation, torch.Generator),
)
OURS = str(Path(__file__).parents[1]), str(Path(os.__file__).parent), "site-packages", "dist-packages"


@contextmanager
def importing_for(run: Path, settings: Mapping[str, Any], code: Path | None = None) -> Iterator[None]:
    """Import no module from the folder of a run inside this block, and from the working directory only as `code`.

    Raises ValueError in place of the error that this leads to.
    """
    _check_imports(run, settings)
    # from now on, in the whole process: the parser refuses what its own list denies, instead of warning
    set_parsing_settings(import_path_denylist=[])
    finder = _Finder(run, code)
    sys.meta_path.insert(0, finder)
    try:
        yield
    except Exception as error:
        if finder.refused:
            raise ValueError(finder.refused) from error
        raise
    finally:
        sys.meta_path.remove(finder)


class _Finder:
    """Finds modules as Python does, and refuses those that a run may not name."""

    def __init__(self, run: Path, code: Path | None):
        self.run, self.code, self.refused = run, code, ""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Find a module; raise ImportError for one that is refused."""
        if name.endswith("__main__"):
            self._refuse(f"{name}, which is a program: importing it would start it")
        others = [one for one in sys.meta_path if one not in (self, PathFinder)]
        found = next((spec for one in others if (spec := one.find_spec(name, path, target))), None)
        found = found or PathFinder.find_spec(name, self._folders() if path is None else path)
        if found is None and path is None and PathFinder.find_spec(name, [os.getcwd()]):
            self._refuse(f"{name} of the working directory: --code . takes code from here, in Python import {name}")
        file = found and found.has_location and found.origin
        if file and any(one(file).startswith(one(self.run) + os.sep) for one in (os.path.abspath, os.path.realpath)):
            self._refuse(f"{file}, which lies within the run: a run is data, and no code of it runs")
        return found

    def _folders(self) -> list[str]:
        # an empty entry of PYTHONPATH is the working directory too, which nobody meant to name
        folders = [one for one in sys.path if os.path.realpath(one) != os.path.realpath("")]
        return folders if self.code is None else [str(self.code.resolve()), *folders]

    def _refuse(self, what: str) -> None:
        self.refused = f"the settings of {self.run} name {what}"
        raise ImportError(self.refused)


def _check_imports(run: Path, value: Any) -> None:
    """Raise ValueError where settings of a run name a module of the standard library that is not imported yet.

    No setting is one, and some do something when they are imported: antigravity opens a browser.
    """
    if isinstance(value, Mapping):
        for one in value.values():
            _check_imports(run, one)
    elif isinstance(value, list | tuple):
        for one in value:
            _check_imports(run, one)
    elif isinstance(value, str) and re.fullmatch(r"\w+(\.\w+)+", value):
        module = value.rpartition(".")[0]
        if module.partition(".")[0] in sys.stdlib_module_names and module not in sys.modules:
            raise ValueError(f"the settings of {run} name {value}, of Python's standard library, which is no setting")


def check_named(run: Path, value: Any) -> None:
    """Raise ValueError where parsed settings of a run name code that is no setting, such as os.system."""
    if isinstance(value, Namespace | Mapping):
        items: Mapping[str, Any] = vars(value) if isinstance(value, Namespace) else value
        if isinstance(path := items.get("class_path"), str):
            _check_kind(run, path, locate(path))
        for one in items.values():
            check_named(run, one)
    elif isinstance(value, list | tuple):
        for one in value:
            check_named(run, one)
    elif isinstance(value, str):
        with suppress(yaml.YAMLError):
            loaded = yaml.safe_load(value)
            if isinstance(loaded, Mapping | list) or (isinstance(loaded, str) and loaded != value.strip()):
                raise ValueError(f"the settings of {run} have the text {value!r}, which the parser would read again")
    elif callable(value):
        _check_kind(run, repr(value), value)


def _check_kind(run: Path, path: str, value: Any) -> None:
    """Raise ValueError for what is neither a class of `KINDS`, nor a function of ours that returns one, nor the user's.

    A function of another package may run text that it is given: torch.fx.graph_module.reduce_graph_module does.
    """
    kind, module = value, getattr(value, "__module__", None) or ""
    if not isinstance(value, type) and module.startswith("sltt.") and module != "sltt.training.trained":
        with suppress(ValueError, TypeError, NameError):
            kind = inspect.signature(value, eval_str=True).return_annotation
    if isinstance(kind, type) and issubclass(kind, KINDS):
        return
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None or any(one in file for one in OURS):
        raise ValueError(
            f"the settings of {run} name {path}, which is no network, data set, loss, rule, optimizer, schedule, "
            "metric, callback or logger: a run names no other code of an installed package"
        )
