"""Dense 3×3 convolutions in fewer multiplications, against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sltt
from sltt import kernels
from sltt.kernels import native
from sltt.kernels.layers import costs, sparse, winograd
from tests.conftest import gradients
from tests.kernels.steps import default_type, threads

pytestmark = pytest.mark.skipif(native.problem() is not None, reason=str(native.problem()))


def layer_of(batch, inputs, outputs, size, padding=(1, 1), stride=1, kernel=3):
    pairs = tuple((p, p) for p in padding)
    return sparse.conv_layer((batch, inputs, *size), (outputs, inputs, kernel, kernel), (stride, stride), pairs)


def check(layer, weight, padding=(1, 1), dtype=torch.float32):
    """In bfloat16, the sums are float32 too: results are rounded once, and the weight gradient not at all."""
    x, grad_y = torch.randn(layer.x_shape).to(dtype), torch.randn(layer.y_shape).to(dtype)
    rounding = 0.0 if dtype == torch.float32 else 2**-8

    def dense(function, a, b, **given):
        """The result, and the largest sum of magnitudes: rounding errors are a part of that."""
        result, magnitudes = (function(q(a.double()), q(b.double()), **given) for q in (torch.Tensor.double, torch.abs))
        return result, magnitudes.max().item()

    def dense_input(g, w):
        return nn.grad.conv2d_input(layer.x_shape, w, g, padding=padding)

    def dense_weight(x, g):
        return nn.grad.conv2d_weight(x, weight.shape, g, padding=padding)

    found = winograd.input_gradient(layer, grad_y, weight)
    assert found.movedim(1, -1).is_contiguous()
    assert found.dtype == dtype
    assert_equal(found, *dense(dense_input, grad_y, weight), rounding)
    found = winograd.weight_gradient(layer, x, grad_y)
    assert found.dtype == torch.float32
    assert_equal(found, *dense(dense_weight, x, grad_y))


def assert_equal(found, expected, magnitude=None, rounding=0.0):
    largest = expected.abs().max().item() if magnitude is None else magnitude
    torch.testing.assert_close(found.double(), expected, rtol=rounding, atol=2e-6 * max(1.0, largest))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "size", "inputs", "outputs"),
    [(1, (1, 1), 32, 32), (3, (7, 33), 64, 96), (2, (17, 2), 96, 128), (5, (4, 4), 32, 96)],
)
def test_odd_sizes(batch, size, inputs, outputs, dtype):
    check(layer_of(batch, inputs, outputs, size), torch.randn(outputs, inputs, 3, 3), dtype=dtype)


def test_many_channels_lose_no_digits():
    check(layer_of(2, 32, 512, (4, 4)), torch.randn(512, 32, 3, 3))
    check(layer_of(2, 512, 32, (4, 4)), torch.randn(32, 512, 3, 3))


@settings(max_examples=30)
@given(st.data())
def test_any_size_and_padding(data):
    draw = data.draw
    padding = draw(st.integers(0, 5)), draw(st.integers(0, 5))
    size = tuple(max(draw(st.integers(1, 12)), 3 - 2 * p) for p in padding)
    inputs, outputs = 32 * draw(st.integers(1, 4)), 32 * draw(st.integers(1, 4))
    torch.manual_seed(draw(st.integers(0, 9)))
    layer = layer_of(draw(st.integers(1, 4)), inputs, outputs, size, padding)
    check(layer, torch.randn(outputs, inputs, 3, 3), padding)


def test_weights_of_any_strides():
    layer = layer_of(2, 32, 32, (8, 8))
    for weight in (torch.randn(32, 64, 3, 3)[:, ::2], torch.randn(3, 3, 32, 32).permute(3, 2, 1, 0)):
        check(layer, weight)


@pytest.mark.parametrize("function", [winograd.input_gradient, winograd.weight_gradient])
def test_any_number_of_threads_gives_the_same_bits(function):
    layer = layer_of(9, 64, 64, (17, 5))
    grad_y, weight, x = (torch.randn(shape) for shape in (layer.y_shape, layer.weight_shape, layer.x_shape))
    given = {"input_gradient": (grad_y, weight), "weight_gradient": (x, grad_y)}
    results = []
    for number in (1, 2, 4, 16):
        with threads(number):
            results.append(function(layer, *given[function.__name__]))
    assert all(torch.equal(one, results[0]) for one in results)


def test_no_memory_is_an_error(monkeypatch):
    layer = layer_of(1, 64, 64, (4, 4))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2**30)  # whose scratch is more than a process can address
    with pytest.raises(MemoryError, match="scratch"):
        winograd.input_gradient(layer, torch.randn(layer.y_shape), torch.randn(layer.weight_shape))


def test_what_it_cannot_do():
    able = {"batch": 1, "inputs": 32, "outputs": 32, "size": (4, 4)}
    for dtype in (torch.float32, torch.bfloat16):
        assert winograd.supports(layer_of(**able), dtype)
    assert not winograd.supports(layer_of(**able), torch.float16)
    others = {"size": (2, 2)}, {"stride": 2}, {"kernel": 1}, {"inputs": 48}, {"outputs": 16}
    for other in others:
        assert not winograd.supports(layer_of(**able | other), torch.float32)
    assert not winograd.supports(sparse.conv_layer((1, 32, 64), (32, 32, 3), (1,), ((1, 1),)), torch.float32)


@pytest.fixture
def seen(monkeypatch):
    """The names of the kernels that layers took."""
    names = []
    for name in ("input_gradient", "weight_gradient"):
        plain = getattr(winograd, name)
        monkeypatch.setattr(winograd, name, lambda *a, plain=plain, name=name: (names.append(name), plain(*a))[1])
    return names


@pytest.mark.parametrize("faster", [True, False])
@pytest.mark.parametrize("spikes", [True, False])
def test_layers_take_what_is_faster(spikes, faster, seen, monkeypatch):
    """On spikes that are too dense for sparse layers, and on other values; float64 says what is right."""
    monkeypatch.setattr(costs, "_dense_unit", lambda dtype: "AVX512" if faster else "AMX")
    monkeypatch.setattr(costs, "break_even", lambda *a: costs.BreakEven(0.0, 0.0))
    monkeypatch.setattr(costs, "PRODUCTS_FROM", 2**16)
    before = sltt.LIF() if spikes else nn.Tanh()
    layers = nn.Conv2d(2, 32, 3, padding=1), before, nn.Conv2d(32, 32, 3, padding=1, bias=spikes), sltt.LIF()
    check_gradients(nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 64, 3)), sltt.SLTT(), (8, 8), "auto")
    assert set(seen) == ({"input_gradient", "weight_gradient"} if faster else set())


def check_gradients(model, rule, size, mode):
    """A rule's gradients in float32, against those in float64."""
    model = model.double().to(memory_format=torch.channels_last)
    x, y = 3 * torch.randn(2, 4, 2, *size, dtype=torch.float64), torch.randint(3, (4,))
    expected, _ = gradients(model, rule, x, y)
    x = x.float().flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (2, 4))
    with kernels.using(sparse=mode):
        found, _ = gradients(model.float(), rule, x, y)
    assert_equal(found, expected)


