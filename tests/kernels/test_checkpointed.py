"""Checkpoints of PyTorch around layers run these again in the backward, where a time step is over."""

import pytest
import torch
from torch import nn

import sltt
from sltt import kernels
from tests.conftest import gradients


def test_checkpoint_around_a_neuron_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), sltt.LIF())
    y = torch.utils.checkpoint.checkpoint(model, torch.randn(2, 4, requires_grad=True), use_reentrant=False)
    with pytest.raises(RuntimeError, match=r"torch\.utils\.checkpoint repeats a forward whose state has moved on"):
        y.sum().backward()


class PartRunsAgain(nn.Module):
    """A convolution on spikes and its BatchNorm are in a checkpoint, unless `reentrant` is None."""

    def __init__(self, reentrant):
        super().__init__()
        self.conv1, self.lif1, self.lif2 = nn.Conv2d(2, 16, 3, padding=1), sltt.LIF(tau=1.5), sltt.LIF(tau=1.5)
        self.part = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16, momentum=1.0))
        self.head, self.reentrant = nn.Linear(16, 3), reentrant

    def forward(self, x):
        x = self.lif1(self.conv1(x))
        if self.reentrant is None:
            x = self.part(x)
        else:
            x = torch.utils.checkpoint.checkpoint(self.part, x, use_reentrant=self.reentrant)
        return self.head(self.lif2(x).mean((2, 3)))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # in steps without a graph
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "rule",
    [
        sltt.SLTT(fold=1),
        sltt.BPTT(fold=1),
        sltt.BPTT(recompute=True, fold=1),
        sltt.RateBased(),
        sltt.RateBased(steady=True),
    ],
    ids=repr,
)
def test_a_checkpoint_around_a_convolution_on_spikes(rule, reentrant):
    plain, again = (PartRunsAgain(how).to(memory_format=torch.channels_last) for how in (None, reentrant))
    again.load_state_dict(plain.state_dict())
    x, y = 3 * torch.randn(3, 8, 2, 16, 16), torch.randint(3, (8,))
    with kernels.using(sparse="on", compile="on"):
        found, expected = (gradients(model, rule, x, y)[0] for model in (again, plain))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_a_checkpoint_of_the_first_linear_layer_runs_again_on_all_of_a_static_input():
    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(784, 64)

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.linear, x, use_reentrant=False)

    model = nn.Sequential(First(), sltt.LIF(), nn.Linear(64, 5)).double()
    x, y = torch.randn(32, 784).double(), torch.randint(5, (32,))
    found, expected = (gradients(model, sltt.SLTT(fold=fold), x, y, steps=8)[0] for fold in (4, 1))
    torch.testing.assert_close(found, expected)
