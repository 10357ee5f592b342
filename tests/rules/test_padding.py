import copy

import pytest
import torch
from torch import nn

import sltt
from sltt.losses import predict_from
from sltt.rules.batch import sequence_loss
from sltt.training.batches import EpochSampler, cut, join_outputs, train_loader
from tests.conftest import LOSS, RULES, batch, gradient, small_network

LENGTHS = (4, 2, 3, 1, 2)
PADDING = {name: rule for name, rule in RULES.items() if rule.pads}


@pytest.fixture(params=PADDING.values(), ids=PADDING.keys())
def padding(request):
    return request.param


def padded():
    x, y = batch()
    for b, length in enumerate(LENGTHS):
        x[length:, b] = 0.0
    return x, sltt.Padded(y, LENGTHS)


def run(model, rule, x, y, **kwargs):
    model = copy.deepcopy(model)
    torch.manual_seed(1)
    out = rule(model, x, y, LOSS, seed=3, **kwargs)
    return gradient(model), out


def test_what_stands_in_padded_steps_changes_no_gradient(padding):
    model = small_network()
    x, y = padded()
    other = x.clone()
    for b, length in enumerate(LENGTHS):
        other[length:, b] = torch.randn(len(x) - length, 6, dtype=torch.float64)
    found, expected = run(model, padding, other, y), run(model, padding, x, y)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1].loss, expected[1].loss)


@pytest.mark.parametrize("rule", [sltt.BPTT(), sltt.SLTT(), sltt.OTTT(decay=0.5)], ids=repr)
def test_a_padded_batch_has_the_gradient_of_its_samples_one_by_one(rule):
    model = small_network()
    x, y = padded()
    found, out = run(model, rule, x, y)
    total, loss = 0, 0
    for b, length in enumerate(LENGTHS):
        share = length / sum(LENGTHS)
        one = run(
            model, rule, x[:length, b : b + 1], y.target[b : b + 1], backward=lambda v, w=share: (v * w).backward()
        )
        total, loss = total + one[0], loss + share * one[1].loss
    torch.testing.assert_close(found, total)
    torch.testing.assert_close(out.loss, loss)
    torch.testing.assert_close(sequence_loss(LOSS, out.logits, y), out.loss)


@pytest.mark.parametrize("rule", [sltt.BPTT(), sltt.SLTT(), sltt.TBPTT(2), sltt.OTTT(decay=0.5)], ids=repr)
@pytest.mark.parametrize("parts", [1, 2])
def test_padded_targets_of_each_step_have_the_gradient_of_the_samples_one_by_one(rule, parts):
    network, loss = small_network(), sltt.losses.PerStep(nn.CrossEntropyLoss())
    x, _ = padded()
    y = torch.randint(3, x.shape[:2])

    def gradients(batches):
        model = copy.deepcopy(network)
        outs = [rule(model, x, y, loss, backward=lambda v, w=w: (v * w).backward()) for x, y, w in batches]
        return gradient(model), sum(out.loss * w for out, (*_, w) in zip(outs, batches, strict=True)), outs

    found = gradients(cut(x, sltt.Padded(y, LENGTHS), parts, static=False, per_step=True))
    rows = enumerate(LENGTHS)
    one = gradients([(x[:n, b : b + 1], y[:n, b : b + 1], n / sum(LENGTHS)) for b, n in rows])
    torch.testing.assert_close(found[:2], one[:2])
    if parts == 1:
        torch.testing.assert_close(sequence_loss(loss, found[2][0].logits, sltt.Padded(y, LENGTHS)), found[1])


def test_full_lengths_are_as_without(padding):
    model = small_network()
    x, y = batch()
    plain, full = run(model, padding, x, y), run(model, padding, x, sltt.Padded(y, [4] * 5))
    torch.testing.assert_close(full[0], plain[0])
    torch.testing.assert_close(full[1].loss, plain[1].loss)


def test_slttk_trains_all_steps_of_a_batch_of_short_sequences():
    model = small_network()
    x, y = batch(steps=2)
    short = sltt.Padded(y, [2, 1, 2, 1, 2])
    for rescale in (False, True):
        found, expected = run(model, sltt.SLTT(k=3, rescale=rescale), x, short), run(model, sltt.SLTT(), x, short)
        torch.testing.assert_close(found[0], expected[0])


@pytest.mark.parametrize("parts", [2, 3])
def test_parts_of_a_padded_batch_add_up(parts):
    network, found = small_network(), []
    x, y = padded()
    for count in (1, parts):
        model = copy.deepcopy(network)

        def step(x, y, weight, model=model):
            return sltt.SLTT()(model, x, y, LOSS, backward=lambda value: (value * weight).backward())

        split = cut(x, y, count, static=False, per_step=False)
        out = join_outputs([step(*part) for part in split], split)
        found.append((gradient(model), out.loss))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("by", ["mean", "last", "max"])
