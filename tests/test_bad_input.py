"""Bad input to neurons, models, data, training and analysis: each case ends in the error that says what is wrong."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import sltt
from sltt import analysis, data, losses, models, schedules
from sltt.data import recordings
from tests.bad_values import CHOICE, FLAG, OBJECT, PATH, SIZES, Kind, assert_refused, constructions, number, whole

NEURON = {
    "v_threshold": number(0, -1.0), "v_reset": number(1.0, 2.0).but("none"), "v_init": number(1.0, 2.0).but("none"),
    "detach_reset": FLAG, "half_state": FLAG, "surrogate": OBJECT,
}  # fmt: skip
LEAKY = NEURON | {"tau": number(1, 0.5, 0, -2), "decay_input": FLAG}
SPLIT = {"validation": number(-0.1, 1.0)}
FRAMES = SPLIT | {
    "root": PATH, "size": whole(0, -1).but("none"), "resize": CHOICE, "slicing": CHOICE, "augment": OBJECT,
    "on_error": CHOICE, "cache": PATH.but("none"),
}  # fmt: skip
EVENTS = FRAMES | {"download": FLAG}
IMAGES = SPLIT | {
    "root": PATH, "augment": FLAG, "cutout": whole(-1), "randaugment": whole(-1),
    "erase": number(-0.1, 1.1), "mixup": number(-1), "reflect": FLAG,
}  # fmt: skip
NETWORK = {"in_channels": whole(0, -1), "classes": whole(0, -1), "neuron": OBJECT}
DROPOUT = {"dropout": Kind(number(-0.1, 1.0).values, "p must be ")}


def of_phase(kind):
    return Kind(kind.values, kind.message.replace("{name}", "{name} of a phase"))


CONSTRUCTORS = [
    (sltt.IF, {}, NEURON),
    (sltt.LIF, {}, LEAKY),
    (sltt.PLIF, {}, LEAKY),
    (sltt.LIF.from_beta, {"beta": 0.5}, {"beta": number(0, 1, -0.5, 1.5)}),
    (sltt.Dropout, {}, {"p": number(-0.1, 1.0, 2)}),
    (sltt.RunningMax, {}, {"pool": OBJECT}),
    (sltt.Delay, {}, {"taps": Kind(SIZES.values | {"negative": [0, -1]}, SIZES.message)}),
    (losses.CrossEntropyMSE, {}, {"alpha": number(-0.1, 1.1), "one_hot": FLAG, "label_smoothing": number(-0.1, 1)}),
    (schedules.Constant, {}, {"warmup": number(-1)}),
    (schedules.Cosine, {}, {"warmup": number(-1)}),
    (schedules.Linear, {}, {"warmup": number(-1), "last": number(-1)}),
    (schedules.MultiStep, {"milestones": [1]}, {"warmup": number(-1), "gamma": number(0, -1)}),
    (schedules.MultiStep, {}, {"milestones": Kind({"number": 7, "text": "34", "negative": [-1]}, "{name}")}),
    (sltt.Phase, {"epochs": 1}, {
        "epochs": of_phase(whole(0, -1)), "steps": of_phase(whole(0, -1).but("none")), "rule": of_phase(OBJECT),
        "lr": of_phase(number(-1).but("none")), "weight_decay": of_phase(number(-1).but("none")),
        "freeze_norm": of_phase(FLAG), "crop": of_phase(whole(0, -1).but("none")),
        "batches": of_phase(whole(0, -1).but("none")),
    }),
    (models.DigitsNet, {}, NETWORK | DROPOUT | {"width": whole(0, -1)}),
    (models.MLP, {"features": [2, 2, 2]}, DROPOUT | {
        "features": SIZES, "norm": FLAG, "neuron": OBJECT, "delays": SIZES.but("empty"),
    }),
    (models.ShallowResNet, {}, NETWORK | DROPOUT | {"widths": SIZES, "stem": whole(-1), "blocks": whole(-1)}),
    (models.ShallowVGG, {}, {"widths": SIZES, "classes": whole(0, -1), "neuron": OBJECT, "scale": number(0, -1)}),
    (models.VGG, {"blocks": [[2]]}, NETWORK | DROPOUT | {"delays": SIZES.but("empty")}),
    (models.VGG, {}, {"blocks": Kind(SIZES.values | {"flat": [2, 2]}, SIZES.message)}),
    (models.ResNet, {"blocks": [1, 1, 1, 1]}, NETWORK | DROPOUT | {"blocks": SIZES}),
    (models.NFResNet, {"blocks": [1, 1, 1, 1], "bottleneck": False}, NETWORK | {"blocks": SIZES, "bottleneck": FLAG}),
    (data.Digits, {}, SPLIT | {"augment": FLAG}),
    (data.DigitsEvents, {}, SPLIT | {"augment": FLAG, "size": whole(11, -1), "threshold": number(0, -1)}),
    (data.SequentialDigits, {}, SPLIT | {"augment": FLAG, "permute": FLAG}),
    (data.Recall, {}, SPLIT | {
        "classes": whole(1, -1), "delay": whole(-1), "noise": number(-1), "channels": whole(0), "samples": whole(0, 15),
        "seed": whole(), "cues": whole(0),
    }),
    (data.NMNIST, {}, EVENTS),
    (data.DVSGesture, {}, EVENTS),
    (data.CIFAR10DVS, {}, EVENTS),
    (data.EventFolder, {"root": "x", "sensor": (2, 2)}, FRAMES | {"sensor": Kind(SIZES.values, SIZES.message)}),
    (data.SHD, {}, SPLIT | {"root": PATH, "duration": number(0, -1), "download": FLAG}),
    (data.SpokenDigits, {}, SPLIT | {
        "root": PATH, "speaker": Kind({"number": 7}, "{name} must be a str"), "bands": whole(0, 65),
        "delta": number(0, -1).but("none"),
    }),
    (data.TimeSeries, {}, SPLIT | {"name": CHOICE, "delta": number(0, -1).but("none")}),
    (data.CIFAR10, {}, IMAGES | {"download": FLAG}),
    (data.CIFAR100, {}, IMAGES | {"download": FLAG}),
    (data.ImageFolder, {"root": "x"}, IMAGES | {
        "size": whole(0, -1), "crop_padding": whole(-1).but("none"),
    }),
    (data.Encoded, {"data": data.Digits(), "encoding": data.Poisson()}, {"data": OBJECT, "encoding": OBJECT}),
    (data.Poisson, {}, {"low": number(), "high": number(0, -1)}),
    (data.Latency, {}, {"low": number(), "high": number(0, -1)}),
    (data.Delta, {}, {"threshold": number(0, -1)}),
    (data.Mixup, {"data": []}, {"alpha": number(0, -1)}),
    (data.EventAugmentation, {}, {
        "flip": FLAG, "roll": whole(-1), "rotate": number(-1), "shear": number(-1), "cutout": whole(-1),
    }),
]  # fmt: skip


def network():
    return nn.Sequential(nn.Linear(6, 8), sltt.LIF(), nn.Linear(8, 3))


X, Y, LOSS = torch.randn(4, 5, 6), torch.randint(3, (5,)), losses.CrossEntropyMSE()
IMAGES_8 = torch.rand(2, 3, 8, 8)


def fit(**kwargs):
    return sltt.fit(**{"model": network(), "data": data.Digits(), "device": "cpu", "run": "never-made", **kwargs})


def evaluate(**kwargs):
    return sltt.evaluate(**{"model": network(), "data": data.Digits(), "device": "cpu", **kwargs})


TRAINING = {
    "model": OBJECT, "data": OBJECT, "rule": OBJECT, "schedule": OBJECT,
    "loss": Kind({"text": "mse", "class": losses.CrossEntropyMSE}, "loss must be a function of"),
    "optimizer": Kind({"text": "sgd", "number": 0.1}, "optimizer must be a function of the parameters"),
    "steps": whole(0, -1), "epochs": whole(0, -1), "batch_size": whole(0, -1).but("none"),
    "clip_norm": number(0, -1).but("none"), "norm_weight_decay": number(-1).but("none"),
    "norm_bias_lr": number(0, -1), "ema": number(0, 1.0, -0.5).but("none"),
    "precision": CHOICE, "channels_last": FLAG.but("none"), "seed": whole(-1), "workers": whole(-1), "device": CHOICE,
    "devices": whole(0, -1).but("none"),
    "compile": CHOICE, "checkpoint_minutes": number(-1), "resume": FLAG,
    "phases": Kind({"number": 7, "of a number": [3], "text": "ab"}, "phase"),
}  # fmt: skip
EVALUATION = (
    "model", "data", "loss", "steps", "batch_size", "precision", "channels_last", "workers", "device", "devices",
    "compile",
)  # fmt: skip

SGD = partial(torch.optim.SGD, lr=0.1)


class Misnamed(sltt.callbacks.Callback):
    def on_train_epoch_end(self, trainer):
        raise AssertionError


def timed(measure, optimizer):
    return measure(network(), [(X, Y)] * 12, LOSS, sltt.SLTT(), optimizer)


def per_step():
    splits = data.from_datasets([(torch.rand(4, 6), 1)] * 4, static=False, per_step=True).splits(4)
    return splits.collate([splits.train[0]])


OTHER_CALLS = [
    ("fit(config: text)", partial(fit, config="x"), ValueError, "config must be a dict, got 'x'"),
    ("fit(no parameter)", partial(fit, model=sltt.LIF()), ValueError, "the model has no parameter to train"),
    ("fit(workers: 10**9)", partial(fit, workers=10**9), ValueError, "workers must be at least 0 and at most 1000"),
    ("fit(long name)", partial(fit, run="r" * 300), OSError, "cannot make the run folder r.*too long. Choose another"),
    ("fit(callbacks: other names)", partial(fit, callbacks=[Misnamed()]), ValueError, "defines neither on_batch"),
    ("fit(config: object)", partial(fit, config={"a": object()}), ValueError, "config must hold numbers, texts, lists"),
    ("predict(lengths: number)", lambda: sltt.predict(network(), X, lengths=2), ValueError, "of 5 samples, got 2"),
    ("predict(lengths of no sequence)", lambda: sltt.predict(network(), X[0, 0], lengths=[1]), ValueError, "time firs"),
    ("LIF of nothing", lambda: sltt.LIF()(None), ValueError, "x must be a Tensor, got None"),
    ("lif_step(decay: 2)", partial(sltt.lif_step, X, X, decay=2.0), ValueError, "decay must be at least 0 and at most"),
    ("Accuracy of floats", lambda: sltt.metrics.Accuracy()(X[0], torch.ones(5)), ValueError, "takes class indices"),
    ("memory_parts(optimizer)", lambda: analysis.memory_parts(network(), X, Y, LOSS, sltt.SLTT(), SGD), ValueError,
     "optimizer must be an Optimizer"),
    ("Delta of NaN", lambda: data.Delta()(torch.full((4, 3), torch.nan), 4), ValueError, "expected a finite input"),
    ("from_datasets(per_step)", per_step, ValueError, "expected targets of each time step, .* is per_step=True right"),
    ("read(text)", partial(recordings.read, Path("x.txt"), (3, 3), "count", 4), recordings.RecordingError, "not a rec"),
    ("to_nir(dt)", lambda: sltt.interop.to_nir(network(), X[0], dt=0), ValueError, "dt must be greater than 0, got 0"),
    ("to_c(shape)", lambda: sltt.interop.to_c(network(), X[..., :1], "c"), RuntimeError, "shapes cannot be multiplied"),
    ("to_c(zeros)", lambda: sltt.interop.to_c(network(), 0 * X, "c", weights="int8"), ValueError, "is zero everywhere"),
    ("fit(resume without run)", partial(fit, resume=True, run=None), ValueError, "resume=True needs the folder"),
    ("evaluate(split)", partial(evaluate, split="valid"), ValueError, "split must be one of"),
    ("evaluate(mirror)", partial(evaluate, mirror="yes"), ValueError, "mirror must be True or False"),
    ("splits(steps: fraction)", partial(data.Digits().splits, 2.5), ValueError, "steps must be a whole number"),
    ("DigitsEvents(too many steps)", partial(data.DigitsEvents().splits, 97), ValueError, "steps must be in 1 … 96"),
    ("Recall(too few steps)", partial(data.Recall().splits, 3), ValueError, "use more steps or a shorter delay"),
    ("NMNIST(nothing there)", partial(data.NMNIST("nowhere").splits, 4), FileNotFoundError, r"Train/LABEL/\*\.bin"),
    ("CIFAR10(nothing there)", partial(data.CIFAR10("nowhere").splits, 4), FileNotFoundError, "cifar-10.*load true"),
    ("ImageFolder(nothing there)", partial(data.ImageFolder("x").splits, 1), FileNotFoundError, "train and test"),
    ("NMNIST(interpolate)", partial(data.NMNIST, resize="interpolate"), ValueError, "give a size"),
    ("ImageFolder(reflect)", partial(data.ImageFolder, "x", reflect=True), ValueError, "needs a crop_padding"),
    ("ResNet(blocks: 3)", partial(models.ResNet, (1, 1, 1)), ValueError, "blocks must be"),
    ("DigitsNet(neuron: instance)", partial(models.DigitsNet, neuron=sltt.LIF()), ValueError, "neuron must be a class"),
    ("DigitsNet of a sequence", lambda: models.DigitsNet(3)(IMAGES_8[None]), ValueError, "goes through a rule"),
    ("DigitsNet of few channels", lambda: models.DigitsNet(1)(IMAGES_8), ValueError, r"expected one time step \[B, 1"),
    ("DigitsNet of 2 pixels", lambda: models.DigitsNet(3)(IMAGES_8[..., :2]), ValueError, "at least 4, got"),
    ("loss of one dimension", lambda: LOSS(torch.randn(3), Y), ValueError, r"expected logits \[B, C\]"),
    ("agreement(rules: one)", lambda: analysis.agreement(network(), X, Y, LOSS, sltt.SLTT()), ValueError, "rules must"),
    ("memory_parts(rule)", lambda: analysis.memory_parts(network(), X, Y, LOSS, "SLTT"), ValueError, "rule must be"),
    ("peak_memory(call)", lambda: analysis.peak_memory(3), ValueError, "call must be a function"),
]  # fmt: skip


def trainings():
    """Calls of `fit` and `evaluate`: an argument with the values of its kind."""
    for title, function, names in (("fit", fit, TRAINING), ("evaluate", evaluate, EVALUATION)):
        for name in names:
            kind = TRAINING[name].but("none") if (title, name) == ("evaluate", "steps") else TRAINING[name]
            calls = [partial(function, **{name: value}) for value in kind.values.values()]
            yield pytest.param(calls, ValueError, kind.message.format(name=name), id=f"{title}({name})")


OTHERS = [pytest.param([call], error, message, id=label) for label, call, error, message in OTHER_CALLS]


@pytest.fixture(autouse=True, scope="module")
def folder(tmp_path_factory):
    """What is refused writes nothing."""
    folder = tmp_path_factory.mktemp("empty")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield
    assert not list(folder.iterdir())


@pytest.mark.parametrize(("calls", "error", "message"), [*constructions(CONSTRUCTORS), *trainings(), *OTHERS])
def test_bad_input_is_refused(calls, error, message):
    assert_refused(calls, error, message)


@pytest.mark.parametrize(
    ("make", "name", "value", "expected"),
    [
        (sltt.LIF, "tau", 2, 2.0),
        (partial(models.MLP, dropout=0), "features", (3, 2), [3, 2]),
        (partial(data.Recall, classes=3), "samples", 9, 9),
    ],
)
def test_what_is_at_the_edge_is_taken(make, name, value, expected):
    made = make(**{name: value})
    assert getattr(made, name) == expected
    assert type(getattr(made, name)) is type(expected)
