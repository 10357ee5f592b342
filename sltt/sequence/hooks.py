"""Hooks for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch.utils.hooks import RemovableHandle


@contextmanager
def hooked(*handles: RemovableHandle) -> Iterator[None]:
    """Inside this block, hooks run that were just registered; at its end they are removed."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
