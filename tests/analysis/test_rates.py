import copy

import pytest
import torch
from torch import nn

import sltt
from sltt.analysis import find_learning_rate
from sltt.analysis.rates import MEMORY, _choose_rates
from tests.conftest import LOSS, batch, small_network


def ranged(rule=sltt.SLTT(), optimizer=torch.optim.SGD, **settings):
    model = small_network(norm=True)
    x, y = batch(size=8)
    made = optimizer(model.parameters(), lr=0.3)
    before = copy.deepcopy(model.state_dict())
    found = find_learning_rate(model, [(x, y)] * 40, LOSS, rule, made, **{"count": 40, **settings})
    return found, made, before, model


@pytest.mark.parametrize("rule", [sltt.SLTT(), sltt.BPTT(), sltt.OTTT(decay=0.5, online=True)], ids=repr)
def test_the_rate_rises_and_all_is_as_before(rule):
    found, optimizer, before, model = ranged(rule, torch.optim.AdamW, largest=10.0)
    steps = [b / a for a, b in zip(found.rates, found.rates[1:], strict=False)]
    assert steps == pytest.approx([(10 / 1e-5) ** (1 / 39)] * len(steps))
    assert found.rates[0] == pytest.approx(1e-5)
    assert found.suggestion < found.lowest <= found.rates[-1]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert optimizer.param_groups[0]["lr"] == 0.3
    assert not optimizer.state


def test_the_losses_are_those_of_a_loop_with_these_rates():
    found, _, _, model = ranged(count=12)
    x, y = (torch.manual_seed(0), small_network(norm=True), batch(size=8))[2]
    optimizer, average = torch.optim.SGD(model.parameters(), lr=0.0), 0.0
    for i, (rate, expected) in enumerate(zip(found.rates, found.losses, strict=True)):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss = sltt.SLTT()(model, x, y, LOSS).loss
        optimizer.step()
        average = MEMORY * average + (1 - MEMORY) * float(loss)
        assert average / (1 - MEMORY ** (i + 1)) == pytest.approx(expected)


@pytest.mark.parametrize("shift", [0, 1, 100])
def test_a_loss_below_zero_is_tested_as_one_above(shift):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), sltt.LIF(), nn.Linear(8, 1)).double()
    x, y = torch.randn(4, 8, 6, dtype=torch.float64), torch.ones(8, 1, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)

    def loss(o, y):
        return nn.functional.mse_loss(o, y) - shift

    found = find_learning_rate(model, [(x, y)] * 60, loss, sltt.SLTT(), optimizer, largest=1e6, count=60)
    assert 10 < len(found.rates) < 60  # it ends where the loss explodes
    assert found.losses[-1] + shift > 4 * (min(found.losses) + shift)
    assert (found.suggestion is None) == (shift == 100)  # which falls by less than 2%


def test_the_rate_of_the_steepest_fall_is_suggested():
    assert _choose_rates([1, 2, 3, 4, 5, 6], [9.0, 8.9, 8.0, 5.0, 4.9, 7.0]) == (3, 5)
    assert _choose_rates([1, 2, 3], [1.0, 2.0, 3.0]) == (None, 1)
    assert _choose_rates([1, 2, 3, 4], [1.0, 0.995, 0.99, 1.0]) == (None, 3)  # the noise of batches


@pytest.mark.parametrize("rate", [{"lr": 0.2}, {"lr": 0.1, "lr_factor": 2.0}], ids=["rate", "factor"])
def test_the_rates_of_groups_keep_their_ratio(rate):
    model = small_network()
    groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[4].parameters(), **rate}]
    seen = []

    class Noted(torch.optim.SGD):
        def step(self, closure=None):
            seen.append(self.param_groups[1]["lr"] / self.param_groups[0]["lr"])

    find_learning_rate(model, [batch()] * 10, LOSS, sltt.SLTT(), Noted(groups), count=10)
    assert seen == pytest.approx([2.0] * 10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 9}, "count must be at least 10"),
        ({"smallest": 0}, "smallest must be greater than 0"),
        ({"smallest": 1.0, "largest": 0.5}, "largest must be greater than 1"),
        ({"count": 50, "smallest": float("nan")}, "smallest must be a finite number"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ranged(**settings)


def test_too_few_batches_are_refused():
    model = small_network()
    with pytest.raises(ValueError, match="needs ten batches with a finite loss, got 3"):
        find_learning_rate(model, [batch()] * 3, LOSS, sltt.SLTT(), torch.optim.SGD(model.parameters(), lr=1.0))
