"""Metrics that compute their score from all samples, as those of torchmetrics do."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sltt
from sltt.data import Splits
from sltt.metrics import collects, higher_is_better, name_of
from sltt.training.console import Console
from tests.collecting import ConfusionMatrix, MacroF1, macro_f1
from tests.training.blobs import Blobs, network, stop_at, train


class Uneven(Blobs):
    """In the order of the classes, so that most batches have one class only."""

    def load(self, steps):
        splits = super().load(steps)
        parts = (sorted(part, key=lambda sample: sample[1]) for part in (splits.train, splits.validation, splits.test))
        return Splits(*parts, static=True, classes=3, fingerprint="uneven")


@pytest.mark.parametrize(
    ("value", "got"), [("good", "a str"), (None, "a NoneType"), (torch.ones(2), r"shape \[2\]")], ids=repr
)
def test_a_metric_that_gives_no_number_is_named(value, got):
    def odd(prediction, target):
        return value

    with pytest.raises(ValueError, match=f"the metric odd gives {got}, expected one number"):
        sltt.evaluate(network(), Blobs(), metric=odd, device="cpu")


@pytest.mark.parametrize("batch_size", [1, 5, 128])
def test_the_score_is_that_of_all_samples_at_once(batch_size):
    model, data, metric = network(), Uneven(), MacroF1()
    found = sltt.evaluate(model, data, metric=metric, batch_size=batch_size, device="cpu")
    x, y = data.splits(4).collate(data.splits(4).test)
    assert found.metric == "macro_f1"
    assert found.score == pytest.approx(macro_f1(sltt.predict(model, x, steps=4), y))
    assert metric.counts.sum() == 0  # a copy collects


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("AUROC", "auroc"), ("BinaryAUROC", "binary_auroc"), ("MeanAbsoluteError", "mean_absolute_error"),
        ("MultilabelF1Score", "multilabel_f1_score"), ("MSELoss", "mse_loss"), ("_Own", "own"), ("my_own", "my_own"),
    ],
)  # fmt: skip
def test_names_of_metrics_keep_abbreviations_whole(kind, expected):
    assert name_of(type(kind, (), {})()) == expected


class Seen:
    """How many samples it has seen."""

    def __init__(self):
        self.count = 0

    def update(self, prediction, target):
        self.count += len(target)

    def compute(self):
        return self.count

    def reset(self):
        self.count = 0


def test_each_epoch_collects_anew_and_selects_by_the_score(tmp_path):
    _, result = train(tmp_path / "run", metric=Seen(), epochs=3)
    assert [(row["train_seen"], row["validation_seen"]) for row in result.history] == [(60, 12)] * 3
    model, result = train(tmp_path / "f1", data=Uneven(), metric=MacroF1(), epochs=3)
    scores = [row["validation_macro_f1"] for row in result.history]
    assert scores[result.epoch - 1] == max(scores)
    measured = sltt.evaluate(model, Uneven(), "validation", metric=MacroF1(), device="cpu")
    assert measured.score == pytest.approx(max(scores))


@pytest.mark.parametrize(("batch", "rest"), [(2, 60 - 2 * 16), (4, None)])
def test_a_metric_that_cannot_be_saved_has_the_score_of_the_rest_of_a_resumed_epoch(batch, rest, tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "part", metric=Seen(), rule=stop_at(batch), epochs=2)
    settings = {"metric": Seen(), "rule": sltt.SLTT(k=2), "epochs": 2, "report": Console(), "resume": True}
    _, again = train(tmp_path / "part", **settings)
    assert [row["train_seen"] for row in again.history] == [rest, 60]
    assert [row["validation_seen"] for row in again.history] == [12] * 2
    assert capsys.readouterr().out.count("train_seen of epoch 1 counts the batches after the resume only") == 1


@dataclass
class Count:
    samples: int = 0


class Dataclass(Seen):
    """Its state is a dataclass."""

    def state_dict(self):
        return {"count": Count(self.count)}

    def load_state_dict(self, state):
        self.count = Count(**state["count"]).samples


def test_a_state_of_a_metric_with_a_dataclass_is_read_again_as_its_fields(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "part", metric=Dataclass(), rule=stop_at(2), epochs=1)
    _, again = train(tmp_path / "part", metric=Dataclass(), rule=sltt.SLTT(k=2), epochs=1, resume=True)
    assert [row["train_dataclass"] for row in again.history] == [60]


def test_a_metric_of_several_numbers_is_refused(tmp_path):
    message = r"macro_f1 gives shape \[3\], expected one number: .* average='macro'"
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "run", metric=MacroF1(average=None))


def test_padded_sequences_and_targets_of_each_step_are_collected():
    model = nn.Sequential(nn.Linear(4, 8), sltt.LIF(), nn.Linear(8, 3))
    samples = [(torch.rand(3 + i % 3, 4), i % 3) for i in range(12)]
    data = sltt.data.from_datasets(samples, 0.5, static=False, pad=True)
    settings = {"steps": 5, "batch_size": 2, "device": "cpu"}
    assert sltt.evaluate(model, data, "validation", metric=Seen(), **settings).score == 6
    samples = [(torch.rand(5, 4), torch.arange(5) % 3) for _ in range(12)]
    data = sltt.data.from_datasets(samples, 0.5, static=False, per_step=True)
    loss = sltt.losses.PerStep(nn.CrossEntropyLoss())
    found = sltt.evaluate(model, data, "validation", loss=loss, metric=Seen(), **settings)
    assert found.score == 6 * 5  # each step is a sample


def test_a_metric_that_does_not_say_is_better_higher():
    class Silent(MacroF1):
        higher_is_better = None

    assert higher_is_better(Silent())
    assert collects(Silent())


class TopTwo(sltt.metrics.Metric):
    """The share of samples whose class is among the two largest logits."""

    def __call__(self, prediction, target):
        return (prediction.topk(2).indices == target[:, None]).any(1).double().mean()


def test_an_evaluation_takes_several_metrics_and_one_that_gives_a_matrix():
    model, data = network(), Uneven()
    matrix = ConfusionMatrix()
    several = [sltt.metrics.Accuracy(), matrix, TopTwo()]
    found = sltt.evaluate(model, data, metric=several, batch_size=5, device="cpu")
    x, y = data.splits(4).collate(data.splits(4).test)
    counts = found.scores["confusion_matrix"]
    assert counts.sum(1).tolist() == y.bincount(minlength=3).tolist()
    assert counts.trace() / counts.sum() == pytest.approx(found.accuracy)
    assert found.scores["accuracy"] == found.score
    top = sltt.predict(model, x, steps=4).topk(2).indices
    assert found.scores["top_two"] == pytest.approx(float((top == y[:, None]).any(1).double().mean()))
    alone = sltt.evaluate(model, data, metric=matrix, batch_size=5, device="cpu")
    torch.testing.assert_close(alone.score, counts)
    with pytest.raises(ValueError, match=r"gives shape \[3, 3\], expected one number"):
        sltt.fit(model, data, metric=matrix, epochs=1, device="cpu")
    with pytest.raises(ValueError, match="of different names, got accuracy"):
        sltt.evaluate(model, data, metric=[sltt.metrics.Accuracy()] * 2, device="cpu")


LOSSES = [nn.CrossEntropyLoss(), nn.MSELoss(), sltt.losses.CrossEntropyMSE(), F.l1_loss, F.cross_entropy]


@pytest.mark.parametrize("loss", LOSSES, ids=name_of)
def test_a_loss_as_the_metric_is_better_where_it_is_lower(loss):
    assert not higher_is_better(loss)
