"""Biases in front of a BatchNorm, which a device leaves out: tensors say that they are elsewhere."""

import copy
import math

import pytest
import torch
from torch import nn

import sltt
from sltt.rules.truncated import Truncated
from sltt.sequence.biases import Biases
from tests.conftest import LOSS, each_kind, gradient
from tests.references import by_hand, every


def network():
    layers = nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6, momentum=0.3), sltt.LIF(), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6)
    model = nn.Sequential(*layers, sltt.PLIF(), nn.Flatten(), nn.Linear(24, 8), nn.BatchNorm1d(8), sltt.LIF())
    return model.append(nn.Linear(8, 3)).double()


def batch():
    return 2 * torch.randn(4, 5, 2, 6, 6, dtype=torch.float64), torch.randint(3, (5,))


@each_kind
def test_every_rule_gives_the_gradient_and_statistics_with_biases(rule, monkeypatch):
    (x, y), results, model = batch(), [], network()
    for device in ("cpu", "elsewhere"):
        monkeypatch.setattr(torch.Tensor, "is_cpu", device == "cpu")
        twin = copy.deepcopy(model)
        outs = [rule(twin, x, y, LOSS, seed=0) for _ in range(2)]
        results.append([*outs[1], *(p.grad for p in twin.parameters()), *twin.buffers()])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)
    of_bias = results[1][3]
    assert (not of_bias.any()) == (isinstance(rule, Truncated) and not rule.repeats)


def tokens(model):
    model[6], model[7], model[8] = nn.Flatten(2), nn.Linear(4, 6), nn.BatchNorm1d(6)  # of the other axis
    model[10] = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    model.double()


CASES = {  # what is done to a network, and which of three biases are left out then
    "": (lambda m: None, 3),
    "hook": (lambda m: m[0].register_forward_hook(lambda m, args, y: y.exp()), 2),
    "hook of the norm": (lambda m: m[1].register_forward_pre_hook(lambda m, args: args[0].exp()), 2),
    "hook of the bias": (lambda m: m[0].bias.register_hook(lambda grad: 2 * grad), 2),
    "forward": (lambda m: setattr(m[0], "forward", lambda x: nn.Conv2d.forward(m[0], x).exp()), 2),
    "running statistics": (lambda m: m[1].eval(), 2),
    "average": (lambda m: setattr(m[1], "momentum", None), 2),
    "frozen weight": (lambda m: m[0].weight.requires_grad_(False), 2),
    "frozen bias": (lambda m: m[0].bias.requires_grad_(False), 3),
    "another axis": (tokens, 2),
    "a norm twice": (lambda m: m.__setitem__(4, m[1]), 2),
    "a layer twice": (lambda m: m.extend([nn.Linear(3, 24).double(), m[7], nn.Linear(8, 3).double()]), 3),
}


@pytest.mark.parametrize(("change", "left_out"), CASES.values(), ids=CASES)
@pytest.mark.parametrize(("rule", "window"), [(sltt.SLTT(fold=1), 1), (sltt.BPTT(fold=1), 4)], ids=repr)
def test_what_reads_a_bias_has_it(change, left_out, rule, window, elsewhere, monkeypatch):
    model, (x, y), calls, weigh = network(), batch(), set(), Biases.weigh

    def note(self, layer, norm, x):
        if (y := weigh(self, layer, norm, x)) is not None:
            calls.add(layer)
        return y

    monkeypatch.setattr(Biases, "weigh", note)
    twin = copy.deepcopy(model)
    for one in (model, twin):
        torch.manual_seed(1)
        change(one)
    expected, _ = by_hand(twin, x, y, every(window))
    rule(model, x, y, LOSS)
    torch.testing.assert_close(gradient(model), expected)
    torch.testing.assert_close([*model.buffers()], [*twin.buffers()])
    assert len(calls) == left_out


def test_a_damaged_bias_is_seen(elsewhere):
    model = network()
    [*model.parameters()][1].data[1] = math.nan
    assert sltt.SLTT()(model, *batch(), LOSS).loss.isnan()
