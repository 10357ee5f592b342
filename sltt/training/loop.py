"""The loop of a training: stages, epochs, batches."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader

from sltt.analysis import FiringRates, firing_rates
from sltt.callbacks import Moment
from sltt.data import Data, Splits
from sltt.losses import is_per_step, predicted, prediction_of
from sltt.metrics import higher_is_better, improves, name_of
from sltt.parallel.signals import Interrupt
from sltt.rules import Output
from sltt.sequence.padding import Padded, lengths_of, target_of
from sltt.sequence.steps import check_input
from sltt.training.average import Average
from sltt.training.batches import EpochSampler, ending, seed_batch, share, train_loader, whole_epoch
from sltt.training.checkpoints import Checkpoints
from sltt.training.console import Console
from sltt.training.evaluation import counting, measure
from sltt.training.files import write_table
from sltt.training.logs import Logs
from sltt.training.parts import count_parts, run_in_parts
from sltt.training.phases import Stage, freeze_norm, set_rates, stage_at
from sltt.training.progress import BatchMemory, Metrics, Progress, epoch_row
from sltt.training.runs import BEST, LAST, METRICS
from sltt.training.safeguards import check_finite, check_labels, check_length, extreme_layers
from sltt.training.score import Score
from sltt.training.session import Session
from sltt.training.settings import Training


@dataclass(kw_only=True)
class Loop:
    """A training in one process: what was set up for it, and how far it is.

    Args:
        training: what is trained.
        model: the network.
        net: the network for calls under the precision of the session.
        average: of the weights, where the training has one, and
        averaged: that network for such calls; else the network itself.
        loss: on the device.
        optim: the optimizer.
        splits: of the first stage.
        checkpoints: of the run.
        folder: of the run.
        state: how far the training is.
    """

    session: Session
    training: Training
    model: nn.Module
    net: Any
    average: Average | None
    averaged: Any
    loss: Any
    optim: Any
    data: Data
    splits: Splits
    checkpoints: Checkpoints
    folder: Path
    report: Console
    state: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        self.processes = self.session.processes
        self.stages = self.training.stages
        self.metric = name_of(self.training.metric)
        self.sampler = EpochSampler.of(self.splits, self.training.seed, self.training.batch_size)
        self.batches = math.ceil(self.sampler.length / self.training.batch_size)
        self.scaled = self.session.execution.precision == "16-mixed"  # a scaler leaves out steps that are not finite
        self.initial = [(group["lr"], group.get("weight_decay", 0.0)) for group in self.optim.param_groups]

    def run(self) -> None:
        """Train the epochs that are left."""
        log = Logs(self.folder, self.training.loggers or (), self.checkpoints.config, self.processes.rank == 0)
        with log, Interrupt() as interrupt:
            self._show_callbacks()
            for row in self.state.history:  # so that the log of a resumed run is whole
                log(row)
            for stage in self.stages:
                if self.state.epoch < stage.stop and not self.state.stopped:
                    self._stage(stage, log, interrupt)
        self._write_table()  # also after a resume that had nothing left to train

    def _stage(self, stage: Stage, log: Logs, interrupt: Interrupt) -> None:
        """Train the epochs of a stage that are left."""
        batches, validation = self._begin(stage)
        with ending(batches, validation):
            while self.state.epoch < stage.stop and not self.state.stopped:
                training = self._epoch(stage, batches, interrupt)
                for model in self._models():
                    self.processes.average_statistics(model)
                row = self._end_epoch(training, self._validate(stage, validation))
                log(row)
                self.report.row(row)
                for warning in extreme_layers(training.layers):
                    self.report.warn(warning)
                if self.state.stopped:
                    self.report.line(f"stopped after epoch {self.state.epoch}: {self.state.stopped}")
                interrupt.stop(int(self.processes.highest(interrupt.requested)), self.folder)

    def _begin(self, stage: Stage) -> tuple[DataLoader[Any], DataLoader[Any] | None]:
        """Batches to train on and to validate by, in a stage, which may be in its middle.

        At another T, the best epoch is sought anew.
        """
        if self.training.phases:
            crop = f", crops of {stage.crop} pixels" if stage.crop else ""
            self.report.line(f"epochs {stage.start + 1} to {stage.stop}: T = {stage.steps}, {stage.rule}{crop}")
        self.splits = self.session.splits(self.data, stage.steps)
        new = self.state.batch == 0 and self.state.epoch > 0
        if new and stage_at(self.stages, self.state.epoch - 1).steps != stage.steps:
            # metrics at another T do not compare
            self.state.best, self.state.best_epoch, self.state.first = [], None, self.state.epoch
        self.memory = BatchMemory(self.session.fabric.device, stage.rule)
        size, held_out = self.training.batch_size, self.splits.validation
        return (
            train_loader(
                self.splits,
                size,
                self.sampler,
                self.session.execution.workers,
                pin=self.session.fabric.device.type == "cuda",
                rank=self.processes.rank,
                processes=self.processes.count,
                crop=stage.crop,
            ),
            None if held_out is None else self.session.eval_loader(held_out, self.splits, size),
        )

    def _epoch(self, stage: Stage, loader: DataLoader[Any], interrupt: Interrupt) -> Metrics:
        """Train what is left of an epoch."""
        state = self.state
        self.sampler.set_epoch(state.epoch, min(state.batch * self.training.batch_size, self.sampler.length))
        began = time.monotonic() - state.seconds
        self.score = Score(self.training.metric, self.processes, state)
        if self.score.partial:
            self.report.warn(
                f"train_{self.metric} of epoch {state.epoch + 1} counts the batches after the resume only: a "
                "checkpoint keeps what a metric collects if it has state_dict and load_state_dict"
            )
        self.net.train()
        if stage.freeze_norm:
            freeze_norm(self.model)
        bar = self.report.bar(f"epoch {state.epoch + 1}/{self.training.epochs}", self.batches, done=state.batch)
        with firing_rates(self.model) as firing, bar as advance, self._located():
            firing.load_state_dict(state.firing)
            for x, y in whole_epoch(loader):
                epoch = state.epoch + state.batch / self.batches
                set_rates(self.optim, self.initial, stage, self.training.schedule, epoch)
                self._batch(stage, x, y, firing)
                advance()
                due = self.checkpoints.age() > 60 * self.training.checkpoint_minutes
                if wanted := self.processes.highest(interrupt.requested or due / 2):  # a signal, or a checkpoint
                    state.seconds = time.monotonic() - began
                    state.firing, state.score = firing.state_dict(), self.score.state()
                    self.checkpoints.save(state, LAST)
                    interrupt.stop(int(wanted), self.folder)
        state.firing = firing.state_dict()
        return self.score.of(state.metrics(self.metric, self.processes, time.monotonic() - began, self.memory.peak))

    def _batch(self, stage: Stage, x: Tensor, y: Tensor | Padded, firing: FiringRates) -> None:
        """Train a batch, or this process's share of it."""
        state, rank, seed = self.state, self.processes.rank, self.training.seed
        self.optim.zero_grad()
        size = min(self.training.batch_size, self.sampler.length - state.batch * self.training.batch_size)
        weight, count = share(size, rank, self.processes.count)
        parts = count_parts(self.training.accumulate, size, self.processes.count)
        drawn = seed_batch(seed, state.epoch, state.batch)  # of the rule, in all processes alike
        seed_batch(seed, state.epoch, state.batch, rank)
        check_labels(target_of(y), self.splits.classes)
        if isinstance(y, Padded):
            weight = y.steps / self.processes.sum([y.steps])[0]
        check_length(x, y, self.splits, stage.steps)
        if self.session.fabric.device.type != "cpu":  # where the rule does not look, since that would wait
            check_input(x)
        x, y = self.session.batch(x, y)

        carried = stage.rule.state_dict()

        def run_part(x: Tensor, y: Tensor | Padded, part: float) -> Output:
            stage.rule.load_state_dict(carried)  # each part draws the same time steps
            return stage.rule(
                *(self.net, x, y, self.loss),
                steps=stage.steps if self.splits.static else None,
                # weighted, such that the gradients of all parts and processes add up to that of the batch
                backward=lambda loss: self.session.fabric.backward(loss * (weight * part)),
                update=self._reduce_and_update if stage.rule.online else None,
                seed=drawn,
            )

        forms = {"static": self.splits.static, "per_step": is_per_step(self.loss)}
        run = partial(run_in_parts, run_part, x, y, parts, **forms)
        with counting(firing, count):
            full = size == min(self.training.batch_size, self.sampler.length)
            out = self.memory(run, len(x), full=full)
        if not stage.rule.online:
            self._reduce()
        check_finite(out.loss, self.model, self.optim, scaled=self.scaled)
        if not stage.rule.online:
            self._update()
        prediction = predicted(prediction_of(self.loss), out.logits, lengths_of(y))
        state.count(out.loss, self.score.batch(prediction, target_of(y), count), count, y)
        if self.average:
            self.average.update(self.model)
        self._call("on_batch", out.loss.item())

    def _reduce(self) -> None:
        self.processes.reduce_gradients(self.model.parameters())

    def _update(self) -> None:
        if (most := self.training.clip_norm) is not None:
            # a scaler finds what is not finite by itself, and leaves the step out
            self.session.fabric.clip_gradients(self.net, self.optim, max_norm=most, error_if_nonfinite=not self.scaled)
        self.optim.step()
        self.optim.zero_grad()

    def _reduce_and_update(self) -> None:
        self._reduce()
        self._update()

    def _validate(self, stage: Stage, loader: DataLoader[Any] | None) -> Metrics | None:
        if loader is None:
            return None
        with self._located("validation"):
            return measure(
                self.session, self.averaged, loader, self.splits, self.loss, self.training.metric, stage.steps
            )

    def _end_epoch(self, training: Metrics, validation: Metrics | None) -> dict[str, Any]:
        """Save an epoch; returns its row in the table of metrics."""
        row = epoch_row(self.state.epoch + 1, self.optim, training, validation)
        quality = improves(self.training.metric, validation.score) if validation else 0.0
        improved = self.state.end_epoch(row, validation, quality)
        self.state.pending = bool(self.training.callbacks)
        # the best before the last: that one says that there is a best
        self._save(*[BEST] * improved, LAST)
        self._show_callbacks()
        return row

    def _show_callbacks(self) -> None:
        """Show the last epoch to callbacks that have not seen it. It is saved: a callback that fails loses no epoch."""
        if self.state.pending:
            with self._located("callback", self.state.epoch):
                self._call("on_epoch")
            self.state.pending = False
            self._save(LAST)

    def _save(self, *names: str) -> None:
        self.checkpoints.save(self.state, *names)
        self._write_table()

    def _call(self, name: str, loss: float | None = None) -> None:
        """Call a method of all callbacks; what one of them stops, in any process, ends for all after the epoch."""
        state = self.state
        now = Moment(
            model=self.model,
            optimizer=self.optim,
            epoch=state.epoch,
            batch=state.batch,
            loss=loss,
            history=state.history[state.first :],
            metric=self.metric,
            higher_is_better=higher_is_better(self.training.metric),
            stopped=state.stopped,
        )
        for callback in self.training.callbacks or ():
            getattr(callback, name)(now)
        state.stopped = now.stopped
        if name == "on_epoch" and self.training.callbacks and self.processes.highest(bool(state.stopped)):
            state.stopped = state.stopped or "as asked for in another process"

    def _models(self) -> list[nn.Module]:
        return [self.model, *([self.average.model] if self.average else [])]

    def _write_table(self) -> None:
        if self.processes.rank == 0:
            write_table(self.folder / METRICS, self.state.history)

    @contextmanager
    def _located(self, place: str | None = None, epoch: int | None = None) -> Iterator[None]:
        """Say of an exception in which batch, or at which `place` of the epoch, it was, and what is saved.

        None is the batch, and the epoch, in progress.
        """
        try:
            yield
        except Exception as error:
            place = place or f"batch {self.state.batch + 1} of {self.batches}"
            error.add_note(f"at epoch {epoch or self.state.epoch + 1}, {place}")
            if (self.folder / LAST).exists():
                error.add_note(
                    f"the last good checkpoint is {self.folder / LAST}: continue with --resume {self.folder}, "
                    "in Python with resume=True"
                )
            raise
