import multiprocessing
import re
from dataclasses import replace

import pytest
import torch
from torch import nn

import sltt
from sltt.parallel.devices import make_fabric
from sltt.training import batch_loop
from sltt.training.session import Session
from tests.training.blobs import Blobs, Ends, ending, network, noting, train, weights


def nan_gradient(model):
    model[0].weight.grad[0, 0] = float("nan")


def nan_weight(model):
    """Of a hidden layer, whose neurons swallow it: the loss stays finite."""
    model[0].weight.data[0, 0] = float("nan")
    model[0].weight.grad[0, 0] = float("nan")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (nan_gradient, r"the norm of its gradient nan: lower the learning rate"),
        (nan_weight, r"the weights of 0.weight are not finite any more: lower the learning rate \(it is 0.0"),
    ],
)
def test_what_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(spoil, message, tmp_path):
    def explode(batch):
        if (tmp_path / "run" / "last.ckpt").exists():
            spoil(batch.model.module)

    with pytest.raises(FloatingPointError, match=message) as caught:
        train(tmp_path / "run", model := network(), rule=noting(after=explode), graph="off")
    assert caught.value.__notes__[0] == "at epoch 2, batch 1 of 4"
    assert "last good checkpoint" in caught.value.__notes__[1]
    saved = weights(tmp_path / "run" / "last.ckpt")
    assert all(v.isfinite().all() for v in saved.values())
    assert all(p.isfinite().all() for p in model.parameters()) == (spoil is nan_gradient)


def test_a_loss_of_other_weights_ends_the_run(tmp_path):
    scale = nn.Parameter(torch.ones(()))
    with pytest.raises(ValueError, match="no parameter of the model has a gradient: the loss does not depend on the"):
        train(tmp_path / "run", loss=lambda logits, target: scale * 1)


def spoil_input(x, labels):
    x[7, 1] = float("nan")


def spoil_label(x, labels):
    labels[3] = 5


