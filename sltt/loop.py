"""The loop of a training: its stages, epochs, batches and checkpoints; and how a split is measured."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sltt.analysis import FiringRates, firing_rates
from sltt.checkpoints import save_checkpoint
from sltt.data import Splits
from sltt.distributed import Processes, whole
from sltt.files import write_table
from sltt.health import check_finite, check_labels, check_length, check_weights, extreme_layers
from sltt.interrupt import Interrupt
from sltt.loading import EpochSampler, eval_loader, seed_batch, share, train_loader, whole_epoch
from sltt.losses import Loss
from sltt.metrics import BatchMemory, Metrics, Progress, epoch_row
from sltt.phases import Stage, freeze_norm, stage_at
from sltt.progress import Report
from sltt.rules import unroll
from sltt.rules.base import step_loss
from sltt.runs import BEST, LAST, METRICS
from sltt.schedules import Schedule
from sltt.sequence.steps import check_input

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass(kw_only=True)
class Loop:
    """A training in one process: what `fit` has set up, and how far it is. Arguments not said here are those of `fit`.

    Args:
        net: the model for calls under the precision of the training.
        initial: learning rate and weight decay of each group of the optimizer at its start.
        phased: whether the training was given in phases, whose beginnings are then printed.
        load: gives the splits at T.
        state: how far the training is.
        scaled: whether a scaler of float16 finds and leaves out steps that are not finite.
        folder: of the run.
    """

    fabric: "Fabric"
    processes: Processes
    model: nn.Module
    net: Any
    loss: Loss
    optim: Any
    initial: list[tuple[float, float]]
    schedule: Schedule
    stages: list[Stage]
    phased: bool
    load: Callable[[int], Splits]
    splits: Splits
    sampler: EpochSampler
    state: Progress
    epochs: int
    batch_size: int
    clip_norm: float | None
    scaled: bool
    channels_last: bool
    seed: int
    workers: int
    checkpoint_minutes: float
    folder: Path
    config: dict[str, Any]
    report: Report
    loaders: tuple[DataLoader[Any], DataLoader[Any] | None] | None = field(init=False, default=None)
    memory: BatchMemory = field(init=False)
    saved: float = field(init=False, default_factory=time.monotonic)

    def run(self) -> None:
        """Train the epochs that are left."""
        log = _ScalarLog(self.folder, self.state.history, self.processes)
        with closing(log), Interrupt() as interrupt:
            while self.state.epoch < self.epochs:
                stage = stage_at(self.stages, self.state.epoch)
                if self.loaders is None or stage.start == self.state.epoch:
                    self.loaders = self._begin(stage)
                batches, validation = self.loaders
                training = self._epoch(stage, batches, interrupt)
                self.processes.average_statistics(self.model)
                row = self._end_epoch(training, self._validate(stage, validation))
                log(row)
                self.report.row(row)
                for warning in extreme_layers(training.layers):
                    self.report.warn(warning)
                interrupt.stop(int(self.processes.highest(interrupt.requested)), self.folder)
        if self.processes.rank == 0:
            write_table(self.folder / METRICS, self.state.history)  # also after a resume that had nothing left to train

    def _begin(self, stage: Stage) -> tuple[DataLoader[Any], DataLoader[Any] | None]:
        """Batches to train on and to validate by, in a stage, which may be in its middle.

        At another T, the best epoch is sought anew.
        """
        if self.phased:
            crop = f", crops of {stage.crop} pixels" if stage.crop else ""
            self.report.line(f"epochs {stage.start + 1} to {stage.stop}: T = {stage.steps}, {stage.rule}{crop}")
        self.splits = self.load(stage.steps)
        new = self.state.batch == 0 and self.state.epoch > 0
        if new and stage_at(self.stages, self.state.epoch - 1).steps != stage.steps:
            self.state.best, self.state.best_epoch = [], None  # accuracies at another T do not compare
        self.memory = BatchMemory(self.fabric.device, stage.rule)
        pin = self.fabric.device.type == "cuda"
        ranks = self.processes.rank, self.processes.count
        training = train_loader(self.splits, self.batch_size, self.sampler, self.workers, pin, *ranks, stage.crop)
        held_out = self.splits.validation
        if held_out is None:
            return training, None
        return training, eval_loader(held_out, self.splits, self.batch_size, self.workers, *ranks)

    def _epoch(self, stage: Stage, loader: DataLoader[Any], interrupt: Interrupt) -> Metrics:
        """Train what is left of an epoch."""
        state, batches = self.state, math.ceil(self.sampler.length / self.batch_size)
        self.sampler.set_epoch(state.epoch, min(state.batch * self.batch_size, self.sampler.length))
        began = time.monotonic() - state.seconds
        self.net.train()
        if stage.freeze_norm:
            freeze_norm(self.model)
        bar = self.report.bar(f"epoch {state.epoch + 1}/{self.epochs}", batches, done=state.batch)
        with firing_rates(self.model) as firing, bar as advance, self._located(batches):
            firing.load_state_dict(state.firing)
            for x, y in whole_epoch(loader):
                _set_rates(self.optim, self.initial, stage, self.schedule, state.epoch + state.batch / batches)
                self._batch(stage, x, y, firing)
                advance()
                due = time.monotonic() - self.saved > 60 * self.checkpoint_minutes
                if wanted := self.processes.highest(interrupt.requested or due / 2):  # a signal, or a checkpoint
                    state.seconds = time.monotonic() - began
                    state.firing = firing.state_dict()
                    self._save(LAST)
                    interrupt.stop(int(wanted), self.folder)
        state.firing = firing.state_dict()
        return state.metrics(self.processes, time.monotonic() - began, self.memory.peak)

    @contextmanager
    def _located(self, batches: int | None = None) -> Iterator[None]:
        """Say of an exception where the training was, in an epoch of so many batches or in validation, and is saved."""
        try:
            yield
        except Exception as error:
            place = "validation" if batches is None else f"batch {self.state.batch + 1} of {batches}"
            error.add_note(f"at epoch {self.state.epoch + 1}, {place}")
            if (self.folder / LAST).exists():
                error.add_note(f"the last good checkpoint is {self.folder / LAST}")
            raise

    def _batch(self, stage: Stage, x: Tensor, y: Tensor, firing: FiringRates) -> None:
        """Train a batch, or this process's share of it."""
        state, rank = self.state, self.processes.rank
        self.optim.zero_grad()
        size = min(self.batch_size, self.sampler.length - state.batch * self.batch_size)
        weight, count = share(size, rank, self.processes.count)
        seed = seed_batch(self.seed, state.epoch, state.batch)
        seed_batch(self.seed, state.epoch, state.batch, rank)
        check_labels(y, self.splits.classes)
        check_length(x, self.splits, stage.steps)
        if self.fabric.device.type != "cpu":  # where the rule does not look, since that would wait
            check_input(x)
        x, y = _on(self.fabric, x, self.channels_last), self.fabric.to_device(y)
        with _counting(firing, count):
            out = self.memory(
                lambda: stage.rule(
                    self.net,
                    x,
                    y,
                    self.loss,
                    steps=stage.steps if self.splits.static else None,
                    backward=_weighted(self.fabric, weight),
                    update=self._reduce_and_update if stage.rule.online else None,
                    seed=seed,
                ),
                full=size == min(self.batch_size, self.sampler.length),
            )
        if not stage.rule.online:
            self._reduce()
        check_finite(out.loss, self.model, self.optim, scaled=self.scaled)
        if not stage.rule.online:
            self._update()
        state.count(out.loss, out.logits, y, count)

    def _reduce(self) -> None:
        self.processes.reduce_gradients(self.model.parameters())

    def _update(self) -> None:
        if self.clip_norm is not None:
            # a scaler finds what is not finite by itself, and leaves the step out
            self.fabric.clip_gradients(
                self.net, self.optim, max_norm=self.clip_norm, error_if_nonfinite=not self.scaled
            )
        self.optim.step()
        self.optim.zero_grad()

    def _reduce_and_update(self) -> None:
        self._reduce()
        self._update()

    def _validate(self, stage: Stage, loader: DataLoader[Any] | None) -> Metrics | None:
        if loader is None:
            return None
        with self._located():
            return measure(self.fabric, self.net, loader, self.splits, self.loss, stage.steps, self.channels_last)

    def _end_epoch(self, training: Metrics, validation: Metrics | None) -> dict[str, Any]:
        """Save an epoch; returns its row in the table of metrics."""
        row = epoch_row(self.state.epoch + 1, self.optim, training, validation)
        # the best before the last: that one says that there is a best
        self._save(*[BEST] * self.state.end_epoch(row, validation), LAST)
        if self.processes.rank == 0:
            write_table(self.folder / METRICS, self.state.history)
        return row

    def _save(self, *names: str) -> None:
        check_weights(self.model)
        self.processes.average_statistics(self.model)
        content = {
            "model": whole(self.model.state_dict()),
            "optimizer": whole(self.optim.state_dict()),
            "scaler": self.fabric.strategy.precision.state_dict(),
            "rules": [stage.rule.state_dict() for stage in self.stages],
            "progress": vars(self.state.summed(self.processes)),
            "fingerprint": self.splits.fingerprint,
            "config": self.config,
        }
        for name in names if self.processes.rank == 0 else ():
            save_checkpoint(self.folder / name, content)
        self.processes.wait()  # a process that went on might end, and its launcher the first one while it writes
        self.saved = time.monotonic()


