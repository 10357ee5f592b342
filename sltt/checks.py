"""Checks of arguments: each returns the value, or raises ValueError that says what was expected and what was given."""

import math
import numbers
import operator
import sys
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")


def number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
    remedy: str = "",
) -> float:
    """Return a finite real number in a range, as a float; `remedy` ends the message.

    self.gamma = number("gamma", gamma, above=0)
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(_message(name, "a number", value, remedy))
    if not math.isfinite(value):
        raise ValueError(_message(name, "a finite number", value, remedy))
    _check_range(name, value, remedy, above=above, least=least, below=below, most=most)
    return float(value)


def whole_number(name: str, value: Any, *, least: int | None = None, most: int | None = None, remedy: str = "") -> int:
    """Return a whole number in a range, as an int; 2.0 is none, and neither is True."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(_message(name, "a whole number", value, remedy))
    _check_range(name, value, remedy, least=least, most=most)
    _check_range(name, value, remedy, most=sys.maxsize)  # no size in PyTorch is larger
    return operator.index(value)


def whole_numbers(name: str, values: Any, *, least: int | None = None, fewest: int = 1) -> tuple[int, ...]:
    """Return a sequence of at least `fewest` whole numbers."""
    values = sequence(name, values, "whole numbers", fewest=fewest)
    return tuple(whole_number(f"{name}[{i}]", value, least=least) for i, value in enumerate(values))


def sequence(name: str, values: Any, of: str, *, fewest: int = 0) -> Sequence[Any]:
    """Return a list, a tuple or another sequence, but no string."""
    if isinstance(values, str) or not isinstance(values, Sequence) or len(values) < fewest:
        raise ValueError(_message(name, f"a sequence of {f'{fewest} or more ' if fewest else ''}{of}", values))
    return values


def to_python(value: Any) -> Any:
    """Python's number in place of NumPy's, which no file of a run can hold, also in dictionaries and lists."""
    if isinstance(value, np.generic):
        return value.item()
    if type(value) is dict:  # not a state_dict, which has attributes
        return {key: to_python(item) for key, item in value.items()}
    return type(value)(map(to_python, value)) if type(value) in (list, tuple) else value


def flag(name: str, value: Any, remedy: str = "") -> bool:
    """True or False, and nothing that Python takes for it."""
    if not isinstance(value, bool):
        raise ValueError(_message(name, "True or False", value, remedy))
    return value


def choice(name: str, value: T, options: Iterable[T]) -> T:
    """Return one of the options, of the same type."""
    options = list(options)
    if not any(type(value) is type(option) and value == option for option in options):
        raise ValueError(_message(name, f"one of {', '.join(map(repr, options))}", value))
    return value


def instance(name: str, value: Any, kind: type[T], remedy: str = "") -> T:
    """Return an object of a class; where its class itself is given, the message says to call it."""
    if isinstance(value, type) or not isinstance(value, kind):
        if isinstance(value, type) and issubclass(value, kind):
            remedy = f"call it: {value.__name__}()"
        raise ValueError(_message(name, f"a{'n' * (kind.__name__[0] in 'AEIO')} {kind.__name__}", value, remedy))
    return value


def function(name: str, value: Any, of: str) -> Any:
    """Return a function, or an object that is called as one; where a class is given, the message says to call it."""
    if not callable(value) or isinstance(value, type):
        remedy = f"call it: {value.__name__}()" if isinstance(value, type) else ""
        raise ValueError(_message(name, f"a function of {of}", value, remedy))
    return value


def folder(name: str, value: Any, of: str = "a folder") -> Path:
    """Return a path, of a string or a `Path`; ~ is the home."""
    if not isinstance(value, str | PathLike) or not str(value) or "\0" in str(value):
        raise ValueError(_message(name, f"the path of {of}", value))
    return Path(value).expanduser()


_BOUNDS = {
    "above": ("greater than", operator.gt),
    "least": ("at least", operator.ge),
    "below": ("less than", operator.lt),
    "most": ("at most", operator.le),
}


def _check_range(name: str, value: Any, remedy: str, **bounds: float | None) -> None:
    """Raise ValueError for a value outside the bounds, which are named as in `number`."""
    limits = [(*_BOUNDS[key], bound) for key, bound in bounds.items() if bound is not None]
    if not all(holds(value, bound) for _, holds, bound in limits):
        expected = " and ".join(f"{words} {bound}" for words, _, bound in limits)
        raise ValueError(_message(name, expected, value, remedy))


def _message(name: str, expected: str, value: Any, remedy: str = "") -> str:
    got = repr(value)
    got = got if len(got) <= 80 else f"{got[:77]}..."
    return f"{name} must be {expected}, got {got}{f'; {remedy}' if remedy else ''}"
