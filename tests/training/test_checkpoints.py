import random
from contextlib import suppress

import numpy as np
import pytest
import torch

from sltt.training import checkpoints, files, loop
from sltt.training.checkpoints import CheckpointError, load_checkpoint, save_checkpoint
from tests.training.blobs import Blobs, equal, train


def test_a_checkpoint_within_an_epoch_by_time(tmp_path, monkeypatch):
    names = []
    monkeypatch.setattr(loop, "save_checkpoint", lambda path, _: (names.append(path.name), save_checkpoint(path, _)))
    train(tmp_path / "run", epochs=1, checkpoint_minutes=0)
    assert names == [*["last.ckpt"] * 4, "best.ckpt", "last.ckpt"]
    names.clear()
    train(tmp_path / "seldom", epochs=3)
    assert names.count("last.ckpt") == 3


def truncated(path):
    save_checkpoint(path, {"model": {"w": torch.zeros(1000)}})
    path.write_bytes(path.read_bytes()[:2000])


def foreign(path):
    torch.save({"state_dict": {}}, path)


def pickled(path):
    torch.save({"format": checkpoints.FORMAT, "model": Blobs()}, path)


@pytest.mark.parametrize("write", [truncated, foreign, pickled, lambda p: p.write_text("hello"), lambda p: p.touch()])
def test_a_damaged_or_foreign_checkpoint_is_named(write, tmp_path):
    path = tmp_path / "last.ckpt"
    write(path)
    with pytest.raises(ValueError, match=str(path)):
        load_checkpoint(path)


def test_a_flipped_bit_never_loads_as_another_value(tmp_path):
    path = tmp_path / "last.ckpt"
    saved = {"w": torch.randn(500, generator=torch.Generator().manual_seed(0))}
    save_checkpoint(path, {"model": saved})
    whole = path.read_bytes()
    for place in random.Random(0).sample(range(8 * len(whole)), 300):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        with suppress(CheckpointError):
            assert equal(load_checkpoint(path)["model"], saved)  # a bit between the tensors


def test_a_checkpoint_is_read_by_torch_alone(tmp_path):
    save_checkpoint(tmp_path / "last.ckpt", {"model": 1})
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["model"] == 1


def test_the_message_about_a_checkpoint_with_objects_does_not_advise_to_execute_them(tmp_path):
    pickled(path := tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match="not a checkpoint of sltt") as caught:
        load_checkpoint(path)
    assert "weights_only" not in str(caught.value)


def test_an_array_of_numpy_is_refused_before_a_checkpoint_is_replaced(tmp_path):
    path, whole = tmp_path / "last.ckpt", {"model": 1}
    save_checkpoint(path, whole)
    with pytest.raises(ValueError, match=r"made by .*numpy.ndarray: give tensors, as torch.from_numpy"):
        save_checkpoint(path, {**whole, "callbacks": [["Kept", {"losses": np.zeros(3)}]]})
    assert load_checkpoint(path).items() >= whole.items()
    assert {p.name for p in tmp_path.iterdir()} == {"last.ckpt"}


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    save_checkpoint(path, {"model": 1})

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match=r"could not write .*last\.ckpt.*No space left.*written before is intact"):
        save_checkpoint(path, {"model": 2})
    assert load_checkpoint(path)["model"] == 1
    assert {p.name for p in tmp_path.iterdir()} == {"last.ckpt"}
