"""Each neuron beside a literal transcription of its equations, and under every rule."""

import math

import pytest
import torch

import sltt
from sltt.neurons import inspection
from tests.conftest import KINDS as RULE_KINDS
from tests.conftest import RULES, batch, gradients, small_network
from tests.neurons.plain import OwnLIF, alone, plain
from tests.neurons.test_custom import Graded
from tests.references import measured

RULES = {name: RULES[name] for name in RULE_KINDS if not isinstance(RULES[name], sltt.RateBased)}
TRIANGLE = sltt.surrogates.Triangle()


def cuba(x, lam=1 - 1 / 3, alpha=0.5, gain=0.7, theta=0.8, rest=None, detach=False):
    v, i = torch.full_like(x[0], rest or 0.0), torch.zeros_like(x[0])
    for x_t in x:
        i = alpha * i + x_t
        u = lam * v + gain * i if rest is None else rest + lam * (v - rest) + gain * i
        s = TRIANGLE(u - theta)
        r = s.detach() if detach else s
        v = u - theta * r if rest is None else u - (u - rest) * r
        yield s


def alif(x):
    v, a = torch.zeros_like(x[0]), torch.zeros_like(x[0])
    for x_t in x:
        threshold = 0.8 + 0.3 * a
        u = (1 - 1 / 3) * v + x_t
        s = TRIANGLE(u - threshold)
        v, a = u - 0.8 * s, (1 - 1 / 20) * a + s
        yield s


def channel(x):
    w, k = torch.tensor(-math.log(3 - 1)), torch.tensor(math.log(0.8))
    w, k = (p.double().expand(x.shape[2]).clone().requires_grad_() for p in (w, k))
    v = torch.zeros_like(x[0])
    for x_t in x:
        u = (1 - torch.sigmoid(w)) * v + x_t
        s = TRIANGLE(u - torch.exp(k))
        v = u - torch.exp(k) * s
        yield s
    yield [w, k]


class RoundClip(torch.autograd.Function):
    """clip(round(u), 0, D), with the derivative of the clip."""

    @staticmethod
    def forward(ctx, u, levels):
        ctx.save_for_backward(u)
        ctx.levels = levels
        return torch.floor(u + 0.5).clip(0, levels)

    @staticmethod
    def backward(ctx, grad):
        (u,) = ctx.saved_tensors
        return grad * ((u > 0) & (u < ctx.levels)), None


def integer(x):
    v = torch.zeros_like(x[0])
    for x_t in x:
        u = (1 - 1 / 3) * v + x_t
        s = RoundClip.apply(u / 0.8, 3)
        v = u - 0.8 * s
        yield s


class Ternary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u):
        ctx.save_for_backward(u)
        return torch.where(u >= 0.8, 1.0, torch.where(u <= -0.8, -1.0, 0.0)).to(u.dtype)

    @staticmethod
    def backward(ctx, grad):
        (u,) = ctx.saved_tensors
        return grad * ((1 - (u - 0.8).abs()).clamp(min=0) + (1 - (u + 0.8).abs()).clamp(min=0))


def ternary(x):
    v = torch.zeros_like(x[0])
    for x_t in x:
        u = (1 - 1 / 3) * v + x_t
        s = Ternary.apply(u)
        v = u - 0.8 * s
        yield s


def leaky_integrator(x):
    v = torch.zeros_like(x[0])
    for x_t in x:
        v = (1 - 1 / 3) * v + (1 - (1 - 1 / 3)) * x_t
        yield v


CUBA = {"tau": 3.0, "tau_syn": 2.0, "gain": 0.7, "v_threshold": 0.8}
EQUATIONS = {
    "CubaLIF": (lambda: sltt.CubaLIF(**CUBA), cuba),
    "CubaLIF, hard reset": (lambda: sltt.CubaLIF(**CUBA, v_reset=-0.3), lambda x: cuba(x, rest=-0.3)),
    "CubaLIF, reset detached": (lambda: sltt.CubaLIF(**CUBA, detach_reset=True), lambda x: cuba(x, detach=True)),
    "CubaLIF, no leak": (lambda: sltt.CubaLIF(**{**CUBA, "tau": None}), lambda x: cuba(x, lam=1.0)),
    "ALIF": (lambda: sltt.ALIF(tau=3.0, tau_a=20.0, beta=0.3, v_threshold=0.8), alif),
    "ChannelLIF": (lambda: sltt.ChannelLIF(6, tau=3.0, v_threshold=0.8), channel),
    "IntegerLIF": (lambda: sltt.IntegerLIF(3, tau=3.0, v_threshold=0.8), integer),
    "TernaryLIF": (lambda: sltt.TernaryLIF(tau=3.0, v_threshold=0.8), ternary),
    "LI": (lambda: sltt.LI(tau=3.0, decay_input=True), leaky_integrator),
}


