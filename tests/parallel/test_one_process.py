"""What several processes need, as far as one process shows it."""

import math
import os
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import sltt
from sltt.parallel import devices, processes
from sltt.parallel.batchnorm import SyncBatchNorm, synchronise
from sltt.parallel.devices import make_fabric
from sltt.sequence.state import Stateful
from sltt.training.batches import Shares, share
from sltt.training.settings import Execution


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


def test_statistics_of_any_shape_are_averaged(monkeypatch):
    class Own(Stateful):
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


def test_a_prompt_cannot_be_run_again_in_each_process(monkeypatch):
    import __main__

    monkeypatch.setattr(__main__, "__spec__", None)
    monkeypatch.delattr(__main__, "__file__", raising=False)
    monkeypatch.setattr(devices.subprocess, "Popen", None)
    with pytest.raises(ValueError, match="devices=2 runs this program again in each process: put it into a script"):
        devices._start_others(2, 1)
