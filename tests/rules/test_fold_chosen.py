"""How many time steps share a call of the network by default: several where that pays, and changes nothing."""

import pytest
import torch
from torch import nn

import sltt
from sltt import kernels, memory
from sltt.rules import folding
from tests.conftest import LOSS
from tests.references import measured, recorded

CALLS = []  # samples in each call of a network, not counting those of a copy that is tried


class Net(nn.Sequential):
    """A network with a forward of its own."""

    def __init__(self, *layers):
        super().__init__(*(layers or (nn.Linear(6, 16), sltt.LIF(), nn.Linear(16, 3))))

    def forward(self, x):
        CALLS.append(len(x))
        return super().forward(x)


def called(rule, model, x, y=None, **kwargs):
    """The samples in the calls of a network."""
    rule(model, x, torch.zeros(x.shape[1], dtype=torch.long) if y is None else y, LOSS, **kwargs)
    CALLS.clear()
    rule(model, x, torch.zeros(x.shape[1], dtype=torch.long) if y is None else y, LOSS, **kwargs)
    return CALLS[:]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (sltt.SLTT(), [32 * 64] * 3 + [4 * 64]),
        (sltt.BPTT(), [32 * 64] * 3 + [4 * 64]),
        (sltt.TBPTT(10), [10 * 64] * 10),
        (sltt.TBPTT(50), [32 * 64, 18 * 64] * 2),
        (sltt.TBPTT(10, fold=4), [4 * 64, 4 * 64, 2 * 64] * 10),
        (sltt.OTTT(), [64] + [32 * 64] * 3 + [3 * 64]),
        (sltt.RateBased(), [64 * 64, 36 * 64, 64]),
        (sltt.SLTT(fold=1), [64] * 100),
        (sltt.SLTT(fold=40), [40 * 64] * 2 + [20 * 64]),
    ],
    ids=repr,
)
def test_small_layers_take_several_time_steps_in_a_call(rule, expected):
    assert called(rule, Net(), torch.randn(100, 64, 6)) == expected


def test_large_layers_take_one():
    layers = nn.Conv2d(2, 4, 3, padding=1), sltt.LIF(), nn.AvgPool2d(8), nn.Flatten(), nn.Linear(4, 3)
    model = Net(*layers)  # in the mean over weights
    assert called(sltt.SLTT(), model, torch.randn(6, 32, 2, 8, 8)) == [32] * 6
    assert called(sltt.SLTT(), model, torch.randn(6, 8, 2, 8, 8)) == [32, 16]


def test_steps_without_a_graph_fold_further():
    torch.manual_seed(0)
    calls = called(sltt.SLTT(k=1), Net(), torch.randn(40, 500, 6), seed=0)
    assert max(calls) == 8 * 500
    assert 500 in calls
    x = torch.randn(40, 500, 6)
    CALLS.clear()
    sltt.unroll(model := Net(), x)
    assert CALLS[-5:] == [8 * 500] * 5
    torch.testing.assert_close(sltt.unroll(model, x), torch.cat([sltt.unroll(model, x[:1]), sltt.unroll(model, x)[1:]]))


class Full(nn.Module):
    """Runs out of memory for more than so many samples in a call."""

    def forward(self, x):
        if len(x) > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x


def test_a_fold_that_does_not_fit_is_not_taken():
    model, x = Net(nn.Linear(6, 16), sltt.LIF(), Full(), nn.Linear(16, 3)), torch.randn(100, 64, 6)
    assert called(sltt.SLTT(), model, x) == [64] * 100


def test_memory_stays_flat_in_time():
    model = nn.Sequential(nn.Linear(700, 256), sltt.LIF(), nn.Linear(256, 256), sltt.LIF(), nn.Linear(256, 20))
    y = torch.randint(20, (64,))
    peaks = {}
    for steps, rule in ((40, sltt.SLTT()), (80, sltt.SLTT()), (80, sltt.SLTT(fold=1))):
        x = (torch.rand(steps, 64, 700) < 0.05).float()
        peaks[steps, rule.fold] = measured(rule, model, x, y)
    logits = 40 * 64 * 20 * 4  # of the further steps
    assert peaks[80, "auto"] <= 1.01 * peaks[40, "auto"] + logits
    assert peaks[80, "auto"] <= peaks[80, 1] + 2**24


def test_the_memory_of_a_call_can_be_set():
    model, x = Net(), torch.randn(100, 64, 6)
    found = []
    for size in (0, 10**5, None):
        with kernels.using(fold_memory=size):
            found.append(max(called(sltt.SLTT(), model, x)) // 64)
    assert found[0] == 1 < found[1] < found[2] == 32


@pytest.mark.parametrize(("room", "trained", "forward"), [(None, 32, 64), (10**5, 8, 15), (10**9, 100, 100)])
def test_on_a_gpu_as_many_steps_share_a_call_as_fit_its_memory(room, trained, forward, monkeypatch):
    monkeypatch.setattr(folding, "call_memory", lambda device: room)
    model, x = Net(), torch.randn(100, 64, 6)
    assert max(called(sltt.SLTT(), model, x)) == trained * 64
    CALLS.clear()
    sltt.unroll(model, x)
    assert CALLS[-1] <= max(CALLS[-2:]) == forward * 64


@pytest.mark.parametrize(("free", "room"), [(60, 10), (12, 6)])
def test_a_call_takes_an_eighth_of_a_gpu_or_half_of_what_is_free(free, room, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free - 2, 80))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 3)
    assert memory.call_memory(torch.device("cuda")) == room
    assert memory.call_memory(torch.device("cpu")) is None


def test_another_length_is_not_compared_again(monkeypatch):
    model, x = Net(), torch.randn(20, 64, 6)
    compared = recorded(monkeypatch, folding, "watch_samples", lambda run, model, steps: steps)
    for steps in (20, 12, 20):
        sltt.unroll(model, x[:steps])
    sltt.unroll(model, torch.randn(30, 64, 6))
    sltt.unroll(model, x[:, :32])
    assert compared == [20, 30, 20]


def test_the_number_of_steps_depends_on_shapes_alone():
    """A network that learned, or that was loaded, runs as a new one does."""
    model, x = Net(), torch.randn(100, 64, 6)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert called(sltt.SLTT(), model, x) == called(sltt.SLTT(), Net(), x)


def test_another_thread_that_seeds_the_generator_changes_no_choice(monkeypatch):
    plain, seeds = torch.manual_seed, iter(range(10**6))
    monkeypatch.setattr(torch, "manual_seed", lambda seed: plain(next(seeds)))  # as if it came between two lines
    assert called(sltt.SLTT(), Net(), torch.randn(100, 64, 6)) == [32 * 64] * 3 + [4 * 64]


@pytest.mark.parametrize(("every", "trials", "calls"), [(1, 4, 5), (3, 4, 1)], ids=["each batch", "each third"])
def test_a_network_that_changes_before_every_batch_is_not_tried_for_ever(every, trials, calls, monkeypatch):
    model, x, y, tried = Net(), torch.randn(5, 4, 6), torch.zeros(4, dtype=torch.long), []
    find = folding.find_difference
    monkeypatch.setattr(folding, "watch_samples", lambda *given: None)
    monkeypatch.setattr(folding, "find_difference", lambda *given: (tried.append(1), find(*given))[1])
    for batch in range(12):
        model.epoch = batch // every
        CALLS.clear()
        sltt.SLTT()(model, x, y, LOSS)
    assert len(tried) == trials
    assert len(CALLS) == calls
