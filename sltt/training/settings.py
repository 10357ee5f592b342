"""Arguments of `sltt.fit`, which has their defaults and explains them, in two parts: execution and training."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from sltt.callbacks import Callback
from sltt.checks import choice, flag, folder, instance, number, sequence, to_python, whole_number
from sltt.kernels import Compile, Sparse
from sltt.losses import check_loss
from sltt.metrics import Metric, check_metric
from sltt.parallel.devices import Device, Graph, Precision, Strategy
from sltt.rules import Rule
from sltt.schedules import Schedule
from sltt.training.logs import Logger
from sltt.training.phases import Phase, Stage, plan
from sltt.training.quantised import Quantised

OptimizerFactory = Callable[[ParamsT], Optimizer]

PROCESSES = ("devices", "num_nodes", "strategy")  # settings of the processes, not of what each of them does
OF_TRAINING = ("callbacks", "loggers")  # whose classes a trained network does without
# what a resumed run may change: where it trains, and when it ends; of data, where it lies (`list_changes`)
RESUMABLE = (
    *("data", "workers", "device", *PROCESSES, "compile", "sparse", "graph"),
    *("epochs", "checkpoint_minutes", "loggers"),
)


class _Settings:
    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Return the settings of this kind among the arguments of `fit`, or what a recipe builds."""
        return cls(**{name: values[name] for name in inspect.signature(cls).parameters})

    def __post_init__(self) -> None:
        vars(self).update(to_python(vars(self)))  # numbers of NumPy, say, which no file of settings takes


@dataclass(frozen=True, kw_only=True)
class Execution(_Settings):
    """Settings of execution: devices and processes, precision, and how data is loaded.

    Raises ValueError for a value that makes no sense. Whether a device is there, `make_fabric` finds out.
    """

    precision: Precision
    channels_last: bool | None
    workers: int
    device: Device
    devices: int | None
    num_nodes: int | None
    strategy: Strategy
    sync_batchnorm: bool
    compile: Compile
    sparse: Sparse
    graph: Graph

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, kind in get_type_hints(type(self)).items():
            if get_origin(kind) is Literal:
                choice(name, getattr(self, name), get_args(kind))
        whole_number("workers", self.workers, least=0, most=1000)
        for name in ("devices", "num_nodes"):
            if getattr(self, name) is not None:
                whole_number(name, getattr(self, name), least=1)
        if self.channels_last is not None:
            flag("channels_last", self.channels_last)
        flag("sync_batchnorm", self.sync_batchnorm)
        if self.strategy == "fsdp" and self.precision == "16-mixed":
            raise ValueError("fsdp does not scale gradients for precision='16-mixed': use 'bf16-mixed'")


@dataclass(frozen=True, kw_only=True)
class Training(_Settings):
    """Settings of training: the rule, loss and optimizer, for how long, in which batches and from which weights.

    Raises ValueError for a value that makes no sense.
    """

    rule: Rule
    loss: nn.Module
    metric: Metric
    optimizer: OptimizerFactory
    schedule: Schedule
    steps: int
    epochs: int
    phases: Sequence[Phase] | None
    batch_size: int
    clip_norm: float | None
    norm_weight_decay: float | None
    norm_bias_lr: float
    seed: int
    checkpoint_minutes: float
    weights: str | None
    accumulate: int
    ema: float | None
    quantised: Quantised | None
    callbacks: Sequence[Callback] | None
    loggers: Sequence[Logger] | None

    def __post_init__(self) -> None:
        super().__post_init__()
        instance("rule", self.rule, Rule)
        check_loss(self.loss)
        check_metric(self.metric)
        check_optimizer(self.optimizer)
        own = "take Cosine, Linear, Step or Constant of sltt.schedules, or derive from Schedule and define decay"
        instance("schedule", self.schedule, Schedule, own)
        for name in ("steps", "epochs", "batch_size", "accumulate"):
            whole_number(name, getattr(self, name), least=1)
        whole_number("seed", self.seed, least=0, most=2**32 - 1)
        number("checkpoint_minutes", self.checkpoint_minutes, least=0)
        bounds: dict[str, Any] = {
            "clip_norm": {"above": 0},
            "norm_weight_decay": {"least": 0},
            "ema": {"above": 0, "below": 1},
        }
        for name, bound in bounds.items():
            if getattr(self, name) is not None:
                number(name, getattr(self, name), **bound)
        number("norm_bias_lr", self.norm_bias_lr, above=0)
        if self.weights is not None:
            folder("weights", self.weights, "a run or a checkpoint")
        if self.quantised is not None:
            self._check_quantised()
        such_as = "such as lightning_fabric.loggers.CSVLogger('logs')"
        for name, kind, remedy in (("callbacks", Callback, ""), ("loggers", Logger, such_as), ("phases", Phase, "")):
            given = getattr(self, name)
            for i, one in enumerate(() if given is None else sequence(name, given, name)):
                instance(f"{name}[{i}]", one, kind, remedy)
        for one in self.callbacks or ():
            if (type(one).on_batch, type(one).on_epoch) == (Callback.on_batch, Callback.on_epoch):
                raise ValueError(f"{type(one).__name__} defines neither on_batch nor on_epoch, which a training calls")
        last = self.stages[-1].steps
        if last != self.steps and sum(phase.epochs for phase in self.phases or ()) <= self.epochs:
            raise ValueError(
                f"steps={self.steps} is the T of evaluation, but the last phase trains T = {last}: set steps={last}"
            )

    def _check_quantised(self) -> None:
        choice("quantised", self.quantised, get_args(Quantised))
        if self.ema is not None:
            raise ValueError("quantised trains the weights that are rounded, and ema averages others: leave one out")
        if online := next((stage.rule for stage in self.stages if stage.rule.online), None):
            raise ValueError(f"quantised rounds the weights once a batch, and {online} updates them in it: use SLTT()")

    @property
    def stages(self) -> list[Stage]:
        """Return the phases with their places in the training."""
        return plan(self.phases, self.epochs, self.steps, self.rule)


def check_optimizer(given: Any) -> None:
    """Raise ValueError, with the line to write, for an optimizer in place of a function that makes one."""
    if isinstance(given, Optimizer):
        name = type(given).__name__
        raise ValueError(
            f"optimizer must be a function of the parameters, got an instance of {name}, which a resumed run could not "
            f"make again: optimizer=functools.partial({name}, lr=…)"
        )
    other = isinstance(given, nn.Module) or (isinstance(given, type) and not issubclass(given, Optimizer))
    if other or not callable(given):
        raise ValueError(
            "optimizer must be a function of the parameters, such as functools.partial(torch.optim.SGD, lr=0.1), "
            f"got {given!r:.80}"
        )
    parameter = nn.Parameter(torch.zeros(2, 2))
    try:
        make: Any = given
        made: Any = make([parameter])
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"optimizer: {kind}{error}") from error
    groups = made.param_groups if isinstance(made, Optimizer) else []
    if [p is parameter for group in groups for p in group["params"]] != [True]:
        raise ValueError(f"optimizer must make an Optimizer of the parameters that it is called with, got {made!r:.80}")
    if isinstance(made, torch.optim.LBFGS):
        raise ValueError("LBFGS computes the loss several times a step, and a rule once a batch: use SGD or AdamW")
