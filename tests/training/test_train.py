import csv
import gzip
import math
import multiprocessing
import os
import random
import re
import signal
import threading
from dataclasses import replace
from functools import partial
from itertools import cycle
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

import sltt
from sltt.data import Data, Splits
from sltt.parallel.devices import make_fabric
from sltt.training import checkpoints, files, runs
from sltt.training.checkpoints import CheckpointError, load_checkpoint, save_checkpoint
from sltt.training.console import Console
from tests.conftest import RULES


class Blobs(Data):
    """Three clouds of points [4], static; 60 to train on, 12 held out, 12 to test."""

    def __init__(self, validation=0.2, static=True, spoil=None):
        super().__init__(validation)
        self.static = static
        self.spoil = spoil

    def load(self, steps):
        generator = torch.Generator().manual_seed(0)
        centres = 3 * torch.randn(3, 4, generator=generator)

        def samples(count):
            labels = torch.arange(count) % 3
            x = centres[labels] + 0.3 * torch.randn(count, 4, generator=generator)
            if self.spoil:
                self.spoil(x, labels)
            return [(v if self.static else v.expand(steps, 4), int(label)) for v, label in zip(x, labels, strict=True)]

        validation = samples(12) if self.validation else None
        return Splits(samples(60), validation, samples(12), self.static, 3, "blobs")


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), sltt.LIF(), sltt.Dropout(0.1), nn.Linear(16, 3))


QUIET = Console(quiet=True)
ADAM = partial(torch.optim.AdamW, lr=0.02)


def train(run, model=None, data=None, **kwargs):
    model = model if model is not None else network()
    settings = {"optimizer": ADAM, "epochs": 4, "batch_size": 16, "report": QUIET, "device": "cpu", **kwargs}
    return model, sltt.fit(model, data or Blobs(), run=run, **settings)


def weights(path):
    return load_checkpoint(path)["model"]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# every rule once, and with each precision several rules, on static data and on sequences
SAMPLE = [*zip(RULES, cycle(["static", "sequence"]), cycle([32, "bf16-mixed", "16-mixed"]))]


@pytest.mark.parametrize(("name", "kind", "precision"), SAMPLE)
def test_every_rule_and_precision_learns(name, kind, precision, tmp_path):
    data = Blobs(static=kind == "static")
    model, result = train(tmp_path / "run", data=data, rule=RULES[name], epochs=8, precision=precision)
    assert result.history[-1]["train_loss"] < 0.8 * result.history[0]["train_loss"]
    assert sltt.evaluate(model, data, precision=precision, device="cpu").accuracy > 0.8
    assert [row["epoch"] for row in result.history] == list(range(1, 9))


def test_a_rule_that_updates_at_every_step_learns_and_the_optimizer_steps_no_more_than_that(tmp_path):
    steps = []

    class Counting(torch.optim.SGD):
        def step(self, closure=None):
            steps.append(1)
            return super().step(closure)

    rule = sltt.OTTT(online=True)
    model, _ = train(
        tmp_path / "run", rule=rule, optimizer=partial(Counting, lr=0.05), epochs=8, steps=3, clip_norm=1.0
    )
    assert len(steps) == 8 * 4 * 3  # epochs, batches, time steps
    assert sltt.evaluate(model, Blobs(), steps=3, device="cpu").accuracy > 0.9


def test_a_loss_may_be_a_plain_function(tmp_path):
    model, _ = train(tmp_path / "run", loss=torch.nn.functional.cross_entropy, epochs=8)
    metrics = sltt.evaluate(model, Blobs(), loss=torch.nn.functional.cross_entropy, device="cpu")
    assert metrics.accuracy > 0.9


def test_the_run_folder_holds_metrics_and_checkpoints(tmp_path):
    model, result = train(tmp_path / "run", config={"a": 1})
    assert {p.name for p in result.run.iterdir() if not p.name.startswith(".")} == {
        "best.ckpt",
        "config.yaml",
        "last.ckpt",
        "metrics.csv",
        "tensorboard",
    }
    rows = list(csv.DictReader((result.run / "metrics.csv").read_text().splitlines()))
    assert len(rows) == 4
    assert float(rows[-1]["train_loss"]) == result.history[-1]["train_loss"]
    assert 0 < result.history[-1]["firing_rate"] < 1
    best = max(result.history, key=lambda r: (r["validation_accuracy"], -r["validation_loss"]))
    assert result.epoch == best["epoch"]
    assert equal(model.state_dict(), weights(result.run / "best.ckpt"))
    assert load_checkpoint(result.run / "last.ckpt")["config"] == {"a": 1}
    assert (result.run / "config.yaml").read_text() == "a: 1\n"


