import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sltt
from sltt.analysis import peak_memory
from sltt.sequence.fold import Clock, clock_of, clocked
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


class Attends(nn.Module):
    """Tokens [B, 3, 4] of an image, in the form that its attention is made for."""

    def __init__(self, batch_first, form=lambda x: x):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first)
        self.neuron, self.head = sltt.LIF(), nn.Linear(4, 3)
        self.form = form

    def forward(self, x):
        x = self.form(x.unflatten(1, (3, 4)))
        return self.head(self.neuron(self.attention(query=x, key=x, value=x)[0]).sum(0 if x.shape[0] == 3 else 1))


@pytest.mark.parametrize("rule", [sltt.SLTT(), sltt.BPTT(fold=2)], ids=repr)
def test_attention_among_samples_or_time_steps_is_named(rule):
    x, y = torch.randn(4, 5, 12), torch.randint(3, (5,))
    loss = nn.CrossEntropyLoss()
    with pytest.raises(
        ValueError, match=r"attention \(MultiheadAttention\) attends over dimension 0 .* batch_first=True"
    ):
        rule(Attends(batch_first=False), x, y, loss)
    with pytest.raises(ValueError, match=r"\[(5|10), 4\], the (5|10) samples of a time step"):
        rule(Attends(batch_first=True, form=lambda x: x[:, 0]), x, y, loss)
    with pytest.raises(ValueError, match=r"attends over dimension 1 of its input \[3, (5|10), 4\]"):
        rule(Attends(batch_first=True, form=lambda x: x.transpose(0, 1)), x, y, loss)
    rule(Attends(batch_first=True), x, y, loss)
    if rule.fold == 1:
        rule(Attends(batch_first=False, form=lambda x: x.transpose(0, 1)), x, y, loss)


class Tokens(nn.Module):
    """Attention by a function, among what `form` makes of tokens [B, 3, 4]."""

    def __init__(self, form):
        super().__init__()
        self.form, self.neuron, self.head = form, sltt.LIF(), nn.Linear(4, 3)

    def forward(self, x):
        q = self.form(x.unflatten(1, (3, 4)))
        return self.head(self.neuron(F.scaled_dot_product_attention(q, q, q).reshape(len(x), 3, 4)).sum(1))


@pytest.mark.parametrize("rule", [sltt.SLTT(), sltt.BPTT(fold=2)], ids=repr)
def test_attention_by_a_function_among_samples_is_named(rule):
    x, y, loss = torch.randn(4, 5, 12), torch.randint(3, (5,)), nn.CrossEntropyLoss()
    for form in (lambda x: x.flatten(1), lambda x: x.transpose(0, 1), lambda x: x.flatten(1)[None, None]):
        model = Tokens(form)
        for _ in range(2):  # the second time, too
            with pytest.raises(ValueError, match=r"attends over dimension [012] of its query .*\[B, heads, N, E\]"):
                rule(model, x, y, loss)
    for form in (lambda x: x, lambda x: x[:, None], lambda x: x.unflatten(2, (2, 2)).transpose(1, 2)):
        rule(Tokens(form), x, y, loss)
        rule(Tokens(form), x[:, :3], y[:3], loss)  # as many samples as tokens


def test_a_sequence_within_a_sequence_gives_the_clock_back():
    neuron, outer, inner = sltt.LIF(), Clock(), Clock()
    with clocked([neuron], outer):
        with clocked([neuron], inner):
            assert clock_of(neuron) is inner
        assert clock_of(neuron) is outer
    assert clock_of(neuron) is None


@pytest.mark.parametrize("run", [sltt.unroll, sltt.predict])
def test_a_batch_without_time_is_no_sequence(run):
    model = nn.Sequential(nn.Linear(5, 8), sltt.LIF(), nn.Linear(8, 3))
    with pytest.raises(ValueError, match=r"expected logits \[5, C\] of the 5 samples .* \[3\].* needs steps=T"):
        run(model, torch.rand(23, 5))
