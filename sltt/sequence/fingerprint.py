"""Compare what a network's forward depends on, as far as it shows, with what it was: before each batch.

Of each module: its class, that one's forward, the modules, parameters and hooks in it, its attributes, also in lists,
dictionaries and plain objects; and the buffers of a module whose forward is not known. Of each class of the user: what
is in it, and the code of its functions. Out of reach are global variables, what lies in closures and in other
libraries' objects, and the values of parameters.
"""

from collections import OrderedDict, deque
from collections.abc import Iterable
from functools import partial
from operator import attrgetter, is_not
from typing import Any

import torch
from torch import Tensor, nn

from sltt.sequence.hooks import Handler, count_hooks
from sltt.sequence.state import LIBRARIES, registrations

_INTERNAL = {*vars(nn.Module()), "_sltt_layouts", "watched"} - {"training", "_non_persistent_buffers_set"}
_ATOMS = {int, float, bool, str, bytes, complex, type(None), torch.dtype, torch.device, torch.Size}
_LISTS = {list, tuple, set, frozenset, deque}
_OPAQUE = {"builtins", "functools", "torch", "numpy", "sltt"}  # whose objects are values, functions or modules
_KNOWN = _OPAQUE | LIBRARIES  # whose classes stay as they are
_DEPTH = 4  # of lists, dictionaries and objects in each other
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
            package = type(layer.module).__module__.partition(".")[0]
            own = layer.role.kind == "other" and package not in ("torch", "sltt")
            self._layers.append((layer, _INTERNAL.union(layer.states), package in LIBRARIES, own))
            kinds = type(layer.module).__mro__
            self._classes |= {k: None for k in kinds if k.__module__.partition(".")[0] not in _KNOWN}
        self._registrations = registrations()
        self._rows, self._held = self._read()

    def _read(self) -> tuple[list[Row], list[Any]]:
        """Return a row for each layer, and the objects whose ids are in it: as long as they live, ids are theirs."""
        held: list[Any] = []
        rows: list[Row] = []
        for layer, internal, theirs, own in self._layers:
            values = vars(layer.module)
            parameters, children, attributes = values["_parameters"].values(), values["_modules"].values(), []
            held += (*parameters, *children)
            for name, value in values.items():
                # what neurons of a library note of a step, such as sinabs' firing rate, is no part of what they do
                if name in internal or (theirs and type(value) not in _ATOMS):
                    continue
                if (kind := type(value)) in _LISTS and len(value) < _LENGTH and _ATOMS.issuperset(map(type, value)):
                    value = kind, *value
                elif kind not in _ATOMS:
                    while isinstance(value, Handler):  # of a run around this one
                        value = value.args[0].before
                    if name == "forward" and value is None:
                        continue
                    value = _freeze(value, held, self._device)
                attributes.append((name, value))
            if own:
                attributes += [(k, _freeze(buffer, held, self._device)) for k, buffer in values["_buffers"].items()]
            ids, hooks = (*map(id, parameters), None, *map(id, children)), count_hooks(layer.module)
            learns = (*map(_LEARNS, filter(_is_there, parameters)),)
            kind, buffers = type(layer.module), tuple(values["_buffers"].keys())
            rows.append((kind, getattr(kind, "forward", None), ids, learns, buffers, hooks, attributes))
        for kind in self._classes:
            parts = ((name, getattr(value, "__code__", value)) for name, value in vars(kind).items())
            rows.append(tuple((name, _freeze(value, held, self._device)) for name, value in parts))
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
