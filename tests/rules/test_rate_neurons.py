"""`RateBased` with any neuron: beside T steps of its function under autograd."""

import pytest
import torch
from torch import nn

import sltt
from tests.conftest import LOSS, batch, gradient, gradients
from tests.references import Checkpointed
from tests.rules.rate_equations import RULE, STEADY, inputs_of

TRIANGLE = sltt.surrogates.Triangle()


class Own(sltt.Neuron):
    """A threshold that rises, by a rate that is learned for each channel."""

    states = ("v", "a")

    def __init__(self, channels):
        super().__init__()
        self.start = {"v": 0.2, "a": 0.1}
        self.rise = nn.Parameter(torch.linspace(0.1, 0.4, channels))
        self.leak = nn.Parameter(torch.tensor(0.6))

    @staticmethod
    def step(x, v, a, *, rise, leak):
        u = leak * v + x
        s = TRIANGLE(u - 0.8 - rise * a)
        return s, u - 0.8 * s, 0.7 * a + s


class OwnStep(sltt.LIF):
    @staticmethod
    def step(x, v, *, decay, v_threshold, surrogate):
        s = surrogate(torch.tanh(decay * v + x) - 0.6 * v_threshold)
        return s, decay * v + x - s


KINDS = {
    "ALIF": lambda channels: sltt.ALIF(tau=3.0, tau_a=5.0, beta=0.4),
    "ChannelLIF": lambda channels: sltt.ChannelLIF(channels, tau=2.5),
    "CubaLIF": lambda channels: sltt.CubaLIF(tau=3.0, tau_syn=2.0),
    "CubaLIF, hard": lambda channels: sltt.CubaLIF(tau=3.0, tau_syn=2.0, v_reset=0.1, detach_reset=True),
    "IntegerLIF": lambda channels: sltt.IntegerLIF(levels=3, tau=2.0),
    "TernaryLIF": lambda channels: sltt.TernaryLIF(tau=2.0),
    "own": Own,
    "own step": lambda channels: OwnStep(tau=2.0),
}


def network(kind, recurrent=False):
    neurons = [kind(8), kind(7)]
    if recurrent:
        neurons = [sltt.Recurrent(n, nn.Linear(c, c)) for n, c in zip(neurons, (8, 7), strict=True)]
    layers = nn.Sequential(nn.Linear(6, 8), neurons[0], nn.Linear(8, 7), neurons[1], nn.Linear(7, 3))
    for module in layers.modules():
        if isinstance(module, nn.Linear):
            module.weight.data.mul_(2)
    return layers.double()


def derivatives(neuron, inputs):
    """The rate, and what it is to first order in c and the parameters, by autograd through T steps."""
    given = neuron.arguments()
    learned = {name: p for name, p in given.items() if isinstance(p, torch.Tensor)}
    free = {name: p.detach().expand_as(inputs[0]).clone().requires_grad_() for name, p in learned.items()}
    c = torch.zeros_like(inputs[0]).requires_grad_()
    states = [torch.full_like(inputs[0], v) for v in neuron.first_states().values()]
    spikes = []
    for x in inputs:
        s, *states = neuron.step(x + c, *states, **given | free)
        spikes.append(s)
    rate = torch.stack(spikes).mean(0)
    slopes = torch.autograd.grad(rate.sum(), [c, *free.values()])
    return rate.detach(), slopes, list(learned.values())


def rate_pass(model, x, inputs):
    """The network on the mean of x, neurons by their derivatives; without `inputs`, under their mean current."""
    r, steps = x.mean(0), len(x)
    for layer in model:
        back = None
        if isinstance(layer, sltt.Recurrent):
            spikes = spikes_of(layer, inputs[layer.neuron])
            back, layer = layer.layer(torch.cat([torch.zeros_like(spikes[:1]), spikes[:-1]]).mean(0)), layer.neuron
        if not isinstance(layer, sltt.Neuron):
            r = layer(r)
            continue
        r = r if back is None else r + back
        rate, slopes, learned = derivatives(layer, [r.detach()] * steps if inputs is None else inputs[layer])
        changes = (slope * (z - z.detach()) for slope, z in zip(slopes, (r, *learned), strict=True))
        r = rate + sum(changes)
    return r


@torch.no_grad()
def spikes_of(layer, inputs):
    states, spikes = [torch.full_like(inputs[0], v) for v in layer.neuron.first_states().values()], []
    for x in inputs:
        s, *states = layer.neuron.step(x, *states, **layer.neuron.arguments())
        spikes.append(s)
    return torch.stack(spikes)


