"""Max pooling in native code, and the pass of `sltt.RunningMax`, against their operations."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sltt
from sltt import kernels
from sltt.kernels import native, running_max
from sltt.kernels.pooling import pooling
from tests.kernels.steps import threads
from tests.references import recorded

pytestmark = pytest.mark.skipif(native.problem() is not None, reason="there are no native kernels")


def images(*shape, dtype=torch.float32, seed=0):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x.to(dtype, memory_format=torch.channels_last)


def sequence(pool, xs):
    """The outputs and the last states."""
    running = sltt.RunningMax(pool)
    return [*(running(x) for x in xs), running.total, running.largest]


def pool_in(mode, pool, x):
    """What a pooling gives in a run; natively with `mode` "on", where the images are of the native form."""
    with kernels.using(compile=mode):
        y = kernels.max_pool(pool, x)
    return pool(x) if y is None else y


def pooled(x, size, mode):
    """The pooling of x and the gradient."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = pool_in(mode, nn.MaxPool2d(size), x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y.dtype)
    return y, *torch.autograd.grad(y, x, weights)


@settings(max_examples=40)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(3, 9), st.integers(3, 9)),
    size=st.sampled_from([1, 2, 3, (1, 2), [3, 2]]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    levels=st.sampled_from([1, 2, 100]),
    seed=st.integers(0, 99),
)
def test_maxima_and_their_gradient_are_those_of_pytorch(shape, size, dtype, levels, seed):
    x = (images(*shape, seed=seed) * levels).round().to(dtype) / levels  # the first of equal values passes
    for ours, plain in zip(pooled(x, size, "on"), pooled(x, size, "off"), strict=True):
        assert ours.dtype == plain.dtype
        assert ours.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(ours, plain)


@settings(max_examples=40)
@given(st.lists(st.sampled_from([-torch.inf, torch.inf, torch.nan, 0.0, -1.0]), min_size=36, max_size=36))
def test_maxima_of_values_that_are_not_finite(values):
    x = torch.tensor(values).view(1, 1, 6, 6).contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(pooled(x, 3, "on"), pooled(x, 3, "off"), rtol=0, atol=0, equal_nan=True)


def test_a_layer_of_more_channels_than_a_block_and_more_threads():
    x = images(2, 1100, 5, 4)
    with threads(3):
        found = pooled(x, 2, "on")
    assert all(map(torch.equal, found, pooled(x, 2, "off")))


def test_gray_images_keep_their_memory_format():
    x = torch.randn(2, 1, 6, 6)
    found, plain = pooled(x, 2, "on"), pooled(x, 2, "off")
    assert [one.stride() for one in found] == [one.stride() for one in plain]


FORMS = {"integers of NumPy": {"kernel_size": np.int64(2), "padding": np.int64(0)}}
FORMS |= {"no stride": {"kernel_size": 2, "stride": None}, "one number in a list": {"kernel_size": [2]}}
FORMS |= {"with the stride": {"kernel_size": (2, 2), "stride": [2, 2]}, "of size 0": {"kernel_size": 0}}
FORMS |= {"of three numbers": {"kernel_size": (2, 2, 2)}, "of no number": {"kernel_size": []}}
FORMS |= {"larger than the images": {"kernel_size": 9}, "with indices": {"kernel_size": 2, "return_indices": True}}
FORMS |= {"to the last pixel": {"kernel_size": 4, "ceil_mode": True}}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_calls_are_understood_or_refused_as_by_pytorch(form):
    found = []
    for mode in ("on", "off"):
        try:
            found.append(pool_in(mode, nn.MaxPool2d(**form), images(2, 3, 6, 6)))
        except (RuntimeError, TypeError) as error:
            found.append(str(error))
    ours, plain = found
    if isinstance(plain, str):
        assert ours == plain
    else:
        torch.testing.assert_close(ours, plain, rtol=0, atol=0)


def test_maxima_under_a_transform_are_those_of_pytorch():
    x = images(6, 3, 4, 4).view(2, 3, 3, 4, 4)
    found = torch.func.vmap(lambda one: pool_in("on", nn.MaxPool2d(2), one))(x)
    assert torch.equal(found, F.max_pool2d(x.flatten(0, 1), 2).unflatten(0, (2, 3)))


