"""Limits of chips, by layers that just fit and others that do not."""

import itertools

import pytest
import torch
from torch import nn

import sltt

pytest.importorskip("nir")

from sltt.interop import check_chip, to_nir


def convs(*channels, size=3, **settings):
    pairs = itertools.pairwise(channels)
    return [m for a, b in pairs for m in (nn.Conv2d(a, b, size, padding=size // 4, **settings), sltt.IF())]


def fcs(*sizes, **settings):
    return [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), sltt.LIF(**settings))]


class Fork(nn.Sequential):
    def forward(self, x):
        x = self[1](self[0](x))
        one, two, three = (self[i + 1](self[i](x)) for i in (2, 4, 6))
        return one + two + three


# layers, the shape of an input, which line names a limit, and what it says
LIMITS = [
    ("speck", lambda: [nn.AvgPool2d(2), *convs(2, 9), nn.Flatten(), nn.Linear(36, 5)], (2, 8, 8), 4, "no neurons"),
    ("speck", lambda: convs(2, 33), (2, 42, 42), 0, "135,168 neurons in the memory, at most 65,536"),
    ("speck", lambda: convs(64, 128), (64, 4, 4), 0, "131,072 weights in the memory, at most 65,536"),
    ("speck", lambda: convs(32, 64), (32, 19, 19), 0, "no core has memory for 32,768 weights and 65,536 neurons"),
    ("speck", lambda: convs(*[16] * 5, size=1), (16, 64, 64), -1, "not enough memory in the 9 cores"),
    ("speck", lambda: [nn.AvgPool2d(3), *convs(2, 2, size=1)], (2, 6, 6), 0, "only windows of 1, 2 or 4"),
    ("speck", lambda: [Fork(*convs(2, 2, 2, 2, 2, size=1))], (2, 4, 4), 1, "3 layers that read it, at most 2"),
    ("speck", lambda: fcs(2, 2), (2,), 1, "not on the chip, which has IF, AvgPool2d, Flatten, Affine"),
    ("speck", lambda: [*convs(2, 2), nn.Flatten(), nn.Linear(8, 5), sltt.IF()], (2, 4, 4), -1, "fit"),
    ("xylo", lambda: fcs(16, 100, 60, 10), (16,), -1, "fit"),
    ("xylo", lambda: fcs(16, 129, 33), (16,), 0, "129 neurons that read the input, at most 128"),
    ("xylo", lambda: fcs(16, 100, 129, 32), (16,), 5, "129 neurons that it reads, at most 128"),
    ("xylo", lambda: fcs(16, 100, 500, 500, 100, 5), (16,), -1, "1,200 hidden neurons, at most 992"),
    ("xylo", lambda: fcs(16, 100, 300, 300, 100, 5), (16,), -1, "150,500 weights of hidden neurons, at most 63,488"),
    ("xylo", lambda: fcs(4, 4, v_reset=0.0), (4,), 1, "only a soft reset"),
    ("xylo", lambda: convs(1, 1), (1, 4, 4), 0, "not on the chip, which has LIF, CubaLIF"),
    ("xylo", lambda: fcs(4, 4)[:1], (4,), 0, "no neurons behind it"),
]


@pytest.mark.parametrize(("chip", "layers", "shape", "place", "expected"), LIMITS)
def test_limits_of_chips_are_named_by_layer(chip, layers, shape, place, expected):
    lines = check_chip(to_nir(nn.Sequential(*layers()), torch.rand(1, *shape)), chip)
    assert lines[place].partition(": ")[2].startswith(expected)
    fits = [line.partition(": ")[2] == "fits" for line in lines[:-1]]
    assert (all(fits), lines[-1]) == (True, "all layers: fit") if expected == "fit" else lines[-1] != "all layers: fit"
