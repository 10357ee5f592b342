"""Checkpoints of PyTorch around layers run these again in the backward, where a time step is over."""

import pytest
import torch
from torch import nn

import sltt
from sltt import kernels
from sltt.kernels.norm import normed
from tests.conftest import gradients
from tests.references import Checkpointed


def test_checkpoint_around_a_neuron_is_refused():
    y = Checkpointed(nn.Linear(4, 4), sltt.LIF())(torch.randn(2, 4, requires_grad=True))
    with pytest.raises(RuntimeError, match=r"torch\.utils\.checkpoint repeats a forward whose state has moved on"):
        y.sum().backward()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # in steps without a graph
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "rule",
    [sltt.SLTT(fold=1), sltt.BPTT(recompute=True, fold=1), sltt.RateBased(), sltt.RateBased(steady=True)],
    ids=repr,
)
def test_a_checkpoint_around_a_convolution_on_spikes(rule, reentrant, monkeypatch):
    monkeypatch.setattr(normed, "NORMED_FROM", 2)
    part = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16, momentum=1.0)
    first = nn.Conv2d(2, 16, 3, padding=1), sltt.LIF(tau=1.5)
    last = sltt.LIF(tau=1.5), nn.AvgPool2d(16), nn.Flatten(), nn.Linear(16, 3)
    plain, again = (
        nn.Sequential(*first, one, *last).to(memory_format=torch.channels_last)
        for one in (nn.Sequential(*part), Checkpointed(*part, reentrant=reentrant))
    )
    x, y = 3 * torch.randn(3, 8, 2, 16, 16), torch.randint(3, (8,))
    with kernels.using(sparse="on"):
        found, expected = (gradients(model, rule, x, y)[0] for model in (again, plain))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_a_checkpoint_of_the_first_linear_layer_runs_again_on_all_of_a_static_input():
    model = nn.Sequential(Checkpointed(nn.Linear(784, 64)), sltt.LIF(), nn.Linear(64, 5)).double()
    x, y = torch.randn(32, 784).double(), torch.randint(5, (32,))
    found, expected = (gradients(model, sltt.SLTT(fold=fold), x, y, steps=8)[0] for fold in (4, 1))
    torch.testing.assert_close(found, expected)
