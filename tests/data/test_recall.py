from collections import Counter

import pytest
import torch

import sltt
from sltt.analysis import advice, agreement
from sltt.analysis.agreement import cheaper_rules
from sltt.data import Recall
from sltt.models import MLP

LOSS = sltt.losses.CrossEntropyMSE(alpha=0.0)


def small(**kwargs):
    return Recall(**{"classes": 3, "channels": 20, "delay": 2, "samples": 900, **kwargs})


def read(dataset):
    """Sequences [N, T, channels] and labels [N]."""
    xs, labels = zip(*dataset, strict=True)
    return torch.stack(xs), torch.tensor(labels)


def network(seed, features):
    torch.manual_seed(seed)
    return MLP(features, lambda: sltt.LIF(tau=20.0, detach_reset=True), norm=False)


@pytest.mark.parametrize(("delay", "steps"), [(0, 2), (2, 4), (2, 9)])
def test_a_sequence_is_cue_silence_and_probe(delay, steps):
    splits = small(delay=delay).splits(steps)
    x, labels = read(splits.test)
    assert x.shape == (2000, steps, 20)
    assert not splits.static
    assert labels.unique().tolist() == list(range(splits.classes)) == [0, 1, 2]
    assert (x[:, 0] != 0).all()
    assert (x[:, 1 : delay + 1] == 0).all()
    probe = x[:, delay + 1 :]
    assert torch.equal(probe, probe[:, :1].expand_as(probe))
    assert len(probe[:, 0].unique(dim=0)) == 3
    torch.testing.assert_close(probe.sum(1), read(small(delay=0).splits(2).test)[0][:, 1])  # whatever T is
    batch, y = splits.collate([splits.train[i] for i in range(5)])
    assert batch.shape == (steps, 5, 20)
    assert y.shape == (5,)


def test_noise_has_the_standard_deviation_that_was_asked_for():
    cues = {noise: read(small(channels=500, noise=noise).splits(4).test)[0][:, 0] for noise in (0.0, 3.0)}
    assert len(cues[0.0].unique(dim=0)) == 3
    pattern, noisy = cues[0.0], cues[3.0] * 10**0.5
    assert (noisy - pattern).std() == pytest.approx(3, rel=0.01)
    assert cues[3.0].std() == pytest.approx(1, rel=0.05)


def test_the_same_seed_gives_the_same_data():
    a, b, other = (small(seed=seed).splits(5) for seed in (0, 0, 1))
    for name in ("train", "validation", "test"):
        (x, y), (again, labels) = read(getattr(a, name)), read(getattr(b, name))
        assert torch.equal(x, again)
        assert torch.equal(y, labels)
        assert not torch.equal(x, read(getattr(other, name))[0])
    assert a.fingerprint == b.fingerprint
    prints = {small(**kwargs).splits(5).fingerprint for kwargs in ({}, {"seed": 1}, {"noise": 1.0})}
    assert len(prints) == 3


def test_splits_are_of_the_sizes_asked_for_and_balanced():
    splits = small().splits(4)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [810, 90, 2000]
    everything = small(validation=0).splits(4)
    assert everything.validation is None
    assert len(everything.train) == 900
    for part in (splits.train, splits.validation, splits.test):
        counts = Counter(read(part)[1].tolist()).values()
        assert max(counts) - min(counts) <= 3
    assert torch.equal(read(splits.test)[0], read(everything.test)[0])


def test_the_label_depends_on_cue_and_probe_together_and_on_neither_alone():
    x, labels = read(small(noise=0.0, validation=0).splits(4).train)
    cue, probe = (x[:, t].unique(dim=0, return_inverse=True)[1] for t in (0, -1))
    for alone in (cue, probe):
        assert Counter(zip(alone.tolist(), labels.tolist(), strict=True)) == {
            (i, y): 100 for i in range(3) for y in range(3)
        }
    pairs = {(c, p, y) for c, p, y in zip(cue.tolist(), probe.tolist(), labels.tolist(), strict=True)}
    assert len(pairs) == 9


def test_one_of_several_cues_is_marked_and_the_label_takes_it():
    splits = small(cues=3, noise=0.0, validation=0).splits(7)
    x, labels = read(splits.train)
    assert x.shape == (900, 7, 21)
    marks = x[..., -1]
    assert torch.equal(marks.unique(), torch.tensor([0.0, 20**0.5]))
    assert ((marks > 0).sum(1) == 1).all()
    step = marks.argmax(1)
    assert torch.bincount(step, minlength=7)[3:].sum() == 0
    assert torch.bincount(step, minlength=3)[:3].min() > 250
    marked = x[torch.arange(900), step, :-1].unique(dim=0, return_inverse=True)[1]
    probe = x[:, -1].unique(dim=0, return_inverse=True)[1]
    pairs = {(c, p, y) for c, p, y in zip(marked.tolist(), probe.tolist(), labels.tolist(), strict=True)}
    assert len(pairs) == 9
    assert (x[:, 3:5] == 0).all()
    assert len(x[:, 0, :-1].unique(dim=0)) == 3  # what is not marked is a cue too


def train(model, rule, splits, batches):
    """Train on batches of 128, then the accuracy on the test samples."""
    x, y = read(splits.train)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(batches):
        chosen = torch.randint(len(y), (128,))
        optimizer.zero_grad()
        rule(model, x[chosen].transpose(0, 1), y[chosen], LOSS)
        optimizer.step()
    x, y = read(splits.test)
    return (sltt.unroll(model, x.transpose(0, 1)).mean(0).argmax(1) == y).float().mean().item()


@pytest.mark.slow
def test_bptt_and_traces_learn_it_and_sltt_does_not():
    splits = Recall(delay=1, samples=6000).splits(4)  # a window of 2 steps cuts between the cue and the probe
    accuracy = {}
    for rule in (sltt.BPTT(), sltt.OTTT(), sltt.SLTT(), sltt.TBPTT(2), sltt.OTTT(inputs=False)):
        accuracy[repr(rule)] = train(network(0, [200, 64, 4]), rule, splits, 100)
    assert min(accuracy.pop(name) for name in ("BPTT()", "OTTT()")) > 0.9
    assert max(accuracy.values()) < 0.6, accuracy


@pytest.mark.parametrize(("seed", "batches"), [(0, 0), (1, 20)])
def test_agreement_advises_traces(seed, batches):
    splits = Recall(delay=3, samples=1000).splits(8)
    model = network(seed, [200, 64, 4])
    train(model, sltt.BPTT(), splits, batches)
    x, y = splits.collate([splits.train[i] for i in range(128)])
    found = agreement(model, x, y, LOSS, cheaper_rules(model, 8))
    assert found[0].cosine < 0.85
    assert advice(found).startswith("Take OTTT.")