def test_without_validation_the_last_epoch_counts(tmp_path):
    model, result = train(tmp_path / "run", data=Blobs(validation=0))
    assert result.epoch == 4
    assert not (result.run / "best.ckpt").exists()
    assert equal(model.state_dict(), weights(result.run / "last.ckpt"))
    with pytest.raises(ValueError, match="no validation samples"):
        sltt.evaluate(model, Blobs(validation=0), "validation")


class Images(Data):
    """Twelve images [1, 2, 4] to test, static or [T, 1, 2, 4]."""

    def __init__(self, static):
        super().__init__(validation=0)
        self.static = static

    def load(self, steps):
        x = torch.randn(12, 1, 2, 4, generator=torch.Generator().manual_seed(1))
        samples = [(v if self.static else torch.stack([v, v.flip(0), -v, v]), i % 3) for i, v in enumerate(x)]
        return Splits(samples, None, samples, self.static, 3, "images")


@pytest.mark.parametrize("static", [True, False], ids=["static", "sequence"])
def test_mirrored_evaluation_takes_the_mean_logits_of_each_image_and_of_its_mirror_image(static):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(8, 16), sltt.LIF(), nn.Linear(16, 3)).eval()
    samples = Images(static).load(4).test
    x = torch.stack([x for x, _ in samples], 0 if static else 1)
    steps = 4 if static else None
    logits = (sltt.unroll(model, x, steps=steps) + sltt.unroll(model, x[..., [3, 2, 1, 0]], steps=steps)) / 2
    target = torch.tensor([label for _, label in samples])
    loss = torch.nn.functional.cross_entropy
    expected = torch.stack([loss(o, target) for o in logits]).mean().item()
    found = sltt.evaluate(model, Images(static), loss=loss, batch_size=12, device="cpu", mirror=True)
    assert found.loss == pytest.approx(expected, rel=1e-5)
    assert found.accuracy == (logits.mean(0).argmax(1) == target).sum().item() / 12
    assert found.loss != pytest.approx(sltt.evaluate(model, Images(static), loss=loss, device="cpu").loss, rel=1e-3)


@pytest.mark.parametrize("static", [True, False], ids=["static", "sequence"])
def test_samples_that_are_no_images_have_no_mirror_image(static):
    with pytest.raises(ValueError, match="mirror=True needs images"):
        sltt.evaluate(network(), Blobs(static=static), device="cpu", mirror=True)


class StopAt(sltt.SLTT):
    """SLTT-K that presses Ctrl-C in its nth batch."""

    def __init__(self, batch, k=2):
        super().__init__(k=k)
        self.left = [batch]

    def run(self, *args):
        self.left[0] -= 1
        if self.left[0] == 0:
            signal.raise_signal(signal.SIGINT)
        return super().run(*args)


@pytest.mark.parametrize("batch", [1, 4, 6, 8, 16])
def test_ctrl_c_saves_and_a_resumed_run_ends_with_the_same_weights(batch, tmp_path):
    whole, result = train(tmp_path / "whole", rule=sltt.SLTT(k=2))
    with pytest.raises(KeyboardInterrupt, match=r"stopped by Ctrl-C; continue with --resume"):
        train(tmp_path / "part", rule=StopAt(batch))
    progress = load_checkpoint(tmp_path / "part" / "last.ckpt")["progress"]
    assert 4 * progress["epoch"] + progress["batch"] == batch
    torch.rand(7)  # random numbers in between do not matter
    resumed, again = train(tmp_path / "part", rule=sltt.SLTT(k=2), resume=True)
    assert equal(weights(tmp_path / "part" / "last.ckpt"), weights(tmp_path / "whole" / "last.ckpt"))
    assert equal(resumed.state_dict(), whole.state_dict())
    measured = [
        [{k: v for k, v in row.items() if k not in ("seconds", "peak_memory")} for row in history]
        for history in (result.history, again.history)
    ]
    assert measured[0] == measured[1]


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    class Twice(sltt.SLTT):
        def run(self, *args):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", rule=Twice())
    assert signal.getsignal(signal.SIGINT) is before
    assert not (tmp_path / "run" / "last.ckpt").exists()


