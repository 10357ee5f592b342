import math
import signal

import pytest
import torch
from torch import nn

import sltt
from sltt.callbacks import Callback, EarlyStopping
from sltt.training.checkpoints import CheckpointError, load_checkpoint
from sltt.training.console import Console
from tests.training.blobs import equal, network, rows, stop_at, train, weights


class Seen(Callback):
    """Keeps what it is shown, and ends the training after an epoch."""

    def __init__(self, epochs=None):
        self.epochs = epochs
        self.losses, self.batches, self.rows = [], [], []

    def on_batch(self, now):
        self.batches.append((now.epoch, now.batch))
        self.losses.append(now.loss)

    def on_epoch(self, now):
        self.rows.append(now.history[-1])
        if now.epoch == self.epochs:
            now.stop("as asked")

    def state_dict(self):
        return {"losses": self.losses, "batches": self.batches}

    def load_state_dict(self, state):
        self.losses, self.batches = state["losses"], [tuple(pair) for pair in state["batches"]]


def test_a_callback_sees_each_batch_and_each_epoch(tmp_path):
    seen = Seen()
    _, result = train(tmp_path / "run", callbacks=[seen], epochs=2)
    assert seen.batches == [(e, b) for e in range(2) for b in range(1, 5)]
    assert seen.rows == result.history
    first = sum(loss * n for loss, n in zip(seen.losses[:4], (16, 16, 16, 12), strict=True)) / 60
    assert first == pytest.approx(result.history[0]["train_loss"])


@pytest.mark.parametrize("batch", [3, 4])
def test_a_callback_continues_with_its_run(batch, tmp_path):
    whole, part = Seen(2), Seen(2)
    train(tmp_path / "whole", rule=sltt.SLTT(k=2), callbacks=[whole], epochs=9)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "part", rule=stop_at(batch), callbacks=[part], epochs=9)
    _, result = train(tmp_path / "part", rule=sltt.SLTT(k=2), callbacks=[again := Seen(2)], epochs=9, resume=True)
    assert (again.batches, again.losses) == (whole.batches, whole.losses)
    assert len(result.history) == 2
    assert equal(weights(tmp_path / "part" / "last.ckpt"), weights(tmp_path / "whole" / "last.ckpt"))


def test_a_network_that_draws_is_validated_as_if_nothing_had_been_drawn_before(tmp_path):
    class Noisy(nn.Identity):
        def forward(self, x):
            return x + torch.randn_like(x)

    class Draws(Callback):
        def on_batch(self, now):
            torch.rand(now.batch)

    networks = (nn.Sequential(Noisy(), network()) for _ in range(2))
    first, second = (train(tmp_path / str(len(c)), next(networks), callbacks=c)[1] for c in ([], [Draws()]))
    assert rows(first) == rows(second)


def test_a_callback_changes_learning_rate_and_weight_decay_for_good(tmp_path):
    class Lowers(Callback):
        def on_epoch(self, now):
            for group in now.optimizer.param_groups:
                group["lr"] *= 0.1
                group["weight_decay"] = 0.5

    settings = {"schedule": sltt.schedules.MultiStep([2], 0.5), "callbacks": [Lowers()]}
    _, whole = train(tmp_path / "whole", epochs=4, **settings)
    assert [row["learning_rate"] for row in whole.history] == pytest.approx([0.02, 0.002, 0.0001, 0.00001])
    train(tmp_path / "part", epochs=2, **settings)
    train(tmp_path / "part", epochs=4, resume=True, **settings)
    groups = load_checkpoint(tmp_path / "part" / "last.ckpt")["optimizer"]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.5}
    assert equal(weights(tmp_path / "part" / "last.ckpt"), weights(tmp_path / "whole" / "last.ckpt"))


@pytest.mark.parametrize("batch", [2, 6, 9])
def test_what_a_callback_changes_in_the_network_is_resumed(batch, tmp_path, monkeypatch, caplog):
    class Frees(Callback):
        _seen = 0

        def on_start(self, now):
            now.model[2].tau = 2.0 + now.epoch
            now.model[0].requires_grad_(False)
            now.optimizer.param_groups[0]["lr"] = [0.01, 0.0, 0.03][now.epoch]

        def on_epoch(self, now):
            self._seen += 1
            now.model[2].tau = 2.0 + now.epoch
            now.model[0].requires_grad_(True)
            now.optimizer.param_groups[0]["lr"] = [0.01, 0.0, 0.03, 0.03][now.epoch]

    def run(name, rule, **settings):
        settings |= {"schedule": sltt.schedules.Constant(), "callbacks": [Frees()], "epochs": 3}
        model, result = train(tmp_path / name, rule=rule, **settings)
        assert [row["learning_rate"] for row in result.history] == pytest.approx([0.01, 0.0, 0.03])
        return model

    whole = run("whole", sltt.SLTT(k=2))
    with pytest.raises(KeyboardInterrupt):
        run("part", stop_at(batch))
    if batch > 4:
        with monkeypatch.context() as without:
            without.delattr(Frees, "on_start")
            with pytest.raises(ValueError, match=r"changes in layers, .* in on_start"):
                run("part", sltt.SLTT(k=2), resume=True)
    assert equal(run("part", sltt.SLTT(k=2), resume=True).state_dict(), whole.state_dict())
    assert not torch.equal(whole[0].weight, network()[0].weight)
    assert "best.ckpt is of other layers than the network: 2 was LIF(tau=" in caplog.text


