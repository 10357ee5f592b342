"""What several processes need, as far as one process shows it."""

import math
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

import sltt
from sltt.commands import main
from sltt.data import Splits
from sltt.parallel import processes
from sltt.parallel.devices import make_fabric
from sltt.parallel.signals import Interrupt
from sltt.training.batches import EpochSampler, Shares, eval_loader, share, train_loader
from sltt.training.session import session
from sltt.training.settings import Settings


@pytest.mark.parametrize("deterministic", [False, True])
def test_convolutions_are_timed_in_a_session_unless_results_are_to_be_the_same_again(deterministic, monkeypatch):
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "deterministic", deterministic)
    assert not cudnn.benchmark
    with session(Settings(nn.Identity(), sltt.data.Digits(), device="cpu")) as here:
        assert cudnn.benchmark is not deterministic
        splits = sltt.data.Digits().splits(2)
        assert not here.eval_loader(splits.test, splits, 8).pin_memory
    assert not cudnn.benchmark


def test_batches_for_a_gpu_are_pinned_unless_they_lie_on_one():
    host, there = (Splits(*[[(torch.zeros(3, device=d), 0)] * 8] * 3, True, 2, "") for d in ("cpu", "meta"))
    cuda, sampler = torch.device("cuda"), EpochSampler(8, 0)
    assert train_loader(host, 4, sampler, 0, device=cuda).pin_memory
    assert eval_loader(host.test, host, 4, 0, device=cuda).pin_memory
    assert not train_loader(there, 4, sampler, 0, device=cuda).pin_memory
    assert not eval_loader(host.test, host, 4, 0, device=torch.device("cpu")).pin_memory


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


def test_numbers_that_differ_from_what_was_started_are_refused(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_NNODES", "2")
    with pytest.raises(ValueError, match="2 processes on 2 machines were started, but devices=3"):
        make_fabric(device="cpu", devices=3)


@pytest.mark.parametrize("ours", [True, False])
def test_groups_are_closed_at_the_end_where_they_are_ours(ours):
    for _ in range(2):  # the second time with a control group of its own
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        dist.all_reduce(torch.ones(1), group=processes.control())
        processes.disband(os.getpid() if ours else os.getppid())  # a forked process has its parent's
        assert dist.is_initialized() == (not ours)
        if not ours:
            dist.destroy_process_group()


@pytest.mark.parametrize(("rank", "code"), [("0", 75), ("1", 0)])
def test_the_first_process_alone_ends_with_the_code_of_a_signal(rank, code, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr("sltt.commands.eval.run", lambda words: Interrupt().stop(signal.SIGTERM, Path("run")))
    assert main(["eval"]) == code
    assert capsys.readouterr().err.count("stopped by SIGTERM") == (rank == "0")


def test_statistics_of_any_shape_are_averaged(monkeypatch):
    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("rise", torch.tensor(0.5))
            self.register_buffer("mask", torch.ones(2, 3))
            self.register_buffer("exact", torch.ones(2, 2, dtype=torch.float64))

    model = torch.nn.Sequential(Own(), torch.nn.BatchNorm1d(3))
    monkeypatch.setattr(dist, "all_reduce", lambda flat: flat.mul_(4))  # of two processes, this one's half
    two = SimpleNamespace(global_rank=0, world_size=2, local_rank=0)
    processes.Processes(two).average_statistics(model)
    assert (model[0].rise, model[0].mask.tolist(), model[0].exact.tolist()) == (1.0, [[2.0] * 3] * 2, [[2.0] * 2] * 2)
    assert model[1].running_var.tolist() == [2.0] * 3
