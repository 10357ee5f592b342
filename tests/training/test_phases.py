import re
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import sltt
from sltt.callbacks import Callback
from sltt.data import Data, Splits
from sltt.training.batches import EpochSampler, train_loader
from sltt.training.console import Console
from sltt.training.phases import Phase, plan, set_rates, stage_at
from tests.training.blobs import Blobs, StopAt, equal, network, train, weights

SLTT, BPTT = sltt.SLTT(), sltt.BPTT()


@pytest.mark.parametrize("factor", ["x", -1.0, float("nan")])
def test_a_schedule_that_gives_no_factor_is_refused(factor):
    class Odd(sltt.schedules.Schedule):
        def decay(self, epoch, epochs):
            return factor

    optimizer, stages = torch.optim.SGD([torch.zeros(1)], lr=0.1), plan(None, 2, 4, sltt.SLTT())
    with pytest.raises(ValueError, match="the factor of the schedule must be"):
        set_rates(optimizer, [(0.1, 0.0)], stages[0], Odd(), 0.5)


def test_what_a_phase_leaves_out_is_that_of_the_training():
    stages = plan([Phase(2, steps=1), Phase(3, rule=BPTT), Phase(1, lr=0.01, weight_decay=0.0)], 6, 4, SLTT)
    assert [(s.start, s.stop, s.steps, s.rule) for s in stages] == [(0, 2, 1, SLTT), (2, 5, 4, BPTT), (5, 6, 4, SLTT)]
    assert [s.span for s in stages] == [(0, 5), (0, 5), (5, 6)]  # the schedule starts anew where a phase has an lr
    assert [s.lr for s in stages] == [None, None, 0.01]
    assert [stage_at(stages, epoch).start for epoch in (0, 1, 2, 4, 5, 9)] == [0, 0, 2, 2, 5, 5]


@pytest.mark.parametrize(("epochs", "expected"), [(1, [(0, 1)]), (3, [(0, 2), (2, 3)]), (9, [(0, 2), (2, 9)])])
def test_fewer_epochs_cut_the_phases_and_more_go_to_the_last(epochs, expected):
    stages = plan([Phase(2), Phase(3)], epochs, 4, SLTT)
    assert [(s.start, s.stop) for s in stages] == expected
    assert stages[0].span == (0, epochs)


def test_a_phase_takes_no_class_of_a_rule():
    with pytest.raises(ValueError, match="rule of a phase must be a Rule, got"):
        Phase(1, rule=sltt.SLTT)


class Recorder(sltt.SLTT):
    """Notes T, learning rate, weight decay and the optimizer's momentum of every batch."""

    def __init__(self, log, optimizers):
        super().__init__()
        self.log, self.optimizers = log, optimizers

    def run(self, batch):
        group = self.optimizers[-1].param_groups[0]
        moving = bool(self.optimizers[-1].state)
        self.log.append((batch.steps, round(group["lr"], 6), group["weight_decay"], moving))
        return super().run(batch)


def recorded(tmp_path, static, **kwargs):
    log, optimizers = [], []

    def optimizer(parameters):
        optimizers.append(torch.optim.SGD(parameters, lr=0.2, momentum=0.9, weight_decay=0.1))
        return optimizers[-1]

    schedule = sltt.schedules.Step([1], 0.5)
    _, result = train(
        tmp_path / "run", data=Blobs(static=static), rule=Recorder(log, optimizers), optimizer=optimizer, batch_size=60,
        schedule=schedule, **kwargs,
    )  # fmt: skip
    return log, result


@pytest.mark.parametrize("static", [True, False], ids=["static", "sequence"])
def test_phases_switch_t_and_rates_and_carry_the_optimizer_on(tmp_path, static):
    phases = [Phase(2, steps=1), Phase(1), Phase(2, steps=4, lr=0.1, weight_decay=0.0)]
    log, result = recorded(tmp_path, static, steps=4, epochs=5, phases=phases)
    assert log == [
        (1, 0.2, 0.1, False),
        (1, 0.1, 0.1, True),
        (4, 0.1, 0.1, True),
        (4, 0.1, 0.0, True),
        (4, 0.05, 0.0, True),
    ]
    assert result.epoch > 2  # the best with the last T