def test_training_works_outside_the_main_thread(tmp_path):
    thread = threading.Thread(target=train, args=(tmp_path / "run",), kwargs={"epochs": 1})
    thread.start()
    thread.join()
    assert (tmp_path / "run" / "last.ckpt").exists()


def test_resuming_a_finished_run_trains_no_more(tmp_path):
    _, first = train(tmp_path / "run")
    saved = (tmp_path / "run" / "last.ckpt").stat().st_mtime_ns
    _, second = train(tmp_path / "run", resume=True)
    assert second.history == first.history
    assert (tmp_path / "run" / "last.ckpt").stat().st_mtime_ns == saved


def test_resuming_before_the_first_checkpoint_starts_again(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("{}")
    train(tmp_path / "run", resume=True)
    train(tmp_path / "whole")
    assert equal(weights(tmp_path / "run" / "last.ckpt"), weights(tmp_path / "whole" / "last.ckpt"))


SETTINGS = {"optimizer": {"class_path": "AdamW", "init_args": {"lr": 0.1, "eps": 1e-8}}, "epochs": 1, "seed": 0}


def changed(**kwargs):
    init = {"lr": kwargs.pop("lr", 0.1), "eps": 1e-8}
    return {**SETTINGS, "optimizer": {"class_path": "AdamW", "init_args": init}, **kwargs}


def test_a_run_resumes_with_the_settings_in_its_checkpoint_only(tmp_path):
    train(tmp_path / "run", epochs=1, config=SETTINGS)
    with pytest.raises(ValueError, match=r"optimizer.init_args.lr was 0.1 and is 0.2; seed was 0 and is 3. Restore"):
        train(tmp_path / "run", resume=True, config=changed(lr=0.2, seed=3))
    newer = changed(epochs=2, workers=0)  # an option that the checkpoint does not know, and one that may change
    train(tmp_path / "run", epochs=2, resume=True, config=newer)
    train(tmp_path / "run", epochs=2, resume=True)
    assert load_checkpoint(tmp_path / "run" / "last.ckpt")["config"] == newer


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (yaml.safe_dump(changed(lr=0.2)), "optimizer.init_args.lr was 0.1 and is 0.2"),
        (yaml.safe_dump(SETTINGS).replace("seed: 0\n", ""), "seed is missing"),
        (yaml.safe_dump(SETTINGS)[:30], "seed is missing"),
        (yaml.safe_dump(SETTINGS) + "rule: SLTT", "rule is new"),
        ("a: [", "epochs is missing; optimizer is missing; seed is missing"),
        ("", "optimizer is missing; seed is missing"),
    ],
)
def test_a_file_of_settings_that_is_not_that_of_the_checkpoint_is_refused(text, message, tmp_path):
    train(tmp_path / "run", epochs=1, config=SETTINGS)
    (tmp_path / "run" / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "run", resume=True, config=SETTINGS)


@pytest.mark.parametrize("name", ["typo", "empty", None])
def test_what_is_no_run_is_not_resumed(name, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="resume=True"):
        train(name and tmp_path / name, resume=True)
    assert not (tmp_path / "typo").exists()


def test_an_empty_folder_is_taken_by_a_new_run(tmp_path):
    (tmp_path / "run").mkdir()
    train(tmp_path / "run", epochs=1)


