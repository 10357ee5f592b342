"""Training and evaluation on Lightning Fabric, without a branch on data set or rule; the loop itself is in loop.py."""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from sltt.data import Splits
from sltt.losses import is_per_step
from sltt.training import runs, safeguards
from sltt.training.batches import check_crop, keep_all_generators, seed_everything
from sltt.training.card import write_card
from sltt.training.check import check
from sltt.training.checkpoints import load_checkpoint, load_selected, start_from
from sltt.training.console import Console
from sltt.training.description import describe
from sltt.training.graphs import CudaGraph
from sltt.training.learner import Learner
from sltt.training.loop import Loop
from sltt.training.sample import write_sample
from sltt.training.session import Session, session
from sltt.training.settings import RESUMABLE, Settings, names_of, takes


@dataclass
class Fit:
    """A finished training: its folder, a row of metrics for each epoch, the epoch of the weights, and T there."""

    run: Path
    history: list[dict[str, Any]]
    epoch: int
    steps: int


@takes(Settings)
def fit(settings: Settings) -> Fit:
    """Train a spiking network; afterwards it has the weights of the best epoch.

    That is the one with the best metric on the validation samples. Without these (`validation: 0`) the last epoch
    counts. The test samples are not touched.

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
    with keep_all_generators(), session(settings) as here:
        if settings.config is None:
            untold: list[str] = []
            settings = replace(settings, config=_config(settings, untold))
            if untold:
                line = f"on resume, sltt cannot tell whether these changed: {', '.join(untold)}"
                here.console(settings.report).line(line)
        return train(here, settings)


def _config(settings: Settings, untold: list[str]) -> dict[str, Any]:
    """Return what the folder of a run that is made in Python keeps: plain settings, and objects by their arguments."""
    plain = bool | int | float | str | None
    told = {
        name: value if isinstance(value, plain) else describe(value, untold, name)
        for name in names_of(Settings, None, "processes")
        if name != "model"
        and ((value := getattr(settings, name)) is not None or not settings.resume or name not in RESUMABLE)
    }
    network = {} if settings.resume else {"model": type(settings.model).__name__}
    return {runs.MADE_IN: "Python, by sltt.fit", **network, **told}


def train(here: Session, settings: Settings, name: str = "run") -> Fit:
    """Train in the folder of the settings, or a new one under `runs` whose name begins with `name`."""
    model, resume, config = settings.model, settings.resume, settings.config or {}
    run = None if settings.run is None else Path(settings.run).expanduser()
    report, first = here.console(settings.report), here.processes.first
    here, splits = _check(here, settings, report)
    if not resume:
        start_from(model, settings.weights, settings.strict)
    made = first(lambda: runs.old_run(run) if resume else runs.new_run(run, name, config))
    with runs.lock_run(made, not resume) if here.processes.rank == 0 else nullcontext():
        checkpoint = None
        if resume:
            checkpoint, config = first(lambda: _read_run(made, config))
            if checkpoint is None:  # it stopped before the first
                start_from(model, settings.weights, settings.strict)
        seed_everything(settings.seed)
        loop = Loop(Learner(here, settings), splits, made, config, report)
        if checkpoint:
            loop.restore(checkpoint)
        continuing = f"continuing {made}: {loop.state.epoch} of {settings.epochs} epochs are done"
        report.line(continuing if resume else f"run {made}")
        if resume and config and here.processes.rank == 0:
            runs.write_config(made, config)
        loop.run()
        load_selected(model, made, here.processes)
        epoch = loop.state.best_epoch or loop.state.epoch
        model.trained = trained = loop.trained(epoch)  # pyright: ignore[reportArgumentType]
        if here.processes.rank == 0:
            write_card(loop, loop.state.history[epoch - 1])
            write_sample(loop, trained.steps)
        return Fit(made, loop.state.history, epoch, trained.steps)


def _check(here: Session, settings: Settings, report: Console) -> tuple[Session, Splits]:
    """Refuse what cannot be trained; return the session in the network's memory format, and the first splits."""
    model, stages, count = settings.model, settings.stages(), here.processes.count
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("the model has no parameter to train: give it a layer with weights, or requires_grad_(True)")
    if settings.graph == "on" and not CudaGraph.runs_on(here.fabric.device):
        raise ValueError(f"graph='on' needs a CUDA device, and this is {here.fabric.device.type}: leave graph out")
    if settings.size < count:
        raise ValueError(f"batch_size={settings.size} is shared by {count} processes: expected a sample for each")
    if settings.accumulate > 1 and (online := next((s.rule for s in stages if s.rule.online), None)):
        raise ValueError(f"{online} updates the weights at every time step, accumulate once a batch: leave one out")
    if isinstance(settings.loss, nn.Module) and any(p.requires_grad for p in settings.loss.parameters()):
        raise ValueError("the loss has parameters, which are not trained: give them to the network, or freeze them")
    if settings.accumulate > 1 or count > 1:
        parts = settings.loss.modules() if isinstance(settings.loss, nn.Module) else [settings.loss]
        told = (getattr(part, "keywords", {}).get("reduction", getattr(part, "reduction", None)) for part in parts)
        if "sum" in told:
            remedy = "set reduction='mean', or leave accumulate and devices at 1"
            raise ValueError(f"a loss with reduction='sum' adds up over samples, and a batch has parts: {remedy}")
    if count > 1:
        here.processes.check_same("; ".join(f"{k} {[*v.shape]}" for k, v in model.state_dict().items()), "the network")
    splits = here.splits(settings.dataset, stages[0].steps)
    for steps in {stage.steps for stage in stages}:
        if here.splits(settings.dataset, steps).fingerprint != splits.fingerprint:
            raise ValueError(f"the data has other samples at T = {steps}: train each phase alone, by --weights")
    samples = safeguards.first_samples(splits, stages[0].steps)
    if splits.per_step != is_per_step(settings.loss):
        other = f"{type(settings.loss).__name__} needs a target for each time step: from_datasets(…, per_step=True)"
        wrap = "the data has a target for each time step: wrap the loss, sltt.losses.PerStep(loss)"
        raise ValueError(wrap if splits.per_step else other)
    for callback in settings.callbacks or ():
        if callback.needs_validation and splits.validation is None:
            raise ValueError(f"{type(callback).__name__} needs validation samples: hold some out, as by validation=0.1")
    for stage in stages:  # now, and not after the epochs before it
        if stage.crop is not None:
            check_crop(samples[0][0], stage.crop)
    safeguards.check_samples(model, splits, samples)
    safeguards.check_last_batch(model, splits, samples, settings.size, stages)
    x = splits.collate(samples)[0].to(next((p.device for p in model.parameters()), "cpu"))
    check(model, x, rule=stages[0].rule, steps=stages[0].steps if splits.static else None)
    chosen = here.choose_format(model, lambda: x, splits.static)
    if chosen.settings.channels_last and not here.settings.channels_last:
        report.line("images and weights are channels-last, for speed; channels_last=False switches this off")
    return chosen, splits


def _read_run(run: Path, config: dict[str, Any]) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Return the last checkpoint of a run, None if it stopped before the first, and the settings to go on with."""
    checkpoint = load_checkpoint(last) if (last := runs.find_last(run)) else None
    saved = runs.read_config(run, checkpoint)
    if runs.MADE_IN in saved or runs.MADE_IN not in config:  # arguments in Python do not repeat a recipe
        runs.check_config(run, saved, {name: value for name, value in config.items() if name in saved})
    same = {"data"} if runs.MADE_IN in config else set()  # by its description, which has no places
    changed = {name: config[name] for name in RESUMABLE if name in config and name not in same}
    return checkpoint, saved | changed if saved else config
