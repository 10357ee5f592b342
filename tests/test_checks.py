"""Checks of arguments."""

import numpy as np
import pytest
import torch

from sltt.checks import number, whole_number, whole_numbers


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-1, "x must be greater than 0 and at most 2, got -1$"),
        (3, "x must be greater than 0 and at most 2, got 3$"),
        (float("nan"), "x must be a finite number, got nan$"),
        (float("-inf"), "x must be a finite number, got -inf$"),
        ("1", "x must be a number, got '1'$"),
        (True, "x must be a number, got True$"),
        (None, "x must be a number, got None$"),
        (torch.tensor(1.0), r"x must be a number, got tensor\(1.\)$"),
        (1j, "x must be a number, got 1j$"),
    ],
)
def test_number_says_what_it_expected(value, message):
    with pytest.raises(ValueError, match=message):
        number("x", value, above=0, most=2)


def test_numbers_of_numpy_are_numbers():
    assert type(number("x", np.float32(0.5), least=0.5, below=1)) is float
    assert type(whole_number("x", np.int64(3), least=3)) is int


def test_ranges_and_remedies_are_in_the_message():
    with pytest.raises(ValueError, match=r"x must be at least 1 and at most 9, got 0; use 1$"):
        whole_number("x", 0, least=1, most=9, remedy="use 1")
    with pytest.raises(ValueError, match=r"x\[1\] must be at least 1, got 0"):
        whole_numbers("x", [3, 0], least=1)
    with pytest.raises(ValueError, match="x must be a sequence of 2 or more whole numbers"):
        whole_numbers("x", [3], fewest=2)
    with pytest.raises(ValueError, match="x must be a sequence of 1 or more whole numbers, got '34'"):
        whole_numbers("x", "34")
