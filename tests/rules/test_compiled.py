import copy

import pytest
import torch
from torch import nn

import sltt
from tests.conftest import LOSS, batch, gradient, gradients


@pytest.fixture(autouse=True)
def forget_compiled_code():
    yield
    torch._dynamo.reset()  # the compiler counts the versions of a neuron's forward in the whole process


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of the compiler
@pytest.mark.parametrize(
    ("limit", "backend"), [(torch._dynamo.config.recompile_limit, "aot_eager"), (1, "eager")], ids=["anew", "given up"]
)
def test_one_rule_after_another_trains_a_compiled_network(limit, backend):
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), sltt.LIF(tau=1.7), nn.Linear(8, 3)).double()
    compiled, (x, y) = torch.compile(copy.deepcopy(model), backend=backend), batch()
    rules = sltt.SLTT(), sltt.SLTT(k=2), sltt.BPTT(segment=2), sltt.RateBased()
    with torch._dynamo.config.patch(recompile_limit=limit):
        for rule in rules:
            compiled.zero_grad()
            rule(compiled, x, y, LOSS, seed=0)
            expected, _ = gradients(model, rule, x, y, seed=0)
            torch.testing.assert_close(gradient(compiled), expected)


@pytest.mark.parametrize("rule", [sltt.SLTT(fold=2), sltt.OTTT()], ids=repr)
def test_what_compiled_code_hides_is_refused(rule):
    compiled = torch.compile(nn.Sequential(nn.Linear(6, 8), sltt.LIF(), nn.Linear(8, 3)).double(), backend="eager")
    with pytest.raises(ValueError, match=r"LIF\) runs in compiled code.*use fold=1|before torch\.compile"):
        rule(compiled, *batch(), LOSS)


def test_firing_rates_of_compiled_code_do_not_compile_it_anew():
    model = nn.Sequential(nn.Linear(6, 8), sltt.LIF(tau=1.7), nn.Linear(8, 3)).double()
    compiled, (x, _) = torch.compile(copy.deepcopy(model), backend="aot_eager"), batch(20)
    with sltt.analysis.firing_rates(model) as expected:
        sltt.unroll(model, x)
    sltt.unroll(compiled, x)  # nobody looks
    with sltt.analysis.firing_rates(compiled) as found, torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        sltt.unroll(compiled, x)
    assert list(found.by_layer().values()) == pytest.approx(list(expected.by_layer().values()))
