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
from sltt.training.sample import read_sample
from tests.training.blobs import Blobs, keep, network, noting, train, weights

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


def recorded(run, note, **settings):
    """A training by SGD: what `note` says of each batch and the optimizer before it runs; the model; the result."""
    log, optimizers = [], []
    sgd = keep(optimizers, lr=0.2, momentum=0.9, weight_decay=0.1)
    rule = noting(lambda batch: log.append(note(batch, optimizers[-1])))
    model, result = train(run, rule=rule, **{"optimizer": sgd, "batch_size": 60, **settings})
    return log, model, result


@pytest.mark.parametrize("static", [True, False], ids=["static", "sequence"])
def test_phases_switch_t_and_rates_and_carry_the_optimizer_on(tmp_path, static):
    def note(batch, optimizer):
        group = optimizer.param_groups[0]
        return batch.steps, round(group["lr"], 6), group["weight_decay"], bool(optimizer.state)

    phases = [Phase(2, steps=1), Phase(1), Phase(2, steps=4, lr=0.1, weight_decay=0.0)]
    settings = {"schedule": sltt.schedules.MultiStep([1], 0.5), "steps": 4, "epochs": 5, "phases": phases}
    log, _, result = recorded(tmp_path / "run", note, data=Blobs(static=static), **settings)
    later = [(4, 0.1, 0.1, True), (4, 0.1, 0.0, True), (4, 0.05, 0.0, True)]
    assert log == [(1, 0.2, 0.1, False), (1, 0.1, 0.1, True), *later]
    assert [row["learning_rate"] for row in result.history] == pytest.approx([rate for _, rate, *_ in log])
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
    assert sltt.load(result.run, network()).trained.steps == result.steps == 2
    assert len(read_sample(result.run).logits) == 2
    cards = [result.run / "card.md", train(tmp_path / "short", steps=2, epochs=1)[1].run / "card.md"]
    assert len({card.read_text().partition("T = 2")[2].partition("| | ")[2] for card in cards}) == 1


def test_groups_of_an_optimizer_keep_the_ratios_of_their_rates_in_a_phase():
    optim = torch.optim.SGD([{"params": [torch.ones(1)], "lr": lr} for lr in (0.1, 0.001)], lr=1.0)
    initial = [(group["lr"], 0.0) for group in optim.param_groups]
    stages = plan([Phase(1), Phase(1, lr=0.02)], 2, 4, SLTT)
    for stage, rates in zip(stages, ([0.1, 0.001], [0.02, 0.0002]), strict=True):
        set_rates(optim, initial, stage, sltt.schedules.Constant(), stage.start)
        assert [group["lr"] for group in optim.param_groups] == pytest.approx(rates)


@pytest.mark.parametrize(
    ("settings", "groups"),
    [
        ({"norm_weight_decay": 0.02}, [(4, 0.2, 0.1), (2, 0.2, 0.02)]),
        ({"norm_bias_lr": 8.0}, [(5, 0.2, 0.1), (1, 1.6, 0.1)]),
        ({"norm_weight_decay": 0.02, "norm_bias_lr": 8.0}, [(4, 0.2, 0.1), (1, 0.2, 0.02), (1, 1.6, 0.02)]),
    ],
    ids=["decay", "bias", "both"],
)
def test_normalisation_has_rates_and_weight_decay_of_its_own_in_all_phases(settings, groups, tmp_path):
    optimizers = []

    def note(batch, optimizer):
        optimizers.append(optimizer)
        return [(len(group["params"]), group["lr"], group["weight_decay"]) for group in optimizer.param_groups]

    phases = [Phase(1), Phase(1, lr=0.4, weight_decay=0.3)]
    settings |= {"schedule": sltt.schedules.Constant(), "phases": phases}
    log, model, _ = recorded(tmp_path / "run", note, epochs=2, **settings)
    later = [(count, pytest.approx(2 * lr), 0.3 if decay == 0.1 else decay) for count, lr, decay in groups]
    assert log == [groups, later]
    assert all(p.shape == (16,) for group in optimizers[-1].param_groups[1:] for p in group["params"])
    if "norm_bias_lr" in settings:
        assert optimizers[-1].param_groups[-1]["params"][0] is model[1].bias
    assert len(recorded(tmp_path / "run", note, epochs=3, resume=True, **settings)[2].history) == 3


def test_a_phase_that_freezes_batchnorm_keeps_its_statistics_and_trains_its_weights(tmp_path):
    def note(batch):
        norm = batch.model.module[1]
        log.append((norm.training, norm.running_mean.clone(), norm.weight.detach().clone()))

    log = []
    phases = [Phase(2), Phase(2, freeze_norm=True), Phase(2)]
    train(tmp_path / "run", rule=noting(note), phases=phases, epochs=6, batch_size=60)
    modes, means, weights = zip(*log, strict=True)
    assert modes == (True, True, False, False, True, True)
    assert [torch.equal(a, b) for a, b in pairwise(means)] == [False, False, True, True, False]
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


@pytest.mark.parametrize("static", [True, False])
def test_a_phase_crops_its_samples_at_random_places_and_the_next_sees_them_whole(tmp_path, static, capsys):
    def note(batch):
        x = batch.sequence.x if static else batch.sequence.x[0]
        assert static or (batch.sequence.x == x).all()
        log.append(x.clone())

    log = []
    model = nn.Sequential(nn.Conv2d(1, 4, 3), sltt.IF(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    phases = [Phase(2, crop=7), Phase(1)]
    kwargs = {"data": Pictures(static), "rule": noting(note), "phases": phases, "epochs": 3, "batch_size": 15}
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


def test_epochs_of_a_few_batches_have_random_samples_and_the_whole_schedule(tmp_path, capsys):
    def note(batch, optimizer):
        return [tuple(row) for row in batch.sequence.x.tolist()], optimizer.param_groups[0]["lr"]

    settings = {"batch_size": 10, "schedule": sltt.schedules.Linear(), "report": Console()}
    phases = [Phase(1), Phase(2, batches=2, lr=0.4)]
    log, *_ = recorded(tmp_path / "run", note, phases=phases, epochs=3, **settings)
    assert capsys.readouterr().out.count(", 2 batches an epoch") == 1
    assert len(log) == 6 + 2 * 2  # 60 samples
    first, second = ([row for rows, _ in part for row in rows] for part in (log[6:8], log[8:]))
    assert len({*first}) == len({*second}) == 20
    assert {*first} != {*second}
    assert [rate for _, rate in log[6:]] == pytest.approx([0.4, 0.3, 0.2, 0.1])
    log, *_ = recorded(tmp_path / "all", note, phases=[Phase(1, batches=7)], epochs=1, **settings)
    assert len({row for rows, _ in log for row in rows}) == 60  # more than there are


def test_training_starts_from_the_weights_of_another_run(tmp_path):
    train(tmp_path / "one", steps=1)
    model, _ = train(tmp_path / "six", model=network(), steps=6, epochs=1, weights=str(tmp_path / "one"),
                     optimizer=lambda p: torch.optim.SGD(p, lr=0.0))  # fmt: skip
    trained = weights(tmp_path / "one" / "best.ckpt")
    assert torch.equal(model[0].weight, trained["0.weight"])
