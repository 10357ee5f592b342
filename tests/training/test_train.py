import gc
import math
import os
import random
import threading
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import cycle

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import TensorDataset

import sltt
from sltt.parallel.devices import make_fabric
from sltt.training import progress
from sltt.training.console import Console
from sltt.training.progress import Metrics, Progress
from sltt.training.safeguards import rising_loss
from sltt.training.sample import read_sample
from tests.conftest import KINDS, RULES
from tests.test_waits import Waits
from tests.training.blobs import Blobs, Ends, equal, network, train, weights

# each kind of rule once, and with each precision several, on static data and on sequences
SAMPLE = [*zip(KINDS, cycle(["static", "sequence"]), cycle([32, "bf16-mixed", "16-mixed"]))]


@pytest.mark.parametrize(("name", "kind", "precision"), SAMPLE)
def test_every_rule_and_precision_learns_with_batchnorm_free_and_frozen(name, kind, precision, tmp_path):
    data, phases = Blobs(static=kind == "static"), [sltt.Phase(2), sltt.Phase(2, freeze_norm=True)]
    settings = {"optimizer": partial(torch.optim.AdamW, lr=0.05), "phases": phases, "precision": precision}
    model, result = train(tmp_path / "run", data=data, rule=RULES[name], **settings)
    losses = [row["train_loss"] for row in result.history]
    assert losses[1] < 0.9 * losses[0]
    assert losses[3] < 0.9 * losses[1]
    assert sltt.evaluate(model, data, precision=precision, device="cpu").accuracy > 0.8
    assert [row["epoch"] for row in result.history] == [1, 2, 3, 4]


class Casts(TorchDispatchMode):
    """Counts casts of a weight of the network to 16 bits."""

    seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        narrow = func is torch.ops.aten._to_copy.default and kwargs.get("dtype") == torch.bfloat16
        self.seen += narrow and args[0].shape == (16, 4)
        return func(*args, **kwargs)


def test_weights_are_cast_once_a_batch(tmp_path):
    with Casts() as casts:
        rule, data = sltt.SLTT(fold=1), Blobs(validation=0)
        train(tmp_path / "run", data=data, rule=rule, precision="bf16-mixed", steps=5, epochs=2, batch_size=20)
    assert casts.seen == 2 * 3  # batches


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


def test_without_validation_the_last_epoch_counts(tmp_path):
    model, result = train(tmp_path / "run", data=Blobs(validation=0))
    assert result.epoch == 4
    assert not (result.run / "best.ckpt").exists()
    assert equal(model.state_dict(), weights(result.run / "last.ckpt"))
    with pytest.raises(ValueError, match="no validation samples"):
        sltt.evaluate(model, Blobs(validation=0), "validation")


def test_trainings_run_at_once_in_threads_which_measure_no_memory(tmp_path):
    threads = [threading.Thread(target=train, args=(tmp_path / name,), kwargs={"epochs": 1}) for name in "ab"]
    for step in (threading.Thread.start, threading.Thread.join):
        for thread in threads:
            step(thread)
    assert all((tmp_path / name / "metrics.csv").read_text().strip().endswith(",") for name in "ab")


@pytest.mark.parametrize("name", KINDS)
def test_scaled_gradients_equal_unscaled_ones(name):
    rule, model = RULES[name], nn.Sequential(nn.Linear(4, 8), sltt.LIF(), nn.Linear(8, 3))
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


def test_values_of_a_batch_are_read_before_its_update(tmp_path):
    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            waits.seen.append("updated")

    class End(sltt.callbacks.Callback):
        def on_batch(self, now):
            waits.seen.append("ended")

    with Waits() as waits:
        train(tmp_path / "run", epochs=1, optimizer=partial(Watched, lr=0.1), callbacks=[End()])
    following = [after for one, after in zip(waits.seen, waits.seen[1:], strict=False) if one == "updated"]
    assert following == ["ended"] * 4
    assert "aten._local_scalar_dense" in waits.seen


