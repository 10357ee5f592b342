import copy

import pytest
import torch
from torch import nn

import sltt
from sltt.sequence.layout import spiking_layers
from sltt.sequence.spikes import observe_spikes, watches
from tests.conftest import LOSS, batch, gradients
from tests.rules.rate_equations import RULE, SETTINGS, STEADY, by_equations, by_rates, network


@torch.no_grad()
def steady_inputs_of(model, x):
    """The mean current of each neuron layer in every step, and the logits: layer by layer."""
    first, _, lif1, second, lif2, third = model
    inputs, rate = {}, x.mean(0)
    for linear, lif in ((first, lif1), (second, lif2)):
        inputs[lif] = [linear(rate)] * len(x)
        rate, _ = by_equations(lif, inputs[lif])
    return inputs, third(rate)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_steady_is_the_equations_under_the_mean_current(settings):
    model = network(lambda: sltt.LIF(tau=2.0, **settings))
    x, y = batch(steps=6)
    found, out = gradients(model, STEADY, x, y)
    expected, loss = by_rates(model, x, y, *steady_inputs_of(model, x))
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(out.loss, loss)
    assert out.logits.shape == (6, 5, 3)
    assert not torch.allclose(found, gradients(model, RULE, x, y)[0])


@pytest.mark.parametrize("make", [sltt.IF, sltt.LIF, sltt.PLIF])
def test_steady_is_exact_where_the_current_is(make):
    model = nn.Sequential(nn.Linear(6, 8), make(), nn.Linear(8, 3)).double()
    model[0].weight.data.mul_(3)
    x, y = batch(steps=1)
    found, expected = copy.deepcopy(model), copy.deepcopy(model)
    a = STEADY(found, x[0], y, LOSS, steps=5)
    b = RULE(expected, x[0], y, LOSS, steps=5)
    torch.testing.assert_close(a.loss, b.loss)
    for p, q in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_steady_runs_the_layers_once_and_observers_see_the_spikes_of_all_steps():
    model, seen, calls = network(sltt.LIF), {}, []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    x, y = batch(steps=11)
    layers = spiking_layers(model)
    with (
        sltt.analysis.firing_rates(model) as rates,
        observe_spikes(layers, lambda name, s: seen.setdefault(name, []).append(s)),
    ):
        STEADY(model, x, y, LOSS)
    assert len(calls) == 1
    assert [s.shape for s in seen["2"]] == [(8 * 5, 8), (3 * 5, 8)]
    (current,) = steady_inputs_of(model, x)[0][model[2]][:1]
    v, expected = torch.full_like(current, model[2].start), []
    for _ in range(11):
        s, v = sltt.lif_step(v, current, decay=model[2].decay())
        expected.append(s)
    assert torch.equal(torch.cat(seen["2"]), torch.cat(expected))
    assert rates.by_layer() == {name: pytest.approx(torch.cat(spikes).mean().item()) for name, spikes in seen.items()}
    assert all("forward" not in vars(m) and not watches(m) for m in layers.values())


@pytest.mark.parametrize("steps", [1, 3, 63, 64, 300])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_firing_rates_are_exact(dtype, steps):
    neuron = sltt.IF(v_init=0.5)
    x = torch.linspace(-0.1, 1.1, 301, dtype=dtype).repeat(2, 1)
    with sltt.analysis.firing_rates(nn.Sequential(neuron, nn.Linear(301, 2, dtype=dtype))) as expected:
        sltt.unroll(nn.Sequential(neuron, nn.Identity()), x, steps=steps)
    model = nn.Sequential(neuron, nn.Linear(301, 2, dtype=dtype))
    with sltt.analysis.firing_rates(model) as found:
        STEADY(model, x, torch.tensor([0, 1]), lambda logits, y: LOSS(logits.float(), y), steps=steps)
    assert found.state_dict() == {"0": expected.state_dict()["0"]}


@pytest.mark.parametrize("rule", [RULE, STEADY], ids=repr)
def test_sums_over_many_steps_do_not_stand_still_in_16_bits(rule):
    model = nn.Sequential(sltt.IF(half_state=True), nn.Linear(4, 2)).to(torch.bfloat16)
    x = torch.full((3, 4), 1.5, dtype=torch.bfloat16)  # a spike in every step
    seen = []
    model[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    rule(model, x, torch.tensor([0, 1, 0]), lambda logits, y: LOSS(logits.float(), y), steps=400)
    assert torch.equal(seen[-1], torch.ones(3, 4, dtype=torch.bfloat16))


@pytest.mark.parametrize("rule", [RULE, STEADY], ids=repr)
def test_a_decay_of_one_element(rule):
    class Own(sltt.PLIF):
        def decay(self):
            return super().decay().reshape(1)

    x, y = batch(steps=3)
    own, plain = network(lambda: Own(tau=2.0)), network(lambda: sltt.PLIF(tau=2.0))
    plain.load_state_dict(own.state_dict())
    torch.testing.assert_close(gradients(own, rule, x, y)[0], gradients(plain, rule, x, y)[0])
