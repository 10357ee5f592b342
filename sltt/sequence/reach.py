"""Find what a function or an object reaches: its closure, its global variables, what it holds; and a graph's nodes."""

import dis
import functools
from collections.abc import Iterable, Iterator
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn


def refers_to(value: Any, modules: dict[nn.Module, Any]) -> bool:
    """Return whether a function or an object holds, or reaches through what it holds, one of the modules."""
    waiting, seen = [value], dict[int, Any]()
    while waiting and len(seen) < _REACHED:
        item = waiting.pop()
        if isinstance(item, nn.Module) and item in modules:
            return True
        if id(item) not in seen and not isinstance(item, ModuleType | type | Tensor):
            seen[id(item)] = item
            waiting += _held_by(item)
    return bool(waiting)


_REACHED = 10_000  # objects behind a loss that are looked at


def _held_by(value: Any) -> Iterator[Any]:
    """Yield what a value holds: a function its closure, defaults and globals, a container its items."""
    if isinstance(value, FunctionType):
        yield from (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
        yield from variables_of(value)
    elif isinstance(value, MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list | tuple | set | frozenset):
        yield from value
    elif isinstance(value, nn.Module):
        yield from value.children()
        yield from (v for name, v in vars(value).items() if name[:1] != "_")
    elif type(value).__module__.partition(".")[0] not in ("torch", "numpy", "builtins"):
        yield from getattr(value, "__dict__", {}).values()


def variables_of(function: FunctionType) -> list[Any]:
    """Return what a function reads from outside: the values in its closure, and of its global variables."""
    cells = [cell.cell_contents for cell in function.__closure__ or () if cell != _EMPTY]
    names, variables = _global_names(function.__code__), function.__globals__
    return cells + [variables[name] for name in names if name in variables]


_EMPTY = CellType()


@functools.lru_cache(maxsize=1024)
def _global_names(code: CodeType) -> tuple[str, ...]:
    """Return the names of global variables that a function reads, those within it too."""
    names = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return tuple(sorted(names.union(*(_global_names(c) for c in code.co_consts if isinstance(c, CodeType)))))


def graph_nodes(roots: Iterable[Any], stop: Iterable[Any] = ()) -> set[Any]:
    """Return the nodes of the graph behind `roots`, with these, and not further than `stop`."""
    seen: set[Any] = set()
    stop, todo = set(stop), [root for root in roots if root is not None]
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo += [behind for behind, _ in node.next_functions if behind is not None and node not in stop]
    return seen


def operations(nodes: set[Any]) -> set[Any]:
    """Return the nodes but those of leaves, which add up gradients."""
    return {node for node in nodes if node.name() != "torch::autograd::AccumulateGrad"}
