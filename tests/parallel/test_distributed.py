import contextlib
import copy
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import sltt
from sltt.parallel.signals import PREEMPTED
from sltt.training.batches import EpochSampler, train_loader
from sltt.training.checkpoints import load_checkpoint
from tests.conftest import LINUX, LOSS
from tests.processes import NORMED, ONLINE, TRAININGS, Sequences, network, several_lengths, statistics, train
from tests.training.blobs import equal

ROOT = Path(__file__).parents[2]
TRAIN = [sys.executable, "-m", "sltt", "train", "digits", "--device", "cpu", "--model.width", "2", "--steps", "1"]
LONG = [*TRAIN, "--devices", "2", "--epochs", "5000"]


def start(words, environment=(), **kwargs):
    others = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {k: v for k, v in os.environ.items() if k not in others} | dict(environment)
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    return subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, **kwargs
    )


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes left of the trainings in tests/processes.py."""
    folder = tmp_path_factory.mktemp("two")
    for name in ("plain", "k"):
        rule = sltt.SLTT(k=2 if name == "k" else None)
        train(folder / f"one-two-{name}", network(dropout=0.2), rule=rule, epochs=1)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = start([*command, "-m", "tests.processes", str(folder)], cwd=ROOT)
    out, _ = process.communicate(timeout=280)
    assert process.returncode == 0, out
    return folder, json.loads((folder / "found.json").read_text())


def weights(run):
    return load_checkpoint(run / "last.ckpt")["model"]


def assert_same_weights(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAININGS)
def test_two_processes_train_to_the_weights_of_one(name, two, tmp_path):
    folder, found = two
    result = train(tmp_path / "run", network(), **TRAININGS[name])
    assert_same_weights(weights(folder / name), weights(tmp_path / "run"))
    for there, here in zip(found["measured"][name], result.history, strict=True):
        for key in (key for key in here if key.startswith(("train_", "validation_", "firing_rate"))):
            if name != "OTTT(online)" or not key.startswith("train"):
                assert there[key] == pytest.approx(here[key], abs=1e-9), key


@pytest.mark.slow
def test_two_processes_train_by_graphs_to_the_weights_of_one_without(two, tmp_path):
    folder, found = two
    train(tmp_path / "run", network())
    assert_same_weights(weights(folder / "graphs"), weights(tmp_path / "run"))
    # the last batches are smaller
    assert found["measured"]["graphs"] == ["new", *["eager"] * 3, "capture", *["replay"] * 5]
    assert found["messages"]["graphs"]["gradients"] == 2 * 5


@pytest.mark.slow
def test_batches_of_similar_length_are_the_same_in_two_processes(two, tmp_path):
    train(tmp_path / "run", network(), several_lengths(), rule=ONLINE)
    assert_same_weights(weights(two[0] / "padded"), weights(tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAININGS)
def test_gradients_are_reduced_once_a_batch_or_once_an_online_update(name, two):
    batches = 2 * math.ceil(60 / TRAININGS[name].get("batch_size", 13))
    updates = 4 if name == "OTTT(online)" else 1
    found = two[1]["messages"][name]
    assert found["gradients"] == batches * updates
    # a decision a batch, which gradients there are, and what starts and ends an epoch
    assert found["others"] < batches * (1 + updates) + 60


@pytest.mark.slow
def test_checkpoints_do_not_change_the_running_statistics(two):
    often, seldom = (weights(two[0] / f"every {minutes} minutes") for minutes in (0.0, 10.0))
    assert equal(often, seldom)


def two_in_one(rule):
    """What `train` comes to, with the shares of two processes one after the other in this process.

    Returns the weights and statistics, and the statistics after every batch.
    """
    first = network(norm=True)
    second = copy.deepcopy(first, {id(p): p for p in first.parameters()})  # the same weights, statistics of its own
    optimizer = torch.optim.SGD(first.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    splits = Sequences().splits(4)
    sampler = EpochSampler.of(splits, 0, 13)
    loaders = [train_loader(splits, 13, sampler, 0, rank=rank, processes=2) for rank in range(2)]

    def average():
        for one, other in zip(first.buffers(), second.buffers(), strict=True):
            if one.is_floating_point():
                one.copy_((one + other) / 2)
                other.copy_(one)

    seen = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for shares in zip(*loaders, strict=True):
            size = sum(len(y) for _, y in shares)
            for model, (x, y) in zip((first, second), shares, strict=True):
                rule(model, x, y, LOSS, backward=lambda loss, part=len(y) / size: (loss * part).backward())
            optimizer.step()
            optimizer.zero_grad()
            average()
            seen.append(statistics(first))
    return first.state_dict(), seen


@pytest.mark.slow
@pytest.mark.parametrize("name", NORMED)
def test_processes_begin_every_batch_with_the_mean_of_their_statistics(name, two):
    expected, seen = two_in_one(NORMED[name])
    assert len(seen) == 10
    assert_same_weights(weights(two[0] / "normed" / name), expected)
    found = torch.tensor(two[1]["measured"][f"normed {name}"])
    torch.testing.assert_close(found, torch.tensor(seen), rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "k"])
def test_a_run_continues_with_another_number_of_processes(name, two, tmp_path):
    """With dropout, whose masks differ between processes: the epochs that a number of processes trained are its own."""
    folder, _ = two
    rule = sltt.SLTT(k=2 if name == "k" else None)
    train(folder / f"two-one-{name}", network(dropout=0.2), rule=rule, resume=True)
    for run in (f"two-one-{name}", f"one-two-{name}"):
        progress = load_checkpoint(folder / run / "last.ckpt")["progress"]
        assert progress["epoch"] == 2
        assert [row["epoch"] for row in progress["history"]] == [1, 2]
        assert progress["history"][1]["train_loss"] < progress["history"][0]["train_loss"]
    first = load_checkpoint(folder / f"one-two-{name}" / "last.ckpt")["progress"]["history"][0]
    alone = train(tmp_path / "run", network(dropout=0.2), rule=rule, epochs=1).history[0]
    assert first["train_loss"] == alone["train_loss"]


def children(pid):
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture
def long_training(tmp_path):
    """A training by two processes that has saved a checkpoint: the first process, its child's pid, and the run."""
    run = tmp_path / "run"
    process = start([*LONG, "--run", str(run), "--checkpoint_minutes", "0"], cwd=tmp_path)
    until = time.monotonic() + 120
    while not (run / "last.ckpt").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until, "no checkpoint in two minutes"
        time.sleep(0.1)
    (child,) = children(process.pid)
    yield process, child, run
    for pid in (process.pid, child):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


