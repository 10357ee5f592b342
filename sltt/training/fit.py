"""Training and evaluation on Lightning Fabric, without a branch on data set or rule; the loop itself is in loop.py."""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sltt.callbacks import Callback
from sltt.checks import flag, folder, instance
from sltt.data import Data, Splits
from sltt.data.loaders import Loaders, as_data
from sltt.kernels import Compile, Sparse
from sltt.losses import CrossEntropyMSE, is_per_step
from sltt.metrics import Accuracy, Metric
from sltt.parallel.devices import Device, Graph, Precision, Strategy
from sltt.rules import SLTT, Rule
from sltt.schedules import Cosine, Schedule
from sltt.training import runs, safeguards
from sltt.training.batches import check_crop, keep_generators, seed_everything
from sltt.training.card import write_card
from sltt.training.check import check
from sltt.training.checkpoints import load_checkpoint, load_selected, restore_state, start_from
from sltt.training.console import Console
from sltt.training.description import describe
from sltt.training.graphs import CudaGraph
from sltt.training.learner import Learner
from sltt.training.logs import Logger
from sltt.training.loop import Loop
from sltt.training.phases import Phase
from sltt.training.quantised import Quantised
from sltt.training.sample import write_sample
from sltt.training.session import Session, session
from sltt.training.settings import OF_TRAINING, RESUMABLE, OptimizerFactory, Settings


@dataclass
class Fit:
    """A finished training: its folder, a row of metrics for each epoch, and the epoch whose weights the model has."""

    run: Path
    history: list[dict[str, Any]]
    epoch: int


def fit(
    model: nn.Module,
    data: Data | Loaders,
    rule: Rule = SLTT(),
    loss: nn.Module = CrossEntropyMSE(),
    optimizer: OptimizerFactory = partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    schedule: Schedule = Cosine(),
    steps: int = 4,
    epochs: int = 10,
    phases: list[Phase] | None = None,
    batch_size: int | None = None,
    clip_norm: float | None = None,
    norm_weight_decay: float | None = None,
    norm_bias_lr: float = 1.0,
    precision: Precision = 32,
    channels_last: bool | None = None,
    seed: int = 0,
    workers: int = 0,
    device: Device = "auto",
    devices: int | None = None,
    strategy: Strategy = "ddp",
    compile: Compile = "auto",
    sparse: Sparse = "auto",
    graph: Graph = "auto",
    checkpoint_minutes: float = 10.0,
    weights: str | None = None,
    metric: Metric = Accuracy(),
    accumulate: int = 1,
    ema: float | None = None,
    quantised: Quantised | None = None,
    callbacks: list[Callback] | None = None,
    loggers: list[Logger] | None = None,
    *,
    run: str | Path | None = None,
    resume: bool = False,
    config: dict[str, Any] | None = None,
    report: Console | None = None,
) -> Fit:
    """Train a spiking network; afterwards it has the weights of the best epoch.

    That is the one with the best metric on the validation samples. Without these (`validation: 0`) the last epoch
    counts. The test samples are not touched.

    Args:
        model: maps the input of one time step [B, ...] to logits [B, C]; its neurons keep their state.
        data: the data set and its splits; of your own by `sltt.data.from_datasets`, or loaders (train, validation). Of
            loaders only the data sets, `collate_fn` and batch size are used; `seed` decides the order.
        rule: the learning rule: SLTT, BPTT, TBPTT, OTTT, RateBased, Mixed, or a `Rule` of your own.
        loss: of one time step, of logits [B, C] and targets [B, ...]; or one of `sltt.losses`.
        optimizer: makes the optimizer from the parameters.
        schedule: how the learning rate changes.
        steps: T, the number of time steps.
        epochs: passes over the training samples.
        phases: parts of the training, each with settings of its own. `steps` and `rule` stand in for what a phase
            leaves out. The best epoch has the last T, which is `steps`: that of evaluation.
        batch_size: samples in a batch, over all processes; None is that of the loader, or 128 for other data.
        clip_norm: scale larger gradients down to this norm.
        norm_weight_decay: weight decay of normalisation, which makes currents smaller; None is that of the others.
        norm_bias_lr: factor on the learning rate of the biases of normalisation.
        precision: float32, or mixed with bfloat16 or float16.
        channels_last: keep images and weights channels-last, for faster convolutions. None does so on CUDA, if the
            network has some and runs in this format; on a CPU, rules see to the images.
        seed: random seed of sample order, augmentation, dropout and the steps of SLTT-K.
        workers: processes that load data, for each that trains.
        device: auto takes CUDA where there is a GPU.
        devices: processes on this machine; None is what torchrun or Slurm started, or 1.
        strategy: of several processes. ddp keeps all weights in each. fsdp keeps a part in each, for networks too large
            for a device, and reduces gradients in every backward.
        compile: compile the neuron step: where it pays (auto), always (on), never (off).
        sparse: compute on active inputs only: where it is faster (auto), wherever possible (on), never (off).
        graph: launch each training batch as one CUDA graph, from the fourth batch of a phase on: on a GPU, unless
            callbacks, hooks or compiled code of your own may need Python (auto), with these too (on), never (off).
            SLTT-K has a graph for each draw of its steps. Mixed, `segment`, online rules, `16-mixed` and sequences of
            several lengths run without.
        checkpoint_minutes: minutes between checkpoints within an epoch; each epoch ends with one.
        weights: start from the weights of this run or checkpoint.
        metric: of predictions and targets, a mean over samples; or with `update` and `compute`, as of torchmetrics. It
            selects the best epoch on the validation samples.
        accumulate: compute each batch in this many parts: the memory of a part, the gradient of the batch. BatchNorm
            takes its statistics over a part, of two samples at least.
        ema: decay of the moving average of the weights. The averaged weights are validated, selected and loaded.
        quantised: round weights as the export to C does. The rounded weights are validated, selected and loaded.
        callbacks: called after each batch and epoch, such as `sltt.callbacks.EarlyStopping`.
        loggers: of Lightning or Fabric. They log a resumed run from its first epoch on. `metrics.csv` and TensorBoard's
            files are there without any.
        run: folder for checkpoints and metrics; must not exist, unless `resume`. None makes one under `runs`.
        resume: continue the run in `run`, with the same arguments; the weights end as if it had never stopped. A folder
            without a checkpoint starts from the beginning.
        config: configuration to keep in the run folder and in the checkpoints; None keeps the arguments as text.
        report: where to print.

    Returns:
        The folder of the run, the metrics of each epoch, and the epoch whose weights the model has.

    Raises:
        ValueError: an argument or a batch that does not fit; the message says which and what to do.
        FloatingPointError: the loss, a gradient or a weight is not finite.
        KeyboardInterrupt: on Ctrl-C, after the batch is finished and a checkpoint saved.
        SystemExit: on SIGTERM, after the same, with the code 75.
        OSError: the run folder cannot be written.

    When another process of the training fails or dies, this one ends too, with the exit code 1.
    """
    settings = Settings(locals())
    instance("model", model, nn.Module)
    flag("resume", resume)
    if config is not None:
        instance("config", config, dict)
    data = as_data(data, settings.batch_size)
    with keep_generators(), session(settings) as here:
        if config is None:
            untold: list[str] = []
            config = _config(model, data, settings, resume, untold)
            if untold:
                here.console(report).line(f"on resume, sltt cannot tell whether these changed: {', '.join(untold)}")
        return train(here, model, data, settings, run, resume=resume, config=config, report=report)


