"""The pass of `sltt.RunningMax` in native code, against its operations."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import sltt
from sltt import kernels
from sltt.kernels import native, running_max

pytestmark = pytest.mark.skipif(native.problem() is not None, reason="there are no native kernels")


def images(*shape, dtype=torch.float32, seed=0):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x.to(dtype, memory_format=torch.channels_last)


def sequence(pool, xs):
    """The outputs and the last states."""
    running = sltt.RunningMax(pool)
    return [*(running(x) for x in xs), running.total, running.largest]


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


@pytest.mark.parametrize("threads", [1, 2])
def test_nan_stays(threads):
    x, total = images(2, 5, 4, 4), images(2, 5, 4, 4, seed=1)
    x[0, 1, 2, 3] = x[1, 4, 0, 0] = torch.nan
    pool, before = nn.MaxPool2d(2), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with kernels.using(compile="on"):
            summed, most, gained = running_max(pool, total, pool(total), x)
    finally:
        torch.set_num_threads(before)
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
