"""Gradients of views of spikes, and of spikes that were weighted and pooled, are those without bits."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sltt
from sltt import kernels
from sltt.surrogates import Triangle
from tests.conftest import gradients


class Own(sltt.Neuron):
    @staticmethod
    def step(x, v):
        u = 0.5 * v + x
        s = Triangle()(u - 1)
        return s, u - s


FRONTS = {
    "LIF": lambda: sltt.LIF(2.0),
    "a neuron of one's own": Own,
    "dropped": lambda: nn.Sequential(sltt.LIF(2.0), sltt.Dropout(0.2)),
    "pooled": lambda: nn.Sequential(sltt.LIF(2.0), nn.MaxPool2d(3, 1, 1)),
}
CHANNELS = torch.linspace(0.5, 1.5, 16)[:, None, None]
COLUMNS = torch.linspace(0.5, 1.5, 8)
USES = {
    "chunks": lambda conv, s: conv(torch.cat(s.chunk(2, 1)[::-1], 1)),
    "half the channels": lambda conv, s: conv(s[:, 8:].repeat(1, 2, 1, 1)) + conv.weight.sum() * s[:, :8].mean(),
    "every second row": lambda conv, s: conv(s[:, :, ::2]),
    "half the batch, then all": lambda conv, s: conv(s[:4]).mean() + conv(s),
    "one channel, expanded": lambda conv, s: conv(s[:, 1:2].expand(-1, 16, -1, -1)),
    "a gate": lambda conv, s: conv(s) * (conv.weight[0, 0, 0, 0] * s[:, 8:9]),
    "weighted by channel, a part pooled": lambda conv, s: conv(
        F.max_pool2d((s * CHANNELS)[:, :8], 3, 1, 1).repeat(1, 2, 1, 1)
    ),
    "weighted by channel, flattened, pooled": lambda conv, s: conv(
        F.max_pool1d((s * CHANNELS).flatten(2), 3, 1, 1).unflatten(2, (8, 8))
    ),
    "weighted by channel, rows and channels exchanged": lambda conv, s: conv(
        F.max_pool2d((s * CHANNELS).permute(0, 2, 1, 3), 3, 1, 1).permute(0, 2, 1, 3)
    ),
    "weighted by channel, pooled, halved": lambda conv, s: conv(0.5 * F.max_pool2d(s * CHANNELS, 3, 1, 1)),
    "weighted by column, then pooled": lambda conv, s: conv(F.max_pool2d(s * COLUMNS, 3, 1, 1)),
    "weighted by row, then pooled": lambda conv, s: conv(F.max_pool2d(s * COLUMNS[:, None], 2)),
}


class Network(nn.Module):
    def __init__(self, front, use):
        super().__init__()
        self.first, self.front, self.use = nn.Conv2d(2, 16, 3, padding=1), front, use
        self.conv, self.neuron, self.head = nn.Conv2d(16, 16, 3, padding=1), sltt.LIF(2.0), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.neuron(self.use(self.conv, self.front(self.first(x)))).mean((2, 3)))


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("front", FRONTS)
def test_views_and_pools_of_spikes_have_the_gradients_that_they_have_without_bits(front, use):
    torch.manual_seed(0)
    x, y = 2 * torch.randn(3, 8, 2, 8, 8), torch.arange(8) % 3
    model, found = Network(FRONTS[front](), USES[use]), []
    for bits, recompute in ((False, False), (True, False), (True, True)):
        torch.manual_seed(5)
        with kernels.using(bits=bits):
            found.append(gradients(model, sltt.BPTT(recompute=recompute), x, y)[0])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-6)