def _config(model: nn.Module, data: Data, settings: Settings, resume: bool, untold: list[str]) -> dict[str, Any]:
    """Return what the folder of a run that is made in Python keeps: plain settings, and objects by their arguments.

    Of a run that is resumed, what it is compared with; None leaves a setting that may change as it was.
    """
    plain = bool | int | float | str | None
    told = {
        name: value if isinstance(value, plain) else describe(value, untold, name)
        for name, value in {"data": data, **vars(settings)}.items()
        if name not in OF_TRAINING and not (resume and value is None and name in RESUMABLE)
    }
    network = {} if resume else {"model": type(model).__name__}
    return {runs.MADE_IN: "Python, by sltt.fit", **network, "layers": runs.describe_layers(model), **told}


def train(
    here: Session,
    model: nn.Module,
    data: Data,
    settings: Settings,
    run: str | Path | None,
    *,
    name: str = "run",
    resume: bool = False,
    config: dict[str, Any],
    report: Console | None = None,
) -> Fit:
    """Train in a new folder: `run`, or one under `runs` whose name begins with `name`; or go on in `run`."""
    run = run if run is None else folder("run", run)
    report, first = here.console(report), here.processes.first
    here, splits = _check(here, model, data, settings, report)
    if not resume:
        start_from(model, settings.weights)
    made = first(lambda: runs.old_run(run) if resume else runs.new_run(run, name, config))
    report.line(f"continuing {made}" if resume else f"run {made}")
    with runs.lock_run(made, not resume) if here.processes.rank == 0 else nullcontext():
        checkpoint = None
        if resume:
            checkpoint, config = first(lambda: _read_run(made, config))
            if checkpoint is None:  # it stopped before the first
                start_from(model, settings.weights)
        seed_everything(settings.seed)
        loop = Loop(Learner(here, settings, model), data, splits, made, config, report)
        if checkpoint:
            restore_state(loop, checkpoint)
        if resume and config and here.processes.rank == 0:
            runs.write_config(made, config)
        loop.run()
        load_selected(model, made, here.processes)
        epoch = loop.state.best_epoch or loop.state.epoch
        if here.processes.rank == 0:
            write_card(loop, loop.state.history[epoch - 1])
            write_sample(loop)
        return Fit(made, loop.state.history, epoch)


