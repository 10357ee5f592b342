"""Sparse layers against float64 and against dense PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sltt.kernels import native
from sltt.kernels.layers import costs, sparse
from sltt.kernels.spikes import bits
from sltt.kernels.spikes.bits import pack
from tests.kernels.exact import NATIVE, TOLERANCE, check_conv, check_linear, spikes
from tests.kernels.steps import threads


@NATIVE
@pytest.mark.parametrize("density", [0.0, "one", 0.5, 1.0])
@pytest.mark.parametrize(
    ("batch", "size", "inputs", "outputs", "dtype"),
    [
        (1, (1, 1), 48, 24, torch.float32),
        (1, (17, 33), 128, 96, torch.bfloat16),
        (3, (7, 33), 24, 16, torch.float16),
        (2, (17, 1), 16, 48, torch.float32),
    ],
)
def test_conv2d(batch, size, inputs, outputs, dtype, density):
    x = spikes((batch, inputs, *size), 0.0 if density == "one" else density)
    if density == "one":
        x[-1, -1, -1, -1] = 1.0
    check_conv(x, outputs, (3, 3), (1, 1), ((1, 1), (1, 1)), dtype)


@NATIVE
@pytest.mark.parametrize("length", [1, 5000])
def test_conv1d(length):
    check_conv(spikes((2, 24, length), 0.3), 48, (5,), (2,), ((4, 2),), one=2.74)


@NATIVE
@settings(max_examples=30)
@given(st.data())
def test_any_shape(data):
    """Kernels, strides and padding of any size; padding may exceed the kernel, and strides skip inputs."""
    draw = data.draw
    axes = draw(st.integers(1, 2))
    kernel = tuple(draw(st.integers(1, 6)) for _ in range(axes))
    stride = tuple(draw(st.integers(1, 4)) for _ in range(axes))
    padding = tuple((draw(st.integers(0, 7)), draw(st.integers(0, 7))) for _ in range(axes))
    size = tuple(max(draw(st.integers(1, 20)), k - sum(p)) for k, p in zip(kernel, padding, strict=True))
    inputs, outputs = (draw(st.integers(16, 144)) for _ in range(2))
    torch.manual_seed(draw(st.integers(0, 9)))
    batch = draw(st.integers(1, 5)) if inputs % 8 == 0 else 8  # bits come in whole bytes
    x = spikes((batch, inputs, *size), draw(st.sampled_from([0.02, 0.2, 0.7])))
    check_conv(x, outputs, kernel, stride, padding, draw(st.sampled_from(list(TOLERANCE))))


@NATIVE
@settings(max_examples=30)
@given(st.data())
def test_a_linear_layer_of_any_shape(data):
    draw = data.draw
    rows, inputs = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)), draw(st.integers(16, 320))
    shape = *rows, *((8,) if inputs % 8 else ()), inputs  # bits come in whole bytes
    density = draw(st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1)))
    torch.manual_seed(draw(st.integers(0, 9)))
    x = (torch.rand(shape) < density).float()
    dtype, one = draw(st.sampled_from(list(TOLERANCE))), draw(st.sampled_from([1.0, 2.74]))
    check_linear(x, draw(st.integers(16, 320)), dtype, one)


@NATIVE
def test_as_dense_pytorch_in_any_memory_format():
    """Weights and gradients may have any strides; the gradient has the channels last."""
    x = spikes((4, 32, 9, 9), 0.2)
    weight = torch.randn(32, 64, 3, 3)[:, ::2]
    grad_y = torch.randn(4, 32, 5, 5)
    layer = sparse.conv_layer(x.shape, weight.shape, (2, 2), ((1, 1), (1, 1)))
    y = sparse.forward(layer, pack(x), sparse.pack_weight(layer, weight), None, torch.float32)
    torch.testing.assert_close(y, F.conv2d(x, weight, stride=2, padding=1), rtol=1e-5, atol=1e-5)
    grad = sparse.weight_gradient(layer, pack(x), grad_y)
    dense = torch.nn.grad.conv2d_weight(x, weight.shape, grad_y, stride=2, padding=1)
    torch.testing.assert_close(grad, dense, rtol=1e-5, atol=1e-5)
    assert grad.is_contiguous(memory_format=torch.channels_last)


@NATIVE
def test_nan_and_infinity_are_kept():
    weight = torch.zeros(16, 16, 1, 1)
    weight[0], weight[1], weight[2] = float("nan"), float("inf"), float("-inf")
    layer = sparse.conv_layer((1, 16, 2, 2), weight.shape, (1, 1), ((0, 0), (0, 0)))
    packed, bits = sparse.pack_weight(layer, weight), pack(torch.ones(1, 16, 2, 2))
    for dtype in TOLERANCE:
        y = sparse.forward(layer, bits, packed, None, dtype)[0, :4, 0, 0].float()
        torch.testing.assert_close(y, torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0]), equal_nan=True)


def run_all(layer, x, weight, grad_y):
    bits = pack(x)
    y = sparse.forward(layer, bits, sparse.pack_weight(layer, weight), None, x.dtype)
    of_bias = torch.empty(len(weight)) if layer.sums_bias else y
    return y, of_bias, sparse.weight_gradient(layer, bits, grad_y, 1.0, of_bias if layer.sums_bias else None)


CASES = {
    "pixels that are independent": ((9, 64, 17, 33), (144, 64, 1, 1), (1, 1)),
    "few outputs, many pixels": ((9, 64, 17, 33), (64, 64, 3, 3), (1, 1)),
    "many outputs, few pixels": ((3, 64, 3, 3), (560, 64, 3, 3), (2, 2)),
}


@NATIVE
@pytest.mark.parametrize(("x_shape", "weight_shape", "stride"), CASES.values(), ids=CASES.keys())
def test_any_number_of_threads_gives_the_same_bits(x_shape, weight_shape, stride):
    layer = sparse.conv_layer(x_shape, weight_shape, stride, ((weight_shape[-1] // 2,) * 2,) * 2)
    arguments = layer, spikes(x_shape, 0.2), torch.randn(weight_shape), torch.randn(layer.y_shape)
    results = []
    for number in (1, 2, 4, 16):
        with threads(number):
            results.append(run_all(*arguments))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@NATIVE
def test_density():
    bits = torch.tensor([0b1, 0b11, 0, 0xFF, 0, 0, 0, 0, 0b1], dtype=torch.uint8)
    assert sparse.density(bits) == 12 / 72
    assert sparse.density(bits[:0]) == 0.0


def test_what_only_the_dense_layer_can_do():
    same = ((1, 1), (1, 1))

    def fits(x_shape=(2, 16, 8, 8), weight_shape=(16, 16, 3, 3), **kwargs):
        return sparse.conv_layer(x_shape, weight_shape, (1, 1), same, **kwargs).fits

    assert fits()
    assert not fits(weight_shape=(15, 16, 3, 3))
    assert not fits((2, 3, 8, 8), (16, 3, 3, 3))
    assert not fits(weight_shape=(16, 8, 3, 3), groups=2)
    assert not fits(dilation=(2, 2))
    assert not fits(x_shape=(0, 16, 8, 8))


@NATIVE
@pytest.mark.parametrize("dtype", [*TOLERANCE, torch.float64])
@pytest.mark.parametrize("n", [8, 8 * 8191, 8 * 8192, 8 * 8193])
def test_the_native_loop_packs_as_the_plain_form_does(n, dtype):
    assert native.library() is not None
    x = (torch.rand(n) < 0.3).to(dtype) * 2.5
    x[1], x[2], x[3] = -0.0, float("nan"), -1.0
    expected = torch.empty(n // 8, dtype=torch.uint8)
    bits._pack(expected, x)
    assert torch.equal(pack(x), expected)


@NATIVE
@pytest.mark.parametrize(
    ("vectors", "amx", "dtype", "forward", "gradient"),
    [
        ("AVX512", True, "float32", 0.6069, 0.3992),
        ("AVX2", False, "float32", 0.9011, 0.3338),
        ("AVX512", True, "bfloat16", 0.0013, 0.1192),
        ("AVX512", False, "bfloat16", 0.6069, 0.3992),
    ],
)
def test_break_even_follows_from_the_shapes_the_type_and_the_instructions(
    vectors, amx, dtype, forward, gradient, monkeypatch
):
    monkeypatch.setattr(costs, "_vectors", lambda: vectors)
    monkeypatch.setattr(costs.native, "has_amx", lambda: amx)
    layer = sparse.conv_layer((8, 64, 16, 16), (64, 64, 3, 3), (1, 1), ((1, 1), (1, 1)))
    found = costs.break_even.__wrapped__(layer, getattr(torch, dtype), calls=4)
    assert found == pytest.approx((forward, gradient), abs=2e-4)
    small = sparse.linear_layer((2, 64), (64, 64))
    assert costs.break_even(small, torch.float32) == (0.0, 0.0)


@NATIVE
def test_sums_over_many_samples_round_little():
    """One sum from sample to sample has an error of 2.4e-6."""
    x, g = (torch.rand(2**17, 64) < 0.2).float(), torch.randn(2**17, 64) + 0.1
    exact = g.double().T @ x.double()
    grad = sparse.weight_gradient(sparse.linear_layer(x.shape, (64, 64)), pack(x), g)
    assert (grad.double() - exact).norm() < 1e-6 * exact.norm()
