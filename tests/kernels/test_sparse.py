"""Sparse layers against float64 and against dense PyTorch, and all that can go wrong on the way to a library."""

import os
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sltt.kernels import bits, costs, native, sparse, winograd
from sltt.kernels.bits import pack
from tests.conftest import LINUX

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}  # of the largest value
NATIVE = pytest.mark.skipif(native.problem() is not None, reason=str(native.problem()))


def spikes(shape, density):
    x = torch.rand(shape) < density
    if density == "one":
        x.view(-1)[x.numel() // 2] = True
    return x.float().movedim(1, -1).contiguous().movedim(-1, 1)


def near(a, b, dtype):
    assert a.dtype == dtype
    assert a.shape == b.shape
    torch.testing.assert_close(a.double(), b, rtol=0, atol=TOLERANCE[dtype] * max(1.0, b.abs().max().item()))


def check_conv(x, channels, kernel, stride, padding, dtype=torch.float32, one=1.0):
    """Forward, weight and bias gradient of a convolution of spikes against float64."""
    weight = torch.randn(channels, x.shape[1], *kernel).to(dtype)
    bias = torch.randn(channels).to(dtype)
    layer = sparse.conv_layer(x.shape, weight.shape, stride, padding)
    assert sparse.unsupported(x.to(dtype), layer) is None
    conv = F.conv1d if len(kernel) == 1 else F.conv2d
    padded = F.pad(one * x.double(), [p for pair in reversed(padding) for p in pair])
    exact = [t.double().requires_grad_() for t in (weight, bias)]
    expected = conv(padded, *exact, stride=stride)
    bits = pack(x)
    y = sparse.forward(layer, bits, sparse.pack_weight(layer, weight, one), bias, dtype)
    near(y, expected.detach(), dtype)
    assert y.movedim(1, -1).is_contiguous()
    grad_y = torch.randn(expected.shape).to(dtype)
    grads = sparse.weight_gradient(layer, bits, grad_y, one, needs_bias=True)
    for grad, reference in zip(grads, torch.autograd.grad(expected, exact, grad_y.double()), strict=True):
        near(grad.to(dtype), reference, dtype)


@NATIVE
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("density", [0.0, "one", 0.5, 1.0])
@pytest.mark.parametrize(("inputs", "outputs"), [(16, 48), (24, 16), (48, 24), (128, 96)])
@pytest.mark.parametrize(("batch", "size"), [(1, (1, 1)), (3, (7, 33)), (2, (17, 1))])
def test_conv2d(batch, size, inputs, outputs, density, dtype):
    x = spikes((batch, inputs, *size), 0.0 if density == "one" else density)
    if density == "one":
        x[-1, -1, -1, -1] = 1.0
    check_conv(x, outputs, (3, 3), (1, 1), ((1, 1), (1, 1)), dtype)


@NATIVE
@pytest.mark.parametrize("length", [1, 7, 17, 33, 5000])
def test_conv1d(length):
    check_conv(spikes((2, 24, length), 0.3), 48, (5,), (2,), ((4, 2),), one=2.74)


@NATIVE
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_shape(data):
    """Kernels, strides and padding of any size; padding may exceed the kernel, and strides skip inputs."""
    draw = data.draw
    axes = draw(st.integers(1, 2))
    kernel = tuple(draw(st.integers(1, 6)) for _ in range(axes))
    stride = tuple(draw(st.integers(1, 4)) for _ in range(axes))
    padding = tuple((draw(st.integers(0, 7)), draw(st.integers(0, 7))) for _ in range(axes))
    size = tuple(max(draw(st.integers(1, 20)), k - sum(p)) for k, p in zip(kernel, padding, strict=True))
    inputs, outputs = (8 * draw(st.integers(2, 18)) for _ in range(2))
    torch.manual_seed(draw(st.integers(0, 9)))
    x = spikes((draw(st.integers(1, 5)), inputs, *size), draw(st.sampled_from([0.02, 0.2, 0.7])))
    check_conv(x, outputs, kernel, stride, padding, draw(st.sampled_from(list(TOLERANCE))))


@NATIVE
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 16), (7, 24), (33, 264), (4, 3, 64)])
def test_linear(shape, dtype):
    x, one = (torch.rand(shape) < 0.2).float(), 2.0
    weight, bias = torch.randn(40, shape[-1]).to(dtype), torch.randn(40).to(dtype)
    layer = sparse.linear_layer(x.shape, weight.shape)
    assert sparse.unsupported(x.to(dtype), layer) is None
    exact = [t.double().requires_grad_() for t in (weight, bias)]
    expected = F.linear(one * x.double(), *exact)
    y = sparse.forward(layer, pack(x), sparse.pack_weight(layer, weight, one), bias, dtype)
    near(y, expected.detach(), dtype)
    grad_y = torch.randn_like(y)
    grads = sparse.weight_gradient(layer, pack(x), grad_y, one, needs_bias=True)
    for grad, reference in zip(grads, torch.autograd.grad(expected, exact, grad_y.double()), strict=True):
        near(grad.to(dtype), reference, dtype)


