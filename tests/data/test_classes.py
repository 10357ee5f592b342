import pytest
import torch
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from sltt.data import Classes, Digits, DigitsEvents, Latency, Mixup, Recall, SequentialDigits, from_datasets
from sltt.data.base import Data, Mapped, Splits
from sltt.data.classes import class_labels
from sltt.data.encodings import Encoded

SETS = {
    "images": (Digits(), 4),
    "events": (DigitsEvents(size=12), 2),
    "sequences": (SequentialDigits(), 8),
    "coded": (Encoded(Digits(), Latency(low=-1.0, high=2.0)), 3),
    "own": (from_datasets(TensorDataset(torch.randn(40, 3), torch.arange(40) % 10), 0.5, static=True), 2),
}


@pytest.mark.parametrize("name", SETS)
def test_classes_are_chosen_and_numbered_anew(name):
    data, steps = SETS[name]
    whole, chosen = data.splits(steps), Classes(data, [7, 2, 5]).splits(steps)
    assert chosen.classes == 3
    assert chosen.static == whole.static
    assert chosen.fingerprint != whole.fingerprint
    for part in ("train", "validation", "test", "plain"):
        all_samples, some = getattr(whole, part), getattr(chosen, part)
        if all_samples is None:
            assert some is None
            continue
        kept = [i for i, label in enumerate(class_labels(all_samples)) if label in (7, 2, 5)]
        assert len(some) == len(kept) == len(some.targets)
        for i in (0, len(kept) - 1):
            x, y = some[i]
            assert [7, 2, 5][y] == int(all_samples[kept[i]][1])
            assert y == some.targets[i]
            if part != "train":  # which is drawn anew
                assert torch.equal(x, all_samples[kept[i]][0])


class Drawn(TensorDataset):
    """Training samples that are drawn anew: reading one is an error here."""

    def __getitem__(self, index):
        raise AssertionError(f"sample {index} was read")


def test_labels_are_read_without_the_samples_where_a_data_set_has_them():
    samples = Mapped(Drawn(torch.randn(6, 3), torch.arange(6) % 3), torch.flatten)
    assert class_labels(samples) == class_labels(Subset(samples, range(6))) == [0, 1, 2, 0, 1, 2]


def test_the_labels_of_training_samples_that_are_drawn_are_those_of_the_plain_ones():
    class Own(Data):
        def load(self, steps):
            plain = TensorDataset(torch.randn(6, 3), torch.arange(6) % 3)
            train = ConcatDataset([Drawn(*plain.tensors)])
            return Splits(train, None, plain, False, 3, "", plain=plain, lengths=[5, 6, 7, 8, 9, 10])

    splits = Classes(Own(), [2, 1]).splits(1)
    assert splits.train.targets == splits.plain.targets == [1, 0, 1, 0]
    assert splits.lengths == [6, 7, 9, 10]


@pytest.mark.parametrize("name", ["images", "events", "sequences"])
def test_plain_samples_are_those_of_the_training_without_augmentation(name):
    data, steps = SETS[name]
    splits = data.splits(steps)
    assert class_labels(splits.plain) == [int(splits.train[i][1]) for i in range(len(splits.train))]
    assert torch.equal(splits.plain[3][0], splits.plain[3][0])
    assert any(not torch.equal(splits.train[3][0], splits.plain[3][0]) for _ in range(20))


def test_what_cannot_be_chosen_is_refused():
    with pytest.raises(ValueError, match="class 3 stands twice"):
        Classes(Digits(), [3, 4, 3])
    with pytest.raises(ValueError, match=r"class 10 of Digits has no training samples"):
        Classes(Digits(), [3, 10]).splits(4)
    numbers = from_datasets(TensorDataset(torch.randn(8, 3), torch.randn(8)), static=True)
    with pytest.raises(ValueError, match="are no classes, one for each sample"):
        Classes(numbers, [0]).splits(4)
    gap = from_datasets(TensorDataset(torch.randn(8, 3), torch.arange(8) % 2 * 2), static=True)
    with pytest.raises(ValueError, match="class 1 of TensorDataset has no training samples"):
        Classes(gap, [0, 1]).splits(4)
    mixed = Recall(classes=2, samples=16)
    splits = mixed.splits(16)
    object.__setattr__(splits, "train", Mixup(splits.train, 0.2))
    with pytest.raises(ValueError, match="mixup mixes samples of all classes"):
        Classes(mixed, [0, 1]).splits(16)
