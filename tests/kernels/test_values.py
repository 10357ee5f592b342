"""Convolutions of any values, such as rates: their gradients are Winograd's, or in bf16 matrix products."""

import pytest
import torch
from torch import nn

import sltt
from sltt import kernels
from sltt.kernels.layers import costs, values, winograd
from tests.conftest import LOSS, gradients
from tests.kernels.exact import NATIVE, applied
from tests.references import Checkpointed, recorded


@pytest.fixture
def products(monkeypatch):
    """The weight gradients that were matrix products, of layers of any size."""
    monkeypatch.setattr(values.costs, "PRODUCTS_FROM", 0)
    return recorded(monkeypatch, values, "_multiplied_weight_gradient")


@pytest.mark.parametrize("spikes", [True, False])
@pytest.mark.parametrize(("size", "stride", "padding"), [((4, 4), 1, 1), ((7, 5), 2, (0, 2)), ((3, 6), (1, 3), (2, 1))])
def test_gradients_in_bfloat16_are_those_of_pytorch(size, stride, padding, spikes, products, monkeypatch):
    """Of small images; on spikes that are too dense for sparse layers, and on other values."""
    monkeypatch.setattr(costs, "break_even", lambda *args: costs.BreakEven(0.0, 0.0))
    conv = nn.Conv2d(16, 24, 3, stride, padding, bias=spikes).to(memory_format=torch.channels_last)
    x = torch.randn(16, 16, *size).contiguous(memory_format=torch.channels_last).requires_grad_()
    found = []
    for sparse in ("auto", "off"):
        with torch.autocast("cpu", torch.bfloat16), kernels.using(sparse=sparse):
            y = applied(conv, sltt.LIF()(2 * x) if spikes else x)
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
    with pytest.raises(RuntimeError, match="expected input"):
        applied(nn.Conv2d(16, 16, 3), torch.randn(2, 8, 5, 5).contiguous(memory_format=torch.channels_last))
    assert not products


@pytest.fixture
def taken(monkeypatch):
    """The input gradients that are Winograd's; layers of any size take it."""
    monkeypatch.setattr(costs, "PRODUCTS_FROM", 0)
    monkeypatch.setattr(costs, "fast_gradients", winograd.supports)
    return recorded(monkeypatch, winograd, "input_gradient")


class Residual(nn.Sequential):
    def forward(self, x):
        y = super().forward(x)
        y += x
        return y


@NATIVE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [Checkpointed, Residual], ids=["checkpoint", "in place"])
def test_networks_that_pytorch_runs(kind, dtype, taken):
    layers = nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(inplace=True), kind(nn.Conv2d(32, 32, 3, padding=1))
    model = nn.Sequential(*layers, nn.ReLU(inplace=True), sltt.LIF(), nn.Flatten(), nn.Linear(32 * 64, 3))
    model, y = model.to(memory_format=torch.channels_last), torch.randint(3, (4,))
    x, found = torch.randn(4, 3, 8, 8).contiguous(memory_format=torch.channels_last), []
    for sparse in ("auto", "off"):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32), kernels.using(sparse=sparse):
            found.append(gradients(model, sltt.SLTT(), x, y, LOSS, steps=2)[0])
    assert taken
    torch.testing.assert_close(*found, rtol=5e-2, atol=1e-5 if dtype == torch.float32 else 5e-3)


@NATIVE
@pytest.mark.parametrize(
    "rules",
    [(sltt.BPTT(segment=2), sltt.BPTT()), (sltt.BPTT(recompute=True, fold=4), sltt.BPTT(fold=4))],
    ids=["segments", "recompute"],
)
def test_a_forward_that_runs_again_gives_the_same(rules, taken):
    layers = []
    for inputs in (3, 32, 32):
        layers += [nn.Conv2d(inputs, 32, 3, padding=1), nn.BatchNorm2d(32), sltt.LIF(), nn.AvgPool2d(2)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 16, 3)).to(memory_format=torch.channels_last)
    x, y = torch.randn(4, 8, 3, 32, 32), torch.randint(3, (8,))
    again, once = (gradients(model, rule, x, y, LOSS)[0] for rule in rules)
    assert taken
    torch.testing.assert_close(again, once)


@NATIVE
def test_gradients_have_gradients(taken):
    conv = nn.Conv2d(32, 32, 3, padding=1)
    x, found = torch.randn(2, 32, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_(), []
    for sparse in ("auto", "off"):
        with kernels.using(sparse=sparse):
            y = applied(conv, x)
        (of_x,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(of_x.square().mean(), [x, conv.weight]))
    assert taken  # by what has no gradient itself
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@NATIVE
def test_negated_memory_is_read_right(taken):
    numbers = torch.complex(torch.randn(32, 32, 3, 3), torch.randn(32, 32, 3, 3)).requires_grad_()
    weight, operation = numbers.conj().imag, kernels.operation_of(nn.Conv2d(32, 32, 3, padding=1))
    assert weight.is_neg()
    x = torch.randn(2, 32, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    (found,) = torch.autograd.grad(kernels.run_layer(operation, x, weight, None, kernels.WeightCache()).sum(), x)
    torch.testing.assert_close(found, nn.grad.conv2d_input(x.shape, weight, torch.ones(2, 32, 8, 8), padding=1))


@NATIVE
@pytest.mark.parametrize("types", [(torch.float32, torch.float64), (torch.bfloat16, torch.float32)])
def test_types_that_pytorch_refuses_are_refused(types, taken):
    conv = nn.Conv2d(32, 32, 3, padding=1)
    conv.bias.data = conv.bias.data.to(types[1])
    x = torch.randn(2, 32, 8, 8).contiguous(memory_format=torch.channels_last).to(types[0])
    with pytest.raises(RuntimeError, match="type"):
        applied(conv, x)