def test_a_run_killed_while_its_settings_are_written_leaves_no_folder_of_its_name(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def dies(descriptor):
        raise Killed

    monkeypatch.setattr(files.os, "fsync", dies)
    with pytest.raises(Killed):
        train(tmp_path / "run", epochs=1, config=SETTINGS)
    monkeypatch.undo()
    assert not (tmp_path / "run").exists()
    train(tmp_path / "run", epochs=1, config=SETTINGS)


class Meanwhile(sltt.SLTT):
    """Does something in its first batch."""

    def __init__(self, action):
        super().__init__()
        self.actions = [action]

    def run(self, *args):
        if self.actions:
            self.actions.pop()()
        return super().run(*args)


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
    train(tmp_path / "run", rule=Meanwhile(elsewhere), epochs=2, resume=True)
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
    with pytest.raises(FileExistsError, match="--resume"):
        train(tmp_path / "run", epochs=1)


def test_two_runs_without_a_folder_get_two(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a, b = (train(None, epochs=1)[1].run for _ in range(2))
    assert a != b
    assert a.parent == b.parent


def test_a_checkpoint_within_an_epoch_by_time(tmp_path, monkeypatch):
    names = []
    real = checkpoints.save_checkpoint
    monkeypatch.setattr(
        checkpoints, "save_checkpoint", lambda path, content: (names.append(path.name), real(path, content))
    )
    train(tmp_path / "run", epochs=1, checkpoint_minutes=0)
    assert names == [*["last.ckpt"] * 4, "best.ckpt", "last.ckpt"]


def test_gradients_are_scaled_in_16_mixed_and_the_scale_is_saved(tmp_path):
    assert make_fabric(device="cpu", precision="16-mixed").strategy.precision.scaler is not None
    train(tmp_path / "run", precision="16-mixed")
    scaler = load_checkpoint(tmp_path / "run" / "last.ckpt")["scaler"]
    assert scaler["scale"] > 1


def test_scaled_gradients_equal_unscaled_ones(rule):
    model = nn.Sequential(nn.Linear(4, 8), sltt.LIF(), nn.Linear(8, 3))
    fabric = make_fabric(device="cpu", precision="16-mixed")
    net, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=1.0))
    x, y = torch.randn(4, 5, 4), torch.randint(3, (5,))
    loss = sltt.losses.CrossEntropyMSE()
    torch.manual_seed(0)
    rule(net, x, y, loss, backward=fabric.backward)
    scale = fabric.strategy.precision.scaler.get_scale()
    scaled = [p.grad / scale for p in model.parameters()]
    optimizer.zero_grad()
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.float16):
        rule(model, x, y, loss)
    for a, p in zip(scaled, model.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=2e-2, atol=2e-4)


def test_clipping_bounds_the_step(tmp_path):
    model = network()
    before = [p.detach().clone() for p in model.parameters()]
    train(
        tmp_path / "run", model, Blobs(validation=0), epochs=1, batch_size=60, clip_norm=1e-3,
        optimizer=partial(torch.optim.SGD, lr=1.0), schedule=sltt.schedules.Constant(),
    )  # fmt: skip
    moved = math.sqrt(sum((p - q).square().sum().item() for p, q in zip(model.parameters(), before, strict=True)))
    assert moved == pytest.approx(1e-3, rel=1e-2)


def test_the_schedule_sets_the_learning_rate(tmp_path):
    _, result = train(
        tmp_path / "run", optimizer=partial(torch.optim.SGD, lr=0.5), schedule=sltt.schedules.Step([2], gamma=0.1)
    )
    assert [row["learning_rate"] for row in result.history] == pytest.approx([0.5, 0.5, 0.05, 0.05])


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
    class Explodes(sltt.SLTT):
        def run(self, batch):
            out = super().run(batch)
            if (tmp_path / "run" / "last.ckpt").exists():
                spoil(batch.model.module)
            return out

    with pytest.raises(FloatingPointError, match=message) as caught:
        train(tmp_path / "run", rule=Explodes())
    assert caught.value.__notes__[0] == "at epoch 2, batch 1 of 4"
    assert "last good checkpoint" in caught.value.__notes__[1]
    saved = weights(tmp_path / "run" / "last.ckpt")
    assert all(v.isfinite().all() for v in saved.values())


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


@pytest.mark.parametrize(
    "arguments", [{"epochs": 0}, {"batch_size": 0}, {"steps": 0}, {"clip_norm": -1}, {"data": "none"}]
)
def test_nothing_to_do_is_refused_before_a_folder_is_made(arguments, tmp_path):
    if "data" in arguments:
        arguments = {"data": Blobs()}
        arguments["data"].load = lambda steps: Splits([], None, [], True, 3, "empty")
    with pytest.raises(ValueError, match=r"at least|greater than 0|there are no train samples"):
        train(tmp_path / "run", **arguments)
    assert not (tmp_path / "run").exists()


