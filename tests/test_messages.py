"""What a user gives wrong, and what the error says to do."""

import re
from functools import partial

import pytest
import torch
from torch import nn

import sltt
from tests.conftest import LOSS, batch, small_network


def test_a_static_image_without_steps_is_explained():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), sltt.LIF(), nn.Flatten(), nn.Linear(4 * 36, 3))
    x, y = torch.randn(5, 3, 8, 8), torch.randint(3, (5,))
    with pytest.raises(RuntimeError) as caught:
        sltt.unroll(model, x)
    assert "T = 5 time steps of 3 samples; for a static input [B, ...] say steps=T" in caught.value.__notes__[0]
    with pytest.raises(ValueError, match=r"say steps=T"):
        sltt.SLTT()(model, x, y, LOSS)


class Calls(nn.Module):
    """Calls a function with its network, and the input of a time step, in every forward."""

    def __init__(self, call):
        super().__init__()
        self.network, self.call = small_network(), call

    def forward(self, x):
        return self.call(self.network, x)


def reset_first(reset, network, x):
    reset(network)
    return network(x)


def looped(network, x):
    return torch.stack([network(x) for _ in range(4)])


class Branches(sltt.Neuron):
    @staticmethod
    def step(x, v):
        return (x, v) if x > 1 else (v, x)


class EverySecond(sltt.Rule):
    def run(self, batch):
        for t in range(0, batch.steps, 2):
            batch.backward(batch.forward(range(t, t + 1)))
            batch.detach()
        return batch.output()


def every_step(outputs, target):
    return (outputs - target).square().mean()


X, Y = batch(steps=4)
UNCLEAR = {
    "float32 for float64": ({"x": X.float()}, r"in 0, Linear\(in_features=6.*weights of torch.float64: give x.to"),
    "integers": ({"x": X.long()}, r"of torch.int64, with weights of torch.float64: give x.to\(torch.float64\)"),
    "weights on another device": ({"model": small_network().to("meta")}, "with weights of meta: give x.to"),
    "a list of targets": ({"y": Y.tolist(), "loss": nn.CrossEntropyLoss()}, r"outputs \[5, 3\] .* and targets \["),
    "a branch in a neuron": ({"model": nn.Sequential(nn.Linear(6, 3), Branches()).double()}, r"write torch.where\("),
    "a target at each step": (
        {"y": torch.randn(5, 4, 3), "loss": every_step},
        r"outputs \[5, 3\] .* and targets \[5, 4, 3\]",
    ),
    "targets in time": ({"y": torch.randn(4, 5, 3)}, r"for a target at each time step: sltt.losses.PerStep\(loss\)"),
    "a step left out": ({"rule": EverySecond()}, r"runs all T = 4 time steps, and this one ran 0, 2: call batch.run"),
    "a loop over time": ({"model": Calls(looped)}, r"loops over time: return the output of one time step"),
    "reset within": ({"model": Calls(partial(reset_first, sltt.reset))}, r"network.2 \(LIF\) was reset in the middle"),
    "samples first": ({"x": X.transpose(0, 1)}, r"\[B, T, ...\] give x\.transpose\(0, 1\), also where T = B"),
    "no sample": ({"x": X[:, :0], "y": Y[:0]}, r"at least one sample to train on, got an input of shape \[4, 0, 6\]"),
}


@pytest.mark.parametrize(("changes", "message"), UNCLEAR.values(), ids=UNCLEAR)
def test_what_is_wrong_is_said_with_the_remedy(changes, message):
    given = {"rule": sltt.SLTT(), "model": small_network(), "x": X, "y": Y, "loss": LOSS, **changes}
    rule, model, x, y, loss = (given.pop(name) for name in ("rule", "model", "x", "y", "loss"))
    with pytest.raises((ValueError, RuntimeError, TypeError)) as caught:
        rule(model, x, y, loss, **given)
    assert re.search(message, "\n".join([str(caught.value), *getattr(caught.value, "__notes__", ())]))
