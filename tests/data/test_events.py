import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import sltt
from sltt.data.recordings import RecordingError
from tests.data.recordings import cifar10dvs, events, gesture, nmnist, write_bin, write_npy


def test_nmnist_of_any_number_of_files(tmp_path, caplog):
    data = sltt.data.NMNIST(str(nmnist(tmp_path)), validation=0.34)
    with caplog.at_level(logging.WARNING):
        splits = data.splits(4)
    assert "N-MNIST is partial: 59970 train recordings and 9970 test recordings not there" in caplog.text
    assert data.missing() == {"train": 59970, "test": 9970}
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (20, 10, 30)
    x, y = splits.collate([splits.train[i] for i in range(5)])
    assert x.shape == (4, 5, 2, 34, 34)
    assert (x.sum((0, 2, 3, 4)) == 40).all()
    assert y.tolist() == [splits.train[i][1] for i in range(5)]
    assert (
        splits.fingerprint == sltt.data.NMNIST(str(tmp_path), validation=0.34).splits(4).fingerprint == "0090ff7d0771"
    )


def test_gestures_and_the_split_of_cifar10dvs(tmp_path):
    splits = sltt.data.DVSGesture(str(gesture(tmp_path)), validation=0, size=32).splits(5)
    assert (len(splits.train), len(splits.test), splits.classes) == (22, 22, 11)
    assert splits.train[0][0].shape == (5, 2, 32, 32)
    data = sltt.data.CIFAR10DVS(str(cifar10dvs(tmp_path)), validation=0, size=48)
    assert [(p.name, y) for p, y in data.recordings(train=False)][:2] == [
        ("cifar10_airplane_900.aedat", 0), ("cifar10_airplane_999.aedat", 0),
    ]  # fmt: skip
    splits = data.splits(4)
    assert (len(splits.train), len(splits.test)) == (9, 6)
    assert splits.train[0][0].sum() == 50
    small = sltt.data.CIFAR10DVS(str(tmp_path), validation=0, size=48, resize="interpolate")
    interpolated = small.splits(4).train[0][0]
    full = sltt.data.CIFAR10DVS(str(tmp_path), validation=0).splits(4).train[0][0]
    torch.testing.assert_close(interpolated, torch.nn.functional.interpolate(full, (48, 48), mode="bilinear"))


TIMES, UNITS = (0.0, 0.5, 1.3, 9.0), (0, 1, 699, 5)


def write_shd(root, times=TIMES, units=UNITS, last=19):
    """Write four recordings of both splits."""
    h5py = pytest.importorskip("h5py")
    (root / "SHD").mkdir(exist_ok=True)
    for name in ("train", "test"):
        with h5py.File(root / "SHD" / f"shd_{name}.h5", "w") as file:
            for key, kind, given in (("times", "f2", times), ("units", "f4", units)):
                rows = file.create_dataset(f"spikes/{key}", (4,), dtype=h5py.vlen_dtype(np.dtype(kind)))
                for i in range(4):
                    rows[i] = np.array(given, kind)
            file["labels"] = np.array((0, 1, 0, last))
    return root


def test_shd(tmp_path):
    splits = sltt.data.SHD(str(write_shd(tmp_path)), validation=0).splits(7)
    x, y = splits.collate([splits.train[i] for i in range(4)])
    assert x.shape == (7, 4, 700)
    assert [i.tolist() for i in x[:, 0].nonzero().T] == [[0, 2, 6, 6], [0, 1, 5, 699]]
    assert y.tolist() == [0, 1, 0, 19]
    (tmp_path / "SHD" / "shd_test.h5").write_bytes(b"no")
    with pytest.raises(RecordingError, match=r"shd_test\.h5: not a file of SHD"):
        sltt.data.SHD(str(tmp_path)).splits(7)


@pytest.mark.parametrize(
    ("times", "units", "last"),
    [
        *(([0.1, time], [1, 2], 19) for time in (-0.2, np.nan, np.inf, 200)),
        *(([0.1, 0.2], [1, unit], 19) for unit in (-5, 700)),
        *(([0.1] * count, [1], 19) for count in (0, 2)),
        *(([0.1], [1], label) for label in (-1, 20)),
        ([], [], 19),
    ],
)
def test_damaged_samples_of_shd_are_named(times, units, last, tmp_path):
    with pytest.raises(RecordingError, match=r"shd_train\.h5: sample [03] is damaged: expected a label of 0 … 19"):
        sltt.data.SHD(str(write_shd(tmp_path, times, units, last))).splits(7)


