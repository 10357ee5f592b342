import contextlib
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
import torch.distributed as dist

import sltt
from sltt.parallel import processes
from sltt.parallel.batchnorm import SyncBatchNorm, synchronise
from sltt.parallel.devices import make_fabric
from sltt.parallel.signals import PREEMPTED
from sltt.training.batches import Shares, share
from sltt.training.checkpoints import load_checkpoint
from sltt.training.settings import Execution
from tests.conftest import LINUX
from tests.processes import (
    NORMED,
    ONLINE,
    SHARDED,
    TRAININGS,
    Sequences,
    network,
    several_lengths,
    standardised,
    train,
)

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
    train(folder / "fsdp-from-one", network(), epochs=1)
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
    assert_same_weights(weights(folder / "ddp" / name), weights(tmp_path / "run"))
    for there, here in zip(found["measured"][name], result.history, strict=True):
        for key in (key for key in here if key.startswith(("train_", "validation_", "firing_rate"))):
            if name != "OTTT(online)" or not key.startswith("train"):
                assert there[key] == pytest.approx(here[key], abs=1e-9), key


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
    assert found["others"] < batches + 60  # a decision a batch, and what starts and ends an epoch


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARDED)
def test_sharded_weights_train_to_the_weights_of_one_process(name, two, tmp_path):
    model = network(neuron=lambda **kwargs: sltt.PLIF(tau=2.0, **kwargs))
    train(tmp_path / "run", model, rule=SHARDED[name], clip_norm=1.0)
    assert_same_weights(weights(two[0] / "fsdp" / name), weights(tmp_path / "run"))
    assert two[1]["measured"][f"fsdp {name}"] == sltt.evaluate(model, Sequences(), "validation").accuracy


@pytest.mark.slow
def test_sharded_weights_are_standardised_at_every_step(two, tmp_path):
    train(tmp_path / "run", standardised())
    assert_same_weights(weights(two[0] / "fsdp-standardised"), weights(tmp_path / "run"))


@pytest.mark.slow
def test_sharded_training_continues_what_one_process_began(two, tmp_path):
    train(tmp_path / "run", network())
    assert_same_weights(weights(two[0] / "fsdp-from-one"), weights(tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.parametrize("name", NORMED)
def test_synchronised_batch_statistics_are_those_of_the_whole_batch(name, two, tmp_path):
    train(tmp_path / "run", network(norm=True), rule=NORMED[name])
    assert_same_weights(weights(two[0] / "norm" / name), weights(tmp_path / "run"))


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
def test_the_death_of_a_process_ends_the_others_with_its_name(long_training):
    process, child, run = long_training
    os.kill(child, signal.SIGKILL)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 1
    assert f"sltt: process 1 of 2 (pid {child}" in out
    assert "died: killed, out of memory, or its machine is gone; the other processes end too" in out
    assert "Traceback" not in out
    load_checkpoint(run / "last.ckpt")  # whole


@LINUX
@pytest.mark.slow
def test_the_death_of_the_first_process_ends_the_others(long_training):
    process, child, run = long_training
    process.kill()
    wait_gone(child)
    assert "sltt: process 0 of 2 died" in process.stdout.read()
    load_checkpoint(run / "last.ckpt")


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
    assert out.count(f"sltt: stopped by SIGTERM; continue with --resume {run}") == 1
    progress = load_checkpoint(run / "last.ckpt")["progress"]
    assert progress["epoch"] + progress["batch"] > 0


@pytest.mark.slow
def test_what_slurm_starts_trains_together_and_one_process_speaks(tmp_path):
    words = [*TRAIN, "--epochs", "1", "--run", str(tmp_path / "run")]
    job = {"SLURM_JOB_ID": str(20000 + os.getpid() % 10000), "SLURM_JOB_NAME": "train", "SLURM_NODELIST": "127.0.0.1"}
    job |= {
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NNODES": "1",
        "SLURM_NODEID": "0",
        "SLURM_STEP_ID": "0",
    }
    ranks = [{"SLURM_PROCID": r, "SLURM_LOCALID": r} for r in ("0", "1")]
    processes = [start(words, cwd=tmp_path, environment={**job, **rank}) for rank in ranks]
    outs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outs
    assert "2 processes" in outs[0]
    assert "test accuracy" in outs[0]
    assert outs[1] == ""
    assert load_checkpoint(tmp_path / "run" / "last.ckpt")["progress"]["epoch"] == 1


FAILS = """
import sys, torch, sltt, sltt.parallel.watchdog
from torch import nn

sltt.parallel.watchdog.GRACE = 20.0  # no matter how slow the machine is

class Fails(sltt.SLTT):
    def run(self, *args):
        if str(torch.distributed.get_rank()) in sys.argv[2]:
            raise ValueError("no spike was ever seen")
        return super().run(*args)

model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
sltt.fit(model, sltt.data.Digits(), Fails(), steps=2, run=sys.argv[1], device="cpu", devices=2)
"""


def failing(folder, ranks):
    """What two processes print, of which those of the ranks fail."""
    (folder / "script.py").write_text(FAILS)
    process = start([sys.executable, "script.py", str(folder / "run"), ranks], cwd=folder)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    return out


@pytest.mark.slow
def test_an_error_in_one_process_ends_the_others_with_its_message(tmp_path):
    assert "failed: ValueError: no spike was ever seen; the other processes end too" in failing(tmp_path, "1")


@pytest.mark.slow
def test_an_error_in_all_processes_is_said_by_the_first(tmp_path):
    out = failing(tmp_path, "01")
    assert "ValueError: no spike was ever seen" in out
    assert "rank1" not in out  # as PyTorch marks what another process prints


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("samples", [1, 7, 16, 17])
def test_shares_are_every_sample_once(samples, processes):
    batches = [list(Shares(range(samples), 8, rank, processes)) for rank in range(processes)]
    seen = []
    for b in range(math.ceil(samples / 8)):
        size, weights = min(8, samples - 8 * b), 0.0
        for rank in range(processes):
            weight, count = share(size, rank, processes)
            seen += batches[rank][b][:count]
            weights += weight
            if size >= 2:
                assert len(batches[rank][b]) >= 2  # for BatchNorm
        assert weights == pytest.approx(1)
    assert sorted(seen) == list(range(samples))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"devices": 0}, "devices must be at least 1, got 0"),
        ({"num_nodes": 0}, "num_nodes must be at least 1, got 0"),
        ({"devices": 2, "strategy": "fsdp", "precision": "16-mixed"}, "use 'bf16-mixed'"),
    ],
)
def test_devices_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Execution(device="cpu", **arguments)


