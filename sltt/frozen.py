"""Values: objects whose attributes are set once, when they are made, so that many can share one."""

from typing import Any


class Frozen:
    """A value: an attribute that is set cannot be set again."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in vars(self):
            kind = type(self).__name__
            raise AttributeError(f"a {kind} is a value and never changes: make another one, {kind}({name}={value!r})")
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a {type(self).__name__} is a value and never changes: {name} cannot be deleted")
