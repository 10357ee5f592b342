"""Subclasses of the neurons of the library, with another `step`, a learned threshold or a λ for each neuron."""

import pytest
import torch
from torch import nn

import sltt
from sltt.surrogates import Triangle

FIRES = Triangle()


class Stubborn(sltt.LIF):
    """Fires at twice the threshold, and forgets then."""

    @staticmethod
    def step(x, v, *, decay, v_threshold, surrogate):
        u = decay * v + x
        s = surrogate(u - 2 * v_threshold)
        return s, u * (1 - s)


class StubbornCurrent(sltt.CubaLIF):
    @staticmethod
    def step(x, v, i, *, decay, synaptic_decay, v_threshold, surrogate):
        i = synaptic_decay * i + x
        u = decay * v + i
        s = surrogate(u - 2 * v_threshold)
        return s, u * (1 - s), i


class Doubled(sltt.LIF):
    """LIF of twice the input, by the function of its class."""

    @staticmethod
    def step(x, v, *, decay, **constants):
        return sltt.lif_step(v, 2 * x, decay=decay, **constants)


class Vector(sltt.LIF):
    """A λ that is learned, as a vector of one."""

    def __init__(self):
        super().__init__(surrogate=FIRES)
        self.p = nn.Parameter(torch.zeros(1))

    def decay(self):
        return torch.sigmoid(self.p)


class PerNeuron(sltt.PLIF):
    """A time constant for each of five channels."""

    def __init__(self):
        super().__init__(tau=2.0, surrogate=FIRES)
        self.w = nn.Parameter(torch.linspace(-1, 1, 5))


class Started(sltt.LIF):
    def first_states(self):
        return {"v": 0.5}


class Advanced(sltt.LIF):
    def advance(self, x, steps=1, cut=False):
        return super().advance(2 * x, steps, cut)


class Fused(sltt.LIF):
    def fused_steps(self, x, steps, cut):
        return super().fused_steps(2 * x, steps, cut)


class Gains(sltt.Delay):
    """A gain for each tap."""

    def __init__(self):
        super().__init__([0, 2])
        self.gain = nn.Parameter(torch.tensor([1.0, 3.0]))

    def forward(self, x):
        return super().forward(x) * self.gain.repeat_interleave(x.shape[1])


@pytest.mark.parametrize("fold", [1, 3, "auto"])
@pytest.mark.parametrize("kind", [Started, Advanced, Fused, Gains])
def test_what_a_subclass_changes_holds_under_rules_as_in_a_loop(kind, fold):
    torch.manual_seed(0)
    layer = kind() if kind is Gains else kind(tau=2.0)
    model = nn.Sequential(nn.Linear(4, 5), layer, nn.Linear(10 if kind is Gains else 5, 3))
    x, y, loss = 3 * torch.randn(6, 8, 4), torch.arange(8) % 3, nn.CrossEntropyLoss()
    sum(loss(model(x_t), y) for x_t in x).div(6).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    sltt.reset(model)
    sltt.BPTT(fold=fold)(model, x, y, loss)
    torch.testing.assert_close([p.grad for p in model.parameters()], expected)


def test_a_time_constant_that_is_a_parameter_learns():
    found, neurons = [], [sltt.LIF(tau=2.0), sltt.LIF(tau=2.0)]
    neurons[1].tau = nn.Parameter(torch.tensor(2.0))
    for neuron in neurons:
        torch.manual_seed(0)
        first = nn.Linear(4, 5)
        sltt.SLTT()(nn.Sequential(first, neuron, nn.Linear(5, 3)), 3 * torch.randn(6, 8, 4), torch.arange(8) % 3,
                    nn.CrossEntropyLoss())  # fmt: skip
        found.append(first.weight.grad)
    torch.testing.assert_close(*found)
    assert neurons[1].tau.grad.abs() > 0


def literal(neuron, xs):
    """The steps one by one by the plain function."""
    named = {k: v.view(1, -1) if torch.is_tensor(v) and v.ndim else v for k, v in neuron.arguments().items()}
    states = [torch.full_like(xs[0], value) for value in neuron.first_states().values()]
    spikes = []
    for x in xs:
        s, *states = neuron.step(x, *states, **named)
        spikes.append(s)
    return torch.stack(spikes)


def learned_threshold(kind, **kwargs):
    neuron = kind(**kwargs)
    neuron.v_threshold = nn.Parameter(torch.tensor(0.7))
    return neuron


NEURONS = {
    "LIF with a step": lambda: Stubborn(tau=2.0, surrogate=FIRES),
    "CubaLIF with a step": lambda: StubbornCurrent(tau=2.0, surrogate=FIRES),
    "LIF with a step that passes on": lambda: Doubled(tau=2.0, v_threshold=0.5, v_reset=0.1, decay_input=True),
    "a vector of one": Vector,
    "PLIF of channels": PerNeuron,
    "LIF, learned threshold": lambda: learned_threshold(sltt.LIF, tau=2.0),
    "IF, learned threshold": lambda: learned_threshold(sltt.IF),
    "CubaLIF, learned threshold": lambda: learned_threshold(sltt.CubaLIF, tau=2.0),
}


@pytest.mark.parametrize("fold", [1, 3])
@pytest.mark.parametrize("name", NEURONS)
def test_the_layer_computes_the_step_of_its_class_and_learns_its_parameters(name, fold):
    torch.manual_seed(0)
    neuron, first, last = NEURONS[name](), nn.Linear(4, 5), nn.Linear(5, 3)
    x, y, loss = 3 * torch.randn(6, 8, 4), torch.arange(8) % 3, nn.CrossEntropyLoss()
    spikes = literal(neuron, [first(one) for one in x])
    weights = [*neuron.parameters(), *first.parameters()]
    expected = torch.autograd.grad(sum(loss(last(s), y) for s in spikes) / 6, weights)
    model = nn.Sequential(first, neuron, last)
    out = sltt.BPTT(fold=fold)(model, x, y, loss)
    torch.testing.assert_close(out.logits, torch.stack([last(s) for s in spikes]).detach())
    torch.testing.assert_close([p.grad for p in weights], list(expected))
    if "learned threshold" in name:
        before = out.logits
        with torch.no_grad():
            neuron.v_threshold.fill_(50.0)
        assert not torch.equal(sltt.unroll(model, x), before)


@pytest.mark.parametrize("rule", [sltt.RateBased(), sltt.RateBased(steady=True)], ids=repr)
@pytest.mark.parametrize("name", NEURONS)
def test_the_rate_of_one_step_has_the_gradient_of_the_function(name, rule):
    model = nn.Sequential(nn.Linear(4, 5), NEURONS[name](), nn.Linear(5, 3)).double()
    model[0].weight.data.mul_(3)
    x, y = torch.randn(1, 8, 4, dtype=torch.float64), torch.arange(8) % 3
    found = []
    for one in (rule, sltt.BPTT()):
        model.zero_grad()
        one(model, x, y, nn.CrossEntropyLoss())
        found.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*found)
