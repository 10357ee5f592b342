"""The classes that the settings of a run name. A run folder is data: nothing in it is executed.

Code comes from sltt, from the packages that it works with, and from the user: imported already, or in a folder named.
"""

import inspect
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from pydoc import locate
from typing import Any

import torch
import yaml
from jsonargparse import set_parsing_settings
from torch import nn

from sltt.callbacks import Callback
from sltt.data import Data, Encoding, EventAugmentation
from sltt.metrics import Metric
from sltt.rules import Rule
from sltt.schedules import Schedule
from sltt.surrogates import Surrogate
from sltt.training.logs import Logger

PACKAGES = (
    *("sltt", "torch", "torchvision", "torchmetrics", "tonic", "lightning", "lightning_fabric", "pytorch_lightning"),
    *("norse", "sinabs", "snntorch", "spikingjelly"),
)
KINDS = (
    *(nn.Module, Data, Encoding, Rule, torch.optim.Optimizer, Schedule, Metric, Callback, Logger, Surrogate),
    *(EventAugmentation, torch.Generator),
)
OURS = str(Path(__file__).parents[1]), str(Path(os.__file__).parent), "site-packages", "dist-packages"


def check_named(run: Path, settings: Mapping[str, Any], code: Path | None = None) -> None:
    """Raise ValueError where the settings of a run name code that they may not; no other module is imported."""
    if "config" in settings:
        raise ValueError(f"the settings of {run} have the key config, by which the parser would read another file")
    # from now on, in the whole process: the parser refuses what its own list denies, instead of warning
    set_parsing_settings(import_path_denylist=[])
    for key, text in _texts(settings):
        with suppress(yaml.YAMLError):
            loaded = yaml.safe_load(text)
            if isinstance(loaded, Mapping | list) or (isinstance(loaded, str) and loaded != text.strip()):
                raise ValueError(f"the settings of {run} have the text {text!r}, which the parser would read again")
        parts = text.strip().split(".")
        if len(parts) > 1 and all(part.isidentifier() for part in parts):
            is_class = key.endswith("class_path")
            _check_module(run, parts[:-1], code, is_class)
            if callable(named := locate(text.strip())) or is_class:
                _check_kind(run, text, named)


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield each text in nested settings, with its key."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping | list | tuple):
        for name, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _texts(item, str(name))


def _check_module(run: Path, parts: list[str], code: Path | None, is_class: bool) -> None:
    """Raise ValueError for a module that a run may not name. Text that is no class is one if it can be imported."""
    first, name = parts[0], ".".join(parts)
    paths = [Path(code, *parts[: i + 1]) for i in range(len(parts))] if code else []
    there = [p for path in paths for p in (path, path.with_suffix(".py")) if p.exists()]
    names = os.path.abspath, os.path.realpath  # by its name or by where a link leads
    if file := next((p for p in there if any(Path(form(p)).is_relative_to(form(run)) for form in names)), None):
        raise ValueError(f"the settings of {run} name {file}, which lies within the run: a run is data, and no code")
    # a file of the working directory, which Python may have on its path, is none of these packages
    ours = first in PACKAGES and (first in sys.modules or not PathFinder.find_spec(first, [os.getcwd()]))
    allowed = ours or (name in sys.modules and first not in sys.stdlib_module_names)
    if "__main__" not in parts[1:] and (allowed or (code and PathFinder.find_spec(first, [str(code)]))):
        return
    if is_class or find_spec(first):
        raise ValueError(
            f"the settings of {run} name {name}, which is neither of sltt and the packages that it works with, nor "
            f"code of yours: --code FOLDER takes classes from a folder too, in Python import {first} before"
        )


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
    if file is None or any(folder in file for folder in OURS):
        raise ValueError(f"the settings of {run} name {path}, which is no network, data set or other setting")
