"""Recurrence beside a loop written out, and under every rule."""

import copy
import itertools
from functools import partial

import pytest
import torch
from torch import nn

import sltt
from tests.conftest import KINDS, RULES, batch, gradients
from tests.neurons.plain import alone

RULES = {name: RULES[name] for name in KINDS if not isinstance(RULES[name], sltt.RateBased)}
LOSS = sltt.losses.CrossEntropyMSE()
NEURONS = {
    "LIF": partial(sltt.LIF, tau=3.0),
    "PLIF": partial(sltt.PLIF, tau=3.0),
    "ALIF": partial(sltt.ALIF, tau=3.0),
    "CubaLIF": partial(sltt.CubaLIF, tau=3.0),
}


class Literal(sltt.Stateful):
    """The equations, with the last spikes kept by hand; nothing is folded."""

    states = ("last",)

    def __init__(self, recurrent):
        super().__init__()
        self.neuron, self.layer = recurrent.neuron, recurrent.layer

    def forward(self, x):
        self.last = self.neuron(x + self.layer(torch.zeros_like(x) if self.last is None else self.last))
        return self.last


def linear(neuron=NEURONS["LIF"], other=None):
    layers = [nn.Linear(6, 8), nn.Identity()]
    layers += [sltt.Recurrent(neuron(), nn.Linear(8, 8)), nn.Linear(8, 7)]
    layers += [sltt.Recurrent((other or neuron)(), nn.Linear(7, 7))]
    return scaled(nn.Sequential(*layers, nn.Linear(7, 3)))


def scaled(model):
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.weight.data.mul_(2)
    return model.double()


def written_out(model):
    model = copy.deepcopy(model)
    for i, module in enumerate(model):
        if isinstance(module, sltt.Recurrent):
            model[i] = Literal(module)
    return model


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("neurons", [("LIF", "CubaLIF"), ("PLIF", "ALIF")], ids="+".join)
def test_every_rule_trains_a_recurrent_layer(neurons, rule):
    model = linear(*(NEURONS[name] for name in neurons))
    x, y = batch(steps=5)
    found, out = gradients(model, rule, x, y, seed=3)
    expected, plain = gradients(written_out(model), alone(rule), x, y, seed=3)
    # written out, nothing says whose spikes the recurrent weights read: without traces of inputs they lack them
    same = [not (".layer." in name and getattr(rule, "inputs", True) is False) for name, _ in model.named_parameters()]
    kept = torch.cat([torch.full_like(p, s).flatten() for s, p in zip(same, model.parameters(), strict=True)]).bool()
    torch.testing.assert_close(found[kept], expected[kept], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(out.logits, plain.logits)
    weights = dict(model.named_parameters())["2.layer.weight"]
    assert weights.shape == (8, 8)


def test_the_spikes_come_back_a_step_later():
    recurrent = sltt.Recurrent(sltt.IF(), nn.Linear(2, 2, bias=False))
    recurrent.layer.weight.data = torch.tensor([[0.0, 0.0], [1.0, 0.0]])  # the first excites the second
    x = torch.tensor([[[1.0, 0.0]], [[0.0, 0.0]], [[0.0, 0.0]]])
    with torch.no_grad():
        assert [recurrent(x_t).tolist() for x_t in x] == [[[1.0, 0.0]], [[0.0, 1.0]], [[0.0, 0.0]]]


@pytest.mark.parametrize(
    "rule", [sltt.BPTT(), sltt.BPTT(fold=3), sltt.SLTT(), sltt.SLTT(fold=4), sltt.OTTT()], ids=repr
)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "normalised"])
def test_convolutional_recurrence(rule, norm):
    back = nn.Conv2d(4, 4, 3, padding=1)
    back = nn.Sequential(back, nn.BatchNorm2d(4)) if norm else back
    layers = [nn.Conv2d(1, 4, 3), sltt.Recurrent(sltt.LIF(tau=3.0), back), nn.Flatten(), nn.Linear(4 * 9, 3)]
    model = scaled(nn.Sequential(*layers))
    x, y = 2 * torch.randn(5, 6, 1, 5, 5, dtype=torch.float64), torch.randint(3, (6,))
    found, expected = gradients(model, rule, x, y)[0], gradients(written_out(model), alone(rule), x, y)[0]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert found.abs().max() > 0


