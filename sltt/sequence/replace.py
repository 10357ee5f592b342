"""Another forward for some modules, for a while."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn


def own_forward(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module's forward is another than that of `kind`: overridden by its class, or replaced."""
    return type(module).forward is not kind.forward or "forward" in vars(module)


@contextmanager
def replaced(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Inside this block, each module runs the forward given for it; hooks run as ever."""
    before = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward  # an attribute of the instance, in front of the method
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                vars(module).pop("forward", None)
            else:
                module.forward = forward
