"""The settings of a training: each stands here once, with its kind, default, bounds and text.

`sltt.fit` and `sltt.evaluate` take them as arguments, `sltt train` as options, a recipe as keys.
"""

import difflib
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import partial, wraps
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, ParamSpec, TypeVar, Union, cast, dataclass_transform, get_args, get_origin

import torch
from docstring_parser import parse_from_object
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from sltt._torch import without_compiler
from sltt.callbacks import Callback
from sltt.checks import choice, flag, folder, instance, number, sequence, to_python, whole_number
from sltt.data import Data
from sltt.data.loaders import Loaders, as_data, batch_size_of
from sltt.kernels import Compile, Sparse
from sltt.losses import CrossEntropyMSE, check_loss
from sltt.metrics import Accuracy, Metric, check_metric
from sltt.parallel.devices import Device, Graph, Precision
from sltt.rules import SLTT, Rule
from sltt.schedules import Cosine, Schedule
from sltt.training.console import Console
from sltt.training.logs import Logger
from sltt.training.phases import Phase, Stage, plan
from sltt.training.quantised import Quantised

OptimizerFactory = Callable[[ParamsT], Optimizer]
P = ParamSpec("P")
A = TypeVar("A")
R = TypeVar("R")


def check_factory(factory: Any) -> None:
    """Raise ValueError, with the line to write, for an optimizer in place of a function that makes one."""
    other = isinstance(factory, nn.Module) or (isinstance(factory, type) and not issubclass(factory, Optimizer))
    if other or not callable(factory):
        raise ValueError(
            "optimizer must be a function of the parameters, such as functools.partial(torch.optim.SGD, lr=0.1), "
            f"got {factory!r:.80}"
        )
    parameter = nn.Parameter(torch.zeros(2, 2))
    try:
        make: Any = factory
        with without_compiler(factory):
            made: Any = make([parameter])
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"optimizer: {kind}{error}") from error
    groups = made.param_groups if isinstance(made, Optimizer) else []
    if [p is parameter for group in groups for p in group["params"]] != [True]:
        raise ValueError(f"optimizer must make an Optimizer of the parameters that it is called with, got {made!r:.80}")


def setting(default: Any = MISSING, *, kw_only: bool = True, **about: Any) -> Any:
    """Return a field of settings, with what `about` says of it.

    `resume`: a resumed run may change it. `group`: "processes"; "watchers", whose classes a trained network does
    without; or "run" for its folder and what is told of it. `check`: of the value, in place of that of its kind.
    `remedy`: ends the message. Else bounds: other whole numbers are at least 1, others greater than 0.
    """
    return field(default=default, kw_only=kw_only, metadata=about)


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(setting,))
def value(kind: type[A]) -> type[A]:
    """Make a dataclass of settings."""
    return dataclass(frozen=True, kw_only=True)(kind)


