"""What modules have for a while: hooks, and other attributes, such as a forward."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


@contextmanager
def hooked(*handles: RemovableHandle) -> Iterator[None]:
    """Inside this block, hooks run that were just registered; at its end they are removed."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def own_forward(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module's forward is another than that of `kind`: overridden by its class, or replaced."""
    return type(module).forward is not kind.forward or "forward" in vars(module)


@contextmanager
def replaced(name: str, values: Mapping[nn.Module, Any]) -> Iterator[None]:
    """Inside this block, each module has the attribute `name` that is given for it; after it, its own of before.

    With another `forward`, hooks run as ever.
    """
    before = {module: vars(module).get(name) for module in values}
    try:
        for module, value in values.items():
            setattr(module, name, value)  # an attribute of the instance, in front of a method
        yield
    finally:
        for module, value in before.items():
            if value is None:
                vars(module).pop(name, None)
            else:
                setattr(module, name, value)
