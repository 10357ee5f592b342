"""The loop of a training: stages, epochs, batches."""

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sltt.analysis import FiringRates
from sltt.callbacks import Moment
from sltt.data import Data, Splits
from sltt.losses import is_per_step, prediction_of, to_score
from sltt.metrics import higher_is_better, improves, name_of
from sltt.parallel.processes import synchronise
from sltt.parallel.signals import Interrupt
from sltt.rules import Output
from sltt.rules.diagnosis import check_reached
from sltt.sequence.layout import last_fold, spiking_layers
from sltt.sequence.padding import Padded, target_of
from sltt.sequence.spikes import observe_spikes
from sltt.sequence.steps import check_input
from sltt.training.average import Average
from sltt.training.batches import (
    Ahead,
    EpochSampler,
    count_parts,
    cut,
    finish_loaders,
    join_outputs,
    seed_batch,
    seed_everything,
    share,
    train_loader,
    whole_epoch,
)
from sltt.training.checkpoints import save_state
from sltt.training.console import Console
from sltt.training.evaluation import measure
from sltt.training.graphs import make_graphs
from sltt.training.logs import logs
from sltt.training.manifest import BEST, LAST
from sltt.training.parameters import parameter_groups
from sltt.training.phases import Stage, freeze_norm, set_rates, stage_at
from sltt.training.progress import BatchMemory, Metrics, Progress, epoch_row
from sltt.training.quantised import round_weights
from sltt.training.runs import write_table
from sltt.training.safeguards import check_finite, check_labels, check_length, extreme_layers, long_warmup
from sltt.training.score import Score, count_scored
from sltt.training.session import Session
from sltt.training.settings import Settings


