"""Descriptions of the objects that a training is given, by which a resumed one finds that one is another."""

import hashlib
import inspect
from collections.abc import Mapping, Set
from enum import Enum
from functools import partial
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sltt.frozen import arguments_of

PLACES = ("root", "cache", "download")  # arguments of data, which may move
MOST = 1000  # items of a list that are told; of a longer one, as the files of a data set, its length and its ends


def describe(value: Any, untold: list[str], place: str, within: tuple[int, ...] = ()) -> Any:
    """Return numbers, text, lists and dictionaries that tell a value from others; a tensor is the digest of its bytes.

    An object is its class and its arguments, or all its attributes where an argument is none of them. A path is its
    last name. Of what cannot be told from others, as a lambda, `place` is added to `untold`.
    """
    value = value.item() if isinstance(value, np.generic) else value
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str | PurePath):
        return str(value).rpartition("/")[2]
    if isinstance(value, float | complex | bytes | range | slice | Enum | torch.dtype | torch.device):
        return value if isinstance(value, float) and value == value else repr(value)  # NaN differs from itself
    if isinstance(value, Tensor):
        memory: Any = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        return f"{value.dtype} {[*value.shape]} {hashlib.sha256(memory).hexdigest()[:16]}"
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return f"NumPy's {value.dtype} {[*value.shape]} {hashlib.sha256(value.tobytes()).hexdigest()[:16]}"
    if id(value) in within:
        return "itself"
    within = *within, id(value)
    if isinstance(value, list | tuple | Set):
        items = [*value] if len(value) <= MOST else [len(value), *[*value][:: len(value) - 1]]
        told = [describe(item, untold, f"{place}.{i}", within) for i, item in enumerate(items)]
        told = sorted(told, key=repr) if isinstance(value, Set) else told
        return told if len(told) < 20 else f"{len(told)} items {hashlib.sha256(repr(told).encode()).hexdigest()[:16]}"
    parts = {str(key): part for key, part in value.items()} if isinstance(value, Mapping) else _parts(value)
    if parts.get("class") is None and not isinstance(value, Mapping):
        untold.append(place)
    return {
        name: describe(part, untold, f"{place}.{name}", within)
        for name, part in parts.items()
        if name not in PLACES or not place.startswith("data")
    }


def _parts(value: Any) -> dict[str, Any]:
    """Return the class of an object, None where it does not tell enough, and what tells it from others of the class."""
    if isinstance(value, partial):
        return {"class": value.func, "arguments": value.args, **value.keywords}
    kind = value if isinstance(value, type) or inspect.isroutine(value) else type(value)
    package = str(kind.__module__).partition(".")[0]  # a script of the user's may be __main__ or a module
    name = f"{package}.{kind.__qualname__}" if package in ("sltt", "torch") else kind.__qualname__
    if inspect.ismethod(value):
        return {"class": name, "of": value.__self__}
    if kind is value:
        return {"class": name if isinstance(value, type) or "<" not in name else None}
    try:
        taken = [*arguments_of(type(value))]
    except (TypeError, ValueError):  # of a class that is not written in Python
        taken = [""]
    if all(hasattr(value, attribute) and not inspect.isroutine(getattr(kind, attribute, None)) for attribute in taken):
        return {"class": name if taken or hasattr(value, "__dict__") else None, **{k: getattr(value, k) for k in taken}}
    held = {k: v for k, v in getattr(value, "__dict__", {}).items() if k != "_loaded"}
    if isinstance(value, nn.Module):
        tensors = *value.named_parameters(recurse=False), *value.named_buffers(recurse=False)
        held = {k: v for k, v in held.items() if k not in vars(nn.Module())}
        held |= dict(tensors) | dict(value.named_children())
    return {"class": name if held else None, **held}