def test_clipping_bounds_the_step(tmp_path):
    model = network()
    before = [p.detach().clone() for p in model.parameters()]
    train(
        tmp_path / "run", model, Blobs(validation=0), epochs=1, batch_size=60, clip_norm=1e-3,
        optimizer=partial(torch.optim.SGD, lr=1.0), schedule=sltt.schedules.Constant(),
    )  # fmt: skip
    moved = math.sqrt(sum((p - q).square().sum().item() for p, q in zip(model.parameters(), before, strict=True)))
    assert moved == pytest.approx(1e-3, rel=1e-2)


def test_peak_memory_is_that_of_a_batch_under_its_rule(tmp_path):
    def run(name, **settings):
        model = nn.Sequential(nn.Linear(4, 512), sltt.LIF(), nn.Linear(512, 3))
        gc.collect()  # what other tests left must not be freed while a batch is measured
        return [row["peak_memory"] for row in train(tmp_path / name, model, batch_size=59, **settings)[1].history]

    phases = [sltt.Phase(1, steps=16, rule=sltt.BPTT()), sltt.Phase(1, steps=4, rule=sltt.SLTT(fold=1))]
    bptt, sltt_ = run("phases", phases=phases, epochs=2)
    state = 4 * 59 * 512
    assert 16 * state < bptt
    assert state < sltt_ < 10 * state
    assert run("alone", epochs=2, rule=sltt.SLTT(fold=1)) == [sltt_] * 2
    assert 0 < sltt.evaluate(network(), Blobs(), device="cpu").peak_memory < state


class Other(nn.Sequential):
    """A network of which only a trial on copies tells that its time steps may share a call."""

    def forward(self, x):
        return super().forward(x + 0.0)


@pytest.mark.parametrize(("device", "count"), [("cpu", 2), ("cuda", 3)])  # there the second one is watched
def test_the_peak_is_that_of_the_last_of_the_first_batches(device, count, monkeypatch):
    monkeypatch.setattr(progress, "peak_memory", lambda batch, device: batch())
    memory, measured = progress.BatchMemory(torch.device(device)), []
    for i in range(5):
        if memory.is_due(8):
            memory.measure(lambda i=i: measured.append(i))
    assert measured == [*range(count)]


def test_the_trial_of_the_first_batch_does_not_count_and_the_figure_is_that_of_the_commands(tmp_path):
    model, (x, y) = Other(nn.Linear(4, 512), sltt.LIF(), nn.Linear(512, 3)), (torch.randn(20, 4), torch.arange(20) % 3)
    gc.collect()
    row = train(tmp_path, model, batch_size=20, epochs=1, rule=sltt.SLTT(), steps=4)[1].history[0]
    with sltt.analysis.firing_rates(model):
        found = sltt.analysis.memory_parts(model, x, y, sltt.losses.CrossEntropyMSE(), sltt.SLTT(), steps=4)
    assert row["peak_memory"] == pytest.approx(found.batch, rel=0.01)


@pytest.mark.parametrize(
    ("losses", "rule", "warned"),
    [
        ([1.0, 0.5, 0.51, 0.52, 0.53], sltt.SLTT(), True),
        ([1.0, 0.5, 0.51, 0.52, 0.52], sltt.SLTT(), False),
        ([1.0, 0.5, 0.501, 0.502, 0.503], sltt.SLTT(), False),  # little
        ([1.0, 0.5, 0.56, 0.52, 0.55], sltt.SLTT(), True),  # not in each of the epochs
        ([1.0, 0.5, 0.56, 0.49, 0.55], sltt.SLTT(), False),
        ([1.0, 0.001, 0.002, 0.003, 0.004], sltt.SLTT(), False),
        ([0.5, 0.6, 0.7], sltt.SLTT(), False),
        ([-1.0, -0.9, -0.8, -0.7], sltt.SLTT(k=1), True),
        ([1.0, 0.5, 0.51, 0.52, 0.53], sltt.BPTT(), False),
    ],
)
def test_a_loss_that_rises_under_sltt_has_a_remedy(losses, rule, warned):
    said = " ".join(rising_loss(losses, rule))
    assert ("SLTT drops the gradient through time, which this network may need: use BPTT, or OTTT" in said) == warned


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
    pids = [pid for pid in (tmp_path / "pids").read_text().split() if pid != str(os.getpid())]
    assert len(pids) == 3 * 12
    assert len(set(pids)) == 1


