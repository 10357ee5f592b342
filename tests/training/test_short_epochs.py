"""Epochs of a few batches: `Phase(batches=n)`."""

import pytest
import torch

import sltt
from sltt.training.checkpoints import load_checkpoint
from sltt.training.console import Console
from sltt.training.phases import Phase
from tests.training.blobs import StopAt, equal, train


class Noted(sltt.SLTT):
    """Notes the samples of every batch, and the learning rate."""

    def __init__(self, log, optimizers):
        super().__init__()
        self.log, self.optimizers = log, optimizers

    def run(self, batch):
        rows = [tuple(row.tolist()) for row in batch.sequence.x]
        self.log.append((rows, round(self.optimizers[0].param_groups[0]["lr"], 6)))
        return super().run(batch)


def noted(tmp_path, phases, epochs=3):
    log, optimizers = [], []

    def optimizer(parameters):
        optimizers.append(torch.optim.SGD(parameters, lr=0.2))
        return optimizers[0]

    train(
        tmp_path / "run", rule=Noted(log, optimizers), optimizer=optimizer, batch_size=10, phases=phases, epochs=epochs,
        schedule=sltt.schedules.Linear(),
    )  # fmt: skip
    return log


def test_epochs_of_a_few_batches_have_random_samples_and_the_whole_schedule(tmp_path):
    log = noted(tmp_path, [Phase(1), Phase(2, batches=2, lr=0.4)])
    assert len(log) == 6 + 2 * 2  # 60 samples
    first, second = ([row for rows, _ in part for row in rows] for part in (log[6:8], log[8:]))
    assert len({*first}) == len({*second}) == 20
    assert {*first} != {*second}
    assert [rate for _, rate in log[6:]] == pytest.approx([0.4, 0.3, 0.2, 0.1])


def test_more_batches_than_there_are_are_all(tmp_path):
    log = noted(tmp_path, [Phase(1, batches=7)], epochs=1)
    assert len({row for rows, _ in log for row in rows}) == 60


@pytest.mark.parametrize("batch", [2, 3, 4])
def test_a_run_that_stopped_in_an_epoch_of_a_few_batches_goes_on_as_if_it_had_not(tmp_path, batch, capsys):
    phases = [Phase(1, batches=3), Phase(1, batches=2, lr=0.01)]
    settings = {"phases": phases, "epochs": 2, "ema": 0.9, "rule": sltt.SLTT(k=2)}
    whole, _ = train(tmp_path / "whole", report=Console(), **settings)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epochs ")]
    assert [line.rpartition(", ")[2] for line in lines] == ["3 batches an epoch", "2 batches an epoch"]
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "part", **settings | {"rule": StopAt(batch)})
    resumed, _ = train(tmp_path / "part", resume=True, **settings)
    assert equal(resumed.state_dict(), whole.state_dict())
    runs = [load_checkpoint(tmp_path / name / "last.ckpt")["averaged"] for name in ("whole", "part")]
    assert equal(*runs)
