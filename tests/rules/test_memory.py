import pytest
import torch

import sltt
from tests.references import measured


def peak(rule, steps):
    return measured(
        rule, sltt.models.DigitsNet(width=8), torch.randn(16, 1, 8, 8), torch.randint(10, (16,)), steps=steps
    )


@pytest.mark.parametrize(
    "rule", [sltt.SLTT(fold=1), sltt.SLTT(k=2, fold=1), sltt.TBPTT(2, fold=1), sltt.RateBased(fold=1)], ids=repr
)
def test_memory_does_not_grow_with_time(rule):
    assert peak(rule, 12) <= 1.05 * peak(rule, 4)


def test_memory_of_bptt_grows_with_time_and_with_segments_is_that_of_these():
    bptt = peak(sltt.BPTT(fold=1), 32)
    assert bptt > 1.7 * peak(sltt.BPTT(fold=1), 16)
    assert peak(sltt.BPTT(segment=4, fold=1), 32) < 0.35 * bptt