@pytest.mark.parametrize("mode", ["on", "off"])
def test_networks_take_it_for_layers_on_spikes(mode, seen):
    layers = nn.Conv2d(2, 32, 3, padding=1), sltt.LIF(), nn.Conv2d(32, 32, 3, padding=1), sltt.LIF()
    check_gradients(nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 64, 3)), sltt.SLTT(), (8, 8), mode)
    assert set(seen) == ({"input_gradient"} if mode == "on" else set())


def test_weights_of_traces_take_both(seen):
    """Equal gradients under OTTT, whose traces have many values; layers that it cannot do stay PyTorch's."""
    convs = nn.Conv2d(2, 32, 3), nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 48, 3), nn.Conv2d(48, 32, 3, 2)
    layers = [layer for conv in convs for layer in (conv, sltt.LIF(tau=2.0))]
    check_gradients(nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 3)), sltt.OTTT(), (7, 7), "on")
    assert set(seen) == {"input_gradient", "weight_gradient"}


@pytest.mark.parametrize("rule", [sltt.SLTT(), sltt.OTTT()], ids=repr)
def test_the_default_type_changes_nothing(rule, seen):
    layers = nn.Conv2d(2, 32, 3, padding=1), sltt.LIF(), nn.Conv2d(32, 32, 3, padding=1), sltt.LIF()
    with default_type(torch.float64):
        check_gradients(nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 64, 3)), rule, (8, 8), "on")
    assert seen
