import copy
import signal
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import sltt
from sltt.callbacks import Callback, EarlyStopping
from sltt.training import loop
from sltt.training.batches import EpochSampler
from sltt.training.checkpoints import CheckpointError, load_checkpoint
from sltt.training.console import Console
from sltt.training.phases import Phase
from sltt.training.runs import new_run, read_config
from tests.collecting import MacroF1
from tests.training.blobs import ADAM, Blobs, equal, noting, rows, stop_at, train, weights

PHASES = {"phases": [Phase(1, steps=2), Phase(1, lr=0.01)]}
FEW = {"phases": [Phase(1, batches=3), Phase(1, batches=2, lr=0.01)], "ema": 0.9}
INTERRUPTED = [
    *((1, {}), (4, {}), (8, {})),
    *((4, {"ema": 0.8}), (6, {"ema": 0.8})),
    *((4, {"quantised": "int8"}), (6, {"quantised": "int8"})),
    *((4, {"metric": MacroF1()}), (6, {"metric": MacroF1()})),
    *((3, PHASES | {"ema": 0.8}), (4, PHASES | {"ema": 0.8}), (5, PHASES)),
    *((2, FEW), (3, FEW), (4, FEW)),
]


@pytest.mark.parametrize(("batch", "settings"), INTERRUPTED, ids=[f"{n}-{'-'.join(s)}" for n, s in INTERRUPTED])
def test_ctrl_c_saves_and_a_resumed_run_ends_as_one_that_never_stopped(batch, settings, tmp_path):
    rule, settings = sltt.SLTT(k=2), {"epochs": 2, **settings}
    whole, result = train(tmp_path / "whole", rule=rule, **settings)
    with pytest.raises(KeyboardInterrupt, match=r"stopped by Ctrl-C; continue with --resume"):
        train(tmp_path / "part", rule=stop_at(batch), **settings)
    progress = load_checkpoint(tmp_path / "part" / "last.ckpt")["progress"]
    assert 4 * progress["epoch"] + progress["batch"] == batch or "phases" in settings
    assert bool(progress["score"]) == bool(progress["batch"])
    torch.rand(7)  # random numbers in between do not matter
    resumed, again = train(tmp_path / "part", rule=rule, resume=True, **settings)
    assert equal(resumed.state_dict(), whole.state_dict())
    assert rows(again) == rows(result)
    for file in ("best.ckpt", "last.ckpt"):
        found, expected = (load_checkpoint(tmp_path / name / file) for name in ("part", "whole"))
        assert equal(found["model"], expected["model"])
        assert equal(found["averaged"] or {}, expected["averaged"] or {})


class Balanced(nn.Module):
    """Weighs classes by a running count of their labels."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.ones(3))

    def forward(self, logits, target):
        if torch.is_grad_enabled():
            self.count.mul_(0.9).add_(nn.functional.one_hot(target, 3).sum(0))
        return nn.functional.cross_entropy(logits, target, weight=1 / self.count)


def test_the_state_of_a_loss_continues(tmp_path):
    whole, _ = train(tmp_path / "whole", rule=sltt.SLTT(k=2), loss=Balanced(), epochs=2)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "part", rule=stop_at(6), loss=Balanced(), epochs=2)
    resumed, _ = train(tmp_path / "part", rule=sltt.SLTT(k=2), loss=Balanced(), epochs=2, resume=True)
    assert equal(resumed.state_dict(), whole.state_dict())


def test_a_run_is_not_resumed_for_fewer_epochs_than_it_has(tmp_path):
    train(tmp_path / "run", epochs=2)
    with pytest.raises(ValueError, match="has trained 2 epochs: set epochs to 2 or more"):
        train(tmp_path / "run", epochs=1, resume=True)


class Halving(sltt.schedules.Schedule):
    """A schedule that gives numbers of NumPy."""

    def decay(self, epoch, epochs):
        return np.exp2(-np.float64(epoch))


class Kept(Callback):
    """A state of NumPy's numbers."""

    def on_epoch(self, moment):
        pass

    def state_dict(self):
        return {"mean": np.float32(0.5), "all": [np.int64(1), (np.bool_(True),)]}

    def load_state_dict(self, state):
        pass


