import math

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