def gone(pid):
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def wait_gone(pid, seconds=20):
    until = time.monotonic() + seconds
    while not gone(pid):
        assert time.monotonic() < until, f"process {pid} runs on"
        time.sleep(0.05)


@LINUX
@pytest.mark.slow
@pytest.mark.parametrize("of_first", [False, True], ids=["further process", "first process"])
def test_the_death_of_a_process_ends_the_other(of_first, long_training):
    process, child, run = long_training
    os.kill(process.pid if of_first else child, signal.SIGKILL)
    wait_gone(child)
    out, _ = process.communicate(timeout=20)
    if of_first or process.returncode == 1:  # or else Fabric was first to see it
        assert "sltt: another process ended" in out
    else:
        assert process.returncode == -signal.SIGKILL
        assert f"Child process with PID {child} terminated" in out
    load_checkpoint(run / "last.ckpt")  # whole


@LINUX
@pytest.mark.slow
@pytest.mark.parametrize("of_all", [False, True], ids=["one process", "all processes"])
def test_sigterm_saves_and_ends_with_the_code_for_a_requeue(of_all, long_training):
    process, child, run = long_training
    os.kill(child, signal.SIGTERM)
    if of_all:
        process.terminate()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == PREEMPTED, out
    wait_gone(child)
    assert out.count(f"sltt: stopped by SIGTERM; continue with --resume {run}, in Python with resume=True") == 1
    progress = load_checkpoint(run / "last.ckpt")["progress"]
    assert progress["epoch"] + progress["batch"] > 0


@pytest.mark.slow
def test_what_slurm_starts_trains_together_and_one_process_speaks(tmp_path):
    words = [*TRAIN, "--epochs", "1", "--run", str(tmp_path / "run")]
    job = {"SLURM_JOB_ID": str(20000 + os.getpid() % 10000), "SLURM_JOB_NAME": "train", "SLURM_NODELIST": "127.0.0.1"}
    job |= {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1"}
    job |= {"SLURM_NODEID": "0", "SLURM_STEP_ID": "0"}
    ranks = [{"SLURM_PROCID": r, "SLURM_LOCALID": r} for r in ("0", "1")]
    processes = [start(words, cwd=tmp_path, environment={**job, **rank}) for rank in ranks]
    outs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outs
    assert "2 processes" in outs[0]
    assert "test accuracy" in outs[0]
    assert outs[1] == ""
    assert load_checkpoint(tmp_path / "run" / "last.ckpt")["progress"]["epoch"] == 1
    words = [sys.executable, "-m", "sltt", "eval", str(tmp_path / "run"), "--json"]
    processes = [start(words, cwd=tmp_path, environment={**job, **rank}) for rank in ranks]
    outs = [process.communicate(timeout=120)[0] for process in processes]
    assert (json.loads(outs[0])["split"], outs[1]) == ("test", "")


FAILS = """
import os, sys, torch, sltt
from torch import nn

class Fails(sltt.SLTT):
    def run(self, *args):
        if torch.distributed.get_rank() == 1:
            raise ValueError("no spike was ever seen")
        return super().run(*args)

more = int(os.environ.get("LOCAL_RANK", 0)) if sys.argv[2] == "width" else 0
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10 + more))
sltt.fit(model, sltt.data.Digits(), Fails(), steps=2, run=sys.argv[1], device="cpu", devices=2)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("of", "said"),
    [("rule", "no spike was ever seen"), ("width", "the network differs between processes: 1.weight [10, 64], ")],
)
def test_an_error_in_one_process_ends_the_others(of, said, tmp_path):
    (tmp_path / "script.py").write_text(FAILS)
    process = start([sys.executable, "script.py", str(tmp_path / "run"), of], cwd=tmp_path)
    out, _ = process.communicate(timeout=120)
    assert process.returncode
    assert f"ValueError: {said}" in out
    assert process.returncode != -signal.SIGABRT