def test_cuda_that_is_not_there_is_refused():
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ValueError, match="no CUDA device"):
        make_fabric(device="cuda")


@pytest.mark.parametrize("measured", [False, True], ids=["fit", "evaluate"])
def test_sequences_of_another_length_than_steps_are_refused(measured, tmp_path):
    data = Blobs(static=False)
    load = data.load
    data.load = lambda steps: load(10)
    with pytest.raises(ValueError, match=r"expected sequences of steps=4 time steps, but the data gives 10: set steps"):
        sltt.evaluate(network(), data, steps=4, device="cpu") if measured else train(tmp_path / "run", data=data)
    assert not (tmp_path / "run").exists()


class Ends(torch.utils.data.Dataset):
    """Samples that raise at the given place."""

    def __init__(self, samples, error, place=20):
        self.samples, self.error, self.place = samples, error, place

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        if index == self.place:
            raise self.error
        return self.samples[index]


def ending(error, split="train"):
    data = Blobs()
    splits = data.load(4)
    samples = getattr(splits, split)
    place = len(samples) - 1
    data.load = lambda steps: replace(splits, **{split: Ends(samples, error, place)})
    return data


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


@pytest.mark.parametrize("error", [KeyError("x"), TypeError("x"), RuntimeError("x"), MemoryError(), AssertionError()])
def test_every_error_of_an_epoch_tells_its_batch_and_the_checkpoint(error, tmp_path):
    train(tmp_path / "run", epochs=1)
    with pytest.raises(type(error)) as caught:
        train(tmp_path / "run", data=ending(error), epochs=2, resume=True)
    place, checkpoint = caught.value.__notes__
    assert re.fullmatch("at epoch 2, batch [1-4] of 4", place)
    assert checkpoint == f"the last good checkpoint is {tmp_path / 'run' / 'last.ckpt'}"


def test_an_error_of_the_validation_tells_where_it_is(tmp_path):
    with pytest.raises(KeyError) as caught:
        train(tmp_path / "run", data=ending(KeyError(), "validation"))
    assert caught.value.__notes__ == ["at epoch 1, validation"]


@pytest.mark.parametrize("statistic", ["running_mean", "running_var"])
def test_statistics_that_are_not_finite_are_never_saved(statistic, tmp_path):
    class Spoils(sltt.SLTT):
        def run(self, batch):
            out = super().run(batch)
            getattr(batch.model.module[1], statistic)[3] = float("nan")
            return out

    with pytest.raises(FloatingPointError, match=f"the statistics 1.{statistic} of BatchNorm are not finite"):
        train(tmp_path / "run", rule=Spoils())
    assert not (tmp_path / "run" / "last.ckpt").exists()


@pytest.mark.parametrize("size", [59, 1])
def test_a_batch_of_one_sample_is_refused_before_the_training(size, tmp_path):
    with pytest.raises(ValueError, match=f"with batch_size={size}, and BatchNorm needs two: set batch_size=") as caught:
        train(tmp_path / "run", batch_size=size)
    assert not (tmp_path / "run").exists()
    train(tmp_path / "run", batch_size=int(str(caught.value).rpartition("=")[2]), epochs=1)


@pytest.mark.parametrize(
    "settings",
    [
        {"model": nn.Sequential(nn.Linear(4, 8), sltt.LIF(), nn.Linear(8, 3))},
        {"phases": [sltt.Phase(1, freeze_norm=True)]},
    ],
    ids=["no BatchNorm", "frozen"],
)
def test_a_batch_of_one_sample_trains_where_it_can(settings, tmp_path):
    train(tmp_path / "run", batch_size=59, epochs=1, **settings)


def test_peak_memory_is_that_of_a_batch_under_its_rule(tmp_path):
    def run(name, **settings):
        model = nn.Sequential(nn.Linear(4, 512), sltt.LIF(), nn.Linear(512, 3))
        return [row["peak_memory"] for row in train(tmp_path / name, model, batch_size=59, **settings)[1].history]

    phases = [sltt.Phase(1, steps=32, rule=sltt.BPTT()), sltt.Phase(1, steps=4)]
    bptt, sltt_ = run("phases", phases=phases, epochs=2)
    state = 4 * 59 * 512
    assert 32 * state < bptt
    assert state < sltt_ < 10 * state
    assert run("alone", epochs=2) == [sltt_] * 2
    assert 0 < sltt.evaluate(network(), Blobs(), device="cpu").peak_memory < state