@pytest.mark.parametrize(
    ("spoil", "message"), [(spoil_input, "expected a finite input"), (spoil_label, "labels must be in 0 … 2")]
)
def test_bad_data_is_named_with_its_batch(spoil, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        train(tmp_path / "run", data=Blobs(spoil=spoil))
    assert "at epoch 1, batch" in caught.value.__notes__[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("device", "there", "message"),
    [
        ("cuda", torch.cuda.is_available(), "no CUDA device"),
        ("mps", torch.backends.mps.is_available(), "no GPU of Apple's"),
    ],
)
def test_a_gpu_that_is_not_there_is_refused(device, there, message):
    if there:
        pytest.skip("it is there")
    with pytest.raises(ValueError, match=message):
        make_fabric(device=device)


@pytest.mark.parametrize("measured", [False, True], ids=["fit", "evaluate"])
def test_sequences_of_another_length_than_steps_are_refused(measured, tmp_path):
    data = Blobs(static=False)
    load = data.load
    data.load = lambda steps: load(10)
    with pytest.raises(ValueError, match=r"expected sequences of steps=4 time steps, but the data gives 10: set steps"):
        sltt.evaluate(network(), data, steps=4, device="cpu") if measured else train(tmp_path / "run", data=data)
    assert not (tmp_path / "run").exists()


def test_the_next_batch_is_on_the_device_before_the_host_waits_for_a_loss(tmp_path, monkeypatch):
    reads, copies, check, batch = [0], [0], batch_loop.check_finite, Session.batch

    class Counts(Ends):
        def __getitem__(self, index):
            reads[-1] += 1
            return super().__getitem__(index)

    def waits(*args, **kwargs):
        reads.append(0)
        copies.append(0)
        check(*args, **kwargs)

    def copied(*args):
        copies[-1] += 1
        return batch(*args)

    monkeypatch.setattr(batch_loop, "check_finite", waits)
    monkeypatch.setattr(Session, "batch", copied)
    data = Blobs(validation=0)
    splits = data.load(4)
    data.load = lambda steps: replace(splits, train=Counts(splits.train, None, place=-1))
    train(tmp_path / "run", data=data, epochs=2)
    assert reads[1:] == [16, 12, 0, 32, 16, 12, 0, reads[-1]]  # of 60 samples in batches of 16
    assert copies[:-1] == [2, 1, 1, 0] * 2


def test_data_that_fails_is_named_with_the_batch_that_it_is_of(tmp_path, monkeypatch):
    seen = []

    def fails(*_):
        seen.append(1)
        if len(seen) == 3:
            raise ValueError("damaged")

    monkeypatch.setattr(batch_loop, "check_length", fails)
    with pytest.raises(ValueError, match="damaged") as caught:
        train(tmp_path / "run")
    assert caught.value.__notes__[0] == "at epoch 1, batch 3 of 4"


def test_data_that_ends_early_is_no_whole_epoch(tmp_path):
    with pytest.raises(RuntimeError, match=r"the data ended after \d of 4 batches"):
        train(tmp_path / "run", data=ending(StopIteration()))
    with pytest.raises(RuntimeError, match="the data ended after 0 of 1 batches"):
        sltt.evaluate(network(), ending(StopIteration(), "test"), device="cpu")


def test_no_worker_is_left_after_an_error(tmp_path):
    """Python would wait for it for ever when it ends, while the traceback keeps the loader."""
    with pytest.raises(KeyError) as caught:
        train(tmp_path / "run", data=ending(KeyError("x")), workers=1)
    assert caught.traceback
    assert not multiprocessing.active_children()
    with pytest.raises(KeyError) as caught:
        sltt.evaluate(network(), ending(KeyError("x"), "test"), device="cpu", workers=1)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("error", [KeyError("x"), MemoryError()])
def test_every_error_of_an_epoch_tells_its_batch_and_the_checkpoint(error, tmp_path):
    train(tmp_path / "run", epochs=1)
    with pytest.raises(type(error)) as caught:
        train(tmp_path / "run", data=ending(error), epochs=2, resume=True)
    place, checkpoint = caught.value.__notes__
    assert re.fullmatch("at epoch 2, batch [1-4] of 4", place)
    assert f"is {tmp_path / 'run' / 'last.ckpt'}: continue with --resume {tmp_path / 'run'}" in checkpoint


def test_an_error_of_the_validation_tells_where_it_is(tmp_path):
    with pytest.raises(KeyError) as caught:
        train(tmp_path / "run", data=ending(KeyError(), "validation"))
    assert caught.value.__notes__ == ["at epoch 1, validation"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("0.weight", "the weights of 0.weight are"),
        ("1.running_mean", "the statistics 1.running_mean of BatchNorm are"),
        ("1.running_var", "the statistics 1.running_var of BatchNorm are"),
    ],
)
def test_weights_and_statistics_that_are_not_finite_are_never_saved(name, message, tmp_path):
    def spoil(batch):
        batch.model.module.state_dict()[name].view(-1)[3] = float("inf")
        if name == "0.weight":  # silent or not, the gradient is finite
            batch.model.module[0].weight.grad.zero_()

    with pytest.raises(FloatingPointError, match=f"{message} not finite"):
        train(tmp_path / "run", rule=noting(after=spoil))
    assert not (tmp_path / "run" / "last.ckpt").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"model": nn.Sequential(nn.Linear(4, 8), sltt.LIF(), nn.Linear(8, 3))},
        {"phases": [sltt.Phase(1, freeze_norm=True)]},
        {"phases": [sltt.Phase(1, batches=1)]},
    ],
    ids=["no BatchNorm", "frozen", "not seen"],
)
def test_a_batch_of_one_sample_trains_where_it_can(settings, tmp_path):
    train(tmp_path / "run", batch_size=59, epochs=1, **settings)
