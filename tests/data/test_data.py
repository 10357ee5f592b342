import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import sltt
from sltt.data import CIFAR10, CIFAR100, Digits, DigitsEvents, ImageFolder
from sltt.data.augment import clear_square
from sltt.data.base import hold_out
from sltt.data.digits import POSITIONS, record
from sltt.data.images import decode
from sltt.training.batches import EpochSampler, eval_loader, train_loader

EVENTS = DigitsEvents(size=12)  # whose splits are made once


@given(labels=st.lists(st.integers(0, 4), max_size=60), share=st.floats(0, 0.9))
def test_hold_out_splits_every_class(labels, share):
    kept, held = hold_out(labels, share)
    assert sorted(kept + held) == list(range(len(labels)))
    for label in set(labels):
        total, out = labels.count(label), sum(labels[i] == label for i in held)
        if share > 0 and total > 1:
            assert 1 <= out <= total - 1
            assert abs(out - share * total) <= 1
    if share == 0:
        assert held == []


def test_the_digits_are_those_of_uci():
    with np.load(Path(sltt.data.__file__).with_name("digits.npz")) as file:
        found = file["images"].tobytes() + file["labels"].tobytes()
    assert hashlib.sha256(found).hexdigest()[:12] == "87ff0c9e40dc"  # equal to load_digits of scikit-learn 1.9


def test_splits_are_the_same_on_every_machine():
    assert hold_out([0] * 10, 0.3)[1] == [4, 7, 9]
    assert Digits().splits(1).fingerprint == EVENTS.splits(3).fingerprint == "5012bf79b0e0"


@pytest.mark.parametrize("data", [Digits(), EVENTS], ids=["images", "events"])
def test_digits_splits_share_no_sample(data):
    splits = data.splits(3)
    parts = [splits.plain, splits.validation, splits.test]
    indices = [set(part.indices) for part in parts]
    assert sum(map(len, indices)) == len(set.union(*indices)) == 1797
    assert [len(i) for i in indices] == [1295, 143, 359]
    assert data.splits(3) is splits


def test_images_are_loaded_once_for_every_number_of_steps():
    images = Digits()
    assert images.splits(2) is images.splits(4)
    assert EVENTS.splits(1) is not EVENTS.splits(3)


def test_the_test_split_does_not_depend_on_the_validation_split():
    a, b = Digits(validation=0.3).splits(1), Digits().splits(1)
    assert a.test.indices == b.test.indices
    assert a.fingerprint != b.fingerprint


def test_images_are_normalised():
    x = torch.stack([x for x, _ in Digits(augment=False, validation=0).splits(1).train])
    assert x.shape[1:] == (1, 8, 8)
    assert x.mean().abs() < 0.05
    assert abs(x.std() - 1) < 0.05


def test_shifted_images_are_filled_with_the_least_intensity():
    splits = Digits().splits(3)
    least = splits.plain[0][0].min()
    edges = [splits.train[i][0][0, side] for i in range(40) for side in (0, -1)]
    assert sum(bool((edge == least).all()) for edge in edges) > 20
    assert all(splits.train[i][0].min() >= least for i in range(40))


def test_events_are_counts_of_both_polarities_and_deterministic():
    x, label = EVENTS.splits(3).test[0]
    assert x.shape == (3, 2, 12, 12)
    assert 0 <= int(label) <= 9
    assert torch.equal(x, DigitsEvents(size=12).splits(3).test[0][0])
    assert torch.equal(x, x.round())
    assert x.min() == 0
    assert (x.sum((0, 2, 3)) > 50).all()


@pytest.mark.parametrize("steps", [1, 5, 7, POSITIONS])
def test_frames_of_any_number_hold_the_same_events(steps):
    images = torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(0))
    frames = record(images, steps, 16, 0.2)
    assert frames.shape == (2, steps, 2, 16, 16)
    assert torch.equal(frames.sum(1), record(images, 3, 16, 0.2).sum(1))
    assert steps > 10 or (frames.sum((2, 3, 4)) > 0).all()


def test_event_counts_follow_the_log_intensity():
    """The camera ends where it began, so what is counted up is counted down, to less than one event a pixel."""
    frames = record(torch.rand(3, 8, 8), 4, 16, 0.2)
    net = (frames[:, :, 0] - frames[:, :, 1]).sum(1)
    assert net.abs().max() <= 1
    assert record(torch.zeros(1, 8, 8), 4, 16, 0.2).sum() == 0


