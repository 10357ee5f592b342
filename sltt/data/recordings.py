"""Recordings of event cameras: reading a file, checking it, and summing its events into frames.

A recording is four arrays of equal length: x and y in pixels, p (polarity, 0 or 1) and t in microseconds.
"""

import importlib.util
import struct
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Slicing = Literal["count", "time"]


class RecordingError(ValueError):
    """A recording that cannot be used; the message names the file and what is wrong."""


class Recording(NamedTuple):
    """Events in the order of time."""

    x: NDArray[Any]
    y: NDArray[Any]
    t: NDArray[Any]
    p: NDArray[Any]


def read(path: Path, sensor: tuple[int, int], slicing: Slicing, steps: int) -> Recording:
    """Read and check a recording.

    Args:
        path: `.bin` (N-MNIST), `.aedat` (version 3.1, or 2 of a DVS128), `.aedat4` (with the package aedat), `.npz`
            with arrays x, y, t, p, or `.npy` with fields of these names, t in microseconds, or with columns x, y, p,
            t, t in milliseconds (tonic).
        sensor: height and width of the camera, in pixels.
        slicing: frames of equal event count, or of equal time.
        steps: T, number of frames.

    Raises:
        RecordingError: unreadable, empty, fewer events than frames, time runs backwards, or events outside the sensor.
        ImportError: `.aedat4` without the package aedat.
    """
    numpy = {".npy": _read_npy, ".npz": _read_npz}
    readers = {".bin": _read_bin, ".aedat": _read_aedat, ".aedat4": _read_aedat4, **numpy}
    reader = readers.get(path.suffix)
    if reader is None:
        raise RecordingError(f"{path}: not a recording in a known format ({', '.join(readers)})")
    try:
        recording = reader(path)
    except ImportError:
        raise
    except RecordingError as error:
        raise RecordingError(f"{path}: {error}") from None
    except Exception as error:  # whatever a library raises on a file that is not what its name says
        raise RecordingError(f"{path}: cannot be read ({type(error).__name__}: {error})") from error
    if problem := _problem(recording, sensor, slicing, steps):
        raise RecordingError(f"{path}: {problem}")
    return recording


