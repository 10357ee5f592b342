"""Signals, whose convolutions and poolings run with the channels last in memory, as images of one row."""

import copy

import pytest
import torch
from torch import nn

import sltt
from sltt.kernels import native
from tests.conftest import each_kind
from tests.kernels.test_layers import assert_close, run

pytestmark = pytest.mark.skipif(native.problem() is not None, reason=str(native.problem()))


def of_signals(dims, own_forward):
    """A network of signals, or of images of one row."""
    conv, norm, pool = (getattr(nn, f"{kind}{dims}d") for kind in ("Conv", "BatchNorm", "MaxPool"))

    def size(k, rest=1):
        return (rest, k) if dims == 2 else k

    layers = nn.Sequential(
        *(conv(1, 16, size(9), size(2), size(4, 0)), norm(16), sltt.LIF(), pool(size(2))),
        *(conv(16, 24, size(3), padding=size(1, 0)), norm(24), sltt.LIF(), pool(size(3))),
        *(conv(24, 32, size(3), dilation=size(2)), sltt.LIF(), nn.Flatten(), nn.Linear(32 * 6, 5)),
    )
    return OneByOne(layers) if own_forward else layers


class OneByOne(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Views(OneByOne):
    def forward(self, x):
        x = self.layers[:-2](x)
        return self.layers[-1](x.view(len(x), -1))  # which signals with their channels last do not take


@pytest.mark.parametrize("images", [False, True])
def test_a_view_of_signals_keeps_them_as_they_are(images):
    layers, x, y = of_signals(1, False), torch.randn(4, 64, 1, 128), torch.randint(5, (64,))
    if images:
        layers, x = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Flatten(2), *layers), x.view(4, 64, 1, 8, 16)
    expected, _ = run(layers, sltt.BPTT(fold=1), x, y, "off")
    found, _ = run(Views(layers), sltt.BPTT(), x, y, "on", compile="on")
    assert_close(found, {f"layers.{name}": grad for name, grad in expected.items()}, 1e-3)


@pytest.mark.parametrize("own_forward", [False, True])
@each_kind
def test_signals_run_as_images_of_one_row(rule, own_forward, sparse_calls):
    rows, model = of_signals(2, own_forward), of_signals(1, own_forward)
    if isinstance(rule, sltt.Mixed):
        rule = sltt.Mixed({f"{'layers.' * own_forward}2": "all"})
    model.load_state_dict(
        {name: value.squeeze(2) if value.ndim == 4 else value for name, value in rows.state_dict().items()}
    )
    x, y = torch.randn(4, 16, 1, 128), torch.randint(5, (16,))
    dense, _ = run(copy.deepcopy(model).double(), rule, x.double(), y, "off")
    compile = "off" if isinstance(rule, sltt.RateBased) else "on"  # of rates, by TorchInductor
    found, out = run(model, rule, x, y, "on", compile)
    assert own_forward or sparse_calls or isinstance(rule, sltt.RateBased)
    expected, same = run(rows, rule, x.unsqueeze(3), y, "on", compile)
    torch.testing.assert_close(out.logits, same.logits)
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name].view_as(grad), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad.double(), dense[name], rtol=1e-3, atol=1e-5)
