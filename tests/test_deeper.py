"""The rules of benchmarks/deeper.py, beside those of the library and beside BPTT."""

from functools import partial

import pytest
import torch
from torch import nn

import sltt
from tests.scripts import benchmarks_on_the_path, load  # noqa: F401


@pytest.fixture
def rules():
    return load("deeper").RULES


def gradients(rule, layers):
    torch.manual_seed(0)
    neuron = partial(sltt.LIF, tau=5.0, detach_reset=True)
    model = sltt.models.MLP([5, *[8] * layers, 3], neuron=neuron, norm=False).double()
    x, y = 2 * torch.rand(6, 4, 5, dtype=torch.double), torch.arange(4) % 3
    rule(model, x, y, nn.CrossEntropyLoss())
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize(("name", "rule"), [("SLTT", sltt.SLTT()), ("traces", sltt.OTTT())])
def test_traces_of_steps_are_the_rules_of_the_library(rules, name, rule, layers):
    torch.testing.assert_close(gradients(rules[name], layers), gradients(rule, layers), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("layers", [1, 2])
def test_otpe_is_exact_for_two_hidden_layers(rules, layers):
    torch.testing.assert_close(gradients(rules["OTPE"], layers), gradients(sltt.BPTT(), layers), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["F-OTPE", "pp_prop", "OTPE"])
def test_approximations_are_others_than_traces_and_bptt(rules, name):
    found, *others = (gradients(rule, 3) for rule in (rules[name], rules["traces"], sltt.BPTT()))
    assert all(not torch.allclose(found[0], other[0], rtol=1e-3) for other in others)
