"""Input and weight gradient of dense 3×3 convolutions in fewer multiplications, against float64."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sltt
from sltt import kernels
from sltt.kernels import native, sparse
from tests.conftest import gradients

pytestmark = pytest.mark.skipif(native.problem() is not None, reason=str(native.problem()))


def layer_of(batch, inputs, outputs, size, padding=(1, 1), stride=1, kernel=3):
    pairs = tuple((p, p) for p in padding)
    return sparse.conv_layer((batch, inputs, *size), (outputs, inputs, kernel, kernel), (stride, stride), pairs)


def check(layer, weight, padding=(1, 1)):
    grad_y = torch.randn(layer.y_shape)
    found = sparse.input_gradient(layer, grad_y, weight)
    expected = nn.grad.conv2d_input(layer.x_shape, weight.double(), grad_y.double(), padding=padding)
    assert found.movedim(1, -1).is_contiguous()
    assert_equal(found, expected)
    if sparse.has_dense_weight_gradient(layer, grad_y.dtype):
        x = torch.randn(layer.x_shape)
        found = sparse.dense_weight_gradient(layer, x, grad_y)
        assert_equal(found, nn.grad.conv2d_weight(x.double(), weight.shape, grad_y.double(), padding=padding))


def assert_equal(found, expected):
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-6 * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize(("inputs", "outputs"), [(32, 16), (64, 48), (96, 112), (32, 96), (96, 64)])
@pytest.mark.parametrize(("batch", "size"), [(1, (1, 1)), (3, (7, 33)), (2, (17, 2)), (5, (4, 4))])
def test_odd_sizes(batch, size, inputs, outputs):
    check(layer_of(batch, inputs, outputs, size), torch.randn(outputs, inputs, 3, 3))


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_size_and_padding(data):
    draw = data.draw
    padding = draw(st.integers(0, 5)), draw(st.integers(0, 5))
    size = tuple(max(draw(st.integers(1, 12)), 3 - 2 * p) for p in padding)
    inputs, outputs = 32 * draw(st.integers(1, 4)), 16 * draw(st.integers(1, 8))
    torch.manual_seed(draw(st.integers(0, 9)))
    layer = layer_of(draw(st.integers(1, 4)), inputs, outputs, size, padding)
    check(layer, torch.randn(outputs, inputs, 3, 3), padding)


def test_weights_of_any_strides():
    layer = layer_of(2, 32, 32, (8, 8))
    for weight in (torch.randn(32, 64, 3, 3)[:, ::2], torch.randn(3, 3, 32, 32).permute(3, 2, 1, 0)):
        check(layer, weight)


@pytest.mark.parametrize("function", [sparse.input_gradient, sparse.dense_weight_gradient])
def test_any_number_of_threads_gives_the_same_bits(function):
    layer = layer_of(9, 64, 64, (17, 5))
    grad_y, weight, x = (torch.randn(shape) for shape in (layer.y_shape, layer.weight_shape, layer.x_shape))
    given = (grad_y, weight) if function is sparse.input_gradient else (x, grad_y)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4, 16):
            torch.set_num_threads(threads)
            results.append(function(layer, *given))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, results[0]) for one in results)


def test_what_it_cannot_do():
    assert sparse.has_input_gradient(layer_of(1, 32, 16, (4, 4)), torch.float32)
    assert not sparse.has_input_gradient(layer_of(1, 32, 16, (4, 4)), torch.bfloat16)
    assert not sparse.has_input_gradient(layer_of(1, 32, 16, (4, 4), stride=2), torch.float32)
    assert not sparse.has_input_gradient(layer_of(1, 32, 16, (4, 4), kernel=1), torch.float32)
    assert not sparse.has_input_gradient(layer_of(1, 16, 32, (4, 4)), torch.float32)
    assert not sparse.has_input_gradient(layer_of(1, 32, 24, (4, 4)), torch.float32)
    assert sparse.has_dense_weight_gradient(layer_of(1, 32, 32, (4, 4)), torch.float32)
    assert not sparse.has_dense_weight_gradient(layer_of(1, 32, 16, (4, 4)), torch.float32)


@pytest.mark.parametrize("mode", ["on", "off"])
def test_networks_take_it_for_layers_on_spikes(mode, monkeypatch):
    seen = []
    plain = sparse.input_gradient
    monkeypatch.setattr(sparse, "input_gradient", lambda *a: (seen.append(a[0].weight_shape), plain(*a))[1])
    first, second = nn.Conv2d(2, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
    model = nn.Sequential(first, sltt.LIF(), second, sltt.LIF(), nn.Flatten(), nn.Linear(32 * 64, 3))
    model = model.to(memory_format=torch.channels_last)
    x = torch.randn(8, 2, 8, 8).contiguous(memory_format=torch.channels_last)
    with kernels.using(sparse=mode):
        sltt.SLTT()(model, x, torch.randint(3, (8,)), sltt.losses.CrossEntropyMSE(), steps=2)
    assert seen == ([(32, 32, 3, 3)] * 2 if mode == "on" else [])


def test_weights_of_traces_take_both(monkeypatch):
    """Equal gradients under OTTT, whose traces have many values; layers that it cannot do stay PyTorch's."""
    seen = []
    plain = sparse.dense_weight_gradient
    monkeypatch.setattr(sparse, "dense_weight_gradient", lambda *a: (seen.append(a[0].weight_shape), plain(*a))[1])
    convs = nn.Conv2d(2, 32, 3), nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 48, 3), nn.Conv2d(48, 32, 3, 2)
    layers = [layer for conv in convs for layer in (conv, sltt.LIF(tau=2.0))]
    model: Any = nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 3)).double()
    model = model.to(memory_format=torch.channels_last)
    x, y = 3 * torch.randn(4, 4, 2, 7, 7, dtype=torch.float64), torch.randint(3, (4,))
    expected, _ = gradients(model, sltt.OTTT(), x, y)
    x = x.float().flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (4, 4))
    with kernels.using(sparse="on"):
        found, _ = gradients(model.float(), sltt.OTTT(), x, y)
    assert set(seen) == {(32, 32, 3, 3)}
    assert_equal(found, expected)
