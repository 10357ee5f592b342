"""Max pooling of sums over time: against its equation, and under the rules."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import sltt

T, B = 4, 3


def network(pool):
    torch.manual_seed(0)
    neurons = (sltt.LIF(v_threshold=0.5) for _ in range(2))
    layers = nn.Conv2d(2, 5, 3, padding=1), next(neurons), nn.Conv2d(5, 6, 3, padding=1), pool, next(neurons)
    return nn.Sequential(*layers, sltt.RunningMax(nn.AdaptiveMaxPool2d(1)), nn.Flatten(), nn.Linear(6, 3)).double()


def batch():
    torch.manual_seed(1)
    return torch.randn(T, B, 2, 6, 6, dtype=torch.float64), torch.tensor([0, 1, 2])


def gradient(model, rule):
    x, y = batch()
    out = rule(model, x, y, nn.CrossEntropyLoss())
    return out.loss, torch.cat([p.grad.flatten() for p in model.parameters()])


class ByTheEquation(sltt.Stateful):
    """y[t] = max Σ_{s≤t} x[s] − max Σ_{s<t} x[s], of all inputs so far."""

    states = ("inputs",)

    def forward(self, x):
        before, self.inputs = self.inputs or [], [*(self.inputs or []), x]
        y = F.max_pool2d(sum(self.inputs), 2)
        return y - F.max_pool2d(sum(before), 2) if before else y


@given(steps=st.integers(1, 6), size=st.integers(1, 3), seed=st.integers(0, 99))
def test_the_outputs_add_up_to_the_pooling_of_the_sum(steps, size, seed):
    x = torch.randn(steps, 2, 3, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    pool = sltt.RunningMax(nn.MaxPool2d(size))
    y = torch.stack([pool(step) for step in x])
    torch.testing.assert_close(y.cumsum(0), F.max_pool2d(x.cumsum(0).flatten(0, 1), size).unflatten(0, (steps, 2)))


def test_a_constant_input_is_pooled_as_by_torch():
    x, pool = torch.randn(2, 3, 5, 5), sltt.RunningMax(nn.MaxPool2d(2))
    for _ in range(3):
        torch.testing.assert_close(pool(x), F.max_pool2d(x, 2))


@given(steps=st.integers(2, 6), seed=st.integers(0, 99))
def test_spikes_are_pooled_to_spikes(steps, seed):
    spikes = torch.rand(steps, 2, 3, 6, generator=torch.Generator().manual_seed(seed)).round()
    pool = sltt.RunningMax(partial(torch.amax, dim=-1))
    pooled = torch.stack([pool(step) for step in spikes])
    assert {*pooled.unique().tolist()} <= {0, 1}
    assert torch.equal(pooled.sum(0), spikes.sum(0).amax(-1))


@pytest.mark.parametrize("rule", [sltt.BPTT(), sltt.SLTT(), sltt.SLTT(k=2), sltt.TBPTT(2)], ids=str)
def test_rules_give_the_gradient_of_the_equation(rule):
    ours, theirs = (gradient(network(pool), rule) for pool in (sltt.RunningMax(nn.MaxPool2d(2)), ByTheEquation()))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("rule", "other"),
    [
        (sltt.SLTT(), sltt.SLTT(fold=2)),
        (sltt.SLTT(), sltt.SLTT(recompute=True)),
        (sltt.SLTT(), sltt.Mixed({"*": 1})),
        (sltt.BPTT(), sltt.BPTT(fold=T)),
        (sltt.BPTT(), sltt.BPTT(segment=2)),
    ],
    ids=lambda rule: str(rule),
)
def test_another_way_to_run_a_rule_gives_its_gradient(rule, other):
    torch.testing.assert_close(*(gradient(network(sltt.RunningMax(nn.MaxPool2d(2))), one) for one in (rule, other)))


@pytest.mark.parametrize("steady", [False, True])
def test_under_a_constant_current_rates_have_the_gradient_of_torchs_pooling(steady):
    x, y = batch()
    found = []
    for pool in (sltt.RunningMax(nn.MaxPool2d(2)), nn.MaxPool2d(2)):
        torch.manual_seed(0)
        neuron = sltt.LIF(v_threshold=0.5)
        model = nn.Sequential(nn.Conv2d(2, 5, 3, padding=1), pool, neuron, nn.Flatten(), nn.Linear(45, 3)).double()
        sltt.RateBased(steady=steady)(model, x[0], y, nn.CrossEntropyLoss(), steps=T)
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*found)


def test_the_rate_pass_pools_the_mean_input():
    x, y = batch()
    pool = sltt.RunningMax(nn.MaxPool2d(2))
    model = nn.Sequential(nn.Conv2d(2, 3, 1), pool, nn.Flatten(), nn.Linear(27, 3), sltt.LIF()).double()
    seen = []
    pool.register_forward_hook(lambda *call: seen.append(call[-1]))
    sltt.RateBased()(model, x, y, nn.CrossEntropyLoss())
    assert len(seen) == T + 1
    torch.testing.assert_close(seen[-1], sum(seen[:-1]) / T)


def test_work_on_a_static_image_that_pools_runs_once():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.stem = nn.Sequential(nn.Conv2d(2, 3, 3), sltt.RunningMax(nn.MaxPool2d(2)))
            self.rest = nn.Sequential(sltt.LIF(v_threshold=0.5), nn.Flatten(), nn.Linear(12, 3))

        def forward(self, x):
            return self.rest(sltt.once(self.stem, x))

    x, y = batch()
    models = Net().double(), Net().double()
    for model, hoist in zip(models, (False, True), strict=True):
        sltt.SLTT(hoist=hoist)(model, x[0], y, nn.CrossEntropyLoss(), steps=T)
    torch.testing.assert_close(*([p.grad for p in model.parameters()] for model in models))


def test_sums_are_of_float32_where_inputs_have_16_bits():
    pool = sltt.RunningMax(nn.MaxPool2d(1))
    for _ in range(300):
        y = pool(torch.ones(1, 1, 1, 1, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert pool.total.item() == 300


def test_another_batch_without_a_reset_is_refused():
    pool = sltt.RunningMax(nn.MaxPool2d(2))
    pool(torch.zeros(2, 1, 4, 4))
    with pytest.raises(ValueError, match=r"sltt\.reset"):
        pool(torch.zeros(3, 1, 4, 4))


def test_what_others_change_in_place_is_not_its_state():
    x = torch.rand(3, 2, 3, 4, 4)
    pool, expected = (sltt.RunningMax(nn.MaxPool2d(2)) for _ in range(2))
    for step in x:
        right = expected(step.clone())
        step = step.clone()
        y = pool(step)
        torch.testing.assert_close(y, right)
        y.mul_(7)
        step.mul_(7)
