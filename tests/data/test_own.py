"""Data of one's own: data sets of images and sequences, dictionaries as Hugging Face has them, data loaders."""

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, Subset, TensorDataset

import sltt
from sltt.data import from_datasets
from sltt.data.loaders import as_data

LABELS = torch.arange(30) % 3


def sequences(steps=5, count=30):
    return TensorDataset(torch.randn(count, steps, 4), LABELS[:count])


def images(count=30):
    return TensorDataset(torch.randn(count, 1, 4, 4), LABELS[:count])


def network(features=4):
    return nn.Sequential(nn.Flatten(), nn.Linear(features, 8), sltt.LIF(), nn.Linear(8, 3))


class Table(list):
    """Dictionaries, with the columns as Hugging Face's `datasets` gives them."""

    column_names = ("picture", "digit")

    def __getitem__(self, key):
        return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)


def test_images_and_sequences_are_stacked_as_the_rules_take_them():
    splits = from_datasets(images(), 0.2, images(9), static=True).splits(steps=2)
    x, y = splits.collate([splits.train[i] for i in range(4)])
    assert x.shape == (4, 1, 4, 4)
    assert y.dtype == torch.int64
    assert (splits.classes, len(splits.train), len(splits.validation), len(splits.test)) == (3, 24, 6, 9)
    splits = from_datasets(sequences(), static=False).splits(steps=5)
    assert splits.collate([splits.train[0]] * 2)[0].shape == (5, 2, 4)
    assert splits.validation is splits.test is None


def test_held_out_samples_are_of_each_class_alike():
    held, again = (from_datasets(images(), 0.2, static=True).splits(1) for _ in range(2))
    assert [sum(y == k for _, y in held.validation) for k in range(3)] == [2, 2, 2]
    assert held.fingerprint == again.fingerprint


def test_dictionaries_of_pictures_as_hugging_face_has_them():
    rows = Table({"picture": Image.new("L", (6, 5), 255), "digit": i % 2} for i in range(4))
    splits = from_datasets(rows, static=True, columns=("picture", "digit")).splits(1)
    x, y = splits.collate([splits.train[1]])
    assert x.shape == (1, 1, 5, 6)
    assert x.max() == 1
    assert y.tolist() == [1]
    assert splits.classes == 2


def test_numpy_samples_have_the_type_of_the_weights():
    splits = from_datasets([(np.zeros((5, 4)), np.int64(0)), (np.ones((5, 4)), np.int64(1))], static=False).splits(5)
    x, y = splits.collate([splits.train[0]])
    assert (x.dtype, y.dtype, splits.classes) == (torch.float32, torch.int64, 2)


def test_samples_of_float64_are_explained_where_the_weights_are_float32(tmp_path):
    samples = TensorDataset(torch.rand(12, 5, 4, dtype=torch.float64), torch.arange(12) % 3)
    data, settings = from_datasets(samples, static=False), {"steps": 5, "epochs": 1, "batch_size": 4, "device": "cpu"}
    with pytest.raises(RuntimeError) as caught:
        sltt.fit(network(), data, run=tmp_path / "other", **settings)
    assert "with weights of torch.float32: give x.to(torch.float32)" in caught.value.__notes__[0]
    assert sltt.fit(network().double(), data, run=tmp_path / "run", **settings).history


def test_labels_kept_as_a_list_are_read_without_the_samples():
    class Slow(TensorDataset):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    read = []
    splits = from_datasets(Subset(Slow(*images().tensors), range(1, 7)), static=True).splits(1)
    assert splits.classes == 3
    assert set(read) == {1, 3, 6}  # the first, the middle and the last, to compare


def test_labels_of_more_samples_than_the_data_set_has_are_not_split():
    class Few(Dataset):
        targets = [0, 1] * 20

        def __len__(self):
            return 10

        def __getitem__(self, index):
            return torch.rand(4), self.targets[index]

    splits = from_datasets(Few(), 0.2, static=True).splits(1)
    assert (splits.sizes["train"], splits.sizes["validation"]) == (8, 2)
    assert max(splits.train.indices + splits.validation.indices) == 9


