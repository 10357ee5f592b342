import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sltt.data.recordings import Recording, RecordingError, frames, read
from tests.data.recordings import events, write_aedat2, write_aedat3, write_aedat4, write_bin, write_npy

tonic_io = pytest.importorskip("tonic.io", reason="event data needs tonic")


@pytest.mark.parametrize(
    ("write", "suffix", "sensor", "reference"),
    [
        (write_bin, ".bin", (34, 34), lambda p: tonic_io.read_mnist_file(str(p), np.dtype([(n, int) for n in "xytp"]))),
        (write_aedat2, ".aedat", (128, 128), None),
        (write_aedat3, ".aedat", (128, 128), None),
        (write_aedat4, ".aedat4", (128, 128), None),
        (write_npy, ".npy", (128, 128), None),
    ],
    ids=["bin", "aedat 2", "aedat 3.1", "aedat 4", "npy"],
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


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"x", "not a recording in a known format"),
        ("a.npy", b"x", "cannot be read"),
        ("a.aedat", b"PK\x03\x04", "it does not begin with #!AER-"),
        ("a.aedat", b"#!AER-DAT2.0\r\n\x01\x02\x03", "truncated: the data is no multiple of the 8 bytes"),
        ("a.aedat", b"#!AER-DAT2.0\r\n" + 8 * b"\x01", "addresses are not those of a DVS128"),
        ("a.aedat", b"#!AER-DAT3.1\r\n#!END-HEADER\r\n" + struct.pack("<HH6i", 1, 1, 8, 4, 0, 2, 2, 2), "truncated"),
    ],
)
def test_a_file_of_another_format_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RecordingError, match=message) as caught:
        read(tmp_path / name, (34, 34), "count", 1)
    assert str(tmp_path / name) in str(caught.value)


def test_aedat_3_has_packets_of_other_events_and_invalid_ones(tmp_path):
    recording, path = events(50, (34, 34)), tmp_path / "a.aedat"
    write_aedat3(path, recording)
    header, *packets = path.read_bytes().partition(b"#!END-HEADER\r\n")
    special = struct.pack("<HH6i2I", 0, 1, 8, 4, 0, 1, 1, 1, 3, 7)
    invalid = struct.pack("<HH6i2I", 1, 1, 8, 4, 0, 1, 1, 0, 5 << 17, 7)
    path.write_bytes(header + packets[0] + special + invalid + packets[1])
    assert all(map(np.array_equal, read(path, (34, 34), "count", 1), recording))


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        (0, 1.5, "expected whole numbers, got x = 1.5 at event 2"),
        (3, np.nan, "got t = nan at event 2"),
        (3, 1e300, r"got t = 1e\+300 at event 2"),
    ],
)
@pytest.mark.parametrize("fields", [True, False])
def test_an_array_of_impossible_numbers_is_named(tmp_path, column, value, message, fields):
    rows = np.tile([1.0, 2.0, 0.0, 3.0], (4, 1))
    rows[2, column] = value
    kind = np.dtype([(name, "f8") for name in "xypt"])
    np.save(tmp_path / "a.npy", rows.view(kind)[:, 0] if fields else rows / [1, 1, 1, 1000])
    with pytest.raises(RecordingError, match=message) as caught:
        read(tmp_path / "a.npy", (34, 34), "count", 2)
    assert str(tmp_path / "a.npy") in str(caught.value)


def test_milliseconds_are_rounded_to_microseconds(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[0, 0, 0, t / 1000] for t in range(3000)]))
    assert read(tmp_path / "a.npy", (1, 1), "time", 1).t.tolist() == list(range(3000))


def test_a_wide_sensor_is_scaled_by_its_height_and_its_width():
    corner = Recording(*(np.array([value]) for value in (39, 19, 0, 1)))
    assert frames(corner, 1, (20, 40), 5)[0, 1, 4, 4] == 1