def expected(model, x, y, inputs, mean=None):
    """The gradient, and the loss."""
    rates = rate_pass(model, x, inputs)
    mean = rates if mean is None else mean + rates - rates.detach()
    loss = LOSS(mean, y)
    model.zero_grad()
    loss.backward()
    return gradient(model), loss.detach()


@pytest.mark.parametrize("recurrent", [False, True], ids=["", "recurrent"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_rate_is_differentiated_through_the_neurons_function(kind, recurrent):
    model = network(kind, recurrent)
    x, y = batch(steps=6)
    found, out = gradients(model, RULE, x, y)
    inputs, logits = inputs_of(model, x)
    of_reference, loss = expected(model, x, y, inputs, logits.mean(0))
    torch.testing.assert_close(found, of_reference, rtol=1e-10, atol=1e-13)
    assert found.count_nonzero() > len(found) / 2
    torch.testing.assert_close(out.loss, loss)
    torch.testing.assert_close(out.logits, logits)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_steady_it_is_that_under_the_mean_current(kind):
    model = network(kind)
    x, y = batch(steps=6)
    found, out = gradients(model, STEADY, x, y)
    of_reference, loss = expected(model, x, y, None)
    torch.testing.assert_close(found, of_reference, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(out.loss, loss)


@pytest.mark.parametrize("rule", [RULE, STEADY], ids=repr)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_with_one_step_it_is_bptt(kind, rule):
    model = network(kind)
    x, y = batch(steps=1)
    torch.testing.assert_close(gradients(model, rule, x, y)[0], gradients(model, sltt.BPTT(), x, y)[0])


def test_steady_a_recurrent_layer_is_refused():
    with pytest.raises(ValueError, match=r"1 \(Recurrent\) reads spikes of the step before: use RateBased\(\)"):
        STEADY(network(KINDS["ALIF"], recurrent=True), *batch(), LOSS)


def test_observers_see_the_steps_under_a_steady_current():
    model = network(KINDS["own"])
    x, y = batch(steps=5)
    with sltt.analysis.firing_rates(model) as rates:
        STEADY(model, x, y, LOSS)
    current = model[0](x.mean(0))
    assert rates.by_layer()["1"] == pytest.approx(derivatives(model[1], [current.detach()] * 5)[0].mean().item())


@pytest.mark.slow
@pytest.mark.parametrize("neuron", [Own(4), sltt.PLIF(tau=2.0, v_reset=0.0, decay_input=True)], ids=["own", "PLIF"])
def test_compiled_with_channels_last_it_is_the_plain_one(neuron):
    x, y = 2 * torch.randn(4, 3, 2, 8, 8), torch.randint(3, (3,))
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), neuron, nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(256, 3))
    with sltt.kernels.using(compile="off"):
        of_plain, _ = gradients(model, RULE, x, y)
    with sltt.kernels.using(compile="on"):
        torch.testing.assert_close(gradients(model.to(memory_format=torch.channels_last), RULE, x, y)[0], of_plain)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler's own
@pytest.mark.parametrize("rule", [RULE, STEADY], ids=repr)
@pytest.mark.parametrize(
    "kind", [lambda channels: sltt.PLIF(tau=2.0), KINDS["CubaLIF"], Own], ids=["PLIF", "CubaLIF", "own"]
)
def test_a_compiled_network_has_the_gradient_of_the_plain_one(kind, rule):
    model = network(kind)
    x, y = batch(steps=4)
    expected, _ = gradients(model, rule, x, y)
    found, _ = gradients(torch.compile(model, backend="eager"), rule, x, y)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("rule", [RULE, sltt.SLTT(fold=3)], ids=repr)
def test_neurons_in_a_checkpoint_are_named(rule):
    with pytest.raises(RuntimeError, match=r"LIF ran inside a backward pass: .* Leave the neurons out"):
        rule(nn.Sequential(Checkpointed(nn.Linear(6, 8), sltt.LIF()), nn.Linear(8, 3)).double(), *batch(), LOSS)


def test_a_buffer_that_grows():
    class Growing(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(0))

        def forward(self, x):
            self.seen = torch.cat([self.seen, x.detach().mean().float().view(1)])
            return x

    model = nn.Sequential(Growing(), *network(KINDS["ALIF"]))
    x, y = batch(steps=4)
    torch.testing.assert_close(gradients(model, RULE, x, y)[0], gradients(model[1:], RULE, x, y)[0])