def test_sequences_of_several_lengths_are_padded_with_zeros():
    samples = [(torch.ones(length, 4), length % 2) for length in (2, 3, 5)]
    splits = from_datasets(samples, static=False, pad=True).splits(steps=5)
    x, y = splits.collate([splits.train[i] for i in range(3)])
    assert x.sum(dim=(0, 2)).tolist() == [8, 12, 20]
    assert (y.target.tolist(), y.lengths) == ([0, 1, 1], (2, 3, 5))
    each = [(x, torch.arange(len(x))) for x, _ in samples]
    splits = from_datasets(each, static=False, pad=True, per_step=True, classes=5).splits(steps=5)
    _, y = splits.collate([splits.train[0], splits.train[1]])
    assert (y.target.tolist(), y.lengths) == ([[0, 0], [1, 1], [0, 2]], (2, 3))
    with pytest.raises(ValueError, match=r"train\[2\] has 5 time steps, more than steps=4"):
        from_datasets(samples, static=False, pad=True).splits(steps=4).train[2]
    splits = from_datasets(samples, static=False).splits(steps=5)
    with pytest.raises(ValueError, match=r"one shape in a batch, got \[2, 4\] and \[3, 4\]: resize, cut or pad"):
        splits.collate([splits.train[0], splits.train[1]])


def test_a_target_for_each_step_of_another_length_than_its_sequence_is_seen():
    samples = [(torch.rand(t, 4), torch.zeros(t - 1).long()) for t in (3, 5)]
    splits = from_datasets(samples, static=False, pad=True, per_step=True, classes=2).splits(steps=5)
    x, y = splits.collate(samples)
    with pytest.raises(ValueError, match=r"expected targets \[T, B, ...\] = \[5, 2\] for each time step, got \[4, 2\]"):
        sltt.SLTT()(nn.Sequential(nn.Linear(4, 2), sltt.LIF()), x, y, sltt.losses.PerStep(nn.CrossEntropyLoss()))


def test_targets_that_are_no_classes():
    values = from_datasets([(torch.zeros(4), 0.5), (torch.ones(4), 1.5)], static=True).splits(1)
    assert values.classes is None
    assert values.collate([values.train[0], values.train[1]])[1].tolist() == [[0.5], [1.5]]
    steps = from_datasets([(torch.zeros(5, 4), torch.arange(5))] * 2, static=False, per_step=True, classes=5).splits(5)
    assert steps.classes == 5
    assert steps.collate([steps.train[0]] * 2)[1].shape == (5, 2)


def test_a_training_on_loaders_is_that_on_their_data_sets(tmp_path):
    def trained(data, run):
        torch.manual_seed(0)
        model = network()
        result = sltt.fit(model, data, steps=5, epochs=1, batch_size=8, device="cpu", run=tmp_path / run)
        return [{**row, "seconds": 0, "peak_memory": 0} for row in result.history]

    def collate(samples):
        xs, ys = zip(*samples, strict=True)
        return torch.stack(xs, dim=1), torch.stack(ys)

    train, held_out = Subset(sequences(), range(20)), Subset(sequences(), range(20, 30))
    loaders = [DataLoader(part, batch_size=8, collate_fn=collate) for part in (train, held_out)]
    expected = trained(from_datasets(train, held_out, static=False), "datasets")
    assert expected[0]["validation_loss"] is not None
    assert trained(loaders, "loaders") == expected


def test_the_batch_size_is_that_of_the_loader_unless_another_one_is_given(tmp_path):
    loaders = (DataLoader(images(), 8), DataLoader(images(6), 3))
    model, where = network(16), {"steps": 2, "device": "cpu"}
    result = sltt.fit(model, loaders, epochs=1, run=tmp_path / "run", **where)
    assert yaml.safe_load((result.run / "config.yaml").read_text())["batch_size"] == 8
    sltt.evaluate(model, loaders, "validation", **where)
    for measure in (lambda: sltt.fit(model, loaders, batch_size=16, **where),
                    lambda: sltt.evaluate(model, loaders, batch_size=16, **where)):  # fmt: skip
        with pytest.raises(ValueError, match="the loader has batch_size=8, the training 16: say batch_size=8"):
            measure()
    result = sltt.fit(model, from_datasets(images(), static=True), epochs=1, run=tmp_path / "other", **where)
    assert yaml.safe_load((result.run / "config.yaml").read_text())["batch_size"] == 128


def test_loaders_of_images_are_static():
    data = as_data((DataLoader(images(), batch_size=8), None, DataLoader(images(6))), 8)
    splits = data.splits(2)
    assert splits.static
    assert splits.collate([splits.train[0]] * 2)[0].shape == (2, 1, 4, 4)
    assert (splits.validation, len(splits.test)) == (None, 6)


def test_without_test_samples_an_evaluation_says_so(tmp_path):
    data = from_datasets(images(), 0.2, static=True)
    model = network(16)
    sltt.fit(model, data, epochs=1, device="cpu", run=tmp_path / "run")
    assert 0 <= sltt.evaluate(model, data, "validation", device="cpu").accuracy <= 1
    with pytest.raises(ValueError, match="there are no test samples: the data was made without"):
        sltt.evaluate(model, data, device="cpu")