def test_sltt_cuts_the_way_back_and_ottt_is_e_prop():
    """∇W = Σ_t e[t] s[t−1]ᵀ under SLTT; OTTT filters s by the neurons' λ, as e-prop does."""
    model = nn.Sequential(
        nn.Linear(6, 8), sltt.Recurrent(sltt.LIF(tau=3.0), nn.Linear(8, 8, bias=False)), nn.Linear(8, 3)
    )
    model = scaled(model)
    x, y = batch(steps=7)
    neuron, back, readout = model[1].neuron, model[1].layer, model[2]
    v = s = trace = torch.zeros(5, 8, dtype=torch.float64)
    sltt_, e_prop = 0, 0
    for x_t in x:
        u = (neuron.decay() * v + model[0](x_t) + back(s)).detach().requires_grad_()
        trace = neuron.decay() * trace + s
        fired = neuron.surrogate(u - 1)
        (e,) = torch.autograd.grad(LOSS(readout(fired), y) / len(x), u)
        sltt_, e_prop = sltt_ + e.T @ s, e_prop + e.T @ trace
        v, s = (u - fired).detach(), fired.detach()
    for rule, expected in ((sltt.SLTT(), sltt_), (sltt.OTTT(), e_prop)):
        model.zero_grad()
        rule(model, x, y, LOSS)
        torch.testing.assert_close(back.weight.grad, expected, rtol=1e-10, atol=1e-12)


def test_a_window_of_mixed_is_that_of_the_whole_recurrent_layer():
    model, (x, y) = linear(), batch(steps=6)
    whole, bptt = (gradients(model, rule, x, y)[0] for rule in (sltt.Mixed({"2": "all", "4": "all"}), sltt.BPTT()))
    torch.testing.assert_close(whole, bptt, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("layer", "message"),
    [(nn.Linear(3, 4), r"gets spikes \[2, 3\] and gives \[2, 4\]: expected a layer that keeps the shape")],
)
def test_recurrence_of_the_wrong_width_is_named(layer, message):
    with pytest.raises(ValueError, match=message):
        sltt.Recurrent(sltt.LIF(), layer)(torch.randn(2, 3))


def test_neuron_and_layer_are_told_apart():
    with pytest.raises(ValueError, match=r"neuron must be a layer of neurons, such as sltt.LIF\(\), got Linear"):
        sltt.Recurrent(nn.Linear(3, 3), sltt.LIF())


def test_firing_rates_count_the_neurons_inside_once():
    model = linear()
    with sltt.analysis.firing_rates(model) as rates:
        sltt.unroll(model, batch(steps=6)[0])
    assert list(rates.by_layer()) == ["2.neuron", "4.neuron"]
    assert rates.mean() > 0


def spoken(size):
    """Counts of events [17, B, 700], as of SHD, and the class: the order of three sounds with silence in between."""
    orders = torch.tensor([*itertools.permutations(range(3))])
    y = torch.randint(len(orders), (size,))
    rates = torch.full((17, size, 700), 0.01)
    for place, sound in enumerate(orders[y].T):
        start = 700 / 3 * (sound + 0.5) + 25 * torch.randn(size)  # each has a third of the channels, and rises
        for step in range(3):
            distance = torch.arange(700) - start[:, None] - 25 * (step - 1)
            rates[7 * place + step] += 0.3 * torch.exp(-((distance / 50) ** 2) / 2)
    return torch.poisson(rates), y


@pytest.mark.slow
def test_256_recurrent_units_learn_the_order_of_sounds():
    """The answer at the last step needs all three sounds, and a membrane keeps 1/32 of what was before a silence.

    Low thresholds let neurons fire from the start, and a small learning rate does not mend a bad initialisation. The
    accuracy is below 0.1 without recurrence or with recurrent weights that stay, and 0.6 with five times larger ones.
    """
    network = sltt.models.MLP([700, 256, 6], partial(sltt.LIF, tau=2.0, v_threshold=0.25), norm=False, recurrent=True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.0002)
    for _ in range(120):
        x, y = spoken(64)
        optimizer.zero_grad()
        sltt.BPTT()(network, x, y, nn.CrossEntropyLoss())
        optimizer.step()
    x, y = spoken(512)
    with torch.no_grad():
        said = sltt.unroll(network, x)[-1].argmax(1)
    assert (said == y).float().mean() > 0.9