def test_a_callback_that_fails_loses_no_epoch(tmp_path):
    class Fails(Seen):
        def on_epoch(self, now):
            if now.epoch == 2:
                raise KeyError("mine")

    whole, part = Seen(), Seen()
    train(tmp_path / "whole", callbacks=[whole], epochs=3)
    Fails.__name__ = "Seen"
    with pytest.raises(KeyError) as failed:
        train(tmp_path / "part", callbacks=[Fails()], epochs=3)
    assert failed.value.__notes__[0] == "at epoch 2, callback"
    _, result = train(tmp_path / "part", callbacks=[part], epochs=3, resume=True)
    assert (part.batches, part.losses) == (whole.batches, whole.losses)
    assert part.rows == result.history[1:]
    assert equal(weights(tmp_path / "part" / "last.ckpt"), weights(tmp_path / "whole" / "last.ckpt"))


def test_a_stopped_run_stays_stopped_and_says_why(tmp_path, capsys):
    train(tmp_path / "run", callbacks=[Seen(2)], epochs=9, report=Console())
    *_, row, stopped = capsys.readouterr().out.splitlines()
    assert (row.split()[0], stopped) == ("2", "stopped after epoch 2: as asked")
    seen = Seen(2)
    _, result = train(tmp_path / "run", callbacks=[seen], epochs=9, resume=True)
    assert len(result.history) == 2
    assert len(seen.batches) == 8


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_run_that_is_stopped_and_interrupted_in_one_epoch_ends_after_it(epoch, tmp_path):
    class Enough(Callback):
        def on_batch(self, now):
            if (now.epoch, now.batch) == (epoch, 2):
                now.stop("enough")
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", callbacks=[Enough()])
    _, result = train(tmp_path / "run", callbacks=[Enough()], resume=True)
    assert len(result.history) == epoch + 1


@pytest.mark.parametrize("given", [[], [Seen(), Seen()]])
def test_a_run_resumes_with_its_own_callbacks_only(given, tmp_path):
    train(tmp_path / "run", callbacks=[Seen()], epochs=1)
    with pytest.raises(CheckpointError, match=r"trained with callbacks Seen.*, and is to go on with (none|Seen.*, S)"):
        train(tmp_path / "run", callbacks=given, epochs=2, resume=True)


def moment(values, by, higher=True):
    history = [{"validation_accuracy": v, "validation_loss": v} for v in values]
    now = sltt.callbacks.Moment(nn.Identity(), None, len(values), 0, None, history, "accuracy", higher)
    return now, EarlyStopping(patience=2, by=by)


@pytest.mark.parametrize(
    ("values", "by", "higher", "stops"),
    [
        ([0.5, 0.6, 0.6, 0.6], "metric", True, True),
        ([0.5, 0.6, 0.6, 0.7], "metric", True, False),
        ([0.5, 0.6, 0.6], "metric", True, False),
        ([0.5, 0.6, 0.7], "metric", False, True),
        ([0.5, 0.4, 0.3], "metric", False, False),
        ([0.5, 0.6, 0.7], "loss", True, True),
        ([0.5, 0.6, 0.4], "loss", True, False),
        ([], "metric", True, False),
        ([math.nan, 0.1, 0.2, 0.3], "metric", True, False),
        ([0.5, math.nan, math.nan], "metric", True, True),
        ([math.nan] * 4, "metric", True, True),
    ],
)
def test_early_stopping_waits_for_a_better_epoch(values, by, higher, stops):
    now, callback = moment(values, by, higher)
    callback.on_epoch(now)
    assert bool(now.stopped) == stops


def test_early_stopping_breaks_ties_by_the_loss_as_the_selection_of_the_best_epoch_does():
    now, callback = moment([0.5, 0.5, 0.5], "metric")
    for row, loss in zip(now.history, (0.4, 0.3, 0.2), strict=True):
        row["validation_loss"] = loss
    callback.on_epoch(now)
    assert not now.stopped


def test_a_gain_below_the_least_is_none():
    now, callback = moment([0.5, 0.501, 0.502], "metric")
    callback.least = 0.01
    callback.on_epoch(now)
    assert now.stopped == "no better validation accuracy in 2 epochs"


@pytest.mark.parametrize("metric", [sltt.metrics.Accuracy(), lambda prediction, target: prediction.square().mean()])
def test_early_stopping_ends_a_training_that_learns_no_more(metric, tmp_path):
    model = nn.Sequential(nn.Linear(4, 8), sltt.LIF(), nn.Linear(8, 3))
    still = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.0), "metric": metric}
    _, result = train(tmp_path / "run", model, callbacks=[EarlyStopping(3)], epochs=20, **still)
    assert len(result.history) == 4
    assert load_checkpoint(tmp_path / "run" / "last.ckpt")["progress"]["stopped"]


def test_early_stopping_counts_anew_at_another_time_step_count(tmp_path):
    model = nn.Sequential(nn.Linear(4, 8), sltt.LIF(), nn.Linear(8, 3))
    phases = [sltt.Phase(2, steps=2), sltt.Phase(4, steps=4)]
    still = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.0), "phases": phases}
    assert len(train(tmp_path / "run", model, callbacks=[EarlyStopping(2)], epochs=6, **still)[1].history) == 5