def test_numbers_of_numpy_are_kept_as_pythons(tmp_path):
    def of(run, whole, real):
        given = {"steps": whole(2), "seed": whole(1), "clip_norm": real(1), "callbacks": [Kept()]}
        sgd = partial(torch.optim.SGD, lr=real(0.1))
        return train(tmp_path / run, **given, schedule=Halving(), optimizer=sgd, resume=(tmp_path / run).exists())

    model, result = of("numpy", np.int64, np.float64)
    assert load_checkpoint(result.run / "last.ckpt")["callbacks"] == [["Kept()", {"mean": 0.5, "all": [1, (True,)]}]]
    again, _ = of("numpy", np.int64, np.float64)
    expected, _ = of("python", int, float)
    assert equal(model.state_dict(), expected.state_dict())
    assert equal(again.state_dict(), expected.state_dict())
    assert (config := read_config(tmp_path / "numpy"))["steps"] == 2
    assert config.keys() == read_config(tmp_path / "python").keys()


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    def twice(batch):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", rule=noting(twice))
    assert signal.getsignal(signal.SIGINT) is before
    assert not (tmp_path / "run" / "last.ckpt").exists()


def test_resuming_a_finished_run_trains_no_more(tmp_path):
    _, first = train(tmp_path / "run", epochs=1)
    saved = (tmp_path / "run" / "last.ckpt").stat().st_mtime_ns
    _, second = train(tmp_path / "run", epochs=1, resume=True)
    assert second.history == first.history
    assert (tmp_path / "run" / "last.ckpt").stat().st_mtime_ns == saved


def test_more_epochs_of_a_resumed_run_are_kept(tmp_path):
    train(tmp_path / "run", rule=sltt.SLTT(k=2), epochs=1)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", rule=stop_at(2), epochs=3, checkpoint_minutes=5, resume=True)
    config = load_checkpoint(tmp_path / "run" / "last.ckpt")["config"]
    assert (config["epochs"], config["checkpoint_minutes"]) == (3, 5)
    assert config == read_config(tmp_path / "run")
    assert (config["rule"]["class"], config["rule"]["k"]) == ("sltt.SLTT", 2)


def test_resuming_before_the_first_checkpoint_starts_again(tmp_path):
    new_run(tmp_path / "run", "run", {})
    train(tmp_path / "run", epochs=1, resume=True)
    train(tmp_path / "whole", epochs=1)
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


class Plain:
    """A change to a sample that keeps its argument under another name."""

    def __init__(self, size):
        self.s = size

    def __call__(self, x):
        return x


def weighted(last):
    return sltt.losses.Activity(nn.CrossEntropyLoss(torch.tensor([1.0, 1.0, last])))


def own(change):
    dataset = [(torch.rand(4), i % 3) for i in range(30)]
    return sltt.data.from_datasets(sltt.data.base.Mapped(dataset, change), static=True)


