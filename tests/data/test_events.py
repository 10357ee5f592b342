import json
import logging
import multiprocessing
import os
import signal
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sltt
from sltt.data import augment
from sltt.data.cache import CacheError, cached
from sltt.data.recordings import Recording, RecordingError, frames, read
from sltt.training.batches import EpochSampler, train_loader

tonic_io = pytest.importorskip("tonic.io", reason="event data needs tonic")


def events(count=40, sensor=(34, 34), seed=0):
    """Random events in the order of time."""
    rng = np.random.default_rng(seed)
    height, width = sensor
    return Recording(
        rng.integers(width, size=count), rng.integers(height, size=count), np.sort(rng.integers(300_000, size=count)),
        rng.integers(2, size=count),
    )  # fmt: skip


def write_bin(path, recording):
    """N-MNIST: x, y, then the polarity and 23 bits of time."""
    raw = np.empty((len(recording.t), 5), np.uint8)
    raw[:, 0], raw[:, 1] = recording.x, recording.y
    raw[:, 2] = recording.p << 7 | recording.t >> 16 & 0x7F
    raw[:, 3], raw[:, 4] = recording.t >> 8 & 0xFF, recording.t & 0xFF
    path.parent.mkdir(parents=True, exist_ok=True)
    raw.tofile(path)


def write_aedat2(path, recording):
    """AEDAT 2.0 of a DVS128: a text header, then address and time of each event, big-endian."""
    raw = np.empty((len(recording.t), 2), ">u4")
    raw[:, 0] = recording.x << 8 | recording.y << 1 | recording.p
    raw[:, 1] = recording.t
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"#!AER-DAT2.0\r\n# made by a test\r\n" + raw.tobytes())


def write_aedat3(path, recording):
    """AEDAT 3.1: a text header, then packets with a header of 28 bytes, little-endian."""
    raw = np.empty((len(recording.t), 2), "<u4")
    raw[:, 0] = recording.x << 17 | recording.y << 2 | recording.p << 1 | 1
    raw[:, 1] = recording.t
    packets = b""
    for part in np.array_split(raw, 3):
        packets += (
            np.array([1, 1], "<u2").tobytes() + np.array([8, 4, 0, len(part), len(part), len(part)], "<u4").tobytes()
        )
        packets += part.tobytes()
    path.write_bytes(b"#!AER-DAT3.1\r\n#!END-HEADER\r\n" + packets)


def write_aedat4(path, recording):
    """AEDAT 4.0 without compression: a header that describes stream 0 in XML, then packets of 16 bytes an event."""
    outline = (
        b'<dv version="2.0"><node name="outInfo" path="/outInfo/"><node name="0" path="/outInfo/0/">'
        b'<attr key="compression" type="string">NONE</attr><attr key="typeIdentifier" type="string">EVTS</attr>'
        b'<node name="info" path="/outInfo/0/info/"><attr key="sizeX" type="int">128</attr>'
        b'<attr key="sizeY" type="int">128</attr></node></node></node></dv>'
    )
    # flatbuffers: offset of the root, kind, table of the fields' places; then the root: compression, outline, no index
    header = struct.pack("<I4s6x5H", 24, b"IOHE", 10, 24, 4, 12, 8) + struct.pack("<iiIq4x", 10, 0, 16, -1)
    header += struct.pack("<I", len(outline)) + outline + b"\0"
    content = b"#!AER-DAT4.0\r\n" + struct.pack("<I", len(header)) + header
    fields = {"names": ["t", "x", "y", "p"], "formats": ["<i8", "<i2", "<i2", "?"], "itemsize": 16}
    raw = np.zeros(len(recording.t), fields)
    for name in "xytp":
        raw[name] = getattr(recording, name)
    for part in np.array_split(raw, 3):
        table = struct.pack("<I4s2x3H", 16, b"EVTS", 6, 8, 4) + struct.pack("<iII", 6, 4, len(part))
        packet = struct.pack("<I", len(table) + part.nbytes) + table + part.tobytes()
        content += struct.pack("<II", 0, len(packet)) + packet
    path.write_bytes(content)


def write_dat(path, recording):
    """Prophesee's DAT: lines of text, the type and the size of an event, then time, and x, y and polarity in bits."""
    raw = np.empty((len(recording.t), 2), "<u4")
    raw[:, 0] = recording.t
    raw[:, 1] = recording.x | recording.y << 14 | recording.p << 28
    path.write_bytes(b"% Data file containing CD events.\n% Version 2\n" + bytes([12, 8]) + raw.tobytes())


