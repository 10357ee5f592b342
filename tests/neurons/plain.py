"""A neuron of one's own, and a neuron's function under autograd, in a module that is no `sltt.Neuron`."""

import copy

import torch
from torch import nn

import sltt


class OwnLIF(sltt.Neuron):
    decay = 0.5

    @staticmethod
    def step(x, v, *, decay):
        u = decay * v + x
        s = sltt.surrogates.Triangle()(u - 1)
        return s, u - s


class Plain(sltt.Stateful):
    """A neuron's function under autograd."""

    spikes = True

    def __init__(self, neuron):
        self.states = neuron.states
        super().__init__()
        self.held = (neuron,)  # no module in a module, of which a rule would take the inner one
        self.learned = nn.ParameterList(neuron.parameters())

    def forward(self, x):
        (neuron,) = self.held
        first = neuron.first_states()
        states = [torch.full_like(x, first[n]) if (v := getattr(self, n)) is None else v for n in self.states]
        named = {
            name: v.view(-1, *[1] * (x.ndim - 2)) if isinstance(v, torch.Tensor) and v.ndim else v
            for name, v in neuron.arguments().items()
        }
        s, *states = neuron.step(x, *states, **named)
        for name, state in zip(self.states, states, strict=True):
            setattr(self, name, state)
        return s


def plain(model):
    """A network with its neurons replaced by the same under autograd."""
    model = copy.deepcopy(model)
    for i, module in enumerate(model):
        if isinstance(module, sltt.Neuron):
            model[i] = Plain(module)
    return model


def alone(rule):
    """A rule with one time step in a call."""
    rule = copy.copy(rule)
    vars(rule).update({"fold": 1} if "fold" in vars(rule) else {})
    return rule