@NATIVE
def test_as_dense_pytorch_in_any_memory_format():
    """Weights and gradients may have any strides; the gradient has the channels last."""
    x = spikes((4, 32, 9, 9), 0.2)
    weight = torch.randn(32, 64, 3, 3)[:, ::2]
    grad_y = torch.randn(4, 32, 5, 5)
    layer = sparse.conv_layer(x.shape, weight.shape, (2, 2), ((1, 1), (1, 1)))
    y = sparse.forward(layer, pack(x), sparse.pack_weight(layer, weight), None, torch.float32)
    torch.testing.assert_close(y, F.conv2d(x, weight, stride=2, padding=1), rtol=1e-5, atol=1e-5)
    grad, none = sparse.weight_gradient(layer, pack(x), grad_y)
    dense = torch.nn.grad.conv2d_weight(x, weight.shape, grad_y, stride=2, padding=1)
    torch.testing.assert_close(grad, dense, rtol=1e-5, atol=1e-5)
    assert none is None
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
    return y, sparse.weight_gradient(layer, bits, grad_y)[0]


CASES = {
    "few outputs, many pixels": ((9, 64, 17, 33), (64, 64, 3, 3), (1, 1)),
    "many outputs, few pixels": ((3, 64, 3, 3), (560, 64, 3, 3), (2, 2)),
}


@NATIVE
@pytest.mark.parametrize(("x_shape", "weight_shape", "stride"), CASES.values(), ids=CASES.keys())
def test_any_number_of_threads_gives_the_same_bits(x_shape, weight_shape, stride):
    layer = sparse.conv_layer(x_shape, weight_shape, stride, ((1, 1), (1, 1)))
    arguments = layer, spikes(x_shape, 0.2), torch.randn(weight_shape), torch.randn(layer.y_shape)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 4, 16):
            torch.set_num_threads(threads)
            results.append(run_all(*arguments))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@NATIVE
def test_several_python_threads():
    x_shape, weight_shape, stride = CASES["few outputs, many pixels"]
    layer = sparse.conv_layer(x_shape, weight_shape, stride, ((1, 1), (1, 1)))
    inputs = [(layer, spikes(x_shape, d), torch.randn(weight_shape), torch.randn(layer.y_shape)) for d in (0.1, 0.4)]
    alone = [run_all(*i) for i in inputs]
    equal = [[], []]

    def work(i):
        for _ in range(10):
            equal[i].append(all(map(torch.equal, run_all(*inputs[i]), alone[i])))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert equal == [[True] * 10] * 2


@NATIVE
def test_density():
    bits = torch.tensor([0b1, 0b11, 0, 0xFF, 0, 0, 0, 0, 0b1], dtype=torch.uint8)
    assert sparse.density(bits) == 12 / 72
    assert sparse.density(bits[:0]) == 0.0