class Stream(IterableDataset):
    def __iter__(self):
        yield torch.zeros(4), 0


PAIR = [(torch.zeros(4), 0)]
MISTAKES = {
    "a dictionary of splits": (
        lambda: from_datasets({"train": PAIR, "test": PAIR}, static=True),
        "choose one of 'train'",
    ),
    "a stream": (lambda: from_datasets(Stream(), static=True), "an iterable data set has no order"),
    "a loader": (lambda: from_datasets(DataLoader(images()), static=True), "train is a loader: pass its data set"),
    "dictionaries": (lambda: from_datasets([{"a": 1, "b": 2}], static=True).splits(1), "keys a, b: say columns="),
    "triples": (
        lambda: from_datasets([(1, 2, 3)], static=True).splits(1),
        r"expected a pair \(x, target\), got a tuple of 3",
    ),
    "text": (lambda: from_datasets([("a", 0)], static=True).splits(1), "PIL image, got a str"),
    "names": (lambda: from_datasets([(torch.zeros(4), "cat")], static=True).splits(1), "'cat': map names to 0"),
    "one axis": (lambda: from_datasets(PAIR, static=False).splits(4), r"expected sequences \[T, ...\]"),
    "labels from 1": (
        lambda: from_datasets([(torch.zeros(4), k) for k in (1, 2)], static=True).splits(1),
        "class indices begin at 0: subtract 1, or say classes=3",
    ),
    "weights": (
        lambda: as_data([DataLoader(images(), 8, sampler=torch.utils.data.WeightedRandomSampler([1.0] * 30, 30))], 8),
        "the loader of train has an order of its own",
    ),
    "with replacement": (
        lambda: as_data([DataLoader(images(), 8, sampler=RandomSampler(images(), replacement=True))], 8),
        "the loader of train has an order of its own",
    ),
    "time second": (lambda: as_data(DataLoader(sequences(), 8), 8), "sequences whose time comes second"),
    "no loader": (lambda: as_data([None, DataLoader(images(), 8)], 8), "a loader of training samples first, got None"),
    "a data set": (lambda: as_data(images(), 8), "got TensorDataset; data sets of your own: sltt.data.from_datasets"),
}


@pytest.mark.parametrize(("make", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


class Damaged(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index == 2:
            raise OSError("cannot be decoded")
        return torch.rand(6), index % 2


def test_a_sample_that_cannot_be_read_is_named():
    with pytest.raises(OSError, match="cannot be decoded") as caught:
        from_datasets(Damaged(), static=True).splits(4)
    assert caught.value.__notes__ == ["while reading train[2]"]


def test_samples_that_require_a_gradient_give_batches_that_do_not():
    leaf = torch.rand(4, 6, requires_grad=True)
    splits = from_datasets(TensorDataset(leaf, torch.arange(4) % 2), static=True).splits(4)
    assert not splits.collate([splits.train[0], splits.train[1]])[0].requires_grad


@pytest.mark.parametrize("kind", ["triples", "dictionaries"])
def test_loaders_of_samples_in_a_form_of_their_own(kind, tmp_path):
    class Samples(Dataset):
        def __len__(self):
            return 16

        def __getitem__(self, i):
            x, y = torch.full((4,), i / 16), i % 3
            return (x, y, f"file {i}") if kind == "triples" else {"image": x, "label": y}

    def collate(samples):
        pairs = [s[:2] if kind == "triples" else (s["image"], s["label"]) for s in samples]
        return torch.stack([x for x, _ in pairs]), torch.tensor([y for _, y in pairs])

    loaders = (DataLoader(Samples(), 8, collate_fn=collate),)
    assert as_data(loaders, 8).splits(2).classes == 3
    run = {"device": "cpu", "run": tmp_path / "run"}
    result = sltt.fit(network(), loaders, steps=2, epochs=1, batch_size=8, **run)
    assert result.history[0]["train_loss"] > 0


@pytest.mark.parametrize(("change", "classes"), [(lambda y: y - 1, 3), (lambda y: y % 2, 2)])
def test_labels_count_as_the_samples_have_them(change, classes):
    class Samples(Dataset):
        targets = (1, 2, 3, 1, 2, 3)

        def __len__(self):
            return 6

        def __getitem__(self, i):
            return torch.rand(4), change(self.targets[i])

    assert from_datasets(Samples(), static=True).splits(1).classes == classes


def test_images_with_a_palette_have_colours():
    picture = Image.new("P", (4, 4), 1)
    picture.putpalette([0, 0, 0, 255, 0, 51])
    x, _ = from_datasets([(picture, 0)], static=True).splits(1).train[0]
    assert x[:, 0, 0].tolist() == pytest.approx([1.0, 0.0, 0.2])
