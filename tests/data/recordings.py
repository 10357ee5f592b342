"""Recordings in every format, and small data sets of them, written to a folder."""

import struct

import numpy as np
import pytest

import sltt
from sltt.data.recordings import Recording

pytest.importorskip("tonic", reason="event data needs tonic")


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