@pytest.mark.parametrize("rule", [sltt.SLTT(recompute=True), sltt.BPTT(hoist=True), sltt.TBPTT(2, fold="auto")])
def test_rules_that_sharded_weights_cannot_serve_are_refused(rule):
    with pytest.raises(ValueError, match="does not run under fsdp"):
        sltt.training.fit._check_shardable(rule)
    sltt.training.fit._check_shardable(sltt.SLTT(k=2, fold=2))


def test_a_batchnorm_of_ones_own_is_not_replaced():
    class Own(torch.nn.BatchNorm1d):
        pass

    with pytest.raises(ValueError, match="Own"):
        synchronise(torch.nn.Sequential(Own(3)))


def test_numbers_that_differ_from_what_was_started_are_refused(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_NNODES", "2")
    with pytest.raises(ValueError, match="2 processes on 2 machines were started, but devices=3 and num_nodes=2"):
        make_fabric(device="cpu", devices=3)


@pytest.mark.parametrize("ours", [True, False])
def test_groups_are_closed_at_the_end_where_they_are_ours(ours, monkeypatch):
    monkeypatch.setattr(processes, "_ours", set() if ours else {os.getppid()})  # a forked process has its parent's
    for _ in range(2):  # the second time with a control group of its own
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        if ours:
            processes.disband_at_exit()
        dist.all_reduce(torch.ones(1), group=processes.control())
        processes.disband()
        assert dist.is_initialized() == (not ours)
        if not ours:
            dist.destroy_process_group()
    processes.disband()


@pytest.mark.parametrize("momentum", [0.1, None])
def test_one_process_alone_normalises_as_ever(momentum):
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4, momentum=momentum))
    twin = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4, momentum=momentum))
    twin.load_state_dict(plain.state_dict())
    synchronise(twin)
    assert isinstance(twin[1], SyncBatchNorm)
    x = torch.randn(6, 3)
    assert torch.equal(plain(x), twin(x))
    assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), twin.buffers(), strict=True))