CHANGES = {  # settings before and after, and what tells them apart
    "clip_norm": (None, 1.0, "clip_norm was None and is 1.0"),
    "loss": (
        nn.CrossEntropyLoss(label_smoothing=0.1),
        nn.CrossEntropyLoss(),
        "loss.label_smoothing was 0.1 and is 0.0",
    ),
    "loss of the last": (weighted(2.0), weighted(3.0), "loss.loss.weight was 'torch.float32 .3. .* and is 'torch"),
    "another loss": (
        sltt.losses.CrossEntropyMSE(),
        nn.CrossEntropyLoss(),
        "loss.class was 'sltt.* and is 'torch.*'. R",
    ),
    "schedule": (sltt.schedules.Cosine(), sltt.schedules.Cosine(warmup=2), "schedule.warmup was 0.0 and is 2.0"),
    "rule": (sltt.SLTT(), sltt.SLTT(fold=1), "rule.fold was 'auto' and is 1"),
    "optimizer": (ADAM, partial(ADAM, eps=1e-6), "optimizer.eps is new"),
    "phases": ([Phase(1)], [Phase(1, lr=0.1)], "phases.* was .* and is"),
    "callbacks": ([EarlyStopping(3)], [EarlyStopping(4)], r"callbacks EarlyStopping\(patience=3.* with .*patience=4"),
    "data": (own(Plain(1)), own(Plain(2)), "data.datasets.train.change.s was 1 and is 2"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_run_made_in_python_resumes_with_its_own_arguments_only(name, tmp_path):
    before, after, told = CHANGES[name]
    name = name.split()[-1 if name.startswith("another") else 0]
    data = {"data": own(Plain(1))} if name != "callbacks" else {}
    train(tmp_path / "run", epochs=1, **data | {name: before})
    with pytest.raises(ValueError, match=told):
        train(tmp_path / "run", epochs=1, resume=True, **data | {name: after})
    train(tmp_path / "run", epochs=1, resume=True, **data | {name: copy.deepcopy(before)})


def test_what_a_resumed_run_cannot_tell_is_named(tmp_path, capsys):
    train(tmp_path / "run", epochs=1, data=own(lambda x: x), report=Console())
    assert "cannot tell whether these changed: data.datasets.train.change\n" in capsys.readouterr().out


@pytest.mark.parametrize("left", ["nothing", "a dangling link"])
def test_a_run_whose_last_checkpoint_is_gone_is_not_trained_again(left, tmp_path):
    train(tmp_path / "run", epochs=1)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    (tmp_path / "run" / "last.ckpt").unlink()
    if left != "nothing":
        (tmp_path / "run" / "last.ckpt").symlink_to("nowhere")
    gone = r"last\.ckpt is gone: restore it, or start anew with --weights"
    with pytest.raises(ValueError, match=gone if left == "nothing" else r"last\.ckpt is a link: .* or remove it"):
        train(tmp_path / "run", resume=True)
    assert all((tmp_path / "run" / name).read_bytes() == before[name] for name in ("best.ckpt", "metrics.csv"))


@pytest.mark.parametrize("name", ["typo", "files", None])
def test_what_is_no_run_is_not_resumed(name, tmp_path):
    (tmp_path / "files" / "mine").mkdir(parents=True)
    with pytest.raises(ValueError, match="resume=True"):
        train(name and tmp_path / name, resume=True)
    assert not (tmp_path / "typo").exists()


def test_other_data_than_the_runs_is_refused(tmp_path, monkeypatch):
    train(tmp_path / "run", epochs=1)
    other = Blobs()
    monkeypatch.setattr(other, "load", lambda steps: replace(Blobs().load(steps), fingerprint="other"))
    with pytest.raises(CheckpointError, match="was trained on the split blobs, but the data now gives other"):
        train(tmp_path / "run", data=other, resume=True)


def test_another_model_is_refused(tmp_path):
    """Also one with the same weights."""
    model = nn.Sequential(nn.Linear(4, 5), sltt.LIF(), nn.Dropout(0.1), nn.Linear(5, 3))
    train(tmp_path / "run", model, epochs=1)
    for at, other, why in ((0, nn.Linear(4, 5, bias=False), "do not fit"), (2, nn.Dropout(0.5), r"is Dropout\(p=0.5")):
        changed = copy.deepcopy(model)
        changed[at] = other
        with pytest.raises(ValueError, match=why):
            train(tmp_path / "run", changed, resume=True)


class Drawing(sltt.SLTT):
    """Draws its steps from a generator of its own."""

    def __init__(self):
        super().__init__(k=2)
        self.generator = torch.Generator().manual_seed(7)

    def trained_steps(self, batch):
        return torch.randperm(batch.steps, generator=self.generator)[:2].tolist()

    def state_dict(self):
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state):
        self.generator.set_state(state["generator"])


def test_a_rules_own_generator_continues(tmp_path):
    train(tmp_path / "whole", rule=Drawing(), epochs=2, schedule=sltt.schedules.Constant())
    train(tmp_path / "a", rule=Drawing(), epochs=1, schedule=sltt.schedules.Constant())
    train(tmp_path / "a", rule=Drawing(), epochs=2, schedule=sltt.schedules.Constant(), resume=True)
    assert equal(weights(tmp_path / "whole" / "last.ckpt"), weights(tmp_path / "a" / "last.ckpt"))


def test_a_run_killed_between_its_two_checkpoints_still_knows_the_best(tmp_path, monkeypatch):
    train(tmp_path / "whole", epochs=2)
    real, written = loop.save_checkpoint, []

    def dies(path, content):
        if len(written) == 1:
            raise SystemExit
        written.append(path.name)
        real(path, content)

    monkeypatch.setattr(loop, "save_checkpoint", dies)
    with pytest.raises(SystemExit):
        train(tmp_path / "part", epochs=2)
    monkeypatch.undo()
    assert written == ["best.ckpt"]
    train(tmp_path / "part", epochs=2, resume=True)
    for name in ("best.ckpt", "last.ckpt"):
        assert equal(weights(tmp_path / "part" / name), weights(tmp_path / "whole" / name))
    assert len((tmp_path / "part" / "metrics.csv").read_text().splitlines()) == 3


def test_the_state_of_another_optimizer_is_refused(tmp_path):
    first, other = (lambda p, kind=kind: kind(p, lr=0.1) for kind in (torch.optim.AdamW, torch.optim.SGD))
    train(tmp_path / "run", optimizer=first, epochs=1)
    with pytest.raises(CheckpointError, match=r"was another, without .*momentum.*--weights"):
        train(tmp_path / "run", optimizer=other, resume=True)


LENGTHS = [1 + i % 7 for i in range(103)]


@pytest.mark.parametrize("sampler", [EpochSampler(103, 3), EpochSampler(103, 3, LENGTHS, 10)], ids=["any", "by length"])
def test_an_epoch_that_continues_has_the_samples_of_the_whole_one_with_their_seeds(sampler):
    sampler.set_epoch(2)
    whole = list(sampler)
    sampler.set_epoch(2, start=40)
    assert list(sampler) == whole[40:]
    assert len(sampler) == 63
    sampler.set_epoch(3)
    other = list(sampler)
    assert sorted(index for index, *_ in other) == list(range(103))
    assert not {seed for _, seed in other} & {seed for _, seed in whole}
    assert [index for index, *_ in other] != [index for index, *_ in whole]


def test_batches_by_length_differ_from_epoch_to_epoch():
    sampler, batches = EpochSampler(103, 3, LENGTHS, 10), []
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        order = [index for index, *_ in sampler]
        batches.append([frozenset(order[i : i + 10]) for i in range(0, 100, 10)])
        longest = [max(LENGTHS[i] for i in batch) for batch in batches[-1]]
        assert all(longest[b] - min(LENGTHS[i] for i in batch) <= 1 for b, batch in enumerate(batches[-1]))
        assert longest != sorted(longest)  # long and short batches come in any order
    assert not {*batches[0]} & {*batches[1]}


def test_the_scale_of_gradients_continues(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "part", rule=stop_at(6), precision="16-mixed", epochs=2)
    _, result = train(tmp_path / "part", rule=sltt.SLTT(k=2), precision="16-mixed", epochs=2, resume=True)
    batches = 2 * 4
    assert load_checkpoint(result.run / "last.ckpt")["scaler"]["_growth_tracker"] == batches
