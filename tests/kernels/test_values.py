"""Convolutions of any values, such as rates: their weight gradients are one matrix product in bf16."""

import pytest
import torch
from torch import nn

import sltt
from sltt import kernels
from sltt.kernels import layers
from tests.conftest import LOSS, gradients


@pytest.fixture
def products(monkeypatch):
    """The weight gradients that were one matrix product, of layers of any size."""
    made = []
    multiply = layers._multiplied_weight_gradient
    monkeypatch.setattr(layers, "_multiplied_weight_gradient", lambda *a: (made.append(1), multiply(*a))[1])
    monkeypatch.setattr(layers.costs, "PRODUCTS_FROM", 0)
    return made


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("size", "stride", "padding"), [((4, 4), 1, 1), ((7, 5), 2, (0, 2)), ((3, 6), (1, 3), (2, 1))])
def test_gradients_in_bfloat16_are_those_of_pytorch(size, stride, padding, bias, products):
    conv = nn.Conv2d(16, 24, 3, stride, padding, bias=bias).to(memory_format=torch.channels_last)
    x = torch.randn(16, 16, *size).contiguous(memory_format=torch.channels_last).requires_grad_()
    found = []
    for sparse in ("auto", "off"):
        with torch.autocast("cpu", torch.bfloat16), kernels.using(sparse=sparse), kernels.saving():
            y = conv(x)
        torch.manual_seed(0)
        found.append([y, *torch.autograd.grad(y, [x, *conv.parameters()], torch.randn(y.shape).bfloat16())])
    assert len(products) == 1
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("rule", [sltt.RateBased(), sltt.RateBased(steady=True), sltt.SLTT()], ids=repr)
def test_rules_take_them_and_keep_their_gradients(rule, products):
    layer = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.AvgPool2d(2), nn.Conv2d(16, 16, 3, padding=1))
    model = nn.Sequential(layer, sltt.LIF(), nn.Flatten(), nn.Linear(64, 3)).to(memory_format=torch.channels_last)
    frames, y = torch.randn(3, 8, 4, 4, 16).movedim(-1, 2), torch.randint(3, (8,))
    found = []
    for sparse in ("auto", "off"):
        with torch.autocast("cpu", torch.bfloat16), kernels.using(sparse=sparse):
            found.append(gradients(model, rule, frames, y, LOSS)[0])
    assert products
    torch.testing.assert_close(*found, rtol=5e-2, atol=5e-3)


def test_pytorch_says_what_does_not_fit(products):
    with kernels.saving(), pytest.raises(RuntimeError, match="expected input"):
        nn.Conv2d(16, 16, 3)(torch.randn(2, 8, 5, 5).contiguous(memory_format=torch.channels_last))
    assert not products
