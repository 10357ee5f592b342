"""Sizes of memory, and the memory that is free."""

import gc

import pytest
import torch

import sltt
from sltt.analysis import memory_parts, peak_memory
from sltt.memory import available_memory, parse_bytes


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("8GiB", 8 * 2**30), ("8GB", 8 * 10**9), ("8G", 8 * 10**9), (" 500 MB ", 500 * 10**6), ("500Mi", 500 * 2**20),
        ("1.5kB", 1500), ("0.5KiB", 512), ("2TB", 2 * 10**12), ("12", 12), ("12B", 12), (12, 12),
    ],
)  # fmt: skip
def test_sizes(size, expected):
    assert parse_bytes(size) == expected


@pytest.mark.parametrize(
    "size",
    ["0.5", "2.5B", "0", "-1", "", "GB", "8iB", "1e9", "1.2.3GB", "8GBB", "8gb", 0, -5, 2.5, 8.0, True, None, 1e999],
)
def test_what_is_no_size_is_refused(size):
    with pytest.raises(ValueError, match="expected a memory size such as 8GB or 500MB, got"):
        parse_bytes(size)


def test_this_machine_has_memory():
    assert available_memory() > 0


@pytest.mark.parametrize("steps", [2, 5])
def test_the_memory_of_slttk_is_that_of_no_lucky_draw(steps):
    """The first step has no state behind it: a batch that trains this step only takes less than the others."""
    model = sltt.models.DigitsNet(width=2)
    x, y, loss = torch.randn(16, 1, 8, 8), torch.randint(10, (16,)), sltt.losses.CrossEntropyMSE()
    every = memory_parts(model, x, y, loss, sltt.SLTT(fold=1), steps=steps)
    for _ in range(3):
        found = memory_parts(model, x, y, loss, sltt.SLTT(k=1, fold=1), steps=steps)
        assert found.total == pytest.approx(every.total, rel=0.01)


@pytest.fixture
def late_collector():
    """A collector that runs after so many new objects only, as within the call below."""
    gc.collect()
    before = gc.get_threshold()
    gc.set_threshold(50_000, *before[1:])
    yield
    gc.set_threshold(*before)


def test_garbage_of_an_earlier_measurement_does_not_lower_a_peak(late_collector):
    def litter():
        garbage = [torch.zeros(1_000_000)]
        garbage.append(garbage)

    def call():
        parts = [[i] for i in range(100_000)]  # enough for the collector to run, were it on
        return torch.zeros(250_000), parts

    peak_memory(litter)
    assert peak_memory(call) == 1_000_000
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        peak_memory(lambda: 1 / 0)
    assert gc.isenabled()


def test_a_profiler_that_runs_is_not_ended():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        with pytest.raises(RuntimeError, match=r"a profiler of PyTorch is running.*measure outside of it"):
            peak_memory(lambda: torch.zeros(3))
        torch.ones(3)
    assert "aten::ones" in {event.key for event in profiler.key_averages()}
    assert peak_memory(lambda: torch.zeros(1000)) == 4000