def test_only_the_first_phase_warms_up():
    stages = plan([Phase(2), Phase(1), Phase(2, lr=0.1)], 5, 4, SLTT)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.2)
    rates = []
    for epoch in (0.5, 1, 2, 3, 4):
        set_rates(optimizer, [(0.2, 0.0)], stage_at(stages, int(epoch)), sltt.schedules.Cosine(warmup=1), epoch)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.1, 0.2, 0.1, 0.1, 0.05])


def test_a_run_that_ends_in_its_first_phase_has_the_time_steps_of_that_phase(tmp_path):
    class Once(Callback):
        def on_epoch(self, now):
            now.stop("enough")

    _, result = train(tmp_path / "run", phases=[Phase(2, steps=2), Phase(2)], steps=6, callbacks=[Once()])
    assert sltt.load(result.run, network()).trained.steps == 2


@pytest.mark.parametrize(("batch", "ema"), [(3, 0.8), (4, None), (4, 0.8), (5, None)])
def test_a_run_that_stopped_between_phases_goes_on_as_if_it_had_not(tmp_path, ema, batch):
    def phases(first=None, second=None):
        return [Phase(1, steps=1, rule=first), Phase(1, rule=second, lr=0.01)]

    settings = {"ema": ema, "epochs": 2}
    _, whole = train(tmp_path / "whole", phases=phases(), **settings)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped", phases=phases(StopAt(batch, k=None), StopAt(batch - 4, k=None)), **settings)
    _, resumed = train(tmp_path / "stopped", phases=phases(), resume=True, **settings)
    assert equal(weights(tmp_path / "whole" / "last.ckpt"), weights(tmp_path / "stopped" / "last.ckpt"))
    assert [row["validation_accuracy"] for row in whole.history] == [
        row["validation_accuracy"] for row in resumed.history
    ]


def test_normalisation_has_its_own_weight_decay_in_all_phases(tmp_path):
    log = []

    def optimizer(groups):
        optimizers.append(torch.optim.SGD(groups, lr=0.1, weight_decay=0.1))
        return optimizers[-1]

    class Groups(sltt.SLTT):
        def run(self, *args):
            log.append([(len(group["params"]), group["weight_decay"]) for group in optimizers[-1].param_groups])
            return super().run(*args)

    optimizers = []
    settings = {"rule": Groups(), "norm_weight_decay": 0.02, "phases": [Phase(1), Phase(1, weight_decay=0.3)]}
    train(tmp_path / "run", optimizer=optimizer, epochs=2, batch_size=60, **settings)
    assert log == [[(4, 0.1), (2, 0.02)], [(4, 0.3), (2, 0.02)]]
    norm = optimizers[-1].param_groups[1]["params"]
    assert [tuple(p.shape) for p in norm] == [(16,), (16,)]
    optimizers.clear()
    result = train(tmp_path / "run", optimizer=optimizer, epochs=3, batch_size=60, resume=True, **settings)[1]
    assert len(result.history) == 3


def test_groups_of_an_optimizer_keep_the_ratios_of_their_rates_in_a_phase():
    optim = torch.optim.SGD([{"params": [torch.ones(1)], "lr": lr} for lr in (0.1, 0.001)], lr=1.0)
    initial = [(group["lr"], 0.0) for group in optim.param_groups]
    stages = plan([Phase(1), Phase(1, lr=0.02)], 2, 4, SLTT)
    for stage, rates in zip(stages, ([0.1, 0.001], [0.02, 0.0002]), strict=True):
        set_rates(optim, initial, stage, sltt.schedules.Constant(), stage.start)
        assert [group["lr"] for group in optim.param_groups] == pytest.approx(rates)