def test_a_rule_that_measures_its_first_batches_is_measured_after_them(tmp_path):
    _, result = train(tmp_path / "run", rule=sltt.SLTT(fold="auto"), batch_size=12, epochs=2)
    assert result.history[0]["peak_memory"] > 0  # of the fourth of five batches
    _, result = train(tmp_path / "few", rule=sltt.SLTT(fold="auto"), batch_size=20, epochs=2)
    assert [row["peak_memory"] is None for row in result.history] == [True, False]


def test_workers_that_validate_stay_from_epoch_to_epoch(tmp_path):
    class Noted(Ends):
        def __getitem__(self, index):
            with (tmp_path / "pids").open("a") as file:
                file.write(f"{os.getpid()}\n")
            return self.samples[index]

    data = Blobs()
    splits = data.load(4)
    data.load = lambda steps: replace(splits, validation=Noted(splits.validation, None))
    train(tmp_path / "run", data=data, epochs=3, workers=1)
    pids = (tmp_path / "pids").read_text().split()
    assert len(pids) == 3 * 12
    assert len(set(pids)) == 1


@pytest.mark.parametrize(("bias", "message"), [(-1e3, "never fired"), (1e3, "always fired")])
def test_a_dead_layer_is_warned_about_by_name(bias, message, tmp_path, capsys):
    model = nn.Sequential(nn.Linear(4, 8), sltt.LIF(), nn.Linear(8, 3))
    nn.init.constant_(model[0].bias, bias)
    train(tmp_path / "run", model, epochs=1, report=Console())
    out = capsys.readouterr().out
    assert f"layer 1 {message} in this epoch" in out
    assert "layer 0" not in out


def test_a_healthy_layer_is_not(tmp_path, capsys):
    train(tmp_path / "run", epochs=1, report=Console())
    assert "warning" not in capsys.readouterr().out


def test_other_data_than_the_runs_is_refused(tmp_path, monkeypatch):
    train(tmp_path / "run", epochs=1)
    other = Blobs()
    monkeypatch.setattr(other, "load", lambda steps: Splits(*list(vars(Blobs().load(steps)).values())[:-1], "other"))
    with pytest.raises(CheckpointError, match="was trained on the split blobs, but the data now gives other"):
        train(tmp_path / "run", data=other, resume=True)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    train(tmp_path / "run", epochs=1)
    with pytest.raises(CheckpointError, match="do not fit the model"):
        train(tmp_path / "run", nn.Sequential(nn.Linear(4, 5), sltt.LIF(), nn.Linear(5, 3)), resume=True)


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    class Explodes(sltt.SLTT):
        def run(self, batch):
            weight = batch.model.module[0].weight
            weight.data[0, 0] = float("inf")  # an infinite charge: silent or not, the loss is finite
            return sltt.Output(torch.zeros(()), torch.zeros(2, len(batch.target), 3))

    with pytest.raises(FloatingPointError, match=r"the weights of 0.weight are not finite"):
        train(tmp_path / "run", rule=Explodes())
    assert not (tmp_path / "run" / "last.ckpt").exists()


def test_a_rules_own_generator_continues(tmp_path):
    def rule():
        return sltt.SLTT(k=2, generator=torch.Generator().manual_seed(7))

    train(tmp_path / "whole", rule=rule(), epochs=4, schedule=sltt.schedules.Constant())
    train(tmp_path / "a", rule=rule(), epochs=2, schedule=sltt.schedules.Constant())
    train(tmp_path / "a", rule=rule(), epochs=4, schedule=sltt.schedules.Constant(), resume=True)
    assert equal(weights(tmp_path / "whole" / "last.ckpt"), weights(tmp_path / "a" / "last.ckpt"))