def _check(here: Session, model: nn.Module, data: Data, settings: Settings, report: Console) -> tuple[Session, Splits]:
    """Return the session in the network's memory format, and the splits of the first stage.

    Raises ValueError for what cannot be trained, before there is a folder.
    """
    stages, count = settings.stages(), here.processes.count
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("the model has no parameter to train: give it a layer with weights, or requires_grad_(True)")
    if count > 1 and here.settings.strategy == "fsdp":
        if rule := next((s.rule for s in stages if s.rule.recompute or s.rule.hoist), None):  # weights come and go
            raise ValueError(
                f"{rule} does not run under fsdp, since recompute=True and hoist=True run layers in an order of their "
                "own: use ddp"
            )
        if whole := next((name for name in ("ema", "quantised") if getattr(settings, name) is not None), None):
            raise ValueError(f"{whole} needs whole weights, which fsdp does not keep: use ddp")
    if here.settings.graph == "on" and not CudaGraph.runs_on(here.fabric.device):
        raise ValueError(f"graph='on' needs a CUDA device, and this is {here.fabric.device.type}: leave graph out")
    if settings.batch_size < count:
        raise ValueError(f"batch_size={settings.batch_size} is shared by {count} processes: expected a sample for each")
    if settings.accumulate > 1 and (online := next((s.rule for s in stages if s.rule.online), None)):
        raise ValueError(
            f"{online} updates the weights at every time step, and accumulate once a batch: leave accumulate out, or "
            "use a rule without online"
        )
    if settings.accumulate > 1 or count > 1:
        safeguards.check_mean(settings.loss)
    if count > 1:
        here.processes.check_same("; ".join(f"{k} {[*v.shape]}" for k, v in model.state_dict().items()), "the network")
    splits = here.splits(data, stages[0].steps)
    samples = safeguards.first_samples(splits, stages[0].steps)
    if splits.per_step != is_per_step(settings.loss):
        raise ValueError(
            "the data has a target for each time step: wrap the loss, sltt.losses.PerStep(loss)"
            if splits.per_step
            else f"{type(settings.loss).__name__} needs a target for each time step, and the data has one for all: "
            "sltt.data.from_datasets(…, per_step=True)"
        )
    for callback in settings.callbacks or ():
        if callback.needs_validation and splits.validation is None:
            raise ValueError(f"{type(callback).__name__} needs validation samples: hold some out, as by validation=0.1")
    for stage in stages:  # now, and not after the epochs before it
        if stage.crop is not None:
            check_crop(samples[0][0], stage.crop)
        stage.rule.check(model, stage.steps)
    safeguards.check_samples(model, splits, samples)
    safeguards.check_static(model, splits, samples, settings.loss, stages[0].steps)
    safeguards.check_last_batch(model, splits, samples, settings.batch_size, stages)
    x = splits.collate(samples)[0].to(next((p.device for p in model.parameters()), "cpu"))
    check(model, x, rule=stages[0].rule, steps=stages[0].steps if splits.static else None)
    chosen = here.choose_format(model, lambda: x, splits.static)
    if chosen.settings.channels_last and not here.settings.channels_last:
        report.line("images and weights are channels-last, for speed; channels_last=False switches this off")
    return chosen, splits


def _read_run(run: Path, config: dict[str, Any]) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Return the last checkpoint of a run, None if it stopped before the first, and the settings to go on with.

    Raises ValueError where those that are given are others than the run's.
    """
    checkpoint = load_checkpoint(last) if (last := runs.find_last(run)) else None
    saved = runs.read_config(run, checkpoint)
    if runs.MADE_IN in saved or runs.MADE_IN not in config:  # arguments in Python do not repeat a recipe
        runs.check_config(run, saved, {name: value for name, value in config.items() if name in saved})
    same = {"data"} if runs.MADE_IN in config else set()  # by its description, which has no places
    changed = {name: config[name] for name in RESUMABLE if name in config and name not in same}
    return checkpoint, saved | changed if saved else config
