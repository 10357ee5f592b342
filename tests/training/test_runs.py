import csv
import errno
import os
import sys
from types import SimpleNamespace

import pytest

from sltt.system import lock_file
from sltt.training import files, runs
from sltt.training.checkpoints import load_checkpoint
from tests.conftest import LINUX
from tests.training.blobs import equal, noting, train, weights


class Killed(BaseException):
    pass


def test_the_run_folder_holds_metrics_and_checkpoints(tmp_path):
    model, result = train(tmp_path / "run", config={"a": 1})
    found = {p.name for p in result.run.iterdir() if not p.name.startswith(".")}
    assert found == {"best.ckpt", "card.md", "config.yaml", "last.ckpt", "metrics.csv", "sample.npz", "tensorboard"}
    rows = list(csv.DictReader((result.run / "metrics.csv").read_text().splitlines()))
    assert len(rows) == 4
    assert float(rows[-1]["train_loss"]) == result.history[-1]["train_loss"]
    assert 0 < result.history[-1]["firing_rate"] < 1
    best = max(result.history, key=lambda r: (r["validation_accuracy"], -r["validation_loss"]))
    assert result.epoch == best["epoch"]
    assert equal(model.state_dict(), weights(result.run / "best.ckpt"))
    assert load_checkpoint(result.run / "last.ckpt")["config"] == {"a": 1}
    assert (result.run / "config.yaml").read_text() == "a: 1\n"


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("left", [[], [".config.yaml.0.part"]])
def test_an_empty_folder_is_taken_by_a_run(left, resume, tmp_path):
    (tmp_path / "run").mkdir()
    for name in left:  # by a process that was killed
        (tmp_path / "run" / name).touch()
    train(tmp_path / "run", epochs=1, resume=resume, config={"seed": 0})
    assert (tmp_path / "run" / "config.yaml").read_text() == "seed: 0\n"
    assert not list((tmp_path / "run").glob(".*.part"))


def test_a_run_that_ends_while_its_settings_are_written_leaves_no_folder(tmp_path, monkeypatch):
    def dies(descriptor):
        raise Killed

    monkeypatch.setattr(files.os, "fsync", dies)
    with pytest.raises(Killed):
        train(tmp_path / "run", epochs=1, config={"seed": 0})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("error", "taken"), [(None, True), (errno.EACCES, False), (errno.ENOLCK, True)])
def test_the_lock_of_windows(error, taken, tmp_path, monkeypatch):
    def locking(descriptor, mode, count):
        assert os.lseek(descriptor, 0, os.SEEK_CUR) > 10**9  # beyond the text, which others read
        if error:
            raise OSError(error, "planted")

    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(LK_NBLCK=2, locking=locking))
    with (tmp_path / "lock").open("w+") as file:
        monkeypatch.setattr(sys, "platform", "win32")
        assert lock_file(file.fileno()) == taken


@LINUX
def test_a_run_is_trained_by_one_process_at_a_time(tmp_path):
    train(tmp_path / "run", epochs=1)
    refused = []

    def resume():
        try:
            train(tmp_path / "run", epochs=2, resume=True)
        except ValueError as error:
            refused.append(str(error))

    def elsewhere():
        resume()
        if (child := os.fork()) == 0:  # a copy of this process, which holds nothing
            runs._held.clear()
            resume()
            os._exit(len(refused) == 2 and refused[1].startswith(f"{tmp_path / 'run'} is being trained by {me} on "))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1

    me = f"process {os.getpid()}"
    train(tmp_path / "run", rule=noting(lambda batch: None if refused else elsewhere()), epochs=2, resume=True)
    assert refused == [f"{tmp_path / 'run'} is being trained by this process, in another thread: wait for it to end"]
    train(tmp_path / "run", epochs=3, resume=True)


def test_two_writers_of_a_file_do_not_share_its_part(tmp_path):
    def outer(file):
        file.write(b"outer")
        files.write_atomically(tmp_path / "a", lambda file: file.write(b"inner"))

    files.write_atomically(tmp_path / "a", outer)
    assert (tmp_path / "a").read_bytes() == b"outer"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_run_never_overwrites_another(tmp_path):
    train(tmp_path / "run", epochs=1)
    (tmp_path / "run").rename(tmp_path / "my run")
    with pytest.raises(FileExistsError, match=f"--resume '{tmp_path}/my run'"):
        train(tmp_path / "my run", epochs=1)


def test_two_runs_without_a_folder_get_two(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a, b = (train(None, epochs=1)[1].run for _ in range(2))
    assert a != b
    assert a.parent == b.parent


def test_a_run_folder_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot make the run folder"):
        train(tmp_path / "file" / "run")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match=r"run: No space left on device\. Choose another with --run"):
        train(tmp_path / "run")


@pytest.mark.parametrize("before", [False, True])
def test_a_kill_while_a_file_is_replaced_leaves_the_one_before(before, tmp_path, monkeypatch):
    def dies(*paths):
        raise Killed

    path = tmp_path / "last.ckpt"
    if before:
        files.write_atomically(path, lambda file: file.write(b"old"))
    monkeypatch.setattr(files.os, "replace", dies)
    with pytest.raises(Killed):
        files.write_atomically(path, lambda file: file.write(b"new"))
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"] * before
