"""Find what a function or an object reaches: its closure, its global variables, what it holds; and a graph's nodes."""

import dis
import functools
from collections.abc import Iterable
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


def _held_by(value: Any) -> Iterable[Any]:
    """Return what a value holds: a function its closure, defaults and globals, a container its items."""
    if isinstance(value, FunctionType):
        defaults = *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()
        return (*defaults, *variables_of(value))
    if isinstance(value, MethodType):
        return value.__self__, value.__func__
    if isinstance(value, functools.partial):
        return (value.func, *value.args, *value.keywords.values())
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, list | tuple | set | frozenset):
        return value
    if isinstance(value, nn.Module):
        return [*value.children(), *(v for name, v in vars(value).items() if name[:1] != "_")]
    own = type(value).__module__.partition(".")[0] not in ("torch", "numpy", "builtins")
    return getattr(value, "__dict__", {}).values() if own else ()


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
