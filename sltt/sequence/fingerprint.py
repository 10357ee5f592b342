"""Compare what a network's forward depends on, as far as it shows, with what it was: before each batch.

Of each module: its class, that one's forward, the modules, parameters and hooks in it, its attributes, also in
containers and objects; and the buffers of a module whose forward is not known. Of each class of the user: what is in
it, and the code of its functions. Out of reach are global variables, what lies in closures and in long containers,
and the values of parameters.
"""

import sys
from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial
from operator import attrgetter, is_not
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sltt.sequence.hooks import Handler, count_hooks
from sltt.sequence.state import LIBRARIES, registrations

_INTERNAL = {*vars(nn.Module()), "_sltt_layouts"} - {"training", "_non_persistent_buffers_set"}
_ATOMS = {int, float, bool, str, bytes, complex, type(None), torch.dtype, torch.device, torch.Size}
_LISTS = list, tuple, set, frozenset, deque
_FUNCTIONS = {FunctionType, BuiltinFunctionType, ModuleType, CodeType, property, staticmethod, classmethod, range}
_KNOWN = {"builtins", "functools", "torch", "numpy", "sltt"} | LIBRARIES  # whose classes stay as they are
_STAY = _KNOWN | sys.stdlib_module_names  # also where an attribute has one of their objects
_LENGTH = 1024  # of a longer one, only its length counts
_LEARNS, _is_there = attrgetter("requires_grad"), partial(is_not, None)

Row = tuple[Any, ...]


class Fingerprint:
    """Record of what the forwards of layers depend on; of tensors on `device`, where their values are."""

    def __init__(self, layers: Iterable[Any], device: torch.device | None = None):
        self._device = device and device.type
        self._layers: list[tuple[Any, set[str], bool, bool]] = []
        self._classes: dict[type, None] = {}  # of the user, in the order in which they were seen
        for layer in layers:
            package = _package(kind := type(layer.module))
            own = layer.role.kind == "other" and package not in ("torch", "sltt")
            internal = {*_INTERNAL, *layer.states, *["watched"] * hasattr(kind, "watched")}
            self._layers.append((layer, internal, package in LIBRARIES, own))
            self._classes |= {k: None for k in kind.__mro__ if _package(k) not in _KNOWN}
        self._registrations = registrations()
        self._rows, self._held = self._read()

    def _read(self) -> tuple[list[Row], list[Any]]:
        """Return a row for each layer, and the objects whose ids are in it: as long as they live, ids are theirs."""
        held: list[Any] = []
        rows: list[Row] = []
        freeze = partial(_freeze, held=held, seen={id(layer.module) for layer, *_ in self._layers}, device=self._device)
        for layer, internal, theirs, own in self._layers:
            values = vars(layer.module)
            parameters, children, attributes = values["_parameters"].values(), values["_modules"].values(), []
            held += (*parameters, *children)
            for name, value in values.items():
                # what neurons of a library note of a step, such as sinabs' firing rate, is no part of what they do
                if name in internal or (theirs and type(value) not in _ATOMS):
                    continue
                if type(value) in _LISTS and len(value) < _LENGTH and _ATOMS.issuperset(map(type, value)):
                    value = type(value), *value
                elif type(value) not in _ATOMS:
                    while isinstance(value, Handler):  # of a run around this one
                        value = value.args[0].before
                    if name == "forward" and value is None:
                        continue
                    value = freeze(value)
                attributes.append((name, value))
            if own:
                attributes += [(k, freeze(buffer)) for k, buffer in values["_buffers"].items()]
            ids, hooks = (*map(id, parameters), None, *map(id, children)), count_hooks(layer.module)
            learns = (*map(_LEARNS, filter(_is_there, parameters)),)
            kind, buffers = type(layer.module), tuple(values["_buffers"].keys())
            rows.append((kind, getattr(kind, "forward", None), ids, learns, buffers, hooks, attributes))
        for kind in self._classes:
            rows.append(tuple((name, freeze(value)) for name, value in _contents(kind)))
        return rows, held

    def changes(self) -> dict[str, Any]:
        """Return what has changed, such as "the attribute mix of blocks.0", and numbers as they are now."""
        if self._registrations != registrations():
            return {"what sltt.register says": None}
        rows, _ = self._read()
        if rows == self._rows:
            return {}
        n = len(self._layers)
        classes = zip(self._classes, rows[n:], self._rows[n:], strict=True)
        changes: dict[str, Any] = {f"the class {kind.__name__}": row for kind, row, before in classes if row != before}
        for (layer, *_), row, before in zip(self._layers, rows, self._rows, strict=False):
            if row[:-1] != before[:-1]:
                changes[f"the modules, parameters or hooks of {layer}"] = row[:-1]
            now, then = dict(row[-1]), dict(before[-1])
            changes |= {f"{name} of {layer}": now.get(name) for name in now | then if now.get(name) != then.get(name)}
        return changes


def _freeze(value: Any, held: list[Any], seen: set[int], device: str | None) -> Any:
    """Return what an attribute holds in a form that can be compared; what cannot be read equals nothing."""
    kind = type(value)
    if kind in _ATOMS:
        return value
    held.append(value)
    if isinstance(value, Tensor):
        if value.device.type == device:
            held.append(value.detach())  # its memory: another tensor may be put into it by `.data`
            return id(value), value.data_ptr()
        return id(value), 0 if value.is_inference() else value._version
    if id(value) in seen:
        return id(value)
    seen.add(id(value))
    inner = partial(_freeze, held=held, seen=seen, device=device)
    if isinstance(value, _LISTS):
        return kind, len(value), *(map(inner, value) if len(value) < _LENGTH else []), *map(inner, _attributes(value))
    if isinstance(value, dict):
        items = value.items() if len(value) < _LENGTH else ()
        return kind, len(value), *[(inner(k), inner(v)) for k, v in items], *map(inner, _attributes(value))
    if kind is np.ndarray and value.size < _LENGTH and not value.dtype.hasobject:
        return kind, value.tobytes()
    if isinstance(value, MethodType):
        return id(value.__func__), inner(value.__self__)
    if isinstance(value, type):
        own = (k for k in value.__mro__ if _package(k) not in _STAY)
        return id(value), *[(name, inner(part)) for one in own for name, part in _contents(one)]
    if not isinstance(value, nn.Module) and (kind in _FUNCTIONS or _package(kind) in ("torch", "sltt")):
        return id(value)
    try:
        return id(value), inner(kind), *map(inner, _attributes(value))
    except Exception:  # of any kind: it is the user's code
        return object() if isinstance(value, Iterator) else id(value)


def _attributes(value: Any) -> Iterable[Any]:
    """Return the attributes of an object; those of a class with its own way to be pickled, or without any, as it is."""
    kind = type(value)
    if hasattr(value, "__dict__") and kind.__reduce__ is object.__reduce__:
        return vars(value).items()
    return () if isinstance(value, (dict, *_LISTS)) else value.__reduce_ex__(2)[1:]


def _contents(kind: type) -> Iterable[tuple[str, Any]]:
    """Return what is in a class, without what a copy of its objects puts there."""
    parts = vars(kind).items()
    return [(name, getattr(part, "__code__", part)) for name, part in parts if name != "__slotnames__"]


def _package(kind: type) -> str:
    return kind.__module__.partition(".")[0]