@pytest.mark.parametrize(("make", "equations"), EQUATIONS.values(), ids=EQUATIONS)
def test_spikes_and_gradients_equal_the_equations(make, equations):
    neuron = make().double()
    x = (torch.randn(8, 50, 6, dtype=torch.float64) + 0.3).requires_grad_()
    weights = torch.randn(8, 50, 6, dtype=torch.float64)
    spikes = torch.stack([neuron(x_t) for x_t in x])
    found = torch.autograd.grad((spikes * weights).sum(), [x, *neuron.parameters()])
    *expected, last = equations(x)
    learned = last if isinstance(last, list) else []
    expected = torch.stack(expected if learned else [*expected, last])
    assert torch.equal(spikes, expected)
    gradient = torch.autograd.grad((expected * weights).sum(), [x, *learned])
    torch.testing.assert_close(found, gradient, rtol=1e-10, atol=1e-12)
    assert len(expected.unique()) == {"IntegerLIF": 4, "TernaryLIF": 3, "LI": x.numel()}.get(type(neuron).__name__, 2)


KINDS = {
    "CubaLIF": lambda width: sltt.CubaLIF(tau=3.0, tau_syn=2.0),
    "ALIF": lambda width: sltt.ALIF(tau=3.0),
    "ChannelLIF": lambda width: sltt.ChannelLIF(width, tau=3.0),
    "IntegerLIF": lambda width: sltt.IntegerLIF(3, tau=3.0),
    "TernaryLIF": lambda width: sltt.TernaryLIF(tau=3.0),
}


def network(*kinds):
    """The small network with two kinds of neurons, or with one in both layers."""
    widths = iter([8, 7])
    made = iter([kinds[0], kinds[-1]])
    return small_network(lambda: (KINDS | {"Graded": lambda width: Graded()})[next(made)](next(widths)))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize(
    "kinds", [("CubaLIF", "ALIF"), ("ChannelLIF", "IntegerLIF"), ("TernaryLIF", "Graded")], ids="+".join
)
def test_every_rule_trains_every_neuron(kinds, rule):
    model = network(*kinds)
    x, y = batch()
    found, out = gradients(model, rule, x, y, seed=3)
    expected, plain_out = gradients(plain(model), alone(rule), x, y, seed=3)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(out.logits, plain_out.logits)
    assert found.count_nonzero() > len(found) / 5


@pytest.mark.parametrize("rule", [sltt.BPTT(), sltt.BPTT(fold=4), sltt.OTTT()], ids=repr)
def test_weights_before_a_readout_have_the_gradient_of_its_equations(rule):
    model, (x, y) = torch.nn.Sequential(*small_network(), sltt.LI(tau=3.0, decay_input=True)), batch()
    loss, head = torch.nn.functional.cross_entropy, model[-2]
    found, _ = gradients(model, rule, x, y, loss)
    logits = torch.stack(
        [*leaky_integrator(torch.nn.functional.linear(sltt.unroll(model[:-2], x), *head.parameters()))]
    )
    expected = torch.autograd.grad(sum(loss(one, y) for one in logits) / len(x), [*head.parameters()])
    torch.testing.assert_close(found[-24:], torch.cat([one.flatten() for one in expected]))


def test_traces_have_the_decay_of_the_neurons():
    x, y = batch()
    for name in ("ALIF", "IntegerLIF", "TernaryLIF", "ChannelLIF"):
        model = network(name)
        a, b = (gradients(model, rule, x, y)[0] for rule in (sltt.OTTT(), sltt.OTTT(decay=1 - 1 / 3)))
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match=r"2 \(CubaLIF\) resets to v_reset = -0.5"):
        sltt.OTTT()(small_network(lambda: sltt.CubaLIF(v_reset=-0.5)), x, y, sltt.losses.CrossEntropyMSE())


@pytest.mark.parametrize("make", [sltt.CubaLIF, OwnLIF])
def test_a_neuron_takes_two_numbers_more_than_lif_at_most(make):
    """At the peak of a batch of SLTT, for each neuron."""
    x, y = torch.randn(4, 64, 1024), torch.zeros(64, dtype=torch.long)

    def peak(neuron):
        model = torch.nn.Sequential(torch.nn.BatchNorm1d(1024), neuron, torch.nn.Linear(1024, 2))
        return measured(sltt.SLTT(), model, x, y) / (4 * 64 * 1024)

    assert peak(make()) - peak(sltt.LIF()) < 2.1


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_repr_names_what_it_was_made_with(kind):
    neuron = kind(8)
    assert "tau=3" in repr(neuron)
    assert "surrogate=" in repr(neuron)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sltt.CubaLIF(tau_syn=0.5), "tau_syn must be at least 1, got 0.5"),
        (lambda: sltt.CubaLIF(gain=0.0), "gain must be greater than 0"),
        (lambda: sltt.CubaLIF(v_reset=1.0), "v_reset must be less than 1.0"),
        (lambda: sltt.ALIF(beta=-1.0), "beta must be at least 0"),
        (lambda: sltt.ALIF(tau_a=1.0), "tau_a must be greater than 1"),
        (lambda: sltt.ChannelLIF(0), "channels must be at least 1"),
        (lambda: sltt.IntegerLIF(0), "levels must be at least 1"),
        (lambda: sltt.TernaryLIF(v_threshold=0.0), "v_threshold must be greater than 0"),
        (lambda: sltt.ChannelLIF(4)(torch.randn(2, 5)), r"ChannelLIF has decay of shape \[4\] for an input \[2, 5\]"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("kind", KINDS)
def test_inference_mode_gives_the_same_spikes(kind):
    inspection.emits_bits.cache_clear()
    model, (x, _) = network(kind), batch()
    with torch.inference_mode():
        found = sltt.unroll(model, x)
    assert torch.equal(found, sltt.unroll(model, x))
