"""Residual sums under `recompute`: made again from their terms, where autograd would keep them."""

from collections import deque

import pytest
import torch
from torch import nn

import sltt
from sltt import kernels
from sltt.kernels.spikes import saved
from tests.conftest import LOSS, gradients


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.BatchNorm2d(8), sltt.LIF(), nn.Conv2d(8, 8, 3, padding=1))

    def forward(self, x):
        return self.layers(x) + x


def network():
    torch.manual_seed(0)
    blocks = [Residual() for _ in range(3)]
    return nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), *blocks, nn.BatchNorm2d(8), sltt.LIF(), nn.Flatten(1)).double()


@pytest.mark.parametrize("place", ["here", "elsewhere"])
def test_sums_of_at_most_two_layers_are_made_again_and_gradients_stay(place, request, monkeypatch):
    if place == "elsewhere":  # where nobody looks at values
        request.getfixturevalue(place)
    x, y = torch.rand(3, 4, 2, 16, 16).double(), torch.randint(5, (4,))
    found, tag_sum = [], kernels.tag_sum

    def look(x, seen):
        tag_sum(x, seen)
        found.append(saved.tag_of(x) is not None)

    monkeypatch.setattr(kernels, "tag_sum", look)
    again = gradients(network(), sltt.BPTT(recompute=True, fold=1), x, y, loss=LOSS)
    # before each normalisation: the first layer; sums, of which every other one is kept, to make the next from
    assert found == 3 * [True, False, True, False]
    for a, b in zip(again, gradients(network(), sltt.BPTT(fold=1), x, y, loss=LOSS), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("here", [True, False])
def test_what_is_no_sum_or_changed_has_no_tag(here, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cpu", here)
    a, b = (torch.randn(2, 64, 64).requires_grad_() + 0 for _ in "ab")
    with kernels.save_as_bits():
        for x, tagged in ((a + b, True), (b + a, True), (a + 2 * b, False), (a - b, False), ((a + b).mul_(2), False)):
            seen = deque([a, b], maxlen=2)
            kernels.tag_sum(x, seen)
            assert (saved.tag_of(x) is not None) == tagged
            assert seen[-1] is (b if tagged else x)
        x = a + b
        kernels.tag_sum(x, deque([a, b]))
        kept = saved.save(x.detach())
        assert torch.equal(saved.restore(kept), x)
        a.mul_(2)
        with pytest.raises(RuntimeError, match="changed by an in-place operation"):
            saved.restore(kept)