@dataclass(eq=False)
class Loop:
    """A training in one process: what is set up for it, and how far it is.

    Attributes:
        splits: of the present stage; those of the data may depend on T.
        net: the network for calls under the precision of the session.
        average: of the weights, where the training has one.
        averaged: the network with these, for such calls; else `net`.
        state: how far the training is.
        saved: when, on the monotonic clock.
    """

    session: Session
    settings: Settings
    model: nn.Module
    data: Data
    splits: Splits
    folder: Path
    config: dict[str, Any]
    report: Console

    def __post_init__(self) -> None:
        session, settings, model, splits = self.session, self.settings, self.model, self.splits
        seed_everything(settings.seed)
        self.processes, self.fingerprint = session.processes, splits.fingerprint
        if session.settings.sync_batchnorm and self.processes.count > 1:
            synchronise(model)
        self.net = session.set_up(model)
        self.spiking = spiking_layers(model)
        self.average = None if settings.ema is None else Average(model, settings.ema)
        groups = parameter_groups(model, settings.norm_weight_decay, settings.norm_bias_lr)
        self.optim: Any = session.fabric.setup_optimizers(settings.optimizer(groups))
        self.averaged = session.set_up(self.average.module) if self.average else self.net
        self.loss = session.set_up_loss(settings.loss)
        self.stages, self.callbacks = settings.stages(), settings.callbacks or ()
        self.metric = name_of(settings.metric)
        self.sampler = EpochSampler.of(splits, settings.seed, settings.batch_size)
        self.scaled = session.settings.precision == "16-mixed"  # a scaler leaves out steps that are not finite
        self.initial = [(group["lr"], group.get("weight_decay", 0.0)) for group in self.optim.param_groups]
        self.state, self.saved = Progress(), time.monotonic()

    def run(self) -> None:
        """Train the epochs that are left."""
        first = self.processes.rank == 0
        with logs(self.folder, self.settings.loggers or (), self.config, first) as log, Interrupt() as interrupt:
            self._show_callbacks()
            if warning := long_warmup(self.settings.schedule, self.stages):
                self.report.warn(warning)
            for row in self.state.history:  # so that the log of a resumed run is whole
                log(row)
            for stage in self.stages:
                if self._is_over(stage):
                    continue
                batches, validation = self._begin(stage)
                with finish_loaders(batches, validation):
                    told = False
                    while not self._is_over(stage):
                        training = self._epoch(stage, batches, interrupt)
                        told = told or self._tell_launches(stage)
                        row = self._end_epoch(training, self._validate(stage, validation))
                        log(row)
                        self._show(row, training)
                        interrupt.stop(int(self.processes.highest(interrupt.requested)), self.folder)
        self._write_table()  # also after a resume that had nothing left to train

    def _epoch(self, stage: Stage, loader: DataLoader[Any], interrupt: Interrupt) -> Metrics:
        """Train what is left of an epoch."""
        state = self.state
        seen, stop = (count * self.settings.batch_size for count in (state.batch, self.batches))
        self.sampler.set_epoch(state.epoch, seen, stop)
        began = time.monotonic() - state.seconds
        self.score = Score(self.settings.metric, self.processes, state)
        if self.score.partial:
            self.report.warn(
                f"train_{self.metric} of epoch {state.epoch + 1} counts the batches after the resume only: a "
                "checkpoint keeps what a metric collects if it has state_dict and load_state_dict"
            )
        self.net.train()
        if stage.freeze_norm:
            freeze_norm(self.model)
        bar = self.report.bar(f"epoch {state.epoch + 1}/{self.settings.epochs}", self.batches, done=state.batch)
        firing = FiringRates(list(self.spiking))
        firing.load_state_dict(state.firing)
        with bar as advance, self._locate_errors():
            self.ahead = Ahead(self._prepare(stage, whole_epoch(loader)))
            for x, y, real in self.ahead:
                epoch = state.epoch + state.batch / self.batches
                set_rates(self.optim, self.initial, stage, self.settings.schedule, epoch)
                self._batch(stage, x, y, real, firing)
                self.fold = self.fold or last_fold(self.net)  # of a full batch: the last one may be smaller
                advance()
                due = time.monotonic() - self.saved > 60 * self.settings.checkpoint_minutes
                if wanted := self.processes.highest(interrupt.requested or due / 2):  # a signal, or a checkpoint
                    state.seconds = time.monotonic() - began
                    state.firing, state.score = firing.state_dict(), self.score.state()
                    save_state(self, LAST)
                    interrupt.stop(int(wanted), self.folder)
        state.firing = firing.state_dict()
        seconds = time.monotonic() - began
        return self.score.of(state.metrics(self.metric, self.processes, seconds, self.memory.peak))

    def _count_batches(self, epoch: int) -> int:
        return stage_at(self.stages, epoch).count_batches(math.ceil(self.sampler.length / self.settings.batch_size))

    @property
    def trained_batches(self) -> int:
        """Return the number of batches that were trained, in all epochs."""
        return sum(map(self._count_batches, range(self.state.epoch))) + self.state.batch

    def _prepare(self, stage: Stage, batches: Iterator[Any]) -> Iterator[tuple[Tensor, Tensor | Padded, float]]:
        """Yield batches, checked and on the device, and the share of a padded batch's real steps that is here."""
        for x, y in batches:
            check_labels(target_of(y), self.splits.classes)
            check_length(x, y, self.splits, stage.steps)
            if self.session.fabric.device.type != "cpu":  # where the rule does not look, since that would wait
                check_input(x)
            real = y.steps / self.processes.sum([y.steps])[0] if isinstance(y, Padded) else 1.0
            yield *self.session.batch(x, y, self.splits.per_step), real

    def _batch(self, stage: Stage, x: Tensor, y: Tensor | Padded, real: float, firing: FiringRates) -> None:
        """Train a batch, or this process's share of it; see `_prepare`."""
        state, rule, rank, processes = self.state, stage.rule, self.processes.rank, self.processes.count
        self.optim.zero_grad()
        largest = min(self.settings.batch_size, self.sampler.length)
        size = min(largest, self.sampler.length - state.batch * self.settings.batch_size)
        weight, count = share(size, rank, processes)
        drawn = seed_batch(self.settings.seed, state.epoch, state.batch)  # of the rule, in all processes alike
        seed_batch(self.settings.seed, state.epoch, state.batch, rank)
        if isinstance(y, Padded):
            weight = real
        static, per_step, carried = self.splits.static, is_per_step(self.loss), rule.state_dict()

        def iteration(x: Tensor, y: Tensor | Padded) -> tuple[Output, FiringRates]:
            parts = cut(x, y, count_parts(self.settings.accumulate, size, processes), static=static, per_step=per_step)
            outs = []
            # outside of calls of the network, so that its casts of weights last for all of them
            casts = torch.autocast(self.session.fabric.device.type, enabled=False)
            with casts, observe_spikes(self.spiking, FiringRates(list(self.spiking))) as seen:
                for part in parts:
                    rule.load_state_dict(carried)  # each part draws the same time steps
                    out = rule(
                        *(self.net, part.x, part.y, self.loss),
                        steps=stage.steps if static else None,
                        backward=partial(self._backward, weight * part.weight),
                        update=self._reduce_and_update if rule.online else None,
                        seed=drawn,
                        mean_logits=prediction_of(self.loss) == "mean" and not isinstance(y, Padded),
                    )
                    outs.append(out)
                seen.settle()
            return join_outputs(outs, parts), seen

        run = partial(iteration, x, y)
        if self.graphs and not self.graphs.problem and size == largest:  # the last batch of an epoch may be smaller
            run = partial(self.graphs, iteration, x, y, rule.draw(stage.steps, drawn))
        with self.round_weights():
            due = self.memory.is_due(len(x), full=size == largest)
            out, seen = self.memory.measure(run) if due else run()
        if count:
            firing.add(seen)
        if not rule.online:
            self._reduce()
            check_reached(self.model)
        self.ahead.fetch()  # a GPU has work, and next the host waits for it
        check_finite(out.loss, self.model, self.optim, scaled=self.scaled)
        counted = count_scored(self.loss, y, count)
        # before the update, so that a GPU runs that while the host prepares the next batch
        loss, score = out.loss.item(), self.score.batch(*to_score(self.loss, out.logits, y), counted)
        if not rule.online:
            self._update()
        self.processes.average_statistics(self.model)
        state.count(loss, score, counted, y)
        if self.average:
            self.average.update(self.model)
        if self.callbacks:
            self._call("on_batch", loss)

    def round_weights(self) -> AbstractContextManager[None]:
        """Round the weights inside a block, in a training that is quantised."""
        return round_weights(self.model) if self.settings.quantised else nullcontext()

    def _backward(self, weight: float, loss: Tensor) -> None:
        """Backpropagate, such that the gradients of all parts and processes add up to that of the batch."""
        self.session.fabric.backward(loss * weight)

    def _reduce(self) -> None:
        self.processes.reduce_gradients(self.model.parameters())

    def _update(self) -> None:
        if (most := self.settings.clip_norm) is not None:
            # a scaler finds what is not finite by itself, and leaves the step out
            self.session.fabric.clip_gradients(self.net, self.optim, max_norm=most, error_if_nonfinite=not self.scaled)
        self.optim.step()
        self.optim.zero_grad()

    def _reduce_and_update(self) -> None:
        self._reduce()
        self._update()

    def _tell_launches(self, stage: Stage) -> bool:
        """Say how many time steps share a call of the network, or why none do; and why batches are no CUDA graphs."""
        fold = self.fold if stage.rule.fold == "auto" else None
        if fold and fold.trained > 1:
            self.report.line(f"{fold.trained} of {stage.steps} time steps share a call of the network")
        if fold and fold.why:
            self.report.line(f"time steps run one by one, since the network {fold.why}")
        if self.graphs and self.graphs.problem:
            self.report.line(f"batches run without a CUDA graph, since {self.graphs.problem}")
        return True

    def _is_over(self, stage: Stage) -> bool:
        stopped = self.state.stopped and not self.state.batch  # a callback ends a training after the epoch
        return self.state.epoch >= stage.stop or bool(stopped)

    def _begin(self, stage: Stage) -> tuple[DataLoader[Any], DataLoader[Any] | None]:
        """Batches to train on and to validate by, in a stage, which may be in its middle.

        At another T, the best epoch is sought anew. Where the schedule starts anew, training goes on from the average.
        """
        self.batches = self._count_batches(stage.start)
        if self.settings.phases:
            crop = f", crops of {stage.crop} pixels" if stage.crop else ""
            part = f", {self.batches} batches an epoch" if stage.batches else ""
            self.report.line(f"epochs {stage.start + 1} to {stage.stop}: T = {stage.steps}, {stage.rule}{crop}{part}")
        self.splits = self.session.splits(self.data, stage.steps)
        new = self.state.batch == 0 and self.state.epoch > 0
        if new and stage_at(self.stages, self.state.epoch - 1).steps != stage.steps:
            # metrics at another T do not compare
            self.state.best, self.state.best_epoch, self.state.first = [], None, self.state.epoch
        if self.average and new and self.state.epoch == stage.start == stage.span[0]:
            self.average.copy_to(self.model)
        device, size, held_out = self.session.fabric.device, self.settings.batch_size, self.splits.validation
        self.memory = BatchMemory(device)
        self.fold = None
        self.graphs = make_graphs(self.session, self.model, stage.rule, stage.steps, self.callbacks)
        workers, ranks = self.session.settings.workers, (self.processes.rank, self.processes.count)
        batches = train_loader(self.splits, size, self.sampler, workers, device, *ranks, crop=stage.crop)
        return batches, None if held_out is None else self.session.eval_loader(held_out, self.splits, size)

    def _validate(self, stage: Stage, loader: DataLoader[Any] | None) -> Metrics | None:
        if loader is None:
            return None
        with self._locate_errors("validation"), self.round_weights():
            return measure(
                self.session, self.averaged, loader, self.splits, self.loss, [self.settings.metric], stage.steps
            )

    def _end_epoch(self, training: Metrics, validation: Metrics | None) -> dict[str, Any]:
        """Save an epoch; returns its row in the table of metrics."""
        row = epoch_row(self.state.epoch + 1, self.optim, training, validation)
        quality = improves(self.settings.metric, validation.score) if validation else 0.0
        improved = self.state.end_epoch(row, validation, quality)
        self.state.pending = bool(self.callbacks)
        # the best before the last: that one says that there is a best
        self._save(*[BEST] * improved, LAST)
        self._show_callbacks()
        return row

    def _show_callbacks(self) -> None:
        """Show the last epoch to callbacks that have not seen it. It is saved: a callback that fails loses no epoch."""
        if self.state.pending:
            with self._locate_errors("callback", self.state.epoch):
                self._call("on_epoch")
            self.state.pending = False
            self._save(LAST)

    def _save(self, *names: str) -> None:
        save_state(self, *names)
        self._write_table()

    def _show(self, row: dict[str, Any], training: Metrics) -> None:
        self.report.row(row)
        for warning in extreme_layers(training.layers):
            self.report.warn(warning)
        if self.state.stopped:
            self.report.line(f"stopped after epoch {self.state.epoch}: {self.state.stopped}")

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
            higher_is_better=higher_is_better(self.settings.metric),
            stopped=state.stopped,
        )
        for callback in self.callbacks:
            getattr(callback, name)(now)
        state.stopped = now.stopped
        if name == "on_epoch" and self.callbacks and self.processes.highest(bool(state.stopped)):
            state.stopped = state.stopped or "as asked for in another process"

    def _write_table(self) -> None:
        if self.processes.rank == 0:
            write_table(self.folder, self.state.history)

    @contextmanager
    def _locate_errors(self, place: str | None = None, epoch: int | None = None) -> Iterator[None]:
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
                    f"the last good checkpoint is {self.folder / LAST}: continue with "
                    f"--resume {quote(str(self.folder))}, in Python with resume=True"
                )
            raise
