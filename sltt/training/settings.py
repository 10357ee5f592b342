"""The settings of a training: the arguments of `sltt.fit`, whose signature has their names, kinds and defaults."""

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

import sltt
from sltt.callbacks import Callback
from sltt.checks import choice, flag, folder, instance, number, sequence, to_python, whole_number
from sltt.data.loaders import batch_size_of
from sltt.frozen import Frozen
from sltt.losses import check_loss
from sltt.metrics import check_metric
from sltt.training.phases import Stage, plan

OptimizerFactory = Callable[[ParamsT], Optimizer]

PROCESSES = ("devices", "strategy")  # settings of the processes, not of what each of them does
OF_TRAINING = ("callbacks", "loggers")  # whose classes a trained network does without
# what a resumed run may change: where it trains, and when it ends; of data, where it lies (`list_changes`)
RESUMABLE = (
    *("data", "workers", "device", *PROCESSES, "compile", "sparse", "graph"),
    *("epochs", "checkpoint_minutes", "loggers"),
)
# of numbers; other whole ones are at least 1, others greater than 0
BOUNDS: dict[str, dict[str, Any]] = {
    "seed": {"least": 0, "most": 2**32 - 1},
    "workers": {"least": 0, "most": 1000},
    "norm_weight_decay": {"least": 0},
    "checkpoint_minutes": {"least": 0},
    "ema": {"above": 0, "below": 1},
}
REMEDIES = {
    "schedule": "take Cosine, Linear, Step or Constant of sltt.schedules, or derive from Schedule and define decay",
    "loggers": "such as lightning_fabric.loggers.CSVLogger('logs')",
}


def fit_settings() -> dict[str, inspect.Parameter]:
    """Return the arguments of `sltt.fit` that are settings: all but the network, the data and what is of a run."""
    found = inspect.signature(sltt.fit).parameters
    return {name: one for name, one in found.items() if one.kind != one.KEYWORD_ONLY and name not in ("model", "data")}


class Settings(Frozen):
    """The settings among some values, such as the arguments of `sltt.fit`; those that are not there are its defaults.

    Raises ValueError for a value that makes no sense. Whether a device is there, `make_fabric` finds out.
    """

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def __init__(self, values: Mapping[str, Any] = MappingProxyType({}), **more: Any):
        values = {**values, **more}
        values["batch_size"] = batch_size_of(values.get("data"), values.get("batch_size"))
        for name, argument in fit_settings().items():
            value = to_python(values.get(name, argument.default))  # a number of NumPy fits in no file of settings
            _check(name, value, argument.annotation)
            setattr(self, name, value)
        if self.strategy == "fsdp" and self.precision == "16-mixed":
            raise ValueError("fsdp does not scale gradients for precision='16-mixed': use 'bf16-mixed'")
        for one in self.callbacks or ():
            if (type(one).on_batch, type(one).on_epoch) == (Callback.on_batch, Callback.on_epoch):
                raise ValueError(f"{type(one).__name__} defines neither on_batch nor on_epoch, which a training calls")
        if self.quantised and self.ema is not None:
            raise ValueError("quantised trains the weights that are rounded, and ema averages others: leave one out")

    def stages(self) -> list[Stage]:
        """Return the phases with their places in the training; raise ValueError where they do not fit the settings."""
        stages = plan(self.phases, self.epochs, self.steps, self.rule)
        last = stages[-1].steps
        if last != self.steps and sum(phase.epochs for phase in self.phases or ()) <= self.epochs:
            raise ValueError(
                f"steps={self.steps} is the T of evaluation, but the last phase trains T = {last}: set steps={last}"
            )
        if self.quantised and (online := next((stage.rule for stage in stages if stage.rule.online), None)):
            raise ValueError(f"quantised rounds the weights once a batch, and {online} updates them in it: use SLTT()")
        return stages


def _check(name: str, value: Any, kind: Any) -> None:
    """Raise ValueError for a value of a setting that is not of its kind, or out of its bounds."""
    if type(None) in get_args(kind):
        if value is None:
            return
        kind = get_args(kind)[0]
    if name in (own := {"loss": check_loss, "metric": check_metric, "optimizer": check_optimizer}):
        own[name](value)
    elif kind is str:
        folder(name, value, "a run or a checkpoint")
    elif get_origin(kind) is Literal:
        choice(name, value, get_args(kind))
    elif get_origin(kind) is list:
        for i, one in enumerate(sequence(name, value, name)):
            instance(f"{name}[{i}]", one, get_args(kind)[0], REMEDIES.get(name, ""))
    elif kind is bool:
        flag(name, value)
    elif kind is int:
        whole_number(name, value, **BOUNDS.get(name, {"least": 1}))
    elif kind is float:
        number(name, value, **BOUNDS.get(name, {"above": 0}))
    else:
        instance(name, value, kind, REMEDIES.get(name, ""))


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
