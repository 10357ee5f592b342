"""What tests of several folders need: a loop written by hand, peak memory, calls of a function, a checkpoint."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sltt import kernels, reset
from sltt.analysis import peak_memory
from tests.conftest import LOSS, gradient


def detach(module):
    """Detach the states of a module and of those in it, without the code of the library."""
    for part in module.modules():
        for name in getattr(part, "states", ()):
            if (value := getattr(part, name)) is not None:
                setattr(part, name, value.detach())


def by_hand(model, x, y, cut=lambda model, t: None, reset=reset):
    """The gradient and the loss of one graph over the literal loop, in which `cut(model, t)` detaches after step t."""
    model.zero_grad()
    reset(model)
    total = 0
    for t, x_t in enumerate(x, 1):
        total = total + LOSS(model(x_t), y) / len(x)
        cut(model, t)
    total.backward()
    expected = gradient(model)
    model.zero_grad()
    return expected, total.detach()


def every(window, detach=detach):
    """Cuts the graph every `window` steps."""
    return lambda model, t: detach(model) if t % window == 0 else None


def measured(rule, model, x, y, *, gradients=True, **kwargs):
    """Bytes at the peak of a batch with eager kernels, whatever ran in the tests before; `gradients`: are in place."""

    def batch():
        rule(model, x, y, LOSS, **kwargs)

    with kernels.using(compile="off"):
        batch()  # on a new machine, the first one times layers, which takes memory
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if gradients else None
        return peak_memory(batch)


def recorded(patch, owner, name, note=lambda *args: args):
    """List `note` of the arguments of each call of a function from here on."""
    calls, function = [], getattr(owner, name)
    patch.setattr(owner, name, lambda *args, **kwargs: (calls.append(note(*args)), function(*args, **kwargs))[1])
    return calls


class Checkpointed(nn.Sequential):
    """Layers that run again in the backward."""

    def __init__(self, *layers, reentrant=False):
        super().__init__(*layers)
        self.reentrant = reentrant

    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=self.reentrant)


def marked(hook):
    """A hook that takes several time steps in a call."""
    hook.sees_folds = True
    return hook
