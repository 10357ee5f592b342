"""The loop of a training: stages and epochs, what is saved of them, and what is shown."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import Any

from torch.utils.data import DataLoader

from sltt.callbacks import Callback, Moment
from sltt.data import Splits
from sltt.losses import prediction_of
from sltt.metrics import higher_is_better, name_of
from sltt.parallel.signals import Interrupt
from sltt.training.batch_loop import BatchLoop
from sltt.training.batches import EpochSampler, finish_loaders, seed_batch, train_loader
from sltt.training.checkpoints import CheckpointError, save_checkpoint
from sltt.training.console import Console
from sltt.training.description import describe
from sltt.training.evaluation import measure
from sltt.training.files import BEST, LAST
from sltt.training.learner import Learner
from sltt.training.logs import logs
from sltt.training.phases import Stage, stage_at
from sltt.training.progress import Metrics, Progress, epoch_row
from sltt.training.runs import compare_layers, describe_code, describe_layers, write_table
from sltt.training.safeguards import check_weights, extreme_layers, rising_loss
from sltt.training.trained import Trained


class Loop:
    """A training in one process: its stages, and how far it is.

    Attributes:
        splits: of the present stage; those of the data may depend on T.
        state: how far the training is.
        saved: when, on the monotonic clock.
        layers, frozen: of the network, as a checkpoint that is resumed has them.
    """

    def __init__(self, learner: Learner, splits: Splits, folder: Path, config: dict[str, Any], report: Console):
        self.learner, self.splits, self.fingerprint = learner, splits, splits.fingerprint
        self.folder, self.config, self.report = folder, config, report
        settings, self.processes = learner.settings, learner.processes
        self.settings, self.stages, self.callbacks = settings, settings.stages(), settings.callbacks or ()
        self.metric = name_of(settings.metric)
        self.sampler = EpochSampler.of(splits, settings.seed, settings.size)
        self.state, self.saved, self.rose = Progress(), time.monotonic(), False
        self.layers, self.frozen = dict[str, str](), None
        self.described = [_describe_callback(callback) for callback in self.callbacks]  # before they count

    def run(self) -> None:
        """Train the epochs that are left."""
        first = self.processes.rank == 0
        with logs(self.folder, self.settings.loggers or (), self.config, first) as log, Interrupt() as interrupt:
            self._call("on_start")
            if self.frozen is not None:
                self.learner.freeze(self.frozen)
            if other := compare_layers(self.learner.model, self.layers):
                change = "what a callback changes in layers, it changes in on_start again"
                raise CheckpointError(f"the run {self.folder} was trained with other layers: {other}; {change}")
            self._show_callbacks()
            for row in self.state.history:  # so that the log of a resumed run is whole
                log(row)
            for stage in self.stages:
                if self._is_over(stage):
                    continue
                batches, loader, validation = self._begin(stage)
                with finish_loaders(loader, validation):
                    while not self._is_over(stage):
                        training = self._epoch(batches, loader, interrupt)
                        for line in batches.launches():
                            self.report.line(line)
                        row = self._end_epoch(training, self._validate(stage, validation))
                        log(row)
                        self._show(row, training)
                        self._show_callbacks()
                        if self.state.stopped:
                            self.report.line(f"stopped after epoch {self.state.epoch}: {self.state.stopped}")
                        interrupt.stop(self.processes.highest(interrupt.requested)[0], self.folder)
        if first:  # also after a resume that had nothing left to train
            write_table(self.folder, self.state.history)

    def _epoch(self, batches: BatchLoop, loader: DataLoader[Any], interrupt: Interrupt) -> Metrics:
        """Train what is left of an epoch."""
        state, title = self.state, f"epoch {self.state.epoch + 1}/{self.settings.epochs}"
        seen, stop = (count * self.settings.size for count in (state.batch, batches.batches))
        self.sampler.set_epoch(state.epoch, seen, stop)
        began = time.monotonic() - state.seconds
        losses = batches.run(loader, state)
        bar = self.report.bar(title, batches.batches, done=state.batch)
        with bar as advance, self._locate_errors(lambda: f"batch {state.batch + 1} of {batches.batches}"):
            for loss in losses:
                if self.callbacks:
                    self._call("on_batch", loss)
                advance()
                due = time.monotonic() - self.saved > 60 * self.settings.checkpoint_minutes
                signal, due = self.processes.highest(interrupt.requested, due)
                if signal or due:
                    batches.settle()
                    state.seconds = time.monotonic() - began
                    state.firing, state.score = batches.firing.state_dict(), batches.score.state()
                    self._save(LAST)
                    interrupt.stop(signal, self.folder)
        if batches.score.partial:
            self.report.warn(
                f"train_{self.metric} of epoch {state.epoch + 1} counts the batches after the resume only: a "
                "checkpoint keeps what a metric collects if it has state_dict and load_state_dict"
            )
        state.firing = batches.firing.state_dict()
        seconds = time.monotonic() - began
        return state.metrics(self.metric, batches.score.value(), self.processes, seconds, batches.memory.peak)

    def _is_over(self, stage: Stage) -> bool:
        stopped = self.state.stopped and not self.state.batch  # a callback ends a training after the epoch
        return self.state.epoch >= stage.stop or bool(stopped and self.state.epoch)

    def _begin(self, stage: Stage) -> tuple[BatchLoop, DataLoader[Any], DataLoader[Any] | None]:
        """Return the batches of a stage, which may be in its middle, and what loads them and those to validate by.

        At another T, the best epoch is sought anew. Where the schedule starts anew, training goes on from the average.
        """
        here, state, size = self.learner.session, self.state, self.settings.size
        count = stage.count_batches(math.ceil(self.sampler.length / size))
        if self.settings.phases:
            crop = f", crops of {stage.crop} pixels" if stage.crop else ""
            part = f", {count} batches an epoch" if stage.batches else ""
            self.report.line(f"epochs {stage.start + 1} to {stage.stop}: T = {stage.steps}, {stage.rule}{crop}{part}")
        self.splits = here.splits(self.settings.dataset, stage.steps)
        new = state.batch == 0 and state.epoch > 0
        if new and stage_at(self.stages, state.epoch - 1).steps != stage.steps:
            state.best, state.best_epoch, state.first = [], None, state.epoch  # metrics at another T do not compare
        if self.learner.average and new and state.epoch == stage.start == stage.span[0]:
            self.learner.average.copy_to(self.learner.model)
        batches = BatchLoop(self.learner, stage, self.splits, self.sampler, count)
        loader = train_loader(self.splits, size, self.sampler, here.settings.workers, stage.crop, **here.place)
        held_out = self.splits.validation
        return batches, loader, None if held_out is None else here.eval_loader(held_out, self.splits, size)

    def _validate(self, stage: Stage, loader: DataLoader[Any] | None) -> Metrics | None:
        if loader is None:
            return None
        learner, arguments = self.learner, (self.splits, self.learner.loss, [self.settings.metric], stage.steps)
        seed_batch(self.settings.seed, self.state.epoch)  # a network may draw here too: the same after a resume
        with self._locate_errors(lambda: "validation"), learner.round_weights():
            return measure(learner.session, learner.averaged, loader, *arguments)

    def _end_epoch(self, training: Metrics, validation: Metrics | None) -> dict[str, Any]:
        """Save an epoch; returns its row in the table of metrics."""
        row = epoch_row(self.state.epoch + 1, self.learner.optim, training, validation)
        improved = self.state.end_epoch(row, validation, 1 if higher_is_better(self.settings.metric) else -1)
        self.state.pending = bool(self.callbacks)
        # the best before the last: that one says that there is a best
        self._save(*[BEST] * improved, LAST)
        return row

    def trained(self, epoch: int) -> Trained:
        """Return what the network has been trained on, with T of its weights' epoch."""
        steps = stage_at(self.stages, max(epoch - 1, 0)).steps
        facts = self.splits.static, self.splits.classes, prediction_of(self.settings.loss)
        return Trained(steps, *facts, self.fingerprint)

    def _save(self, *names: str) -> None:
        """Save what a training needs to go on as if it had never stopped, in the first process; refuse NaN."""
        check_weights(self.learner.model)
        classes = getattr(self.settings.dataset, "classes", ())
        content = {
            **self.learner.state_dict(),
            "rules": [stage.rule.state_dict() for stage in self.stages],
            "callbacks": [[k, c.state_dict()] for k, c in zip(self.described, self.callbacks, strict=True)],
            "progress": vars(self.state.sum_over(self.processes)),
            "task": vars(self.trained(self.state.epoch)),
            "layers": describe_layers(self.learner.model),
            "code": describe_code(self.learner.model),
            "names": [*classes] if isinstance(classes, list | tuple) else [],
            "statistics": self.splits.statistics,
            "config": self.config,
        }
        if self.processes.rank == 0:
            for name in names:
                save_checkpoint(self.folder / name, content)
            write_table(self.folder, self.state.history)
        self.processes.wait()  # a process that went on might end, and its launcher the first one while it writes
        self.saved = time.monotonic()

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Take over all that a checkpoint holds."""
        saved_callbacks = checkpoint["callbacks"]
        if (split := checkpoint["task"]["split"]) != self.fingerprint:
            raise CheckpointError(
                f"the run {self.folder} was trained on the split {split}, but the data now gives "
                f"{self.fingerprint}: restore its samples and settings, or start a new run with --weights"
            )
        if (done := checkpoint["progress"]["epoch"]) > self.settings.epochs:
            raise CheckpointError(f"the run {self.folder} has trained {done} epochs: set epochs to {done} or more")
        before, now = [name for name, _ in saved_callbacks], self.described
        if before != now:
            raise CheckpointError(
                f"the run {self.folder} was trained with callbacks {', '.join(before) or 'none'}, and is to go on with "
                f"{', '.join(now) or 'none'}: give the same ones, in Python by sltt.fit(…, callbacks=[…], resume=True)"
            )
        for stage, state in zip(self.stages, checkpoint["rules"], strict=False):
            stage.rule.load_state_dict(state)
        for c, (_, state) in zip(self.callbacks, saved_callbacks, strict=True):
            c.load_state_dict(state)
        self.state = Progress(**checkpoint["progress"])
        if self.processes.rank:  # the first takes over sums of all processes
            self.state.loss, self.state.terms, self.state.firing = 0.0, 0, {}
        self.learner.load(checkpoint, self.folder / LAST)
        self.layers, self.frozen = checkpoint["layers"], {*checkpoint["frozen"]}
        if other := compare_layers(self.learner.model, checkpoint["code"]):
            self.report.warn(f"the run {self.folder} goes on with other code: {other}")

    def _show_callbacks(self) -> None:
        """Show the last epoch to callbacks that have not seen it. It is saved: a callback that fails loses no epoch."""
        if self.state.pending:
            with self._locate_errors(lambda: "callback", self.state.epoch):
                self._call("on_epoch")
            self.state.pending = False
            self._save(LAST)

    def _show(self, row: dict[str, Any], training: Metrics) -> None:
        self.report.row(row)
        losses = [row["train_loss"] for row in self.state.history[self.state.first :]]
        rises = [] if self.rose else rising_loss(losses, stage_at(self.stages, self.state.epoch - 1).rule)
        self.rose = self.rose or bool(rises)  # which is said once
        for warning in extreme_layers(training.layers) + rises:
            self.report.warn(warning)

    def _call(self, name: str, loss: float | None = None) -> None:
        """Call a method of all callbacks; what one of them stops, in any process, ends for all after the epoch."""
        state, learner = self.state, self.learner
        done = {"epoch": state.epoch, "batch": state.batch, "history": state.history[state.first :]}
        score = {"metric": self.metric, "higher_is_better": higher_is_better(self.settings.metric)}
        now = Moment(learner.model, learner.optim, loss=loss, stopped=state.stopped, **done, **score)
        for callback in self.callbacks:
            getattr(callback, name)(now)
        state.stopped = now.stopped
        if name == "on_epoch" and self.callbacks and any(self.processes.highest(bool(state.stopped))):
            state.stopped = state.stopped or "as asked for in another process"

    @contextmanager
    def _locate_errors(self, place: Callable[[], str], epoch: int | None = None) -> Iterator[None]:
        """Say of an exception at which `place` of an epoch, None is that in progress, it was, and what is saved."""
        try:
            yield
        except Exception as error:
            error.add_note(f"at epoch {epoch or self.state.epoch + 1}, {place()}")
            if (self.folder / LAST).exists():
                error.add_note(
                    f"the last good checkpoint is {self.folder / LAST}: continue with "
                    f"--resume {quote(str(self.folder))}, in Python with resume=True"
                )
            raise


def _describe_callback(callback: Callback) -> str:
    """Return the class of a callback with its arguments."""
    arguments = {**describe(callback, [], ""), "class": type(callback).__name__}
    return f"{arguments.pop('class')}({', '.join(f'{name}={value}' for name, value in arguments.items())})"
