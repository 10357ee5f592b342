"""Compare what a network's forward depends on, as far as it shows, with what it was: before each batch.

Of each module: its class, the modules, parameters and hooks in it, its attributes, also in lists, dictionaries and
plain objects; and the buffers of a module whose forward is not known. Out of reach are global variables, what lies in
closures and in other libraries' objects, and the values of parameters.
"""

from collections import OrderedDict, deque
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sltt.sequence.hooks import Handler, count_hooks
from sltt.sequence.state import LIBRARIES, registrations

_INTERNAL = {*vars(nn.Module()), "_sltt_layouts", "watched"} - {"training", "_non_persistent_buffers_set"}
_ATOMS = {int, float, bool, str, bytes, complex, type(None), torch.dtype, torch.device, torch.Size}
_LISTS = {list, tuple, set, frozenset, deque}
_OPAQUE = {"builtins", "functools", "torch", "numpy", "sltt"}  # whose objects are values, functions or modules
_DEPTH = 4  # of lists, dictionaries and objects in each other
_LENGTH = 1024  # of a longer one, only its length counts

Row = tuple[Any, ...]


class Fingerprint:
    """Record of what the forwards of layers depend on; of tensors on `device`, where their values are."""

    def __init__(self, layers: Iterable[Any], device: torch.device | None = None):
        self._device = device and device.type
        self._layers = [(layer, _INTERNAL.union(layer.states)) for layer in layers]
        self._registrations = registrations()
        self._rows, self._held = self._read()

    def _read(self) -> tuple[list[Row], list[Any]]:
        """Return a row for each layer, and the objects whose ids are in it: as long as they live, ids are theirs."""
        held: list[Any] = []
        return [_row(layer, internal, held, self._device) for layer, internal in self._layers], held

    def changes(self) -> dict[str, Any]:
        """Return what has changed, such as "the attribute mix of blocks.0", and numbers as they are now."""
        if self._registrations != registrations():
            return {"what sltt.register says": None}
        rows, _ = self._read()
        if rows == self._rows:
            return {}
        found: dict[str, Any] = {}
        for (layer, _), row, before in zip(self._layers, rows, self._rows, strict=True):
            if row[:-1] != before[:-1]:
                found[f"the modules, parameters or hooks of {layer}"] = row[:-1]
            now, then = dict(row[-1]), dict(before[-1])
            found |= {f"{name} of {layer}": now.get(name) for name in now | then if now.get(name) != then.get(name)}
        return found


def _row(layer: Any, internal: set[str], held: list[Any], device: str | None) -> Row:
    module = layer.module
    values = vars(module)
    parameters, children = tuple(values["_parameters"].values()), tuple(values["_modules"].values())
    held += parameters
    held += children
    package = type(module).__module__.partition(".")[0]
    attributes = []
    for name, value in values.items():
        # what neurons of a library keep or note of a step, such as sinabs' firing rate, is no part of what they do
        if name in internal or (package in LIBRARIES and type(value) not in _ATOMS):
            continue
        if type(value) not in _ATOMS:
            while isinstance(value, Handler):  # of a run around this one
                value = value.args[0].before
            if name == "forward" and value is None:
                continue
            value = _freeze(value, held, device)
        attributes.append((name, value))
    if layer.role.kind == "other" and package not in ("torch", "sltt"):
        attributes += [(name, _freeze(buffer, held, device)) for name, buffer in values["_buffers"].items()]
    learns = tuple([p is not None and p.requires_grad for p in parameters])
    ids = tuple(map(id, parameters)), tuple(map(id, children))
    return type(module), ids, learns, tuple(values["_buffers"].keys()), count_hooks(module), attributes


def _freeze(value: Any, held: list[Any], device: str | None, depth: int = 0) -> Any:
    """Return what an attribute holds in a form that can be compared."""
    kind = type(value)
    if kind in _ATOMS:
        return value
    if isinstance(value, Tensor):
        held.append(value)
        if value.device.type == device:
            held.append(value.detach())  # its memory: another tensor may be put into it by `.data`
            return id(value), value.data_ptr()
        return id(value), 0 if value.is_inference() else value._version
    if depth < _DEPTH:
        inner = partial(_freeze, held=held, device=device, depth=depth + 1)
        if kind in _LISTS:
            return kind, len(value), *(map(inner, value) if len(value) < _LENGTH else [])
        if kind in (dict, OrderedDict):
            items = value.items() if len(value) < _LENGTH else ()
            return kind, len(value), *[(inner(k), inner(v)) for k, v in items]
        if kind.__module__ == "numpy" and value.size < _LENGTH:
            return kind, value.tobytes()
        plain = hasattr(value, "__dict__") and not isinstance(value, nn.Module | type)
        if plain and kind.__module__.partition(".")[0] not in _OPAQUE:
            held.append(value)
            return id(value), *[(k, inner(v)) for k, v in vars(value).items()]
    held.append(value)
    return id(value)
