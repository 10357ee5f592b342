"""Phases of a training: T, the rule and the learning rate may change on the way, and the weights go on."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import nn

from sltt._torch import _NormBase
from sltt.checks import flag, instance, number, whole_number
from sltt.rules import Rule
from sltt.schedules import Schedule


@dataclass(frozen=True)
class Phase:
    """A part of a training; what is None is as in the whole training, except `lr`.

    Attributes:
        epochs: its length. If the phases are shorter than the training, the last one is extended. If they are longer,
            the training ends after its own `epochs`.
        steps: T.
        rule: the learning rule.
        lr: learning rate, of the optimizer's first group; those of its other groups keep their ratios to it. A phase
            that has one starts the schedule anew, with a warm-up in the first phase only, and with `ema` from the
            averaged weights. None keeps the rate of the phase before, or the optimizer's, and the schedule runs on.
        weight_decay: of the optimizer.
        freeze_norm: BatchNorm normalises with its running statistics in this phase, and leaves them as they are; its
            weights go on learning. Use it where a phase sees other statistics than the one before: firing rates, and
            then single time steps. New statistics would make the network another.
        crop: side, in pixels, of a square taken at a random place out of each training sample, after its other
            augmentation; None is the whole sample. For networks that take images of any size: epochs on parts of the
            images cost by their area.
        batches: how many batches each of its epochs has, of samples in a random order; None, or more than there are, is
            all of them. For a phase that needs less than an epoch.

    Raises ValueError naming a value that makes no sense.
    """

    epochs: int
    steps: int | None = None
    rule: Rule | None = None
    lr: float | None = None
    weight_decay: float | None = None
    freeze_norm: bool = False
    crop: int | None = None
    batches: int | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "steps", "crop", "batches"):
            if name == "epochs" or getattr(self, name) is not None:
                whole_number(f"{name} of a phase", getattr(self, name), least=1)
        for name in ("lr", "weight_decay"):
            if getattr(self, name) is not None:
                number(f"{name} of a phase", getattr(self, name), least=0)
        if self.rule is not None:
            instance("rule of a phase", self.rule, Rule)
        flag("freeze_norm of a phase", self.freeze_norm)


@dataclass(frozen=True, kw_only=True)
class Stage(Phase):
    """A phase with its place in the training: epochs `start` to `stop`, and the span of epochs of the schedule."""

    steps: int  # pyright: ignore[reportGeneralTypeIssues]
    rule: Rule  # pyright: ignore[reportGeneralTypeIssues]
    start: int
    stop: int
    span: tuple[int, int]

    def count_batches(self, whole: int) -> int:
        """Batches in each of its epochs, of data that have `whole`."""
        return min(self.batches or whole, whole)


def plan(phases: Sequence[Phase] | None, epochs: int, steps: int, rule: Rule) -> list[Stage]:
    """Return the stages of a training of `epochs` epochs."""
    phases = list(phases) if phases else [Phase(epochs)]
    bounds = [min(bound, epochs) for bound in accumulate((phase.epochs for phase in phases), initial=0)]
    bounds[-1] = epochs
    new = [i for i, phase in enumerate(phases) if i == 0 or phase.lr is not None]  # here the schedule begins
    stages = []
    for i, phase in enumerate(phases):
        first = max(j for j in new if j <= i)
        last = min((j for j in new if j > i), default=len(phases))
        filled = {"steps": phase.steps or steps, "rule": phase.rule or rule, "lr": phases[first].lr}
        bound = {"start": bounds[i], "stop": bounds[i + 1], "span": (bounds[first], bounds[last])}
        stages.append(Stage(**vars(phase) | filled | bound))
    return [stage for stage in stages if stage.start < stage.stop]


def stage_at(stages: Sequence[Stage], epoch: int) -> Stage:
    """Return the stage of an epoch, counted from 0; after the end, the last."""
    return next((stage for stage in stages if epoch < stage.stop), stages[-1])


def set_rates(
    optim: torch.optim.Optimizer, initial: list[tuple[float, float]], stage: Stage, schedule: Schedule, epoch: float
) -> None:
    """Set learning rate and weight decay at `epoch`, a fraction in the middle of one; `initial` are the optimizer's.

    A weight decay that a callback has changed stays, and the factor by which it has changed a learning rate.
    """
    start, stop = stage.span
    factor_at = schedule.decay if start else schedule.factor  # only the first phase warms up
    factor = number("the factor of the schedule", factor_at(epoch - start, stop - start), least=0)
    first, _ = initial[0]
    for group, (lr, weight_decay) in zip(optim.param_groups, initial, strict=True):
        rate = lr if stage.lr is None else stage.lr * (lr / first if first else 1.0)
        written = group.get("lr_written", group["lr"])
        if group["lr"] != written and (written or factor * rate):  # where it was 0, no ratio is known
            before = written / group.get("lr_factor", 1.0) if written else factor * rate
            group["lr_factor"] = group["lr"] / before
        group["lr"] = group["lr_written"] = factor * rate * group.get("lr_factor", 1.0)
        decay = group.get("weight_decay")
        if decay is not None and "norm" not in group and decay == group.get("decay_written", decay):
            of_stage = weight_decay if stage.weight_decay is None else stage.weight_decay
            group["weight_decay"] = group["decay_written"] = of_stage


def freeze_norm(model: nn.Module) -> None:
    """Let BatchNorm, and InstanceNorm with running statistics, run as in evaluation until the next `model.train()`."""
    for module in model.modules():
        if isinstance(module, _NormBase) and module.track_running_stats:
            module.eval()
