"""The equations of `RateBased`, and a network for them."""

import torch
from torch import nn

import sltt
from tests.conftest import LOSS

RULE = sltt.RateBased()
STEADY = sltt.RateBased(steady=True)
SETTINGS = {"soft": {}, "soft, detached": {"detach_reset": True}, "hard": {"v_reset": 0.1}}
SETTINGS |= {"hard, detached": {"v_reset": 0.0, "detach_reset": True}, "scaled input": {"decay_input": True}}
SETTINGS |= {"hard, scaled input": {"v_reset": -0.2, "decay_input": True}, "another start": {"v_init": 0.4}}
SETTINGS |= {"hard, another start": {"v_init": 0.4, "v_reset": -0.1}}
SETTINGS |= {"another threshold": {"v_threshold": 0.6, "surrogate": sltt.surrogates.Sigmoid()}}


def network(make, norm=False):
    between = nn.BatchNorm1d(8) if norm else nn.Identity()
    layers = [nn.Linear(6, 8), between, make(), nn.Linear(8, 7), make(), nn.Linear(7, 3)]
    for layer in layers[::3] + layers[-1:]:
        layer.weight.data.mul_(3)
    return nn.Sequential(*layers).double()


@torch.no_grad()
def inputs_of(model, x):
    """What each layer of neurons gets in each time step, and the logits."""
    found, hooks = {}, []
    for module in model.modules():
        if isinstance(module, sltt.Neuron):
            found[module] = []
            hooks.append(module.register_forward_hook(lambda m, inputs, out: found[m].append(inputs[0])))
    logits = sltt.unroll(model, x)
    for hook in hooks:
        hook.remove()
    return found, logits


def by_equations(neuron, inputs):
    """Rates r and ∂r/∂c of a layer with the inputs [T, B, C], by equations (2) to (5) of the docstring."""
    decay = float(neuron.decay())
    gain = 1 - decay if neuron.decay_input else 1
    rest = neuron.v_reset or 0.0
    v = torch.full_like(inputs[0], neuron.start)
    f = through = spikes = slope = 0
    for x in inputs:
        u = rest + decay * (v - rest) + gain * x
        s = (u >= neuron.v_threshold).double()
        ds = neuron.surrogate.derivative(u - neuron.v_threshold)
        f = gain + decay * through * f
        spikes, slope = spikes + s, slope + ds * f
        jump = 0 if neuron.detach_reset else 1
        if neuron.v_reset is None:
            v, through = u - neuron.v_threshold * s, 1 - jump * neuron.v_threshold * ds
        else:
            v, through = u - (u - rest) * s, 1 - s - jump * (u - rest) * ds
    return spikes / len(inputs), slope / len(inputs)


def by_rates(model, x, y, inputs, mean):
    """The gradient of Linear, norm, LIF, Linear, LIF, Linear by the rates under each LIF's inputs, and the loss."""
    first, _, lif1, second, lif2, third = model
    mean = mean.detach().requires_grad_()
    loss = LOSS(mean, y)
    (error,) = torch.autograd.grad(loss, mean)
    grads = []
    for linear, below in ((third, lif2), (second, lif1), (first, None)):
        rate, slope = by_equations(below, inputs[below]) if below else (x.mean(0), 1)
        grads = [(error.T @ rate).flatten(), error.sum(0), *grads]
        error = (error @ linear.weight) * slope
    return torch.cat(grads), loss.detach()


@torch.no_grad()
def steady_inputs_of(model, x):
    """The mean current of each neuron layer in every step, and the logits: layer by layer."""
    first, _, lif1, second, lif2, third = model
    inputs, rate = {}, x.mean(0)
    for linear, lif in ((first, lif1), (second, lif2)):
        inputs[lif] = [linear(rate)] * len(x)
        rate, _ = by_equations(lif, inputs[lif])
    return inputs, third(rate)