def test_what_only_the_dense_layer_can_do():
    same = ((1, 1), (1, 1))

    def reason(x_shape=(2, 16, 8, 8), weight_shape=(16, 16, 3, 3), **kwargs):
        return sparse.conv_layer(x_shape, weight_shape, (1, 1), same, **kwargs).problem

    assert reason() is None
    assert "65 output channels" in reason(weight_shape=(65, 16, 3, 3))
    assert "3 input" in reason((2, 3, 8, 8), (16, 3, 3, 3))
    assert "groups=2" in reason(weight_shape=(16, 8, 3, 3), groups=2)
    assert "dilation=(2, 2)" in reason(dilation=(2, 2))
    assert "no output" in reason(x_shape=(0, 16, 8, 8))
    layer = sparse.conv_layer((2, 16, 8, 8), (16, 16, 3, 3), (1, 1), same)
    assert "channels last" in sparse.unsupported(torch.zeros(2, 16, 8, 8), layer)
    assert "float64" in sparse.unsupported(torch.zeros(2, 16, 8, 8).double(), layer)
    assert "meta" in sparse.unsupported(torch.zeros(2, 16, 8, 8, device="meta"), layer)


COPY = 'while [ "$1" != -o ]; do [ "$1" = --version ] && exit; shift; done; cp "$REAL" "$2"'  # a fast compiler


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and a compiler that copies the library of the cache in use; nothing found is remembered."""
    monkeypatch.setenv("REAL", getattr(native.library(), "_name", ""))
    monkeypatch.setenv("CXX", script(tmp_path / "c++", COPY))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget()
    yield tmp_path / "sltt"
    monkeypatch.undo()
    forget()


def forget():
    for function in (native._library, native.key, costs._costs, costs._dense, costs.break_even):
        function.cache_clear()


@NATIVE
def test_damaged_library_is_compiled_anew(cache):
    assert native.library() is not None
    (path,) = cache.iterdir()
    good = path.read_bytes()
    for bad in (b"", good[:1000], good[:5000] + b"x" + good[5001:]):
        path.unlink()  # the mapped file stays as it is
        path.write_bytes(bad)
        native._library.cache_clear()
        assert native.problem() is None
        assert path.read_bytes() == good
        assert list(cache.iterdir()) == [path]


def test_library_is_keyed_by_instruction_set_and_compiler(cache, tmp_path, monkeypatch):
    keys = set()
    for name, text in {"a": "echo 1", "b": "echo 2"}.items():
        monkeypatch.setenv("CXX", script(tmp_path / name, text))
        for capability in ("AVX512", "AVX2", "DEFAULT"):
            monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda c=capability: c)
            native.key.cache_clear()
            keys.add(native.key())
    assert len(keys) == 6


def test_compiler_that_fails(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", script(tmp_path / "c++", "[ $1 = --version ] || { echo 'error: no'; exit 1; } 1>&2"))
    with pytest.warns(UserWarning, match="compiling the kernels failed: error: no"):
        assert native.library() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native.problem() == "compiling the kernels failed: error: no"  # and no second warning
    assert list(cache.iterdir()) == []
    x = spikes((2, 16, 4, 4), 0.5)
    layer = sparse.conv_layer(x.shape, (16, 16, 3, 3), (1, 1), ((1, 1), (1, 1)))
    assert sparse.unsupported(x, layer) == native.problem()


def test_compiler_that_gives_something_else(cache, tmp_path, monkeypatch):
    text = 'while [ "$1" != -o ]; do [ "$1" = --version ] && exit; shift; done; echo no library > "$2"'
    monkeypatch.setenv("CXX", script(tmp_path / "c++", text))
    with pytest.warns(UserWarning, match="cannot be loaded"):
        assert native.library() is None


def test_no_compiler_is_silent(cache, monkeypatch):
    monkeypatch.setattr(native.shutil, "which", lambda _: None)
    assert native.problem() == "there is no C++ compiler (apt install g++)"


def test_unknown_processor_is_silent(cache, monkeypatch):
    monkeypatch.setattr(native.platform, "machine", lambda: "sparc64")
    assert native.problem() == "the kernels are not made for linux on sparc64"


def test_cache_that_cannot_be_written(cache, tmp_path):
    cache.write_text("a file where the folder should be")  # root may write read-only folders
    with pytest.warns(UserWarning, match="cannot be written"):
        assert native.library() is None


def fork_and(succeeds):
    """A process that ends with 0 if succeeds() is true; it has all that is imported already."""
    if child := os.fork():
        return child
    try:
        os._exit(not succeeds())
    finally:
        os._exit(1)


@NATIVE
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@LINUX
def test_two_processes_compile_at_once(cache, tmp_path, monkeypatch):
    """Both compilers are at work before either has written; neither process sees half a file of the other."""
    (tmp_path / "at work").mkdir()
    wait = f"""cd '{tmp_path}/at work'; touch $$; while [ $(ls | wc -l) -lt 2 ]; do sleep 0.01; done"""
    monkeypatch.setenv("CXX", script(tmp_path / "c++", COPY.replace("done; cp", f"done; {wait}; cp")))
    children = [fork_and(lambda: native.library() is not None) for _ in range(2)]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    assert [native._intact(path) for path in cache.iterdir()] == [True]


@NATIVE
def test_break_even_is_read_from_the_cache(cache, monkeypatch):
    """It is a fixed function of the layer: measured once, kept, and measured again only where the file is damaged."""
    measured = []

    def measure(linear, dtype):
        measured.append((linear, dtype))
        return [costs.Costs(0.02, 0.01, 1.0, 0.5), costs.Costs(0.02, 0.1, 1.0, 0.5)]

    monkeypatch.setattr(winograd, "supports", lambda *a: False)
    monkeypatch.setattr(costs, "_measure", measure)
    assert native.library() is not None
    layer = sparse.conv_layer((8, 64, 16, 16), (64, 64, 3, 3), (1, 1), ((1, 1), (1, 1)))
    even = costs.break_even(layer, torch.float32)
    share = 2 / (64 * 9) + 0.5 / (8 * 256)  # elements, and weights, for each product
    assert even == pytest.approx((1.0, (0.02 - share) / 0.1))
    for damage in (None, "[[1, 2, 3, 4]", "[[1, 2, 3], [3, 4, 5]]", "[[1, NaN, 3, 4], [1, 2, 3, 4]]"):
        if damage:
            (path,) = cache.glob("costs-*")
            path.write_text(damage)
        forget()
        assert costs.break_even(layer, torch.float32) == even
    assert len(measured) == 4
    small = sparse.linear_layer((2, 64), (64, 64))
    assert costs.break_even(small, torch.float32) == (0.0, 0.0)
    assert len(measured) == 4


@NATIVE
@pytest.mark.parametrize(
    "damage", ["[[" + "9" * 400 + ", 1, 1, 1], [1, 1, 1, 1]]", "[" * 10**5, None], ids=["number", "brackets", "folder"]
)
def test_costs_are_measured_where_they_cannot_be_kept(damage, cache, monkeypatch):
    """The file holds a number that is none, or brackets without end, or is a folder."""
    assert native.library() is not None  # makes the folder
    monkeypatch.setattr(costs, "_measure", lambda *args: [costs.Costs(0.02, 0.1, 0.0, 0.0)] * 2)
    monkeypatch.setattr(winograd, "supports", lambda *a: False)
    layer = sparse.conv_layer((8, 64, 16, 16), (64, 64, 3, 3), (1, 1), ((1, 1), (1, 1)))
    expected = costs.break_even(layer, torch.float32)
    (path,) = cache.glob("costs-*")
    path.unlink()
    path.write_text(damage) if damage else path.mkdir()
    forget()
    assert costs.break_even(layer, torch.float32) == expected


@NATIVE
def test_dense_layers_limited_to_other_instructions_have_costs_of_their_own(cache, monkeypatch):
    assert native.library() is not None  # makes the folder
    layer = sparse.linear_layer((1024, 512), (512, 512))
    for dense in (0.02, 0.01):
        monkeypatch.setattr(costs, "_measure", lambda *args, d=dense: [costs.Costs(d, 0.1, 0.0, 0.0)] * 2)
        forget()
        assert costs.break_even(layer, torch.float32).forward == pytest.approx(dense / 0.1)
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")


@NATIVE
def test_costs_are_measured(cache):
    for linear in (False, True):
        for found in costs._measure(linear, torch.float32):
            assert found.dense > 0
            assert found.spike > 0
            assert found.element >= 0


def test_costs_are_those_that_explain_the_measured_times():
    products, elements, (low, high) = 1000, 50, costs._DENSITIES
    times = (2.0 * density * products + 3.0 * elements for density in (low, high))
    found = costs._fit(products, elements, 0.5, 700.0, *times)
    assert tuple(found) == pytest.approx((0.7, 2.0, 3.0, 0.5))


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