@pytest.mark.parametrize(
    ("decay", "groups"),
    [
        (None, [(5, 0.1, 0.1), (1, 0.8, 0.1)]),
        (0.02, [(4, 0.1, 0.1), (1, 0.1, 0.02), (1, 0.8, 0.02)]),
    ],
)
def test_biases_of_normalisation_have_a_learning_rate_of_their_own_in_all_phases(decay, groups, tmp_path):
    log, optimizers = [], []

    def optimizer(groups):
        optimizers.append(torch.optim.SGD(groups, lr=0.1, weight_decay=0.1))
        return optimizers[-1]

    class Groups(sltt.SLTT):
        def run(self, *args):
            log.append([(len(g["params"]), g["lr"], g["weight_decay"]) for g in optimizers[-1].param_groups])
            return super().run(*args)

    settings = {"norm_weight_decay": decay, "norm_bias_lr": 8.0, "schedule": sltt.schedules.Constant()}
    settings |= {"rule": Groups(), "phases": [Phase(1), Phase(1, lr=0.2)], "epochs": 2, "batch_size": 60}
    model, _ = train(tmp_path / "run", optimizer=optimizer, **settings)
    assert log == [groups, [(count, pytest.approx(2 * lr), weight_decay) for count, lr, weight_decay in groups]]
    (bias,) = optimizers[-1].param_groups[-1]["params"]
    assert bias is next(m for m in model.modules() if isinstance(m, torch.nn.BatchNorm1d)).bias


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (lambda: torch.nn.Linear(4, 3), {"norm_weight_decay": 0.0}, "norm_weight_decay is given, but no normalisation"),
        (lambda: torch.nn.RMSNorm(4), {"norm_bias_lr": 2.0}, "norm_bias_lr is given, but no .* has a bias"),
    ],
)
def test_rates_of_normalisation_that_do_not_fit_are_refused(tmp_path, model, settings, message):
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "run", model=model(), **settings)


class Statistics(Recorder):
    """Notes BatchNorm's running mean and weights after every batch's backward."""

    def run(self, batch):
        output = sltt.SLTT.run(self, batch)
        norm = batch.model.module[1]
        self.log.append((norm.training, norm.running_mean.clone(), norm.weight.detach().clone()))
        return output


def test_a_phase_that_freezes_batchnorm_keeps_its_statistics_and_trains_its_weights(tmp_path):
    log = []
    rule = Statistics(log, [])
    phases = [Phase(2), Phase(2, freeze_norm=True), Phase(1)]
    train(tmp_path / "run", rule=rule, phases=phases, epochs=5, batch_size=60)
    modes, means, weights = zip(*log, strict=True)
    assert modes == (True, True, False, False, True)
    assert [torch.equal(a, b) for a, b in pairwise(means)] == [False, True, True, False]
    assert not any(torch.equal(a, b) for a, b in pairwise(weights))


class Pictures(Data):
    """Images [C, H, W], or frames [T, C, H, W], whose pixels are numbered from one that says which sample it is."""

    def __init__(self, static=True):
        super().__init__(validation=0.0)
        self.static = static

    def load(self, steps):
        x = torch.arange(30 * 12.0 * 10).reshape(30, 1, 12, 10)
        x = x if self.static else x.unsqueeze(1).expand(-1, steps, -1, -1, -1)
        samples = TensorDataset(x, torch.arange(30) % 3)
        return Splits(samples, None, samples, static=self.static, classes=3, fingerprint="pictures")


class Inputs(sltt.SLTT):
    """Notes the first time step of every batch, and checks that all are the same."""

    def __init__(self, log):
        super().__init__()
        self.log = log

    def run(self, batch):
        sequence = batch.sequence
        x = sequence.x if sequence.static else sequence.x[0]
        assert sequence.static or (sequence.x == x).all()
        self.log.append(x.clone())
        return super().run(batch)


