"""Values that arguments must not take, by the kind of the argument."""

import math
from dataclasses import dataclass
from functools import partial

import pytest
import torch

NOT_A_NUMBER = {
    "nan": math.nan, "inf": math.inf, "-inf": -math.inf, "text": "1", "bool": True, "none": None, "complex": 1j,
    "tensor": torch.tensor(1.0), "list": [1.0],
}  # fmt: skip
NOT_WHOLE = {
    "fraction": 2.5, "float": 2.0, "nan": math.nan, "text": "2", "bool": True, "none": None, "tensor": torch.tensor(2),
    "list": [2],
}  # fmt: skip
NOT_A_FLAG = {"number": 1, "text": "yes", "none": None, "tensor": torch.tensor(True)}
NOT_A_CHOICE = {"text": "foo", "number": 7, "none": None}
NOT_AN_OBJECT = {"text": "foo", "number": 7}


@dataclass
class Kind:
    """Values that an argument must not take, and what the message must say."""

    values: dict
    message: str

    def but(self, *allowed):
        """Without the values of these names, which the argument may take."""
        return Kind({name: value for name, value in self.values.items() if name not in allowed}, self.message)


def number(*outside):
    return Kind(NOT_A_NUMBER | {f"={value}": value for value in outside}, "{name} must be ")


def whole(*outside):
    return Kind(NOT_WHOLE | {f"={value}": value for value in outside}, "{name} must be ")


FLAG = Kind(NOT_A_FLAG, "{name} must be True or False, got ")
CHOICE = Kind(NOT_A_CHOICE, "{name} must be one of ")
OBJECT = Kind(NOT_AN_OBJECT, "{name} must be an? ")
PATH = Kind({"number": 7, "none": None, "list": ["data"]}, "{name} must be the path of a folder, got ")
SIZES = Kind(
    {"number": 7, "text": "34", "none": None, "empty": [], "zero": [0, 0, 0, 0], "float": [2.0] * 4, "set": {1, 2}},
    r"{name}(\[\d\])* must be ",
)


def constructions(table):
    """Calls of each constructor: an argument with the values of its kind, and a keyword that there is not.

    The rows of the table are: constructor, arguments that it needs, kinds of the arguments by name.
    """
    for make, given, arguments in table:
        title = getattr(make, "__qualname__", make.__name__)
        for name, kind in arguments.items():
            calls = [partial(make, **{**given, name: value}) for value in kind.values.values()]
            yield pytest.param(calls, ValueError, kind.message.format(name=name), id=f"{title}({name})")
        yield pytest.param([partial(make, **given, typo=1)], TypeError, "typo", id=f"{title}(typo)")


def assert_refused(calls, error, message):
    for call in calls:
        with pytest.raises(error, match=message) as found:
            call()
        assert type(found.value) is error, call
