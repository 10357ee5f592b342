import copy
from functools import partial

import pytest
import torch
from torch import nn

import sltt
from tests.conftest import KINDS, LOSS, batch, gradient, gradients
from tests.interop.libraries import NETWORK_RULES, gradients_of, jelly, network, network_of, snn
from tests.references import by_hand, every


@pytest.mark.parametrize(
    ("rule", "window"),
    [(sltt.BPTT(segment=2), 9), (sltt.TBPTT(2), 2), (sltt.SLTT(), 1)],
    ids=["BPTT(segment=2)", "TBPTT(2)", "SLTT"],
)
def test_gradients_equal_the_library_s_own_loop(library, rule, window):
    model, x, y = network_of(library)
    expected, _ = by_hand(model, x, y, every(window, library.detach), library.reset)
    out = rule(model, x, y, LOSS)
    found = gradient(model)
    tolerance = {"rtol": 1e-10, "atol": 1e-13} if x.dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(found, expected, **tolerance)
    assert expected.abs().max() > 0
    torch.testing.assert_close(out.logits, sltt.unroll(model, x))


def test_sltt_k_trains_the_steps_that_it_draws(library):
    model, x, y = network_of(library)
    total = 0
    for t in range(len(x)):
        seed = next(s for s in range(999) if torch.randperm(5, generator=torch.Generator().manual_seed(s))[0] == t)
        total = total + gradients_of(partial(sltt.SLTT(k=1), seed=seed), model, x, y)
    torch.testing.assert_close(total, gradients_of(sltt.SLTT(), model, x, y), rtol=1e-4, atol=1e-6)


def test_nothing_is_left_behind(library):
    """A second batch, of another size, has the gradient that it has alone."""
    model, x, y = network_of(library)
    expected = gradients_of(sltt.SLTT(), model, x[:, :3], y[:3])
    gradients_of(sltt.BPTT(), model, x, y)
    torch.testing.assert_close(gradients_of(sltt.SLTT(), model, x[:, :3], y[:3]), expected, rtol=1e-5, atol=1e-7)


def test_a_copy_is_a_network_of_its_own():
    """snnTorch's reset and detach reach what its constructors made, and a copy is made by none."""
    model, x, y = network_of(snn("Leaky"))
    twin = copy.deepcopy(model)
    for rule in (sltt.SLTT(), sltt.BPTT(), sltt.SLTT()):
        assert torch.equal(gradients_of(rule, twin, x, y), gradients_of(rule, model, x, y))


def test_an_exception_resets_the_model(library):
    model, x, y = network_of(library)
    expected = sltt.unroll(model, x, fold=1)

    def fails(logits, target):
        raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        sltt.SLTT()(model, x, y, fails)
    with torch.no_grad():
        assert torch.equal(model(x[0]), expected[0])  # without a reset: the state is that of the start


def test_firing_rates_count_the_library_s_neurons(library):
    model, x, y = network_of(library)
    with sltt.analysis.firing_rates(model) as rates:
        spikes = []
        hook = model[1].register_forward_hook(lambda m, i, o: spikes.append(torch.count_nonzero(o)))
        sltt.SLTT()(model, x, y, LOSS)
        hook.remove()
    found = rates.by_layer()
    assert len(found) == 2
    assert repr(rates) == f"FiringRates({', '.join(f'{name}: {rate:.1%}' for name, rate in found.items())})"
    assert all(0.01 < rate < 0.99 for rate in found.values())  # the networks of the tests spike
    assert next(iter(found.values())) == pytest.approx(sum(spikes).item() / (5 * 5 * 8))
    assert rates.mean() > 0


@pytest.mark.parametrize("name", KINDS)
def test_every_rule_gives_the_gradient_that_it_gives_for_the_same_neuron_here(name):
    rule, neuron = NETWORK_RULES[name], pytest.importorskip("spikingjelly.activation_based.neuron")
    surrogate = pytest.importorskip("spikingjelly.activation_based.surrogate").PiecewiseQuadratic(alpha=1.0)
    theirs = [
        neuron.LIFNode(tau=2.0, decay_input=False, v_reset=None, surrogate_function=surrogate, detach_reset=False)
        for _ in range(2)
    ]
    model = network(*theirs).double()
    ours = copy.deepcopy(model)
    ours[1], ours[3] = sltt.LIF(tau=2.0), sltt.LIF(tau=2.0)
    x, y = batch()
    torch.manual_seed(1)
    expected, _ = gradients(ours, rule, x, y)
    torch.manual_seed(1)
    if isinstance(rule, sltt.RateBased):
        with pytest.raises(ValueError, match=r"not of 1 \(LIFNode\)"):
            gradients(model, rule, x, y)
        return
    torch.testing.assert_close(gradients(model, rule, x, y)[0], expected)


def test_neurons_of_several_libraries_and_ours_in_one_module():
    """Each library's neurons keep their state for themselves: the gradient of the loop that detaches each by hand."""
    first, second = jelly("LIFNode", tau=2.0), snn("Leaky")
    model = nn.Sequential(network(first.make(8), second.make(7)), sltt.LIF(tau=2.0), nn.Linear(3, 3)).double()
    x, y = batch()

    def reset(model):
        first.reset(model)
        second.reset(model)
        model[1].v = None

    def detach(model):
        first.detach(model)
        second.detach(model)
        model[1].v = model[1].v.detach()

    for rule, window in ((sltt.BPTT(), 9), (sltt.BPTT(segment=2), 9), (sltt.SLTT(), 1)):
        expected, _ = by_hand(model, x, y, every(window, detach), reset)
        torch.testing.assert_close(gradients_of(rule, model, x, y), expected, rtol=1e-10, atol=1e-13)
