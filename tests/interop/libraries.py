"""Small networks of the neurons of other libraries, and each library's own reset and detach."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import sltt
from tests.conftest import LOSS, RULES, batch, gradient

NETWORK_RULES = {**RULES}
NETWORK_RULES["Mixed"] = sltt.Mixed({"1": "all"})  # the first neurons of the networks here
NETWORK_RULES["Mixed(default=2)"] = sltt.Mixed({"1": 3}, default=2)


def jelly(name, **kwargs):
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    functional = pytest.importorskip("spikingjelly.activation_based.functional")
    return SimpleNamespace(
        make=lambda size: getattr(neuron, name)(**kwargs), reset=functional.reset_net, detach=functional.detach_net
    )


def snn(name, recurrent=False, **kwargs):
    snntorch = pytest.importorskip("snntorch")

    def make(size):
        sizes = {"linear_features": size} if recurrent else {}
        sizes |= {"input_size": size, "hidden_size": size} if name == "SLSTM" else {"beta": 0.8}
        # snnTorch's own surrogates give float32 for any input
        return getattr(snntorch, name)(spike_grad=sltt.surrogates.ArcTan(), init_hidden=True, **sizes | kwargs)

    def reset(model):
        for m in model.modules():
            if isinstance(m, snntorch.SpikingNeuron):
                m.reset_mem()

    def detach(model):
        for m in model.modules():
            for state in ("spk", "syn", "mem", "syn_exc", "syn_inh"):
                if hasattr(m, state):
                    setattr(m, state, getattr(m, state).detach())

    dtype = torch.float32 if name == "SLSTM" else torch.float64  # of its first state, for any input
    return SimpleNamespace(make=make, reset=reset, detach=detach, dtype=dtype)


def sinabs(name, **kwargs):
    layers = pytest.importorskip("sinabs.layers")

    def detach(model):  # not by zero_grad, which zeroes the gradient of the time constants too
        for m in model.modules():
            for state in ("v_mem", "i_syn"):
                if getattr(m, state, None) is not None:
                    setattr(m, state, getattr(m, state).detach())

    def reset(model):
        for m in model.modules():
            if isinstance(m, layers.StatefulLayer):
                m.reset_states()

    return SimpleNamespace(
        make=lambda size: getattr(layers, name)(num_timesteps=1, **kwargs),
        reset=reset,
        detach=detach,
        dtype=torch.float32,  # of its spikes, for any input
    )


def norse(name, **parameters):
    torch_ = pytest.importorskip("norse.torch")
    interop = pytest.importorskip("sltt.interop.norse")
    kind = getattr(torch_, name)

    def make(size):
        args = (size, size) if "Recurrent" in name else ()
        p = {"p": getattr(torch_, parameters["p"])(**parameters["of_p"])} if parameters else {}
        return interop.KeepState(kind(*args, dt=0.001, **p))

    def each(function):
        return lambda model: [function(m) for m in model.modules() if isinstance(m, interop.KeepState)]

    def cut(m):
        m.state = None if m.state is None else type(m.state)(*(s.detach() for s in m.state))

    return SimpleNamespace(make=make, reset=each(lambda m: setattr(m, "state", None)), detach=each(cut))


CASES = {
    "jelly LIF": (jelly, "LIFNode", {"tau": 2.0}),
    "jelly LIF, soft": (jelly, "LIFNode", {"tau": 3.0, "decay_input": False, "v_reset": None, "store_v_seq": True}),
    "jelly IF": (jelly, "IFNode", {"detach_reset": True}),
    "jelly PLIF": (jelly, "ParametricLIFNode", {"v_reset": None}),
    "jelly KLIF": (jelly, "KLIFNode", {}),
    "snn Leaky": (snn, "Leaky", {}),
    "snn Leaky, zero": (snn, "Leaky", {"reset_mechanism": "zero"}),
    "snn Leaky, zero, at once": (snn, "Leaky", {"reset_mechanism": "zero", "reset_delay": False}),
    "snn Leaky, none": (snn, "Leaky", {"reset_mechanism": "none"}),
    "snn Leaky, learned": (snn, "Leaky", {"reset_mechanism": "zero", "learn_beta": True}),
    "snn Leaky, learned threshold": (snn, "Leaky", {"learn_beta": True, "learn_threshold": True}),
    "snn Lapicque": (snn, "Lapicque", {"threshold": 0.2}),
    "snn Lapicque, zero": (snn, "Lapicque", {"threshold": 0.2, "reset_mechanism": "zero"}),
    "snn Synaptic": (snn, "Synaptic", {"alpha": 0.5}),
    "snn Synaptic, zero": (snn, "Synaptic", {"alpha": 0.5, "reset_mechanism": "zero"}),
    "snn Synaptic, at once": (snn, "Synaptic", {"alpha": 0.5, "reset_mechanism": "zero", "reset_delay": False}),
    "snn Alpha": (snn, "Alpha", {"alpha": 0.9, "threshold": 0.05}),
    "snn RLeaky": (snn, "RLeaky", {"recurrent": True}),
    "snn RSynaptic": (snn, "RSynaptic", {"alpha": 0.5, "recurrent": True}),
    "snn SLSTM": (snn, "SLSTM", {"threshold": 0.1, "reset_mechanism": "subtract"}),
    "sinabs LIF": (sinabs, "LIFSqueeze", {"tau_mem": 3.0, "norm_input": False}),
    "sinabs LIF with current": (sinabs, "LIFSqueeze", {"tau_mem": 3.0, "tau_syn": 2.0}),
    "sinabs LIF, learned": (sinabs, "LIFSqueeze", {"tau_mem": 3.0, "train_alphas": True}),
    "sinabs IAF": (sinabs, "IAFSqueeze", {}),
    "norse LIFBox": (norse, "LIFBoxCell", {"p": "LIFBoxParameters", "of_p": {"v_th": torch.tensor(0.1)}}),
    "norse LIF": (norse, "LIFCell", {"p": "LIFParameters", "of_p": {"v_th": torch.tensor(0.1)}}),
    "norse IAF": (norse, "IAFCell", {}),
    "norse recurrent": (norse, "LIFRecurrentCell", {"p": "LIFParameters", "of_p": {"v_th": torch.tensor(0.1)}}),
}


def network(*neurons):
    layers = [nn.Linear(6, 8), neurons[0], nn.Linear(8, 7), neurons[1], nn.Linear(7, 3)]
    for layer in layers:
        if isinstance(layer, nn.Linear):
            layer.weight.data.mul_(3)
    return nn.Sequential(*layers)


def network_of(library):
    """A network of the library's neurons, and a batch for it."""
    x, y = batch(steps=5)
    dtype = getattr(library, "dtype", torch.float64)
    return network(library.make(8), library.make(7)).to(dtype), x.to(dtype), y


def gradients_of(rule, model, x, y):
    model.zero_grad()
    rule(model, x, y, LOSS)
    return gradient(model)