def test_behind_a_batchnorm_and_in_front_of_a_sparse_layer(monkeypatch):
    calls, found = recorded(monkeypatch, pooling, "_maxima"), []
    x, y = images(4, 32, 64, 64), torch.tensor([0, 1, 2, 0])  # large enough for a BatchNorm that waits
    for compile in ("on", "off"):
        torch.manual_seed(0)
        layers = nn.Conv2d(32, 16, 3, padding=1), nn.BatchNorm2d(16), nn.MaxPool2d(2), sltt.LIF(v_threshold=0.5)
        layers = *layers, nn.MaxPool2d(2), nn.Conv2d(16, 16, 3, padding=1), sltt.LIF(), nn.Flatten()
        model = nn.Sequential(*layers, nn.Linear(16 * 256, 3)).to(memory_format=torch.channels_last)
        model[2].register_forward_hook(lambda *call: None)
        with kernels.using(compile=compile, sparse="on"):
            sltt.BPTT()(model, x, y, nn.CrossEntropyLoss(), steps=2)
        found.append([p.grad for p in model.parameters()])
        assert len(calls) == 4  # two poolings in two steps, with `compile="on"` alone
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)


def test_maxima_keep_a_byte_each_and_no_input():
    y = pool_in("on", nn.MaxPool2d(2), images(2, 8, 32, 32).requires_grad_().sin())
    (kept,) = y.grad_fn.saved_tensors
    assert (kept.dtype, tuple(kept.shape)) == (torch.uint8, (2, 8, 16, 16))


@settings(max_examples=40)
@given(
    steps=st.integers(2, 4),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(3, 9), st.integers(3, 9)),
    size=st.sampled_from([1, 2, 3, (1, 2), [3, 2]]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_it_gives_the_bits_of_the_operations(steps, shape, size, dtype, seed):
    xs = [images(*shape, dtype=dtype, seed=seed + i) for i in range(steps)]
    found = []
    for compile in ("on", "off"):
        with kernels.using(compile=compile), torch.no_grad():
            found.append(sequence(nn.MaxPool2d(size), xs))
    for ours, plain in zip(*found, strict=True):
        assert ours.dtype == plain.dtype
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("number", [1, 2])
def test_nan_stays(number):
    x, total = images(2, 5, 4, 4), images(2, 5, 4, 4, seed=1)
    x[0, 1, 2, 3] = x[1, 4, 0, 0] = torch.nan
    pool = nn.MaxPool2d(2)
    with threads(number), kernels.using(compile="on"):
        summed, most, gained = running_max(pool, total, pool(total), x)
    torch.testing.assert_close(summed, total + x, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(most, pool(total + x), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(gained, pool(total + x) - pool(total), rtol=0, atol=0, equal_nan=True)


POOLS = {
    "overlapping": nn.MaxPool2d(3, stride=2),
    "padded": nn.MaxPool2d(2, padding=1),
    "dilated": nn.MaxPool2d(2, dilation=2),
    "to the last pixel": nn.MaxPool2d(2, ceil_mode=True),
    "adaptive": nn.AdaptiveMaxPool2d(2),
    "a function": partial(torch.amax, dim=-1, keepdim=True),
}


@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS)
def test_other_poolings_run_as_they_are(pool):
    xs = [images(2, 3, 7, 7, seed=i) for i in range(3)]
    with kernels.using(compile="on"), torch.no_grad():
        *gained, _, largest = sequence(pool, xs)
    torch.testing.assert_close(largest, pool(sum(xs)))
    torch.testing.assert_close(sum(gained), pool(sum(xs)))


@pytest.mark.parametrize("rule", [sltt.SLTT(k=1), sltt.SLTT(k=2), sltt.BPTT(), sltt.RateBased()], ids=str)
def test_gradients_are_those_without_it(rule):
    x, y, found = images(3, 2, 7, 7), torch.tensor([0, 1, 2]), []
    for compile in ("on", "off"):
        torch.manual_seed(0)
        layers = nn.Conv2d(2, 8, 3, padding=1), sltt.RunningMax(nn.MaxPool2d(2)), sltt.LIF(v_threshold=0.5)
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(72, 3)).to(memory_format=torch.channels_last)
        with kernels.using(compile=compile, sparse="off"):
            rule(model, x, y, nn.CrossEntropyLoss(), steps=4, **({"seed": 0} if isinstance(rule, sltt.SLTT) else {}))
        found.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*found)
