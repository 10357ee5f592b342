"""What a run that was made in Python keeps of its arguments, so that the commands can make them again.

Values become the lines of a recipe: plain ones as they are, objects as a `class_path` with `init_args`. The network and
the loss are kept in a file, as they are.
"""

import importlib
import inspect
import io
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from os import PathLike, fspath
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from sltt.checks import plain
from sltt.frozen import arguments_of

NETWORK = "network.pt"
UNREADABLE = "sltt eval, export and --resume cannot read this run"
LOST = {
    "callbacks": "this run resumes in Python only, by sltt.fit(…, resume=True)",
    "loggers": "sltt train --resume continues without these loggers",
}


class UndescribedError(ValueError):
    """A value that cannot be made again from a file, with the reason."""


def describe_run(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], bytes | None, list[str]]:
    """The configuration of a run, the content of its file of the network, and why parts of these are missing.

    Args:
        arguments: of `sltt.fit`. What cannot be described is None in the configuration.
    """
    config: dict[str, Any] = {}
    problems: list[str] = []
    for name, value in arguments.items():
        try:
            config[name] = _kept(name, value) if name in ("model", "loss") else describe(value)
        except UndescribedError as error:
            config[name] = None
            problems.append(f"{LOST.get(name, UNREADABLE)}: {name}: {error}")
    try:
        network = pack(arguments["model"], arguments["loss"])
    except UndescribedError as error:
        network = None
        if config["model"] is not None:
            config["model"] = None
            problems.append(f"{UNREADABLE}: {error}")
    return config, network, problems


def describe(value: Any) -> Any:
    """A value as a recipe has it; raises UndescribedError where it cannot be made again from that."""
    if value is None or isinstance(value, bool | int | float | str | np.generic):
        return plain(value)
    if isinstance(value, PathLike):
        return fspath(value)
    if isinstance(value, Mapping):
        return {key: describe(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [describe(one) for one in value]
    if isinstance(value, partial) and not value.args:
        return {"class_path": _path(value.func), "init_args": describe(value.keywords)}
    if isinstance(value, type) or inspect.isroutine(value):
        return {"class_path": _path(value)}
    if is_dataclass(value):
        return _without_defaults({one.name: (describe(getattr(value, one.name)), one.default) for one in fields(value)})
    arguments = {
        name: (describe(_kept_argument(value, one)), one.default) for name, one in arguments_of(type(value)).items()
    }
    return {"class_path": _path(type(value)), "init_args": _without_defaults(arguments)}


def _without_defaults(given: Mapping[str, tuple[Any, Any]]) -> dict[str, Any]:
    """The values of (value, default), without those that are None by default."""
    return {name: value for name, (value, default) in given.items() if value is not None or default is not None}


def _kept_argument(value: Any, parameter: inspect.Parameter) -> Any:
    kind = type(value).__name__
    if parameter.kind is parameter.VAR_POSITIONAL:
        raise UndescribedError(
            f"{kind} takes *{parameter.name}: derive a class whose arguments have names, and keep each in self"
        )
    name = parameter.name if hasattr(value, parameter.name) else f"_{parameter.name}"  # as Lightning's loggers have it
    if not hasattr(value, name):
        raise UndescribedError(
            f"{kind} does not keep its argument {parameter.name}: set self.{parameter.name} in __init__"
        )
    return getattr(value, name)


def _path(value: Any) -> str:
    """The shortest import path of a class or a function; raises UndescribedError where other programs have none."""
    name, module = value.__qualname__, value.__module__
    if module == "__main__" or "<" in name:
        where = "in a script or notebook" if "<" not in name else "within a function"
        raise UndescribedError(f"{name.rpartition('.')[2]} is defined {where}: move it to the top of a module")
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        owner = ".".join(parts[:end])
        try:
            if getattr(importlib.import_module(owner), name, None) is value:
                return f"{owner}.{name}"
        except ImportError:
            break
    raise UndescribedError(f"{name} is not in the module {module}, where it says it is: define it there")


def _kept(name: str, value: Any) -> dict[str, Any]:
    """What makes the network or the loss again: the file that has both."""
    if isinstance(value, fx.GraphModule):
        raise UndescribedError(
            "torch.fx made this network: for a twin, train a recipe with --model sltt.interop.spiking"
        )
    _path(type(value))
    function = {"model": "network", "loss": "loss"}[name]
    return {"class_path": f"sltt.training.saved.{function}", "init_args": {"file": NETWORK}}


def pack(model: nn.Module, loss: Any) -> bytes:
    """The network and the loss as a file; raises UndescribedError where `unpack` would not read it."""
    file = io.BytesIO()
    if not isinstance(loss, nn.Module):
        raise UndescribedError(f"the loss is a {type(loss).__name__}: make it a class of torch.nn.Module")
    try:
        torch.save({"model": model, "loss": loss}, file)
    except Exception as error:  # pickle raises almost anything
        raise UndescribedError(f"the network cannot be saved: {error}") from error
    _allowed(file)
    return file.getvalue()


def unpack(content: bytes) -> dict[str, Any]:
    """The network and the loss in a file: nothing but classes of modules and of this library is made from it."""
    file = io.BytesIO(content)
    with torch.serialization.safe_globals(_allowed(file)):
        return torch.load(file, map_location="cpu", weights_only=True)


def _allowed(file: io.BytesIO) -> list[Any]:
    """The classes that a file needs; raises UndescribedError for others than those of modules and of this library."""
    found = []
    file.seek(0)
    for path in torch.serialization.get_unsafe_globals_in_checkpoint(file):
        module, _, name = path.rpartition(".")
        try:
            value = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            where = "a script or notebook" if module == "__main__" else module
            raise UndescribedError(f"the network needs {name} of {where}, which is not there") from None
        known = path.startswith(("sltt.", "torch.nn."))
        if not known and not (isinstance(value, type) and issubclass(value, nn.Module)):
            raise UndescribedError(f"the network holds {path}, which is no torch.nn.Module")
        found.append(value)
    file.seek(0)
    return found
