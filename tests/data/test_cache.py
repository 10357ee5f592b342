import multiprocessing
import os
import signal
import time

import numpy as np
import pytest

import sltt
from sltt.data.cache import CacheError, cache_frames
from tests.conftest import LINUX
from tests.data.recordings import events, nmnist, write_bin


def make_cache(folder, log):
    """One process that makes or waits for the cache."""

    def make(i):
        with open(log, "a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.01)
        return np.full((2, 3), i)

    return cache_frames(folder, {"a": 1}, [__file__] * 20, (2, 3), make, "test")


@LINUX
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
    arrays, kept = make_cache(tmp_path, log)
    assert [int(array[0, 0]) for array in arrays] == list(range(20)) == kept


def test_a_finished_cache_is_read_without_its_lock(tmp_path, monkeypatch):
    make_cache(tmp_path, tmp_path / "log")
    monkeypatch.setattr(sltt.data.cache, "FileLock", None)  # as in a folder that may not be written to
    arrays, _ = make_cache(tmp_path, tmp_path / "log")
    assert len(arrays) == 20


@LINUX
def test_a_cache_that_was_killed_is_made_again(tmp_path):
    log = tmp_path / "log"
    process = multiprocessing.get_context("fork").Process(target=make_cache, args=(tmp_path, log))
    process.start()
    while not log.exists() or len(log.read_text().split()) < 5:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not list(tmp_path.glob("*/complete.npz"))
    arrays, _ = make_cache(tmp_path, log)
    assert [int(array[1, 2]) for array in arrays] == list(range(20))


def flip_bit(path, at):
    raw = bytearray(path.read_bytes())
    raw[at % len(raw)] ^= 4
    path.write_bytes(raw)


def link(path):
    """Put a link to a file of the user's in place of one of a cache that is not finished."""
    (path.parent / "complete.npz").unlink()
    path.unlink()
    (path.parents[1] / "mine").touch()
    path.symlink_to(path.parents[1] / "mine")


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda home: flip_bit(home / "frames.npy", -1), "array 19 has another checksum"),
        (lambda home: flip_bit(home / "frames.npy", 128), "array 0 has another checksum"),
        (lambda home: os.truncate(home / "frames.npy", 200), r"it cannot be read \(mmap length"),
        (lambda home: np.save(home / "frames.npy", np.ones((20, 3, 2), np.uint16)), r"it holds <u2 \[20, 3, 2\]"),
        *((lambda home, name=name: link(home / name), f"{name} is a link") for name in ("frames.npy", "lock")),
        (lambda home: (home / "complete.npz").write_text(""), "it cannot be read"),
        (lambda home: np.savez(home / "complete.npz", kept=[0]), r"it cannot be read \(.*checksums"),
    ],
)  # fmt: skip
def test_a_damaged_cache_says_which_folder_to_delete(tmp_path, damage, problem):
    make_cache(tmp_path, tmp_path / "log")
    (home,) = (path.parent for path in tmp_path.glob("*/complete.npz"))
    damage(home)
    with pytest.raises(CacheError, match=f"{home} is damaged: .*{problem}.*Delete this folder"):
        list(make_cache(tmp_path, tmp_path / "log")[0])


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
    assert len(list(root.glob(".sltt-cache/*/complete.npz"))) == 10  # training and test each
    sltt.data.NMNIST(str(root), augment=sltt.data.EventAugmentation()).splits(5)
    assert len(list(root.glob(".sltt-cache/*/complete.npz"))) == 10
    write_bin(root / "NMNIST" / "Train" / "0" / "00000.bin", events(41))
    sltt.data.NMNIST(str(root)).splits(4)
    assert len(list(root.glob(".sltt-cache/*/complete.npz"))) == 11