def frames(
    recording: Recording, steps: int, sensor: tuple[int, int], size: int | None = None, slicing: Slicing = "count"
) -> NDArray[Any]:
    """Sum events into T frames [T, 2, H, W] of counts, polarity 0 first.

    By count, the recording's N events are cut into T runs of ⌊N/T⌋, the last with the remainder (the paper's); by time,
    into T runs of equal duration.

    Args:
        recording: events in the order of time.
        steps: T.
        sensor: height and width of the camera.
        size: height and width of the frames, to whose pixels the camera's are mapped and summed; None keeps the sensor.
        slicing: by count or by time.
    """
    count = len(recording.t)
    if slicing == "count":
        step = np.minimum(np.arange(count) // max(count // steps, 1), steps - 1)
    else:
        t = recording.t.astype(np.int64) - int(recording.t[0])
        step = np.minimum(t * steps // (int(t[-1]) + 1), steps - 1)
    height, width = sensor
    x, y = recording.x.astype(np.int64), recording.y.astype(np.int64)
    if size is not None:
        x, y = x * size // width, y * size // height
        height = width = size
    index = ((step * 2 + recording.p.astype(np.int64)) * height + y) * width + x
    return np.bincount(index, minlength=steps * 2 * height * width).reshape(steps, 2, height, width)


def _problem(recording: Recording, sensor: tuple[int, int], slicing: Slicing, steps: int) -> str | None:
    count = len(recording.t)
    if count == 0:
        return "no events"
    if slicing == "count" and count < steps:
        return f"{count} events are fewer than the {steps} frames"
    back = np.flatnonzero(np.diff(recording.t.astype(np.int64)) < 0)
    if len(back):
        before, after = recording.t[back[0] : back[0] + 2]
        return f"time runs backwards at event {back[0] + 1}: {after} after {before} µs"
    height, width = sensor
    outside = np.flatnonzero((recording.x < 0) | (recording.x >= width) | (recording.y < 0) | (recording.y >= height))
    if len(outside):
        i = int(outside[0])
        first = f"{i}, at x = {recording.x[i]}, y = {recording.y[i]}"
        return f"{len(outside)} events outside the sensor of {height} × {width} pixels, the first, {first}"
    if not np.isin(recording.p, (0, 1)).all():
        return "polarities other than 0 and 1"
    return None


def _read_bin(path: Path) -> Recording:
    from tonic.io import read_mnist_file

    if (size := path.stat().st_size) % 5:
        raise RecordingError(f"truncated: {size} bytes are no multiple of the 5 bytes of an event")
    events = read_mnist_file(str(path), np.dtype([(name, np.int64) for name in "xytp"]))
    return Recording(*(events[name] for name in "xytp"))


def _read_aedat(path: Path) -> Recording:
    from tonic.io import get_aer_events_from_file, read_aedat_header_from_file

    with path.open("rb") as file:
        if not file.read(6) == b"#!AER-":
            raise RecordingError("not an AEDAT file: it does not begin with #!AER-")
    version, start = read_aedat_header_from_file(str(path))[:2]
    if version < 3 and (path.stat().st_size - start) % 8:
        raise RecordingError("truncated: the data is no multiple of the 8 bytes of an event")
    # tonic's own decoders of whole files (1.7) fail on the header that its reader of headers gives
    if version < 3:  # DVS128: 7 bits of x, 7 of y, polarity
        events = get_aer_events_from_file(str(path), version, start)
        address, t = (events[name].astype(np.int64) for name in ("address", "timeStamp"))
        if (address >> 16).any():
            raise RecordingError("its addresses are not those of a DVS128, the one camera that is read from AEDAT 2")
        return Recording(address >> 8 & 0x7F, address >> 1 & 0x7F, t, address & 1)
    address, t = _read_packets(path.read_bytes()[start:]).T
    return Recording(address >> 17 & 0x7FFF, address >> 2 & 0x7FFF, t, address >> 1 & 1)


def _read_packets(data: bytes) -> NDArray[np.int64]:
    """Return addresses and times of the valid polarity events of AEDAT 3.1, [N, 2]; tonic takes all for such."""
    packets, place = [np.zeros((0, 2), np.int64)], 0
    while place < len(data):
        kind, _, size, _, overflow, _, count, _ = struct.unpack_from("<HHIIIIII", data, place)
        place += 28 + size * count
        if place > len(data):
            raise RecordingError("truncated: its last packet has fewer events than it says")
        if kind == 1:  # 15 bits of x, 15 of y, polarity, valid; time
            words = np.frombuffer(data, "<u4", 2 * count, place - 8 * count).reshape(-1, 2).astype(np.int64)
            packets.append(words[(words[:, 0] & 1).astype(bool)] + [0, overflow << 31])
    return np.concatenate(packets)


def _read_aedat4(path: Path) -> Recording:
    from tonic.io import read_aedat4

    if importlib.util.find_spec("aedat") is None:
        raise ImportError(f"{path}: tonic reads AEDAT 4 through the package aedat: pip install aedat")
    events = read_aedat4(str(path))
    names = dict(zip("txyp", events.dtype.names, strict=True))  # polarity is called `on`
    return Recording(*(events[names[name]].astype(np.int64) for name in "xytp"))


def _read_npy(path: Path) -> Recording:
    events = np.load(path, allow_pickle=False)
    if events.dtype.names is not None:
        return _of_names(events)
    if events.ndim != 2 or events.shape[1] != 4 or events.dtype.kind not in "iuf":
        got = f"{list(events.shape)} of {events.dtype}"
        raise RecordingError(f"expected events [N, 4] or fields x, y, t, p, got an array {got}")
    x, y, p, t = events.T
    microseconds = np.rint(t.astype(np.float64) * 1000)
    return Recording(*map(_to_integers, "xytp", (x, y, microseconds, p)))


def _read_npz(path: Path) -> Recording:
    with np.load(path, allow_pickle=False) as arrays:
        if missing := ", ".join(sorted(set("xytp") - set(arrays.files))):
            raise RecordingError(f"expected arrays x, y, t, p, got {', '.join(arrays.files)} without {missing}")
        return _of_names(arrays)


def _of_names(arrays: Any) -> Recording:
    columns = [_to_integers(name, arrays[name].ravel()) for name in "xytp"]
    if len(lengths := {len(column) for column in columns}) > 1:
        raise RecordingError(f"expected arrays of one length, got {min(lengths)} and {max(lengths)}")
    return Recording(*columns)


def _to_integers(name: str, values: NDArray[Any]) -> NDArray[np.int64]:
    """Return the values as integers; raise RecordingError for a fraction, NaN, or more than a float counts exactly."""
    whole = (np.abs(values) < 2.0**53) & (values == np.rint(values))
    if not whole.all():
        i = int(np.argmin(whole))
        raise RecordingError(f"expected whole numbers, got {name} = {values[i]} at event {i}")
    return values.astype(np.int64)
