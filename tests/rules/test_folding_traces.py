import copy

import pytest
import torch
from torch import nn

import sltt
from sltt import kernels
from sltt.kernels.neuron import recurrence
from tests.conftest import LOSS
from tests.kernels.exact import NATIVE
from tests.references import recorded
from tests.rules.test_folding import Net, assert_same, data, results


def traced(neuron):
    """A network without BatchNorm: two layers read the same input, one feeds neurons of two kinds, one the output."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.pool = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(2, 8, 3, padding=1), nn.AvgPool2d(4)
            self.lif1, self.lif2, self.lif3 = neuron(), sltt.LIF(tau=3.0), neuron()
            self.hidden, self.head = nn.Linear(8 * 16, 12), nn.Linear(12, 5)

        def forward(self, x):
            z = self.b(x)
            s = self.pool(self.lif1(self.a(x) + z) + self.lif2(z)).flatten(1)
            return self.head(self.lif3(self.hidden(s)))

    return Both().double()


@pytest.mark.parametrize(
    "neuron", [sltt.LIF, lambda: sltt.LIF(tau=1.5, decay_input=True), sltt.IF, sltt.CubaLIF, sltt.ALIF]
)
@pytest.mark.parametrize(
    ("rule", "how"),
    [(sltt.OTTT, {}), (sltt.OTTT, {"decay": 0.3}), (sltt.OTTT, {"inputs": False}), (sltt.RateBased, {})],
    ids=repr,
)
def test_folding_traces_and_rates(rule, how, neuron):
    model = traced(neuron)
    x, y, kwargs = data(static=False)
    plain = results(model, rule(**how, fold=1), x, y, kwargs)
    for fold in (2, 5):
        assert_same(results(model, rule(**how, fold=fold), x, y, kwargs), plain)


def test_folding_rates_of_norms_dropout_and_recurrence():
    class Recurrent(Net):
        def __init__(self):
            super().__init__()
            self.head = nn.Sequential(nn.Linear(1024, 7), sltt.Recurrent(sltt.LIF(), nn.Linear(7, 7)), nn.Linear(7, 5))

    model = Recurrent().double()
    x, y, kwargs = data(static=True)
    plain = results(model, sltt.RateBased(fold=1), x, y, kwargs)
    assert_same(results(model, sltt.RateBased(fold=2), x, y, kwargs), plain)


@pytest.mark.parametrize(
    ("layers", "problem"),
    [
        ([nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), sltt.LIF()], r"the bias of 1 \(BatchNorm2d\)"),
        ([nn.Conv2d(2, 4, 3), sltt.PLIF()], r"the λ of 1 \(PLIF\)"),
        (
            [nn.Flatten(), nn.Linear(512, 4), sltt.Recurrent(sltt.LIF(), nn.Linear(4, 4))],
            r"2.layer \(Linear\), which runs within a layer with a state",
        ),
    ],
)
def test_traces_that_cannot_fold_are_named_and_run_step_by_step(layers, problem):
    model = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(5)).double()
    x, y, _ = data(static=False)
    model(x[0])
    sltt.reset(model)
    with pytest.raises(ValueError, match=problem):
        sltt.OTTT(fold=2)(model, x, y, LOSS)
    assert_same(results(model, sltt.OTTT(), x, y, {}), results(model, sltt.OTTT(fold=1), x, y, {}))


@NATIVE
@pytest.mark.parametrize("neuron", [lambda: sltt.LIF(tau=2.0), lambda: sltt.LIF(tau=2.0, decay_input=True), sltt.IF])
@pytest.mark.parametrize(
    ("how", "bias", "frozen"),
    [
        ({}, False, ""),
        ({}, True, "1.layer.weight"),
        ({"decay": 0.25}, True, "1.layer.bias"),
        ({"inputs": False}, True, "1.layer.bias"),
        ({"inputs": False}, False, ""),
    ],
    ids=repr,
)
def test_traces_of_a_recurrent_layer_in_one_call(how, neuron, bias, frozen, monkeypatch):
    """Of numbers whose sums are exact in float32, so that no rounding decides whether a neuron fires."""
    torch.manual_seed(0)
    recurrent = sltt.Recurrent(neuron(), nn.Linear(16, 16, bias=bias))
    exact = nn.Sequential(nn.Linear(6, 16), recurrent, nn.Linear(16, 12), sltt.LIF(tau=2.0), nn.Linear(12, 3)).double()
    with torch.no_grad():
        for name, p in exact.named_parameters():
            p.copy_(torch.randint(-8, 8, p.shape) / 16)
            p.requires_grad_(name != frozen)
    x, y = torch.randint(-8, 16, (7, 5, 6)).double() / 4, torch.randint(3, (5,))
    expected = results(exact, sltt.OTTT(**how, fold=1), x, y, {})
    calls = recorded(monkeypatch, recurrence, "_forward", lambda call, *_: call.steps)
    for fold in (1, 3):
        found = copy.deepcopy(exact).float()
        calls.clear()
        with kernels.using(compile="on"):
            got = results(found, sltt.OTTT(**how, fold=fold), x.float(), y, {})
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, check_dtype=False, rtol=1e-4, atol=1e-6)
        assert max(calls) == fold