def measure(
    fabric: "Fabric",
    net: Any,
    loader: DataLoader[Any],
    splits: Splits,
    loss: Loss,
    steps: int,
    channels_last: bool,
    mirror: bool = False,
    memory: BatchMemory | None = None,
) -> Metrics:
    """Run a network over the batches of a split, in evaluation mode and without a graph.

    With `mirror`, logits are the mean of those of each image and of its mirror image. With `memory`, the first batch is
    measured.
    """
    processes = Processes(fabric)
    batches: Any = loader.batch_sampler
    state = Progress()
    began = time.monotonic()
    training = net.training
    net.eval()
    try:
        with firing_rates(net.module) as firing, torch.no_grad():
            for x, y in whole_epoch(loader):
                check_length(x, splits, steps)
                x, y = _on(fabric, x, channels_last), fabric.to_device(y)
                size = min(batches.batch_size, len(batches.sampler) - state.batch * batches.batch_size)
                _, count = share(size, processes.rank, processes.count)
                views = [x, _mirrored(x, splits.static)] if mirror else [x]
                with _counting(firing, count):
                    run = partial(_logits, net, views, steps if splits.static else None)
                    runs = memory(run) if memory else run()
                logits = torch.stack(runs).mean(0)
                value = torch.stack([step_loss(loss, o, y) for o in logits]).mean()
                state.count(value, logits, y, count)
    finally:
        net.train(training)
    state.firing = firing.state_dict()
    return state.metrics(processes, time.monotonic() - began, memory.peak if memory else None)


