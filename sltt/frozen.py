"""Values: objects whose attributes are set once, when they are made, so that many can share one."""

import inspect
from typing import Any


class Frozen:
    """A value: attributes are set once, and values of one class with the same attributes are equal."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in vars(self):
            kind = type(self).__name__
            raise AttributeError(f"a {kind} is a value and never changes: make another one, {kind}({name}={value!r})")
        super().__setattr__(name, value)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((type(self), *sorted(vars(self).items())))


def arguments_of(kind: type) -> dict[str, inspect.Parameter]:
    """Return the arguments of a class, with those that it passes on to its base class."""
    parameters: dict[str, inspect.Parameter] = {}
    for base in kind.__mro__:
        if "__init__" not in vars(base) or base is object:
            continue
        own = list(inspect.signature(base.__init__).parameters.values())[1:]
        parameters = {parameter.name: parameter for parameter in own} | parameters
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in own):
            break
    return {name: parameter for name, parameter in parameters.items() if parameter.kind is not parameter.VAR_KEYWORD}