@pytest.mark.parametrize("static", [True, False])
def test_a_phase_crops_its_samples_at_random_places_and_the_next_sees_them_whole(tmp_path, static, capsys):
    log = []
    model = nn.Sequential(nn.Conv2d(1, 4, 3), sltt.IF(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    phases = [Phase(2, crop=7), Phase(1)]
    kwargs = {"data": Pictures(static), "rule": Inputs(log), "phases": phases, "epochs": 3, "batch_size": 15}
    train(tmp_path / "run", model=model, report=Console(), **kwargs)
    first, second = (line for line in capsys.readouterr().out.splitlines() if line.startswith("epochs "))
    assert first.endswith(", crops of 7 pixels")
    assert "crop" not in second
    assert [list(x.shape[1:]) for x in log] == [[1, 7, 7]] * 4 + [[1, 12, 10]] * 2
    square = 10 * torch.arange(7.0)[:, None] + torch.arange(7.0)
    corners = torch.cat([x[:, 0, 0, 0] for x in log[:4]])
    assert torch.equal(torch.cat(log[:4])[:, 0], corners[:, None, None] + square)
    assert sorted((corners // 120).tolist()) == sorted([*range(30)] * 2)  # every sample once in an epoch
    places = corners.remainder(120)
    assert set((places // 10).tolist()) == set(range(6))
    assert set(places.remainder(10).tolist()) == set(range(4))


def test_crops_do_not_depend_on_the_number_of_processes():
    splits = Pictures().load(1)
    loaders = [train_loader(splits, 10, EpochSampler(30, 0), 0, rank=r, processes=n, crop=5) for n, r in
               [(1, 0), (2, 0), (2, 1)]]  # fmt: skip
    whole, *halves = ([x for x, _ in loader] for loader in loaders)
    for x, even, odd in zip(whole, *halves, strict=True):
        assert torch.equal(x[::2], even)
        assert torch.equal(x[1::2], odd)


@pytest.mark.parametrize(("data", "size"), [(Pictures(), 11), (Blobs(), 2)], ids=["too large", "no images"])
def test_a_crop_that_does_not_fit_the_samples_is_refused(tmp_path, data, size):
    with pytest.raises(ValueError, match=f"a phase crops {size} pixels out of samples"):
        train(tmp_path / "run", data=data, phases=[Phase(1, crop=size)], epochs=1)


@pytest.mark.parametrize(
    ("phase", "message"),
    [
        (Phase(1, crop=2), "a phase crops 2 pixels out of samples"),
        (Phase(1, rule=sltt.SLTT(k=5)), r"SLTT\(k=5\) trains 5 steps, but the sequence has T = 4; use k ≤ T"),
        (Phase(1, rule=sltt.OTTT()), r"2 \(LIF\) resets to v_reset = 0.0"),
    ],
    ids=["crop", "k", "OTTT"],
)
def test_a_later_phase_that_cannot_be_trained_is_refused_before_the_first(tmp_path, phase, message):
    model = network()
    model[2] = sltt.LIF(v_reset=0.0)
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "run", model, phases=[Phase(3), phase], steps=4)
    assert not (tmp_path / "run").exists()


def test_evaluation_with_another_t_than_the_last_phase_is_refused(tmp_path):
    with pytest.raises(ValueError, match="steps=4 is the T of evaluation, but the last phase trains T = 2"):
        train(tmp_path / "run", phases=[Phase(4, steps=2)])


def test_training_starts_from_the_weights_of_another_run(tmp_path):
    train(tmp_path / "one", steps=1)
    model, _ = train(tmp_path / "six", model=network(), steps=6, epochs=1, weights=str(tmp_path / "one"),
                     optimizer=lambda p: torch.optim.SGD(p, lr=0.0))  # fmt: skip
    trained = weights(tmp_path / "one" / "best.ckpt")
    assert torch.equal(model[0].weight, trained["0.weight"])


def test_nothing_is_known_to_be_missing_by_default():
    assert Data.missing(Blobs()) == {}


@pytest.mark.parametrize(
    ("warmup", "phases", "said"),
    [
        (4, [Phase(4)], None),
        (6, [Phase(4)], "warm-up of 6 epochs does not end within 4 epochs: the learning rate rises to 67% .* warmup=1"),
        (
            2.5,
            [Phase(2), Phase(2, lr=0.1)],
            "warm-up of 2.5 epochs does not end within 2 epochs: .* rises to 80% .* warmup=0.5",
        ),
    ],
)
def test_a_warm_up_longer_than_the_training_is_told(tmp_path, capsys, warmup, phases, said):
    train(tmp_path / "run", phases=phases, schedule=sltt.schedules.Cosine(warmup), report=Console())
    shown = " ".join(capsys.readouterr().out.split())
    assert bool(re.search(said or "warning", shown)) == bool(said)
