"""What a network runs on, and what is trained: the arguments of `sltt.fit`, which explains them, in two parts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self, get_args

import torch
from torch import nn
from torch.optim.optimizer import ParamsT

from sltt.callbacks import Callback
from sltt.checks import choice, flag, function, instance, number, sequence, whole_number
from sltt.kernels import Compile, Sparse
from sltt.metrics import Metric, check_metric
from sltt.parallel.devices import Device, Precision, Strategy
from sltt.rules import Rule
from sltt.schedules import Schedule
from sltt.training.instead import check_optimizer, check_schedule
from sltt.training.logs import Logger
from sltt.training.phases import Phase, Stage, plan

OptimizerFactory = Callable[[ParamsT], torch.optim.Optimizer]

PROCESSES = ("devices", "num_nodes", "strategy")  # settings of the processes, not of what each of them does
OF_TRAINING = ("callbacks", "loggers")  # whose classes a trained network does without
# of a setting that a resumed run may change: it says where the run trains, or when it ends
RESUMED = {"resumable": True}


class _Settings:
    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """The settings of this kind among the values: arguments of `fit`, or what a recipe builds."""
        names = [field.name for field in fields(cls)]  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        return cls(**{name: values[name] for name in names if name in values})


@dataclass(frozen=True, kw_only=True)
class Execution(_Settings):
    """What a network runs on: devices and processes, precision, and how data is loaded.

    Raises ValueError for a value that makes no sense. Whether a device is there, `make_fabric` finds out.
    """

    precision: Precision = 32
    channels_last: bool = False
    workers: int = field(default=0, metadata=RESUMED)
    device: Device = field(default="auto", metadata=RESUMED)
    devices: int | None = field(default=None, metadata=RESUMED)
    num_nodes: int | None = field(default=None, metadata=RESUMED)
    strategy: Strategy = field(default="ddp", metadata=RESUMED)
    sync_batchnorm: bool = False
    compile: Compile = field(default="auto", metadata=RESUMED)
    sparse: Sparse = field(default="auto", metadata=RESUMED)

    def __post_init__(self) -> None:
        choice("precision", self.precision, get_args(Precision))
        choice("device", self.device, get_args(Device))
        choice("strategy", self.strategy, get_args(Strategy))
        choice("compile", self.compile, get_args(Compile))
        choice("sparse", self.sparse, get_args(Sparse))
        whole_number("workers", self.workers, least=0)
        for name in ("devices", "num_nodes"):
            if getattr(self, name) is not None:
                whole_number(name, getattr(self, name), least=1)
        for name in ("channels_last", "sync_batchnorm"):
            flag(name, getattr(self, name))
        if self.strategy == "fsdp" and self.precision == "16-mixed":
            raise ValueError("fsdp does not scale gradients for precision='16-mixed': use 'bf16-mixed'")


@dataclass(frozen=True, kw_only=True)
class Training(_Settings):
    """What is trained: the rule, loss and optimizer, for how long, in which batches and from which weights.

    Raises ValueError for a value that makes no sense.
    """

    rule: Rule
    loss: nn.Module
    metric: Metric
    optimizer: OptimizerFactory
    schedule: Schedule
    steps: int = 4
    epochs: int = field(default=10, metadata=RESUMED)
    phases: Sequence[Phase] | None = None
    batch_size: int
    clip_norm: float | None = None
    norm_weight_decay: float | None = None
    norm_bias_lr: float = 1.0
    seed: int = 0
    checkpoint_minutes: float = field(default=10.0, metadata=RESUMED)
    weights: str | None = None
    accumulate: int = 1
    ema: float | None = None
    callbacks: Sequence[Callback] | None = None
    loggers: Sequence[Logger] | None = field(default=None, metadata=RESUMED)

    def __post_init__(self) -> None:
        instance("rule", self.rule, Rule)
        function("loss", self.loss, "the logits and the target")
        check_metric(self.metric)
        check_optimizer(self.optimizer)
        check_schedule(self.schedule)
        instance("schedule", self.schedule, Schedule)
        for name in ("steps", "epochs", "batch_size", "accumulate"):
            whole_number(name, getattr(self, name), least=1)
        whole_number("seed", self.seed, least=0, most=2**32 - 1)
        number("checkpoint_minutes", self.checkpoint_minutes, least=0)
        if self.clip_norm is not None:
            number("clip_norm", self.clip_norm, above=0)
        if self.norm_weight_decay is not None:
            number("norm_weight_decay", self.norm_weight_decay, least=0)
        number("norm_bias_lr", self.norm_bias_lr, above=0)
        if self.ema is not None:
            number("ema", self.ema, above=0, below=1)
        for i, callback in enumerate(sequence("callbacks", self.callbacks or (), "callbacks")):
            instance(f"callbacks[{i}]", callback, Callback)
        self._check_loggers()
        for i, phase in enumerate(sequence("phases", self.phases or (), "phases")):
            instance(f"phases[{i}]", phase, Phase)
        last = self.stages[-1].steps
        if last != self.steps and sum(phase.epochs for phase in self.phases or ()) <= self.epochs:
            raise ValueError(
                f"steps={self.steps} is the T of evaluation, but the last phase trains T = {last}: set steps={last}"
            )

    def _check_loggers(self) -> None:
        for i, logger in enumerate(sequence("loggers", self.loggers or (), "loggers")):
            instance(f"loggers[{i}]", logger, Logger, "such as lightning_fabric.loggers.CSVLogger('logs')")

    @property
    def stages(self) -> list[Stage]:
        """The phases with their places in the training."""
        return plan(self.phases, self.epochs, self.steps, self.rule)


# data too, which is no setting: it may have moved, and its split is compared by itself
RESUMABLE = (
    "data",
    *(one.name for kind in (Execution, Training) for one in fields(kind) if "resumable" in one.metadata),
)