def test_a_folder_of_recordings(tmp_path):
    for split in ("train", "test"):
        write_bin(tmp_path / split / "a" / "1.bin", events())
        write_npy(tmp_path / split / "b" / "2.npy", events())
    write_npy(tmp_path / "train" / ".ipynb_checkpoints" / "2.npy", events())
    splits = sltt.data.EventFolder(str(tmp_path), (34, 34), validation=0).splits(3)
    assert [splits.train[i][1] for i in range(len(splits.train))] == [0, 1]
    (tmp_path / "train" / "c").mkdir()
    with pytest.raises(FileNotFoundError, match="train/c has no recordings"):
        sltt.data.EventFolder(str(tmp_path), (34, 34)).splits(3)


def changed(recording, **fields):
    return recording._replace(**{name: change(getattr(recording, name)) for name, change in fields.items()})


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-2]), "truncated: 198 bytes are no multiple of the 5 bytes"),
        (lambda p: p.write_bytes(b""), "no events"),
        (lambda p: write_bin(p, events(3)), "3 events are fewer than the 4 frames"),
        (lambda p: write_bin(p, changed(events(), t=lambda t: t[::-1])), "time runs backwards at event"),
        (lambda p: write_bin(p, changed(events(), x=lambda x: x + 30)), "events outside the sensor of 34 × 34 pixels"),
    ],
    ids=["truncated", "empty", "too few", "backwards", "outside"],
)
def test_a_bad_recording_is_named_and_can_be_skipped(tmp_path, plant, message, caplog):
    bad = nmnist(tmp_path) / "NMNIST" / "Train" / "3" / "00001.bin"
    plant(bad)
    with pytest.raises(RecordingError, match=message) as caught:
        sltt.data.NMNIST(str(tmp_path)).splits(4)
    assert str(bad) in str(caught.value)
    assert "--data.on_error skip" in str(caught.value)
    with caplog.at_level(logging.WARNING):
        splits = sltt.data.NMNIST(str(tmp_path), validation=0, on_error="skip").splits(4)
    assert len(splits.train) == 29
    assert "1 of 30 training recordings skipped" in caplog.text
    assert str(bad) in caplog.text


class Fetched:
    """Stands in for a data set of tonic: "downloads" one recording of each class, or fails on the way."""

    fails = False

    def __init__(self, save_to, train):
        split = "Train" if train else "Test"
        for label in range(10):
            write_bin(Path(save_to) / "NMNIST" / split / str(label) / "0.bin", events())
            if self.fails and label == 5:
                raise ConnectionError("planted")


def test_nothing_is_fetched_unless_asked_and_half_a_download_is_nothing(tmp_path, monkeypatch):
    import tonic.datasets

    monkeypatch.setattr(tonic.datasets, "NMNIST", Fetched)
    with pytest.raises(FileNotFoundError, match=r"--data\.download true"):
        sltt.data.NMNIST(str(tmp_path)).splits(2)
    assert not list(tmp_path.glob("NMNIST*"))
    monkeypatch.setattr(Fetched, "fails", True)
    with pytest.raises(ConnectionError, match="planted"):
        sltt.data.NMNIST(str(tmp_path), download=True).splits(2)
    assert not list(tmp_path.rglob("*.bin"))
    monkeypatch.setattr(Fetched, "fails", False)
    splits = sltt.data.NMNIST(str(tmp_path), download=True, validation=0).splits(2)
    assert (len(splits.train), len(splits.test)) == (10, 10)
    shutil.rmtree(tmp_path / "NMNIST" / "Test")  # as where the network failed between the two
    assert len(sltt.data.NMNIST(str(tmp_path), download=True, validation=0).splits(2).test) == 10


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("DVSGesture", [{"train": True}, {"train": False}]),
        ("CIFAR10DVS", [{}]),
        ("SHD", [{"train": True}, {"train": False}]),
    ],
)
def test_every_part_of_a_data_set_is_fetched(tmp_path, monkeypatch, name, parts):
    import tonic.datasets

    fetched = []

    def fetch(save_to, **arguments):
        (Path(save_to) / name).mkdir()
        (Path(save_to) / name / str(len(fetched))).touch()
        fetched.append(arguments)

    monkeypatch.setattr(tonic.datasets, name, fetch)
    with pytest.raises(FileNotFoundError, match="not found: looked in"):
        getattr(sltt.data, name)(str(tmp_path), download=True).splits(2)
    assert fetched == parts
    assert sorted(p.name for p in (tmp_path / name).iterdir()) == [str(i) for i in range(len(parts))]


def test_recordings_without_a_test_split_train_all_the_same(tmp_path):
    root = nmnist(tmp_path)
    shutil.rmtree(root / "NMNIST" / "Test")
    splits = sltt.data.NMNIST(str(tmp_path), validation=0.34).splits(4)
    assert splits.test is None
    assert splits.sizes["test"] == 0
