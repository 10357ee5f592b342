import pytest
import torch

import sltt
from sltt import kernels
from sltt.analysis import peak_memory
from tests.conftest import LOSS


@pytest.mark.parametrize("rule", [sltt.SLTT(), sltt.SLTT(k=2), sltt.TBPTT(2)], ids=repr)
def test_memory_does_not_grow_with_time(rule):
    assert measured(rule, 64) <= 1.05 * measured(rule, 4)


def test_recomputing_bptt_takes_the_memory_of_its_segments():
    assert measured(sltt.BPTT(segment=4), 32) < 0.35 * measured(sltt.BPTT(), 32)


def test_memory_of_bptt_grows_with_time():
    assert measured(sltt.BPTT(), 32) > 1.7 * measured(sltt.BPTT(), 16)


def measured(rule, steps):
    model = sltt.models.DigitsNet()
    x, y = torch.randn(64, 1, 8, 8), torch.randint(10, (64,))
    with kernels.using(compile="off"):  # the same whatever other tests have compiled before
        rule(model, x, y, LOSS, steps=2)  # gradients exist from here on
        return peak_memory(lambda: rule(model, x, y, LOSS, steps=steps))
