import random
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import sltt
from sltt.kernels import options
from sltt.rules.segments import choose_segments, repeated_segments
from tests.conftest import LOSS, batch, gradients, small_network


def test_the_second_run_of_a_segment_repeats_statistics_masks_and_random_numbers():
    """BatchNorm's statistics, dropout of both kinds and the generator end as if each step had run once."""

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.plain = small_network(norm=True, dropout=0.4), nn.Dropout(0.3)

        def forward(self, x):
            return self.net(self.plain(x))

    x, y = batch(steps=7)
    results = []
    for rule in (sltt.BPTT(fold=1), sltt.BPTT(segment=3, fold=1)):  # dropout draws once a call
        torch.manual_seed(2)
        model = Noisy()
        out = rule(model, x, y, LOSS)
        grads = [p.grad for p in model.parameters()]
        results.append([out.loss, out.logits, *grads, *model.buffers(), torch.get_rng_state()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_the_second_run_of_a_segment_carries_the_gradient_through_a_state_that_rests():
    class EverySecond(nn.Module):
        """Its hidden neurons run on even steps only."""

        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.Sequential(nn.Linear(6, 8), sltt.LIF(tau=4.0)), nn.Linear(14, 3)

        def forward(self, x):
            hidden = self.inner(x) if x[0, 0] > 0 else x.new_zeros(len(x), 8)
            return self.outer(torch.cat([hidden, x], 1))

    x, y = batch(steps=6)
    x[:, 0, 0] = torch.tensor([1.0, -1.0] * 3)
    model = EverySecond().double()
    expected, _ = gradients(model, sltt.BPTT(), x, y)
    for length in (1, 2, 3):
        torch.testing.assert_close(gradients(model, sltt.BPTT(segment=length), x, y)[0], expected)
    assert not torch.allclose(gradients(model, sltt.SLTT(), x, y)[0], expected)


@pytest.mark.filterwarnings("ignore:.*keeps a tensor of the batch")
@pytest.mark.parametrize("rate", [None, 0.3])
@pytest.mark.parametrize("length", [1, 2, "auto"])
def test_segments_have_the_gradient_of_a_loss_on_hidden_layers(length, rate):
    """Read from an attribute and from a hook, beside spikes that Activity reads; random numbers of Python repeat."""

    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.Sequential(nn.Linear(6, 8), sltt.LIF(tau=4.0)), nn.Linear(8, 3)

        def forward(self, x):
            self.hidden = self.inner(x)
            return self.outer(self.hidden * random.choice([0.5, 1.5]) * np.random.choice([0.5, 1.5]))

    def loss(logits, target):
        return LOSS(logits, target) + model.hidden.square().mean() + 3 * seen[-1].mean() + model.outer.weight.sum()

    x, y = batch(steps=7)
    results, model, seen = [], Hidden().double(), []
    model.inner[1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    for rule in (sltt.BPTT(fold=1), sltt.BPTT(segment=length)):
        random.seed(0)
        np.random.seed(0)
        model.zero_grad()
        out = rule(model, x, y, loss if rate is None else sltt.losses.Activity(loss, rate=rate))
        results.append([out.loss, out.logits, *(p.grad for p in model.parameters()), torch.tensor(random.random())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_a_layer_runs_compiled_in_both_runs_of_a_segment_or_in_none(monkeypatch):
    monkeypatch.setattr(options, "COMPILE_FROM", 256)
    monkeypatch.setattr(options, "compiler_problem", lambda device: None)
    monkeypatch.setattr(torch, "compile", lambda function, **kwargs: function)
    compiles, seen = options.Kernel._compiles, []

    def note(self, device, elements):
        found = compiles(self, device, elements)
        seen.append((self.function.__name__, elements, found))
        return found

    monkeypatch.setattr(options.Kernel, "_compiles", note)
    first, second = sltt.LIF(tau=1.37), sltt.LIF(tau=1.37)  # of one kernel, which the second, larger layer compiles
    model = nn.Sequential(nn.Linear(6, 8), first, nn.Linear(8, 64), second, nn.Linear(64, 3)).double()
    x, y = batch(steps=4)
    for small in (False, True):  # in the second batch, which knows that the kernel is compiled
        seen.clear()
        sltt.BPTT(segment=2, fold=1)(model, x, y, LOSS)
        forward = {(elements, found) for name, elements, found in seen if name == "forward"}
        assert forward == {(x.shape[1] * 8, small), (x.shape[1] * 64, True)}


def test_a_second_run_of_a_segment_that_is_not_the_first_is_noticed():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.generator = small_network(), torch.Generator()

        def forward(self, x):
            return self.net(x + torch.randn(x.shape, generator=self.generator, dtype=x.dtype))

    with pytest.raises(RuntimeError, match="time step 0 gave other logits when it was run again"):
        sltt.BPTT(segment=2)(Noisy(), *batch(), LOSS)


@pytest.mark.parametrize("seen", [[0], SimpleNamespace(t=0)])
def test_segments_refuse_what_counts_time_steps(seen):
    class Counts(nn.Identity):
        def forward(self, x):
            counts, at = (self.seen, 0) if isinstance(self.seen, list) else (vars(self.seen), "t")
            counts[at] += 1
            return x if counts[at] % 3 else x.detach()

    model = nn.Sequential(small_network(), Counts())
    model[1].seen = seen
    with pytest.raises(RuntimeError, match="changes seen of 1"):
        sltt.BPTT(segment=2)(model, *batch(), LOSS)


@cache
def fewest(segments: int, checkpoints: int) -> int:
    """Count how many segments run again, where the first of these states is kept after the best number of segments."""
    if checkpoints == 0 or segments == 1:
        return segments * (segments - 1) // 2
    after = range(1, segments)
    return min(k + fewest(segments - k, checkpoints - 1) + fewest(k, checkpoints) for k in after)


@pytest.mark.parametrize("checkpoints", [1, 2, 3, 5, 30, None])
@pytest.mark.parametrize("steps", [2, 7, 24])
@pytest.mark.parametrize("loss", [LOSS, sltt.losses.Activity(LOSS)], ids=repr)
def test_the_fewest_steps_run_again_for_as_many_states(loss, steps, checkpoints):
    model = small_network()
    x, y = batch(steps=steps)
    expected, _ = gradients(model, sltt.BPTT(fold=1), x, y, loss)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(0))
    found, _ = gradients(model, sltt.BPTT(segment=1, checkpoints=checkpoints, fold=1), x, y, loss)
    torch.testing.assert_close(found, expected)
    kept = checkpoints or steps
    assert len(calls) == steps + fewest(steps, kept) == steps + repeated_segments(steps, kept)


@pytest.mark.parametrize(("steps", "segment", "states"), [(1, 1, 1), (16, 1, 4), (64, 2, 6), (256, 2, 14), (64, 8, 2)])
def test_chosen_segments_run_forward_three_times_at_most(steps, segment, states):
    assert choose_segments(steps, 8 if segment == 8 else 1) == (segment, states)
    segments = -(-steps // segment)
    assert repeated_segments(segments, states) <= 2 * segments