def test_batches_are_stacked_time_first():
    splits = EVENTS.splits(3)
    x, y = next(iter(eval_loader(splits.test, splits, 4, workers=0)))
    assert x.shape == (3, 4, 2, 12, 12)
    assert torch.equal(x[:, 1], splits.test[1][0])
    assert y.shape == (4,)
    splits = Digits().splits(3)
    assert next(iter(eval_loader(splits.test, splits, 4, workers=0)))[0].shape == (4, 1, 8, 8)


def epoch_of(splits, seed, epoch, start=0, workers=0):
    sampler = EpochSampler(len(splits.train), seed)
    sampler.set_epoch(epoch, start)
    return [(x, y) for x, y in train_loader(splits, 100, sampler, workers)]


def test_order_and_augmentation_depend_on_seed_and_epoch_only():
    splits = Digits().splits(1)
    torch.manual_seed(1)
    first = epoch_of(splits, seed=3, epoch=2)
    state = torch.get_rng_state()
    again = epoch_of(splits, seed=3, epoch=2, workers=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0][0], epoch_of(splits, seed=3, epoch=3)[0][0])
    assert not torch.equal(first[0][0], epoch_of(splits, seed=4, epoch=2)[0][0])
    resumed = epoch_of(splits, seed=3, epoch=2, start=300)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first[3:], resumed, strict=True))


def test_an_epoch_shows_every_sample_once():
    splits = Digits(augment=False).splits(1)
    labels = torch.cat([y for _, y in epoch_of(splits, seed=0, epoch=0)])
    assert len(labels) == 1295
    assert sorted(labels.tolist()) == sorted(int(y) for _, y in splits.train)