def _logits(net: Any, views: list[Tensor], steps: int | None) -> list[Tensor]:
    return [unroll(net, view, steps=steps) for view in views]


def _mirrored(x: Tensor, static: bool) -> Tensor:
    """Images [B, C, H, W], or with time [T, B, C, H, W], with left and right exchanged."""
    if x.ndim != (4 if static else 5):
        raise ValueError(f"mirror=True needs images [C, H, W] as samples of a time step, got a batch {list(x.shape)}")
    return x.flip(-1)


@contextmanager
def _counting(firing: FiringRates, samples: int) -> Iterator[None]:
    """Let the spikes in this block count, unless another process counts those samples."""
    before = None if samples else firing.state_dict()
    yield
    if before is not None:
        firing.load_state_dict(before)


def _on(fabric: "Fabric", x: Tensor, channels_last: bool) -> Tensor:
    """An input on the device; images channels-last if asked for: [B, C, H, W], or [T, B, C, H, W] step by step."""
    x = fabric.to_device(x)
    if channels_last and x.ndim == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if channels_last and x.ndim == 5:
        return x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, x.shape[:2])
    return x


def _weighted(fabric: "Fabric", weight: float) -> Callable[[Tensor], None]:
    """Backward of a process's mean loss, such that the gradients of all processes add up to that of the batch.

    `weight` is that of `share`.
    """
    return lambda value: fabric.backward(value * weight)


def _set_rates(
    optim: torch.optim.Optimizer, initial: list[tuple[float, float]], stage: Stage, schedule: Schedule, epoch: float
) -> None:
    """Set learning rate and weight decay at `epoch`, a fraction in the middle of one; `initial` are the optimizer's."""
    start, stop = stage.span
    factor = schedule.factor(epoch - start, stop - start)
    for group, (lr, weight_decay) in zip(optim.param_groups, initial, strict=True):
        group["lr"] = factor * (lr if stage.lr is None else stage.lr)
        if "weight_decay" in group and "norm" not in group:
            group["weight_decay"] = weight_decay if stage.weight_decay is None else stage.weight_decay


class _ScalarLog:
    """TensorBoard's writer, in the first process; a resumed run logs anew what its checkpoint says was trained."""

    def __init__(self, run: Path, history: list[dict[str, Any]], processes: Processes):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=0) if processes.rank == 0 else None
        for row in history:
            self(row)

    def __call__(self, row: dict[str, Any]) -> None:
        if self._writer is None:
            return
        for key, value in row.items():
            if value is not None:
                self._writer.add_scalar(key, value, row["epoch"])
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