def test_a_run_killed_between_its_two_checkpoints_still_knows_the_best(tmp_path, monkeypatch):
    train(tmp_path / "whole")
    real, written = checkpoints.save_checkpoint, []

    def dies(path, content):
        if len(written) == 1:
            raise SystemExit
        written.append(path.name)
        real(path, content)

    monkeypatch.setattr(checkpoints, "save_checkpoint", dies)
    with pytest.raises(SystemExit):
        train(tmp_path / "part")
    monkeypatch.undo()
    assert written == ["best.ckpt"]
    train(tmp_path / "part", resume=True)
    for name in ("best.ckpt", "last.ckpt"):
        assert equal(weights(tmp_path / "part" / name), weights(tmp_path / "whole" / name))
    assert len((tmp_path / "part" / "metrics.csv").read_text().splitlines()) == 5


def truncated(path):
    save_checkpoint(path, {"model": {"w": torch.zeros(1000)}})
    path.write_bytes(path.read_bytes()[:2000])


def foreign(path):
    torch.save({"state_dict": {}}, path)


def incomplete(path):
    save_checkpoint(path, {"model": {}})


def pickled(path):
    torch.save({"format": checkpoints.FORMAT, "model": Blobs()}, path)


@pytest.mark.parametrize(
    "write", [truncated, foreign, incomplete, pickled, lambda p: p.write_text("hello"), lambda p: p.touch()]
)
def test_a_damaged_or_foreign_checkpoint_is_named(write, tmp_path):
    path = tmp_path / "last.ckpt"
    write(path)
    with pytest.raises(CheckpointError, match=str(path)):
        load_checkpoint(path)


def test_a_flipped_bit_never_loads_as_another_value(tmp_path):
    path = tmp_path / "last.ckpt"
    saved = {"w": torch.randn(500, generator=torch.Generator().manual_seed(0))}
    save_checkpoint(path, {**dict.fromkeys(checkpoints.KEYS), "model": saved})
    whole, refused = path.read_bytes(), 0
    for place in random.Random(0).sample(range(8 * len(whole)), 300):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            assert equal(load_checkpoint(path)["model"], saved)
        except CheckpointError as error:
            assert "Restore it from a copy" in str(error)  # noqa: PT017 a bit of the padding may not matter
            refused += 1
    assert refused > 200


def test_a_checkpoint_without_a_checksum_loads(tmp_path):
    content = {"format": checkpoints.FORMAT, **dict.fromkeys(checkpoints.KEYS)}
    torch.save(content, tmp_path / "last.ckpt")
    assert load_checkpoint(tmp_path / "last.ckpt") == content


def test_a_checkpoint_is_read_by_torch_alone(tmp_path):
    save_checkpoint(tmp_path / "last.ckpt", {"model": 1})
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["model"] == 1


def test_the_message_about_a_checkpoint_with_objects_does_not_advise_to_execute_them(tmp_path):
    pickled(tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path / "last.ckpt")
    assert "weights_only" not in str(caught.value)


def test_the_state_of_another_optimizer_is_refused(tmp_path):
    train(tmp_path / "run", epochs=1)
    with pytest.raises(CheckpointError, match=r"of another optimizer, without .*momentum.*--weights"):
        train(tmp_path / "run", optimizer=partial(torch.optim.SGD, lr=0.1), resume=True)


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    whole = dict.fromkeys(checkpoints.KEYS)
    save_checkpoint(path, {**whole, "model": 1})

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match=r"could not write .*last\.ckpt.*No space left.*written before is intact"):
        save_checkpoint(path, {**whole, "model": 2})
    assert load_checkpoint(path)["model"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_run_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot make the run folder"):
        train(tmp_path / "file" / "run")


def test_a_checkpoint_of_an_earlier_layout_of_the_code_goes_on(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last.ckpt").write_bytes(
        gzip.decompress(Path(__file__).with_name("earlier.ckpt.gz").read_bytes())
    )

    def training(run, **settings):
        rule = sltt.SLTT(k=2, generator=torch.Generator().manual_seed(3))
        return train(run, rule=rule, schedule=sltt.schedules.Constant(), **settings)[0].state_dict()

    resumed = training(tmp_path / "run", resume=True)
    for name, value in training(tmp_path / "whole").items():
        torch.testing.assert_close(resumed[name], value, msg=name)