def write_cifar(root, name, monkeypatch, train=20, test=10):
    """A few images in the layout of the Python version of CIFAR, with the checksums that torchvision compares."""
    from torchvision import datasets

    kind = getattr(datasets, name)
    folder = root / kind.base_folder
    folder.mkdir()
    rng = np.random.default_rng(0)
    fine, classes = ("labels", 10) if name == "CIFAR10" else ("fine_labels", 100)

    def write(file, content):
        data = pickle.dumps(content)
        (folder / file).write_bytes(data)
        return [file, hashlib.md5(data).hexdigest()]

    def images(count):
        pixels = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        return {"data": pixels, fine: [i % 2 for i in range(count)]}

    names = [file for file, _ in kind.train_list]
    monkeypatch.setattr(kind, "train_list", [write(file, images(train // len(names))) for file in names])
    monkeypatch.setattr(kind, "test_list", [write(file, images(test)) for file, _ in kind.test_list])
    meta = write(kind.meta["filename"], {kind.meta["key"]: [f"class {i}" for i in range(classes)]})
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": meta[1]})
    return classes


@pytest.mark.parametrize("make", [CIFAR10, CIFAR100])
def test_cifar_is_read_in_its_own_layout(make, tmp_path, monkeypatch):
    classes = write_cifar(tmp_path, make.__name__, monkeypatch)
    splits = make(root=str(tmp_path), validation=0.2).splits(4)
    assert splits.static
    assert splits.classes == classes
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (16, 4, 10)
    x, label = splits.train[0]
    assert x.shape == (3, 32, 32)
    assert x.dtype == torch.float32
    assert label in (0, 1)
    plain = splits.test[0][0]
    assert torch.equal(plain, splits.test[0][0])
    mean, std = (torch.tensor(v)[:, None, None] for v in (make.mean, make.std))
    pixels = torch.from_numpy(splits.test.data[0]).permute(2, 0, 1) / 255
    torch.testing.assert_close(plain * std + mean, pixels, atol=1e-6, rtol=1e-5)


def test_cifar_augments_training_images_only(tmp_path, monkeypatch):
    write_cifar(tmp_path, "CIFAR10", monkeypatch)
    splits = CIFAR10(root=str(tmp_path), validation=0.2, cutout=16).splits(1)
    a, b = splits.train[0][0], splits.train[0][0]
    assert not torch.equal(a, b)
    assert (a == 0).all(0).sum() >= 64  # a quarter of the square at the least
    assert torch.equal(splits.validation[0][0], splits.validation[0][0])


def write_images(root, folders=("train", "test"), size=40):
    for folder in folders:
        for label in ("cat", "dog"):
            (root / folder / label).mkdir(parents=True)
            for i in range(4):
                pixels = np.full((size, size, 3), 60 * i, dtype=np.uint8)
                Image.fromarray(pixels).save(root / folder / label / f"{i}.png")


@pytest.mark.parametrize("test_folder", ["test", "val"])
def test_image_folder(tmp_path, test_folder):
    write_images(tmp_path, ("train", test_folder))
    splits = ImageFolder(str(tmp_path), size=32, validation=0.25).splits(1)
    assert (len(splits.train), len(splits.validation), len(splits.test), splits.classes) == (6, 2, 8, 2)
    assert splits.train[0][0].shape == splits.test[0][0].shape == (3, 32, 32)
    padded = ImageFolder(str(tmp_path), size=40, crop_padding=4, cutout=8).splits(1)
    assert padded.train[0][0].shape == (3, 40, 40)


def test_folders_of_images_without_train_and_test_are_split(tmp_path):
    write_images(tmp_path, ["."])
    (tmp_path / ".cache").mkdir()  # is no class
    data = ImageFolder(str(tmp_path), size=32, validation=0.25, test=0.25)
    splits = data.splits(1)
    assert (len(splits.train), len(splits.validation), len(splits.test), splits.classes) == (4, 2, 2, 2)
    assert data.classes == ["cat", "dog"]
    parts = splits.train.indices, splits.validation.indices, splits.test.indices
    assert sorted(i for part in parts for i in part) == list(range(8))
    write_images(tmp_path, ["train"])
    with pytest.raises(ValueError, match=r"test=0\.25 splits .*/CLASS/\*, and it has train: leave test out"):
        ImageFolder(str(tmp_path), test=0.25).splits(1)


def half(path):
    path.write_bytes(path.read_bytes()[:50])


def postscript(path):
    Image.new("RGB", (32, 32)).save(path, format="EPS")


@pytest.mark.parametrize("spoil", [half, postscript])
def test_an_image_that_does_not_decode_is_named(spoil, tmp_path, monkeypatch):
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: Image.new("RGB", (32, 32)).im)
    write_images(tmp_path)
    spoil(tmp_path / "test" / "cat" / "1.png")
    with pytest.raises(ValueError, match=r"test/cat/1\.png does not decode as an image"):
        ImageFolder(str(tmp_path), size=32).splits(1).test[1]


@pytest.mark.parametrize("kind", ["tif", "pgm", "png"])
def test_images_of_16_bits_keep_their_highest_8(kind, tmp_path):
    pixels = np.arange(1024, dtype=np.uint16).reshape(32, 32) * 64
    Image.fromarray(pixels).save(path := tmp_path / f"image.{kind}")
    expected = torch.from_numpy(pixels.astype(int) >> 8)
    assert (decode(str(path)).int() - expected).abs().max() <= 1


def test_images_of_16_bits_are_augmented(tmp_path):
    write_images(tmp_path, ("train", "test"))
    for path in tmp_path.rglob("*.png"):
        Image.fromarray(np.arange(1024, dtype=np.uint16).reshape(32, 32) * 64).save(path)
    splits = ImageFolder(str(tmp_path), size=32, crop_padding=4, randaugment=2).splits(1)
    assert all(splits.train[i][0].isfinite().all() for i in range(len(splits.train)))
    mean, std = (torch.tensor(of).view(3, 1, 1) for of in (ImageFolder.mean, ImageFolder.std))
    expected = (torch.arange(1024).view(32, 32) * 64 // 256 / 255 - mean) / std
    torch.testing.assert_close(splits.test[0][0], expected)


def test_a_class_without_images_is_named(tmp_path):
    write_images(tmp_path)
    (tmp_path / "train" / "fox").mkdir()
    with pytest.raises(FileNotFoundError, match="fox"):
        ImageFolder(str(tmp_path)).splits(1)


def test_image_folders_of_other_classes_or_files_are_told_apart(tmp_path):
    write_images(tmp_path)
    before = ImageFolder(str(tmp_path), size=32).splits(1).fingerprint
    (tmp_path / "train/cat/0.png").rename(tmp_path / "train/cat/9.png")
    assert ImageFolder(str(tmp_path), size=32).splits(1).fingerprint != before
    (tmp_path / "test/cat").rename(tmp_path / "test/ant")
    with pytest.raises(ValueError, match="classes of the training and the test images differ: ant, cat"):
        ImageFolder(str(tmp_path)).splits(1)


def test_cutout_clears_one_square():
    x = torch.ones(3, 20, 20)
    cleared = torch.stack([clear_square(x, 6) for _ in range(200)]) == 0
    counts = cleared[:, 0].sum((1, 2))
    assert counts.max() == 36
    assert counts.min() >= 9
    assert torch.equal(cleared[:, 0], cleared[:, 2])
    assert cleared.any(0).all()
    assert x.min() == 1
