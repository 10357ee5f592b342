"""What the tests compare rules with: the gradient of a loop written by hand, and the peak memory of a batch."""

import torch

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