@pytest.mark.parametrize(
    ("bias", "message"), [(-1e3, "layer 1 never fired"), (1e3, "layer 1 always fired"), (0.5, None)]
)
def test_a_dead_layer_is_warned_about_by_name(bias, message, tmp_path, capsys):
    model = nn.Sequential(nn.Linear(4, 8), sltt.LIF(), nn.Linear(8, 3))
    nn.init.constant_(model[0].bias, bias)
    train(tmp_path / "run", model, epochs=1, report=Console())
    out = capsys.readouterr().out
    assert f"{message} in this epoch" in out if message else "warning" not in out
    assert "layer 0" not in out


def test_of_epochs_that_are_equally_good_the_first_is_the_best(tmp_path):
    model = nn.Sequential(nn.Linear(4, 8), sltt.LIF(), nn.Linear(8, 3))
    still = partial(torch.optim.SGD, lr=0.0)
    assert train(tmp_path / "run", model, optimizer=still, epochs=2)[1].epoch == 1


@pytest.mark.parametrize(
    ("values", "best"), [([0.5, 0.9, math.nan], 2), ([0.9, math.nan, 0.1], 1), ([math.nan, 0.1], 2)]
)
def test_an_epoch_whose_metric_is_no_number_is_not_the_best(values, best):
    progress = Progress()
    for value in values:
        progress.end_epoch({}, Metrics(1.0, value, "precision", 0.0, 0.0, None), 1)
    assert progress.best_epoch == best


@pytest.mark.parametrize("fails", [False, True])
def test_a_training_leaves_the_random_generators_as_they_were(fails, tmp_path):
    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()

    model, data = network(), Blobs(spoil=(lambda x, labels: x.fill_(torch.nan)) if fails else None)
    drawn = []
    for trains in (False, True):
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(3)
        if trains:
            with pytest.raises(ValueError, match="finite input") if fails else nullcontext():
                train(tmp_path / "run", model, data)
        drawn.append(draw())
    assert drawn[0] == drawn[1]


def test_a_training_in_a_profiler_does_not_end_it_and_measures_no_memory(tmp_path):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        _, result = train(tmp_path / "run", epochs=1)
    assert "aten::addmm" in {event.key for event in profiler.key_averages()}
    assert result.history[0]["peak_memory"] is None


def test_another_default_device_does_not_move_the_data(tmp_path):
    model = nn.Sequential(nn.Linear(64, 16), sltt.LIF(), nn.Linear(16, 10))
    data = sltt.data.from_datasets([(torch.rand(64), i % 10) for i in range(40)], 0.5, static=True)
    settings = {"steps": 2, "epochs": 1, "device": "cpu"}
    torch.set_default_device("meta")
    try:
        result = sltt.fit(model, data, run=tmp_path / "run", **settings)
        assert torch.empty(1).is_meta
        metrics = sltt.evaluate(model, data, "validation", steps=2, device="cpu")
    finally:
        torch.set_default_device(None)
    assert metrics.accuracy == result.history[0]["validation_accuracy"]


@pytest.mark.parametrize(("batch_size", "said"), [(1100, False), (64, True)])
def test_the_log_says_how_many_steps_of_a_full_batch_share_a_call(batch_size, said, tmp_path, capsys):
    model = nn.Sequential(nn.Linear(8, 4), sltt.LIF(), nn.Linear(4, 2))
    data = sltt.data.from_datasets(TensorDataset(torch.rand(1160, 8), torch.arange(1160) % 2), static=True)
    sltt.fit(model, data, run=tmp_path / "run", steps=4, epochs=1, batch_size=batch_size, device="cpu")
    assert ("4 of 4 time steps share a call of the network" in capsys.readouterr().out) is said
    assert [len(spikes) for spikes in read_sample(tmp_path / "run").spikes.values()] == [4]  # a row for each step
