"""Hooks on modules for a while, and handlers in place of their forwards."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


@contextmanager
def keep_hooks(*handles: RemovableHandle) -> Iterator[None]:
    """Keep hooks that were just registered inside this block; remove them at its end."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Handler(partial):
    """A function in place of a layer's forward, in a run. A copy of the module, made in a run, has its own forward."""

    def __reduce__(self) -> Any:
        return getattr, (self.args[0].module, "forward")


def own_forward(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether a module's forward is not that of `kind`: overridden by its class, or replaced by its user."""
    forward = vars(module).get("forward")
    while isinstance(forward, Handler):
        forward = forward.args[0].before
    forward = type(module).forward if forward is None else getattr(forward, "__func__", forward)
    return forward is not kind.forward
