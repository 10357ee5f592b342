import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sltt
from tests.conftest import LOSS, batch, gradients, seeded, small_network
from tests.references import by_hand, every


@pytest.fixture
def model(neurons):
    """A network of every neuron; its dropout draws the same mask in every call that is seeded alike."""
    return small_network(neurons, norm=True, dropout=0.3)


@pytest.mark.parametrize(("rule", "window"), [(sltt.BPTT(), 99), (sltt.SLTT(), 1)], ids=str)
def test_bptt_is_the_literal_loop_and_sltt_the_one_that_is_detached_by_hand(model, rule, window):
    x, y = batch()
    grad, out = seeded(gradients, model, rule, x, y)
    expected, loss = seeded(by_hand, model, x, y, every(window))
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(out.loss, loss)
    assert expected.abs().max() > 0


@pytest.mark.parametrize(
    ("rule", "twin"),
    [
        (sltt.TBPTT(4), sltt.BPTT()),
        (sltt.BPTT(segment=1), sltt.BPTT()),
        (sltt.BPTT(segment=3), sltt.BPTT()),
        (sltt.BPTT(segment=9), sltt.BPTT()),
        (sltt.BPTT(segment=1, checkpoints=1), sltt.BPTT()),
        (sltt.BPTT(segment="auto", fold=1), sltt.BPTT()),
        (sltt.TBPTT(9), sltt.BPTT()),
        (sltt.TBPTT(1), sltt.SLTT()),
        (sltt.SLTT(k=4), sltt.SLTT()),
        (sltt.SLTT(k=4, rescale=True), sltt.SLTT()),
    ],
    ids=lambda rule: type(rule).__name__,
)
def test_members_of_the_family_that_are_the_same(model, rule, twin):
    x, y = batch(steps=4)
    found, expected = (seeded(gradients, model, one, x, y, seed=0)[0] for one in (rule, twin))
    torch.testing.assert_close(found, expected)


@settings(max_examples=25, deadline=None)
@given(steps=st.integers(1, 6), window=st.integers(1, 7), size=st.integers(1, 4), seed=st.integers(0, 99))
def test_tbptt_equals_a_loop_that_detaches_between_windows(steps, window, size, seed):
    torch.manual_seed(seed)
    model = small_network()
    x, y = batch(steps, size)
    found, _ = gradients(model, sltt.TBPTT(window), x, y)
    torch.testing.assert_close(found, by_hand(model, x, y, every(window))[0])


def test_rescaled_single_draws_average_to_sltt(neurons):
    steps = 4
    x, y = batch(steps)
    model = small_network(neurons)
    total, seen, seed = 0, set(), 0
    while len(seen) < steps:
        seed += 1
        step = torch.randperm(steps, generator=torch.Generator().manual_seed(seed))[0].item()
        if step in seen:
            continue
        seen.add(step)
        total = total + gradients(model, sltt.SLTT(k=1, rescale=True), x, y, seed=seed)[0]
    torch.testing.assert_close(total / steps, gradients(model, sltt.SLTT(), x, y)[0])


@pytest.mark.parametrize("k", [1, 2, 5])
def test_sltt_k_trains_the_steps_that_its_seed_draws(k):
    x, y = batch(steps=6)
    run, trained = [], []

    def loss(logits, target):
        run.append(logits)
        return LOSS(logits, target)

    def backward(value):
        trained.append(len(run) - 1)
        value.backward()

    sltt.SLTT(k=k, fold=1)(small_network(), x, y, loss, backward=backward, seed=7)
    assert trained == sorted(torch.randperm(6, generator=torch.Generator().manual_seed(7))[:k].tolist())


def test_sltt_k_keeps_the_loss_over_t_unless_rescaled():
    x, y = batch(steps=4)
    model = small_network()
    plain, rescaled = (seeded(gradients, model, sltt.SLTT(k=2, rescale=r), x, y) for r in (False, True))
    torch.testing.assert_close(2 * plain[0], rescaled[0])
    assert plain[1].loss == rescaled[1].loss


class Cut(sltt.Rule):
    """SLTT by one backward: every call of the network is cut from the one before."""

    def __init__(self, length):
        self.length = length

    def run(self, batch):
        calls = [range(t, t + self.length) for t in range(0, batch.steps, self.length)]
        batch.backward(sum(batch.forward(call, cut=True) for call in calls))
        return batch.output()


@pytest.mark.parametrize("length", [1, 2])
def test_calls_of_the_network_that_are_cut(length, neurons):
    model, (x, y) = small_network(neurons), batch()
    torch.testing.assert_close(gradients(model, Cut(length), x, y)[0], gradients(model, sltt.SLTT(), x, y)[0])