@value
class Execution:
    """A network, data, and how both a training and an evaluation run.

    Raises ValueError for a value that makes no sense. Whether a device is there, `make_fabric` finds out.
    """

    model: nn.Module = setting(kw_only=False)
    """maps the input of one time step [B, ...] to logits [B, C]; its neurons keep their state."""
    data: Data | Loaders = setting(kw_only=False, resume=True)  # which may have moved
    """the data set and its splits; of your own by `sltt.data.from_datasets`, or loaders (train, validation). Of
    loaders only the data sets, `collate_fn` and batch size are used; `seed` decides the order."""
    batch_size: int | None = None
    """samples in a batch, over all processes; None is that of the loader, or 128 for other data."""
    precision: Precision = 32
    """float32, or mixed with bfloat16 or float16."""
    channels_last: bool | None = None
    """keep images and weights channels-last, for faster convolutions. None does so on CUDA, if the network has some and
    runs in this format; on a CPU, rules see to the images."""
    workers: int = setting(default=0, resume=True, least=0, most=1000)
    """processes that load data, for each that trains."""
    device: Device = setting(default="auto", resume=True)
    """auto takes CUDA where there is a GPU."""
    devices: int | None = setting(default=None, group="processes", resume=True)
    """processes on this machine; None is what torchrun or Slurm started, or 1."""
    compile: Compile = setting(default="auto", resume=True)
    """compile the neuron step: where it pays (auto), always (on), never (off)."""
    sparse: Sparse = setting(default="auto", resume=True)
    """compute on active inputs only: where it is faster (auto), wherever possible (on), never (off)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "batch_size", batch_size_of(self.data, self.batch_size))
        for setting in fields(self):
            value = to_python(getattr(self, setting.name))  # a number of NumPy fits in no file of settings
            if setting.name != "data":
                _check(setting, value)
            object.__setattr__(self, setting.name, value)
        object.__setattr__(self, "data", as_data(self.data, self.size))

    @property
    def dataset(self) -> Data:
        """Return `data`, which is a `Data` once the settings are made."""
        return as_data(self.data, self.size)

    @property
    def size(self) -> int:
        """Return `batch_size`, which is a number once the settings are made."""
        assert self.batch_size is not None
        return self.batch_size


@value
class Settings(Execution):
    """The arguments of `sltt.fit`."""

    rule: Rule = setting(default=SLTT(), kw_only=False)
    """the learning rule: SLTT, BPTT, TBPTT, OTTT, RateBased, Mixed, or a `Rule` of your own."""
    loss: nn.Module = setting(default=CrossEntropyMSE(), kw_only=False, check=check_loss)
    """of one time step, of logits [B, C] and targets [B, ...]; or one of `sltt.losses`."""
    optimizer: OptimizerFactory = setting(default=partial(torch.optim.SGD, lr=0.1, momentum=0.9), check=check_factory)
    """makes the optimizer from the parameters."""
    schedule: Schedule = setting(
        default=Cosine(),
        remedy="take Cosine, Linear, MultiStep or Constant of sltt.schedules, or derive from Schedule and define decay",
    )
    """how the learning rate changes."""
    steps: int = 4
    """T, the number of time steps."""
    epochs: int = setting(default=10, resume=True)
    """passes over the training samples. More of them on resume stretch the schedule: its learning rate rises again."""
    phases: list[Phase] | None = None
    """parts of the training, each with settings of its own. `steps` and `rule` stand in for what a phase leaves out.
    The best epoch has the last T, which is `steps`: that of evaluation."""
    clip_norm: float | None = None
    """scale larger gradients down to this norm."""
    norm_weight_decay: float | None = setting(default=None, least=0)
    """weight decay of normalisation, which makes currents smaller; None is that of the others."""
    norm_bias_lr: float = 1.0
    """factor on the learning rate of the biases of normalisation."""
    seed: int = setting(default=0, least=0, most=2**32 - 1)
    """random seed of sample order, augmentation, dropout and the steps of SLTT-K."""
    graph: Graph = setting(default="auto", resume=True)
    """launch each training batch as one CUDA graph, from the fourth batch of a phase on: on a GPU, unless callbacks,
    hooks or compiled code of your own may need Python (auto), with these too (on), never (off). SLTT-K has a graph for
    each draw of its steps. Mixed, `segment`, online rules, `16-mixed` and sequences of several lengths run without."""
    checkpoint_minutes: float = setting(default=10.0, resume=True, least=0)
    """minutes between checkpoints within an epoch; each epoch ends with one."""
    weights: str | None = None
    """start from the weights of this run or checkpoint."""
    strict: bool = True
    """False starts from those weights that have the same name and shape, and lists the others in a warning."""
    metric: Metric = setting(default=Accuracy(), check=check_metric)
    """of predictions and targets, a mean over samples; or with `update` and `compute`, as of torchmetrics. It selects
    the best epoch on the validation samples."""
    accumulate: int = 1
    """compute each batch in this many parts: the memory of a part, the gradient of the batch. Of each part alone are
    BatchNorm's statistics, over two samples at least, and the mean of a loss with weights or ignored labels."""
    ema: float | None = setting(default=None, above=0, below=1)
    """decay of the moving average of the weights. The averaged weights are validated, selected and loaded."""
    quantised: Quantised | None = None
    """round weights as the export to C does. The rounded weights are validated, selected and loaded."""
    callbacks: list[Callback] | None = setting(default=None, group="watchers")
    """called after each batch and epoch, such as `sltt.callbacks.EarlyStopping`."""
    loggers: list[Logger] | None = setting(
        default=None, group="watchers", resume=True, remedy="such as lightning_fabric.loggers.CSVLogger('logs')"
    )
    """of Lightning or Fabric. They log a resumed run whole. `metrics.csv` and TensorBoard's files need none."""
    run: str | Path | None = setting(default=None, group="run", check=partial(folder, "run"))
    """folder for checkpoints and metrics; must not exist, unless `resume`. None makes one under `runs`."""
    resume: bool = setting(default=False, group="run")
    """continue the run in `run`, with the same arguments; the weights end as if it had never stopped. A folder without
    a checkpoint starts from the beginning."""
    config: dict[str, Any] | None = setting(default=None, group="run")
    """configuration to keep in the run folder and in the checkpoints; None keeps the arguments as text."""
    report: Console | None = setting(default=None, group="run")
    """where to print."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for callback in self.callbacks or ():
            if (type(callback).on_batch, type(callback).on_epoch) == (Callback.on_batch, Callback.on_epoch):
                raise ValueError(f"{type(callback).__name__} defines neither on_batch nor on_epoch")
        if self.quantised and self.ema is not None:
            raise ValueError("quantised trains the weights that are rounded, and ema averages others: leave one out")

    def stages(self) -> list[Stage]:
        """Return the phases with their places in the training; raise ValueError where they do not fit the settings."""
        stages = plan(self.phases, self.epochs, self.steps, self.rule)
        for stage in stages:
            stage.rule.check(self.model, stage.steps)
        last = stages[-1].steps
        if last != self.steps and sum(phase.epochs for phase in self.phases or ()) <= self.epochs:
            raise ValueError(f"the last phase trains T = {last}, and steps={self.steps} is evaluated: set steps={last}")
        if self.quantised and (online := next((stage.rule for stage in stages if stage.rule.online), None)):
            raise ValueError(f"quantised rounds the weights once a batch, and {online} updates them in it: use SLTT()")
        return stages


RESUMABLE = tuple(one.name for one in fields(Settings) if one.metadata.get("resume"))


def names_of(kind: type[Execution], *groups: str | None) -> list[str]:
    """List the settings of these groups; None are those of no group."""
    return [setting.name for setting in fields(kind) if setting.metadata.get("group") in groups]


def texts_of(kind: type[Execution]) -> dict[str, str]:
    """Return what each setting does, with those of `Execution` last."""
    docs = [doc for base in kind.__mro__[:-1] for doc in parse_from_object(base).params]
    texts = {doc.arg_name: doc.description or "" for doc in docs}
    shared = {setting.name for setting in fields(Execution)}
    order = sorted(fields(kind), key=lambda setting: setting.kw_only and setting.name in shared)
    return {setting.name: " ".join(texts[setting.name].split()) for setting in order}


def takes(kind: Callable[P, A]) -> Callable[[Callable[[A], R]], Callable[P, R]]:
    """Have a function of settings take each as an argument, as its signature and its docstring say."""

    def decorate(function: Callable[[A], R]) -> Callable[P, R]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if unknown := [name for name in kwargs if name not in made.__signature__.parameters]:
                near = difflib.get_close_matches(unknown[0], made.__signature__.parameters, 1)
                hint = f"did you mean {near[0]}?" if near else f"help(sltt.{function.__name__}) lists them"
                if unknown[0] in inspect.signature(torch.optim.AdamW).parameters:
                    hint = f"optimizer=functools.partial(torch.optim.AdamW, {unknown[0]}=…)"
                raise TypeError(f"{function.__name__} has no argument {unknown[0]!r}; {hint}")
            return function(kind(*args, **kwargs))

        made: Any = call
        made.__signature__ = inspect.signature(kind).replace(return_annotation=function.__annotations__["return"])
        texts = (f"{name}: {text}" for name, text in texts_of(kind).items())  # pyright: ignore[reportArgumentType]
        lines = (textwrap.fill(words, 120, initial_indent=" " * 8, subsequent_indent=" " * 12) for words in texts)
        made.__doc__ = (function.__doc__ or "").replace("Returns:", "\n".join(["Args:", *lines, "\n    Returns:"]))
        return made

    return decorate


def _check(setting: Field[Any], value: Any) -> None:
    """Raise ValueError for a value of a setting that is not of its kind, or out of its bounds."""
    name, kind, about = setting.name, cast(Any, setting.type), {**setting.metadata}
    check, remedy = about.pop("check", None), about.pop("remedy", "")
    bounds = {key: about[key] for key in about.keys() & {"above", "least", "below", "most"}}
    if get_origin(kind) in (UnionType, Union):
        if value is None and NoneType in get_args(kind):
            return
        kind = get_args(kind)[0]
    if check:
        check(value)
    elif kind is str:
        folder(name, value, "a run or a checkpoint")
    elif get_origin(kind) is Literal:
        choice(name, value, get_args(kind))
    elif get_origin(kind) is list:
        for i, item in enumerate(sequence(name, value, name)):
            instance(f"{name}[{i}]", item, get_args(kind)[0], remedy)
    elif kind is bool:
        flag(name, value)
    elif kind is int:
        whole_number(name, value, **(bounds or {"least": 1}))
    elif kind is float:
        number(name, value, **(bounds or {"above": 0}))
    else:
        instance(name, value, get_origin(kind) or kind, remedy)
