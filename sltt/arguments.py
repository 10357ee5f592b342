"""Checks of the arguments of a training and an evaluation, before either does anything."""

from collections.abc import Sequence
from typing import Any, get_args

from torch import nn

from sltt.checks import choice, flag, function, instance, number, sequence, whole_number
from sltt.data import Data
from sltt.kernels import Compile
from sltt.phases import Phase
from sltt.rules import Rule
from sltt.schedules import Schedule


def check_evaluation(
    model: nn.Module,
    data: Data,
    loss: Any,
    steps: int,
    batch_size: int,
    workers: int,
    channels_last: bool,
    compile: str,
) -> None:
    """Raise ValueError for an argument of a wrong type or range."""
    instance("model", model, nn.Module)
    instance("data", data, Data)
    function("loss", loss, "the logits and the target")
    whole_number("steps", steps, least=1)
    whole_number("batch_size", batch_size, least=1)
    whole_number("workers", workers, least=0)
    flag("channels_last", channels_last)
    choice("compile", compile, get_args(Compile))


def check_training(
    rule: Rule,
    optimizer: Any,
    schedule: Schedule,
    epochs: int,
    phases: Sequence[Phase] | None,
    clip_norm: float | None,
    norm_weight_decay: float | None,
    seed: int,
    sync_batchnorm: bool,
    checkpoint_minutes: float,
    resume: bool,
) -> None:
    """Raise ValueError for an argument of a wrong type or range, besides those of an evaluation."""
    instance("rule", rule, Rule)
    instance("schedule", schedule, Schedule)
    if not callable(optimizer):
        example = "functools.partial(torch.optim.SGD, lr=0.1)"
        raise ValueError(f"optimizer must be a function of the parameters, such as {example}, got {optimizer!r}")
    whole_number("epochs", epochs, least=1)
    for phase in sequence("phases", phases or (), "phases"):
        instance("a phase", phase, Phase)
    if clip_norm is not None:
        number("clip_norm", clip_norm, above=0)
    if norm_weight_decay is not None:
        number("norm_weight_decay", norm_weight_decay, least=0)
    whole_number("seed", seed, least=0, most=2**32 - 1)
    flag("sync_batchnorm", sync_batchnorm)
    number("checkpoint_minutes", checkpoint_minutes, least=0)
    flag("resume", resume)
