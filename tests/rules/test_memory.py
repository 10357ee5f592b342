from functools import partial

import pytest
import torch
from torch import nn

import sltt
from sltt.analysis import peak_memory
from tests.conftest import LOSS, batch, seeded, small_network
from tests.references import measured


def peak(rule, steps):
    x, y = torch.randn(16, 1, 8, 8), torch.randint(10, (16,))
    return measured(rule, sltt.models.DigitsNet(width=8), x, y, steps=steps)


@pytest.mark.parametrize(
    "rule", [sltt.SLTT(fold=1), sltt.SLTT(k=2, fold=1), sltt.TBPTT(2, fold=1), sltt.RateBased(fold=1)], ids=repr
)
def test_memory_does_not_grow_with_time(rule):
    assert peak(rule, 12) <= 1.05 * peak(rule, 4)


def test_memory_of_bptt_grows_with_time_and_with_segments_is_that_of_these():
    bptt = peak(sltt.BPTT(fold=1), 32)
    assert bptt > 1.7 * peak(sltt.BPTT(fold=1), 16)
    assert peak(sltt.BPTT(segment=4, fold=1), 32) < 0.35 * bptt


def test_the_mean_of_dense_logits_takes_the_same_at_any_number_of_steps():
    model = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), sltt.LIF(), nn.Conv2d(8, 4, 1))
    x, y = torch.randn(4, 2, 16, 16), torch.randint(4, (4, 16, 16))
    rule = partial(sltt.SLTT(), mean_logits=True, loss=nn.CrossEntropyLoss())
    peaks = [peak_memory(lambda t=t: rule(model, x, y, steps=t)) for t in (8, 8, 512)][1:]  # the first times layers
    assert peaks[1] <= 1.02 * peaks[0]


@pytest.mark.parametrize("rule", [sltt.SLTT(), sltt.BPTT(segment=2), sltt.RateBased(), sltt.Mixed({"*": 2})], ids=repr)
def test_the_mean_is_that_of_all_logits(rule):
    model, (x, y) = small_network(), batch()
    every, mean = (seeded(rule, model, x, y, LOSS, mean_logits=on) for on in (False, True))
    assert mean.logits.shape == (1, *every.logits.shape[1:])
    torch.testing.assert_close(mean.logits[0], every.logits.mean(0))