def test_the_prediction_is_of_the_real_steps(by):
    logits = torch.randn(4, 5, 3)
    found = predict_from(by, logits, LENGTHS)
    for b, length in enumerate(LENGTHS):
        torch.testing.assert_close(found[b], predict_from(by, logits[:length, b : b + 1])[0])


def test_predict_takes_lengths():
    model = small_network()
    x, _ = padded()
    found = sltt.predict(model, x, lengths=LENGTHS)
    for b, length in enumerate(LENGTHS):
        torch.testing.assert_close(found[b], sltt.predict(model, x[:length, b : b + 1])[0])
    with pytest.raises(ValueError, match="expected lengths from 1 to T = 4 of 5 samples"):
        sltt.predict(model, x, lengths=[1])


@pytest.mark.parametrize(
    ("rule", "loss", "lengths", "message"),
    [
        (sltt.RateBased(), LOSS, LENGTHS, r"RateBased\(\) has mean rates of all steps.*use SLTT or BPTT"),
        (sltt.BPTT(), sltt.losses.OfLast(LOSS), LENGTHS, "OfLast looks at padded steps too"),
        (sltt.SLTT(), sltt.losses.Activity(LOSS), LENGTHS, "Activity looks at padded steps too"),
        (sltt.SLTT(), LOSS, (4, 2, 3, 1), "expected lengths from 1 to T = 4 of 5 samples, got"),
        (sltt.SLTT(), LOSS, (4, 2, 3, 0, 1), "expected lengths from 1 to T = 4"),
        (sltt.SLTT(), LOSS, (4, 2, 3, 5, 1), "expected lengths from 1 to T = 4"),
        (sltt.SLTT(), LOSS, (4, 2, 3, 1.5, 1), "expected lengths from 1 to T = 4"),
    ],
)
def test_what_cannot_leave_out_padded_steps_is_refused(rule, loss, lengths, message):
    x, y = batch()
    with pytest.raises(ValueError, match=message):
        rule(small_network(), x, sltt.Padded(y, lengths), loss)


def recordings(by_length=False):
    """Two classes of sequences of 2 to 6 steps."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for i in range(40):
        length = 2 + i % 5
        samples.append((2.0 * (i % 2) + 0.1 * torch.randn(length, 4, generator=generator), i % 2))
    return sltt.data.from_datasets(samples, 0.25, static=False, pad=True, by_length=by_length)


def test_batches_of_similar_length_have_few_added_steps():
    added = []
    for by_length in (False, True):
        splits = recordings(by_length).splits(6)
        batches = list(train_loader(splits, 6, EpochSampler.of(splits, 0, 6), workers=0))
        assert sum(len(y.target) for _, y in batches) == 30
        assert all(len(x) == max(y.lengths) for x, y in batches)
        added.append(sum(len(x) - length for x, y in batches for length in y.lengths))
    assert added[1] < added[0] / 2


def test_a_training_leaves_out_padded_steps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(nn.Linear(4, 16), sltt.LIF(tau=2.0), nn.Linear(16, 2))
    settings = {"steps": 6, "batch_size": 8, "device": "cpu"}
    result = sltt.fit(model, recordings(by_length=True), sltt.SLTT(), epochs=8, accumulate=2, **settings)
    metrics = sltt.evaluate(model, recordings(), "validation", **settings)
    assert metrics.accuracy == result.history[result.epoch - 1]["validation_accuracy"] == 1.0


def test_the_score_of_padded_targets_of_each_step_is_of_the_real_steps(tmp_path):
    generator = torch.Generator().manual_seed(0)
    samples = [(x, (x[:, 0] > 0.5).long()) for x in (torch.rand(2 + i % 5, 4, generator=generator) for i in range(24))]
    data = sltt.data.from_datasets(samples[12:], samples[:12], static=False, pad=True, per_step=True, classes=2)
    loss = sltt.losses.PerStep(nn.CrossEntropyLoss())
    model = nn.Sequential(nn.Linear(4, 8), sltt.LIF(), nn.Linear(8, 2))
    settings = {"steps": 6, "batch_size": 5, "device": "cpu", "loss": loss}
    result = sltt.fit(model, data, sltt.SLTT(), epochs=2, run=tmp_path / "run", **settings)
    metrics = sltt.evaluate(model, data, "validation", **settings)
    right = [(sltt.unroll(model, x[:, None]).argmax(-1)[:, 0] == y).float() for x, y in samples[:12]]
    assert metrics.score == pytest.approx(float(torch.cat(right).mean()))
    assert metrics.score == result.history[result.epoch - 1]["validation_accuracy"]
