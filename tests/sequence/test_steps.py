import math
from functools import partial

import pytest
import torch
from torch import nn

import sltt
from sltt.analysis import peak_memory
from sltt.sequence.steps import time_steps


def test_checking_the_input_takes_no_memory():
    x = torch.randn(16, 64, 100)
    assert peak_memory(lambda: time_steps(x, None)) < 100


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_value_that_is_not_finite_is_found(dtype, bad):
    x = torch.randn(4, 5, 6).to(dtype)
    x[1, 2, 3] = bad
    with pytest.raises(ValueError, match="got 1 NaN or infinite of 120 values"):
        time_steps(x, None)


def test_an_empty_batch_is_finite():
    assert time_steps(torch.empty(4, 0, 6), None).batch == 0


@pytest.mark.parametrize("run", [sltt.unroll, sltt.predict])
def test_a_batch_without_time_is_no_sequence(run):
    model = nn.Sequential(nn.Linear(5, 8), sltt.LIF(), nn.Linear(8, 3))
    with pytest.raises(ValueError, match=r"expected logits \[5, C\] of the 5 samples .* \[3\].* needs steps=T"):
        run(model, torch.rand(23, 5))


def test_calls_of_a_static_input_share_it():
    x = torch.randn(3, 4)
    sequence = time_steps(x, 7)
    first = sequence.input(range(3))
    assert sequence.input(range(3, 6)) is first
    assert torch.equal(first, torch.cat([x] * 3))
    first.zero_()
    assert torch.equal(sequence.input(range(3, 6)), torch.cat([x] * 3))


@pytest.mark.parametrize("rule", [sltt.SLTT, partial(sltt.SLTT, k=10), sltt.BPTT])
def test_a_static_input_has_its_gradient_from_all_calls(rule):
    model = nn.Sequential(nn.Linear(5, 8), sltt.LIF(), nn.Linear(8, 3)).double()
    x, y, found = torch.randn(4, 5, dtype=torch.float64), torch.randint(3, (4,)), []
    for fold in (1, 2):
        leaf = x.clone().requires_grad_()
        rule(fold=fold)(model, leaf, y, nn.functional.cross_entropy, steps=20, seed=0)
        found.append(leaf.grad)
    torch.testing.assert_close(*found)
