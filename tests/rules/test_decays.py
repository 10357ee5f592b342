"""The λ of neurons of other libraries, which traces follow."""

import copy
import math

import pytest
import torch
from torch import nn

import sltt
from tests.conftest import LOSS, batch, gradients
from tests.rules.test_ottt import Neurons, network


def test_neurons_of_another_library():
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    surrogate = pytest.importorskip("spikingjelly.activation_based.surrogate")
    model = network()
    theirs = copy.deepcopy(model)
    for i, tau in ((1, 2.0), (3, 4.0)):
        model[i] = sltt.LIF(tau=tau, decay_input=True, detach_reset=True)
        kind = surrogate.PiecewiseQuadratic(alpha=1.0)
        theirs[i] = neuron.LIFNode(tau=tau, v_reset=None, detach_reset=True, surrogate_function=kind)
    x, y = batch()
    found, expected = (gradients(m, sltt.OTTT(), 2 * x, y)[0] for m in (theirs, model))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("library", ["snntorch", "sinabs"])
def test_neurons_of_another_library_whose_reset_ours_have_not(library):
    module = pytest.importorskip("sinabs.layers" if library == "sinabs" else library)

    def neuron(reset):
        if library == "snntorch":
            return module.Leaky(beta=0.8, init_hidden=True, reset_mechanism=reset)
        return module.LIFSqueeze(tau_mem=-1 / math.log(0.8), num_timesteps=1)  # a spike may count several times

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), neuron("subtract"), nn.Linear(8, 3))
    model[0].weight.data.mul_(3)
    x, y = (t.float() if t.is_floating_point() else t for t in batch(steps=5))
    found, expected = (gradients(model, rule, x, y)[0] for rule in (sltt.OTTT(), sltt.OTTT(0.8)))
    torch.testing.assert_close(found, expected)
    if library == "snntorch":  # whose resets have no gradient
        torch.testing.assert_close(found, gradients(model, sltt.BPTT(), x, y)[0])
        with pytest.raises(ValueError, match=r"1 \(Leaky\) resets to v_reset = 0"):
            sltt.OTTT()(nn.Sequential(nn.Linear(6, 8), neuron("zero"), nn.Linear(8, 3)), x, y, LOSS)


class Leaky(sltt.Stateful):
    """Its potential is its output."""

    states = ("v",)

    def forward(self, x):
        self.v = x if self.v is None else 0.8 * self.v + x
        return self.v


def test_a_leaky_readout_has_a_trace():
    torch.manual_seed(0)
    layers = nn.Linear(6, 8), sltt.LIF(detach_reset=True), nn.Linear(8, 3), Leaky()
    model, (x, y) = nn.Sequential(*layers).double(), batch(steps=5)
    with pytest.raises(ValueError, match=r"the λ of 3 \(Leaky\) is not known"):
        sltt.OTTT()(model, x, y, LOSS)
    exact, step = (gradients(model, rule, x, y)[0][-2:] for rule in (sltt.BPTT(), sltt.SLTT()))
    torch.testing.assert_close(gradients(model, sltt.OTTT(0.8), x, y)[0][-2:], exact)
    assert not torch.allclose(step[0], exact[0])
    gradients(model, sltt.OTTT(inputs=False), x, y)  # as published: λ is that of the neurons that fired
    sltt.register(Leaky, states=["v"], decay=lambda layer: 0.8)
    torch.testing.assert_close(gradients(model, sltt.OTTT(), x, y)[0][-2:], exact)


def test_a_state_that_has_no_gradient_needs_no_decay():
    class Counting(sltt.Stateful):
        states = ("mask",)

        def forward(self, x):
            self.mask = torch.ones_like(x).detach() if self.mask is None else self.mask
            return x * self.mask

    x, y = batch()
    plain = nn.Sequential(nn.Linear(6, 8), sltt.LIF(), nn.Linear(8, 3)).double()
    found, expected = (gradients(m, sltt.OTTT(), x, y)[0] for m in (nn.Sequential(*plain, Counting()), plain))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("value", [-0.5, 1.5, math.nan, True, "0.5", None, torch.tensor([]), torch.tensor(2)])
def test_a_decay_that_is_none_is_refused(value):
    class Theirs(Neurons):
        pass

    sltt.register(Theirs, states=["v"], spikes=True, decay=lambda neuron: value)
    model, (x, y) = nn.Sequential(nn.Linear(6, 6), Theirs(), nn.Linear(6, 3)), batch()
    message = "λ of 1 .Theirs. is not known" if value is None else r"λ of 1 is a number from 0 to 1"
    with pytest.raises(ValueError, match=message):
        sltt.OTTT()(model.double(), x, y, LOSS)