def write_npy(path, recording):
    """tonic's DVS128 Gesture: x, y, p, and t in milliseconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, np.stack([recording.x, recording.y, recording.p, recording.t / 1000], 1))


def nmnist(root, per_class=3, count=40):
    for split, shift in (("Train", 0), ("Test", 500)):
        for label in range(10):
            for i in range(per_class):
                write_bin(
                    root / "NMNIST" / split / str(label) / f"{i:05d}.bin", events(count, seed=shift + 10 * i + label)
                )
    return root


def gesture(root):
    for folder in ("ibmGestureTrain", "ibmGestureTest"):
        for user in ("user01_led", "user02_lab"):
            for label in range(11):
                write_npy(root / "DVSGesture" / folder / user / f"{label}.npy", events(60, (128, 128), label))
    return root


def cifar10dvs(root):
    for name in sltt.data.CIFAR10DVS.classes[:3]:
        for number in (0, 3, 899, 900, 999):
            write_aedat2(root / "CIFAR10DVS" / name / f"cifar10_{name}_{number}.aedat", events(50, (128, 128), number))
    return root


@pytest.mark.parametrize(
    ("write", "suffix", "sensor", "reference"),
    [
        (write_bin, ".bin", (34, 34), lambda p: tonic_io.read_mnist_file(str(p), np.dtype([(n, int) for n in "xytp"]))),
        (write_aedat2, ".aedat", (128, 128), None),
        (write_aedat3, ".aedat", (128, 128), None),
        (write_aedat4, ".aedat4", (128, 128), None),
        (write_dat, ".dat", (128, 128), None),
        (write_npy, ".npy", (128, 128), None),
    ],
    ids=["bin", "aedat 2", "aedat 3.1", "aedat 4", "dat", "npy"],
)
def test_recordings_are_read_as_tonic_reads_them(tmp_path, write, suffix, sensor, reference):
    if suffix == ".aedat4":
        pytest.importorskip("aedat", reason="tonic reads AEDAT 4 through aedat")
    expected = events(200, sensor)
    write(tmp_path / f"one{suffix}", expected)
    found = read(tmp_path / f"one{suffix}", sensor, "count", 4)
    for a, b in zip(found, expected, strict=True):
        assert (abs(a - b) <= 1).all()  # milliseconds are floats
    if reference:
        by_tonic = reference(tmp_path / f"one{suffix}")
        assert all((getattr(found, name) == by_tonic[name]).all() for name in "xytp")


@given(count=st.integers(1, 200), steps=st.integers(1, 12), slicing=st.sampled_from(["count", "time"]),
       size=st.sampled_from([None, 5, 17, 34]), seed=st.integers(0, 99))  # fmt: skip
@settings(deadline=None)
def test_every_event_is_in_one_frame(count, steps, slicing, size, seed):
    recording = events(count, seed=seed)
    if slicing == "count" and count < steps:
        return
    made = frames(recording, steps, (34, 34), size, slicing)
    assert made.shape == (steps, 2, size or 34, size or 34)
    assert made.sum() == count
    assert made[:, 1].sum() == recording.p.sum()
    if slicing == "count":
        runs = [count // steps] * (steps - 1)
        assert made.sum((1, 2, 3)).tolist() == [*runs, count - sum(runs)]


def test_frames_by_time_are_of_equal_duration():
    recording = Recording(*(np.array(a) for a in ([0, 1, 2, 3], [0, 0, 0, 0], [100, 199, 200, 299], [0, 1, 0, 1])))
    made = frames(recording, 2, (4, 4), slicing="time")
    assert made[0].sum() == 2
    assert made[0, 1, 0, 1] == made[1, 0, 0, 2] == 1


def test_smaller_frames_sum_the_events_of_their_pixels():
    recording = events(500, (128, 128))
    full, small = frames(recording, 3, (128, 128)), frames(recording, 3, (128, 128), 32)
    assert (small == full.reshape(3, 2, 32, 4, 32, 4).sum((3, 5))).all()


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
    interpolated = (
        sltt.data.CIFAR10DVS(str(tmp_path), validation=0, size=48, resize="interpolate").splits(4).train[0][0]
    )
    full = sltt.data.CIFAR10DVS(str(tmp_path), validation=0).splits(4).train[0][0]
    torch.testing.assert_close(interpolated, torch.nn.functional.interpolate(full, (48, 48), mode="bilinear"))


def test_shd(tmp_path):
    h5py = pytest.importorskip("h5py")
    (tmp_path / "SHD").mkdir()
    for name in ("train", "test"):
        with h5py.File(tmp_path / "SHD" / f"shd_{name}.h5", "w") as file:
            kind = h5py.vlen_dtype(np.dtype("f2"))
            times = file.create_dataset("spikes/times", (4,), dtype=kind)
            units = file.create_dataset("spikes/units", (4,), dtype=h5py.vlen_dtype(np.dtype("i2")))
            for i in range(4):
                times[i], units[i] = np.array([0.0, 0.5, 1.3, 9.0], "f2"), np.array([0, 1, 699, 5], "i2")
            file["labels"] = np.array([0, 1, 0, 19])
    splits = sltt.data.SHD(str(tmp_path), validation=0).splits(7)
    x, y = splits.collate([splits.train[i] for i in range(4)])
    assert x.shape == (7, 4, 700)
    assert [i.tolist() for i in x[:, 0].nonzero().T] == [[0, 2, 6, 6], [0, 1, 5, 699]]
    assert y.tolist() == [0, 1, 0, 19]
    (tmp_path / "SHD" / "shd_test.h5").write_bytes(b"no")
    with pytest.raises(RecordingError, match=r"shd_test\.h5: not a file of SHD"):
        sltt.data.SHD(str(tmp_path)).splits(7)


def test_a_folder_of_recordings(tmp_path):
    for split in ("train", "test"):
        write_bin(tmp_path / split / "a" / "1.bin", events())
        write_npy(tmp_path / split / "b" / "2.npy", events())
    splits = sltt.data.EventFolder(str(tmp_path), (34, 34), validation=0).splits(3)
    assert [splits.train[i][1] for i in range(2)] == [0, 1]
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


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"x", "not a recording in a known format"),
        ("a.npy", b"x", "cannot be read"),
        ("a.aedat", b"PK\x03\x04", "it does not begin with #!AER-"),
        ("a.aedat", b"#!AER-DAT2.0\r\n\x01\x02\x03", "truncated: the data is no multiple of the 8 bytes"),
        ("a.dat", b"PK\x03\x04", "not a DAT file: it does not begin with"),
        ("a.dat", b"% Version 2\n\x0c\x08\x01\x02\x03", "truncated: the data is no multiple of the 8 bytes"),
        ("a.dat", b"% Version 2\n\x0c\x08", "no events"),
        ("a.dat", b"% Version 2\n\x0e\x08" + bytes(16), "events of type 14 in 8 bytes, expected type 0 or 12"),
    ],
)
def test_a_file_of_another_format_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RecordingError, match=message) as caught:
        read(tmp_path / name, (34, 34), "count", 1)
    assert str(tmp_path / name) in str(caught.value)


def test_data_that_is_not_there_says_where_it_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"N-MNIST not found: looked in .*NMNIST/Train/LABEL/\*\.bin"):
        sltt.data.NMNIST(str(tmp_path)).splits(4)


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


def make_cache(folder, log):
    """One process that makes or waits for the cache."""

    def make(i):
        with open(log, "a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.01)
        return np.full((2, 3), i)

    return cached(folder, {"a": 1}, [__file__] * 20, (2, 3), make, "test")


def test_two_processes_make_a_cache_once(tmp_path):
    log = tmp_path / "log"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=make_cache, args=(tmp_path, log)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    makers = log.read_text().split()
    assert len(makers) == 20
    assert len(set(makers)) == 1
    arrays, mark = make_cache(tmp_path, log)
    assert [int(array[0, 0]) for array in arrays] == list(range(20)) == mark["kept"]


def test_a_cache_that_was_killed_is_made_again(tmp_path):
    log = tmp_path / "log"
    process = multiprocessing.get_context("fork").Process(target=make_cache, args=(tmp_path, log))
    process.start()
    while not log.exists() or len(log.read_text().split()) < 5:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not list(tmp_path.glob("*/complete.json"))
    arrays, _ = make_cache(tmp_path, log)
    assert [int(array[1, 2]) for array in arrays] == list(range(20))


def flip_bit(path, at):
    raw = bytearray(path.read_bytes())
    raw[at % len(raw)] ^= 4
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda home: flip_bit(home / "frames.npy", -1), "array 19 has another checksum"),
        (lambda home: flip_bit(home / "frames.npy", 128), "array 0 has another checksum"),
        (lambda home: flip_bit(home / "frames.npy", 1), r"frames\.npy cannot be read"),
        (lambda home: os.truncate(home / "frames.npy", 200), r"frames\.npy cannot be read \(mmap length"),
        (lambda home: os.truncate(home / "frames.npy", 0), r"frames\.npy cannot be read"),
        (lambda home: (home / "frames.npy").unlink(), r"frames\.npy cannot be read"),
        (lambda home: np.save(home / "frames.npy", np.zeros((20, 3, 2), np.uint16)), r"\(20, 3, 2\), expected"),
        (lambda home: np.save(home / "frames.npy", np.zeros((20, 2, 3), np.int16)), "holds int16"),
        (lambda home: (home / "complete.json").write_text(""), r"complete\.json cannot be read"),
        (lambda home: (home / "complete.json").write_text("[]"), r"complete\.json cannot be read"),
        (lambda home: (home / "complete.json").write_text('{"kept": [0]}'), r"complete\.json cannot be read"),
    ],
)  # fmt: skip
def test_a_damaged_cache_says_which_folder_to_delete(tmp_path, damage, problem):
    make_cache(tmp_path, tmp_path / "log")
    (home,) = (path.parent for path in tmp_path.glob("*/complete.json"))
    damage(home)
    with pytest.raises(CacheError, match=f"{home} is damaged: .*{problem}.*Delete this folder"):
        list(make_cache(tmp_path, tmp_path / "log")[0])


def test_no_flipped_bit_of_a_cache_is_taken(tmp_path):
    make_cache(tmp_path, tmp_path / "log")
    (home,) = (path.parent for path in tmp_path.glob("*/complete.json"))
    for path in (home / "frames.npy", home / "complete.json"):
        whole = path.read_bytes()
        for at in range(0, len(whole), 3):
            flip_bit(path, at)
            try:
                arrays, mark = make_cache(tmp_path, tmp_path / "log")
                read = [int(array[0, 0]) for array in arrays]
            except CacheError:
                pass
            else:  # the padding of the header
                assert read == list(range(20)) == mark["kept"]
            path.write_bytes(whole)


def test_a_damaged_frame_stops_a_training_and_says_what_to_delete(tmp_path):
    root = nmnist(tmp_path)
    sltt.data.NMNIST(str(root)).splits(4)
    for frames_file in root.glob(".sltt-cache/*/frames.npy"):
        flip_bit(frames_file, -1)
    splits = sltt.data.NMNIST(str(root)).splits(4)
    with pytest.raises(CacheError, match="Delete this folder"):
        [splits.test[i] for i in range(len(splits.test))]


def test_the_cache_is_keyed_by_what_changes_the_frames(tmp_path):
    root = nmnist(tmp_path)
    for kwargs in ({}, {"size": 17}, {"slicing": "time"}, {"on_error": "skip"}):
        sltt.data.NMNIST(str(root), **kwargs).splits(4)
    sltt.data.NMNIST(str(root)).splits(5)
    assert len(list(root.glob(".sltt-cache/*/complete.json"))) == 10  # training and test each
    sltt.data.NMNIST(str(root), augment=sltt.data.EventAugmentation()).splits(5)
    assert len(list(root.glob(".sltt-cache/*/complete.json"))) == 10
    write_bin(root / "NMNIST" / "Train" / "0" / "00000.bin", events(41))
    sltt.data.NMNIST(str(root)).splits(4)
    marks = list(root.glob(".sltt-cache/*/complete.json"))
    assert len(marks) == 11
    assert all(json.loads(mark.read_text())["version"] for mark in marks)


@pytest.mark.parametrize(
    "change",
    [augment.flip, lambda x: augment.roll(x, 3), lambda x: augment.rotate(x, 30), lambda x: augment.shear(x, 20),
     lambda x: augment.cutout(x, 9), sltt.data.EventAugmentation(drop=0)],
    ids=["flip", "roll", "rotate", "shear", "cutout", "all"],
)  # fmt: skip
def test_what_moves_a_frame_moves_all_alike(change):
    for seed in range(8):
        torch.manual_seed(seed)
        x = torch.randint(4, (1, 2, 16, 16)).float().expand(5, 2, 16, 16)
        y = change(x)
        assert y.shape == x.shape
        assert (y == y[:1]).all()
        assert set(y.unique().tolist()) <= {0.0, 1.0, 2.0, 3.0}


def test_dropped_events_are_some_of_those_that_were_there():
    x = torch.randint(6, (10, 2, 8, 8)).float()
    still = {"flip": False, "roll": 0, "rotate": 0, "shear": 0, "cutout": 0}
    for drop in (augment.drop_events, augment.drop_time, sltt.data.EventAugmentation(drop=1.0, **still)):
        ys = [drop(x) for _ in range(10)]
        assert all((y <= x).all() and (y >= 0).all() for y in ys)
        assert all(y.sum() < x.sum() for y in ys)
    assert torch.equal(sltt.data.EventAugmentation(drop=0.0, **still)(x), x)


def test_augmentation_is_the_same_for_any_number_of_workers(tmp_path):
    splits = sltt.data.NMNIST(str(nmnist(tmp_path)), augment=sltt.data.EventAugmentation(drop=0.5)).splits(3)
    batches = []
    for workers in (0, 2):
        loader = train_loader(splits, 8, EpochSampler(len(splits.train), 0), workers)
        batches.append([x for x, _ in loader])
    assert all(torch.equal(a, b) for a, b in zip(*batches, strict=True))
