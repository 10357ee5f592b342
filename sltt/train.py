"""Training and evaluation: one loop on Lightning Fabric, without a branch on data set or rule."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sltt.analysis import FiringRates, firing_rates, reset_process_peak
from sltt.checkpoints import (
    CheckpointError,
    load_checkpoint,
    load_optimizer,
    load_weights,
    save_checkpoint,
    start_from,
    write_config,
    write_table,
)
from sltt.data import Data, Splits
from sltt.devices import Device, Precision, Strategy, make_fabric
from sltt.distributed import Processes, whole
from sltt.health import check_finite, check_labels, check_weights, checked, extreme_layers
from sltt.interrupt import Interrupt
from sltt.kernels import Compile, using
from sltt.lifeline import Lifeline
from sltt.loading import EpochSampler, eval_loader, seed_batch, share, train_loader
from sltt.losses import CrossEntropyMSE, Loss
from sltt.metrics import Metrics, Progress, epoch_row
from sltt.phases import Phase, Stage, plan, stage_at
from sltt.progress import Report
from sltt.rules import SLTT, Rule, unroll
from sltt.rules.base import check_input, step_loss
from sltt.runs import BEST, LAST, METRICS, find_checkpoint, new_run
from sltt.schedules import Cosine, Schedule
from sltt.syncnorm import synchronise

if TYPE_CHECKING:
    from lightning_fabric import Fabric

OptimizerFactory = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


@dataclass
class Fit:
    """A finished training: its folder, a row of metrics for each epoch, and the epoch whose weights the model has."""

    run: Path
    history: list[dict[str, Any]]
    epoch: int


def fit(
    model: nn.Module,
    data: Data,
    rule: Rule = SLTT(),
    loss: Loss = CrossEntropyMSE(),
    optimizer: OptimizerFactory = partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    schedule: Schedule = Cosine(),
    steps: int = 4,
    epochs: int = 10,
    phases: list[Phase] | None = None,
    batch_size: int = 128,
    clip_norm: float | None = None,
    precision: Precision = 32,
    channels_last: bool = False,
    seed: int = 0,
    workers: int = 0,
    device: Device = "auto",
    devices: int | None = None,
    num_nodes: int | None = None,
    strategy: Strategy = "ddp",
    sync_batchnorm: bool = False,
    compile: Compile = "auto",
    checkpoint_minutes: float = 10.0,
    weights: str | None = None,
    *,
    run: str | Path | None = None,
    resume: bool = False,
    config: dict[str, Any] | None = None,
    report: Report | None = None,
) -> Fit:
    """Train a spiking network; afterwards it has the weights of the best epoch by validation accuracy.

    Without validation samples (`validation: 0`) the last epoch counts. The test samples are not touched.

    Args:
        model: maps the input of one time step [B, ...] to logits [B, C]; its neurons keep their state.
        data: the data set and its splits.
        rule: the learning rule: SLTT, SLTT with k, BPTT, TBPTT.
        loss: loss of one time step, of logits [B, C] and labels [B].
        optimizer: makes the optimizer from the parameters.
        schedule: how the learning rate changes.
        steps: T, the number of time steps.
        epochs: passes over the training samples.
        phases: parts of the training with a T, a rule or a learning rate of their own; `steps` and `rule` hold where a
            phase says nothing, and `steps` is the T of evaluation. The best epoch is one of those with the last T.
        batch_size: samples in a batch, of all processes together: their number changes the result by rounding only.
        clip_norm: scale gradients down to this norm where theirs is larger.
        precision: float32, or mixed with bfloat16 or float16.
        channels_last: keep images and the weights of convolutions channels-last, which is faster on many devices.
        seed: of the order of samples, augmentation, dropout, and the steps that SLTT draws.
        workers: processes that load data, for each that trains; 0 loads in that one.
        device: auto takes CUDA where there is a GPU.
        devices: processes on this machine, one for each device; None is what torchrun or Slurm started, or else 1.
        num_nodes: machines; None is what torchrun or Slurm started, or else 1.
        strategy: of several processes. ddp keeps the weights whole in each and reduces the gradients once a batch;
            fsdp keeps a part of them in each, for networks that are too large for a device, and reduces the gradients
            in every backward.
        sync_batchnorm: take the statistics of BatchNorm over all processes, not over each one's share of the batch.
        compile: compile the neuron step: where it can be and pays (auto), always (on), never (off).
        checkpoint_minutes: save within an epoch too, when the last checkpoint is older than this.
        weights: start from the weights of this run, or of this checkpoint, instead of random ones.
        run: folder for checkpoints and metrics; must not exist, unless `resume`. None makes one under `runs`.
        resume: continue the run in `run`, with the same arguments; the weights end as if it had never stopped. A folder
            without a checkpoint starts from the beginning.
        config: configuration to keep in the run folder and in the checkpoints.
        report: where to print.

    Raises:
        ValueError: an argument or a batch that does not fit; the message says which and what to do.
        FloatingPointError: the loss, a gradient or a weight is not finite.
        KeyboardInterrupt: on Ctrl-C, after the batch is finished and a checkpoint saved.
        SystemExit: on SIGTERM, after the same, with the code 75.
        OSError: the run folder cannot be written.

    When another process of the training fails or dies, this one ends too, with the exit code 1.
    """
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"expected at least 1 epoch and 1 sample in a batch, got {epochs=} and {batch_size=}")
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"clip_norm must be greater than 0, got {clip_norm}")
    stages = plan(phases, epochs, steps, rule)
    if stages[-1].steps != steps and phases and sum(phase.epochs for phase in phases) <= epochs:
        raise ValueError(f"steps={steps} is the T of evaluation, but the last phase trains T = {stages[-1].steps}")
    fabric = make_fabric(device, precision, devices, num_nodes, strategy)
    if fabric.world_size > 1 and strategy == "fsdp":
        for stage in stages:
            _check_shardable(stage.rule)
    if batch_size < fabric.world_size:
        raise ValueError(f"{batch_size=} is shared by {fabric.world_size} processes: expected a sample for each")
    report = (report or Report()) if fabric.is_global_zero else Report(quiet=True)
    with Lifeline(fabric):
        processes = Processes(fabric)
        load = partial(_splits, data, processes)
        splits = load(stages[0].steps)
        checkpoint = processes.first(lambda: _resume_point(run)) if resume else None
        folder = Path(run) if resume and run is not None else processes.first(lambda: new_run(run))
        seed_everything(seed)

        if checkpoint is None:
            start_from(model, weights)
        if sync_batchnorm:
            synchronise(model)
        loss = _on_device(loss, fabric)
        net = _set_up(fabric, model, channels_last)
        optim: Any = fabric.setup_optimizers(optimizer(model.parameters()))
        first = [(group["lr"], group.get("weight_decay", 0.0)) for group in optim.param_groups]
        sampler = EpochSampler(len(splits.train), seed)  # type: ignore[arg-type]
        loader = None
        batches = math.ceil(sampler.length / batch_size)
        state = Progress()
        if checkpoint is not None:
            load_weights(model, checkpoint, folder / LAST)
            load_optimizer(optim, checkpoint["optimizer"])
            fabric.strategy.precision.load_state_dict(checkpoint["scaler"])
            for stage, rule_state in zip(stages, checkpoint["rules"], strict=False):
                stage.rule.load_state_dict(rule_state)
            state = Progress(**checkpoint["progress"]).of_process(processes.rank)
            _check_fingerprint(splits, checkpoint, folder)

        def save(*names: str) -> None:
            check_weights(model)
            processes.average_statistics(model)
            content = {
                "model": whole(model.state_dict()),
                "optimizer": whole(optim.state_dict()),
                "scaler": fabric.strategy.precision.state_dict(),
                "rules": [stage.rule.state_dict() for stage in stages],
                "progress": vars(state.summed(processes)),
                "fingerprint": splits.fingerprint,
                "config": config or {},
            }
            for name in names if processes.rank == 0 else ():
                save_checkpoint(folder / name, content)
            processes.wait()  # a process that went on might end, and its launcher the first one while it writes

        def update() -> None:
            if clip_norm is not None:
                # a scaler finds what is not finite by itself, and leaves the step out
                fabric.clip_gradients(net, optim, max_norm=clip_norm, error_if_nonfinite=precision != "16-mixed")
            optim.step()
            optim.zero_grad()

        def reduce() -> None:
            processes.reduce_gradients(model.parameters())

        def reduce_and_update() -> None:
            reduce()
            update()

        if processes.rank == 0:
            _tidy(folder, config)
        log = _ScalarLog(folder, state.history, processes)
        saved = time.monotonic()
        with closing(log), Interrupt() as interrupt, using(compile=compile):
            while state.epoch < epochs:
                stage = stage_at(stages, state.epoch)
                if loader is None or stage.start == state.epoch:
                    if phases:
                        report.line(f"epochs {stage.start + 1} to {stage.stop}: T = {stage.steps}, {stage.rule}")
                    splits = load(stage.steps)
                    pin = fabric.device.type == "cuda"
                    loader = train_loader(splits, batch_size, sampler, workers, pin, processes.rank, processes.count)
                    if (
                        state.batch == 0
                        and stage is not stages[0]
                        and stage_at(stages, state.epoch - 1).steps != stage.steps
                    ):
                        state.best, state.best_epoch = [], None  # accuracies at another T do not compare
                sampler.set_epoch(state.epoch, min(state.batch * batch_size, sampler.length))
                began = time.monotonic() - state.seconds
                reset_process_peak(fabric.device)
                net.train()
                bar = report.bar(f"epoch {state.epoch + 1}/{epochs}", batches, done=state.batch)
                with firing_rates(model) as firing, bar as advance:
                    firing.load_state_dict(state.firing)
                    for x, y in loader:
                        _set_rates(optim, first, stage, schedule, state.epoch + state.batch / batches)
                        optim.zero_grad()
                        size = min(batch_size, sampler.length - state.batch * batch_size)
                        weight, count = share(size, processes.rank, processes.count)
                        backward = _weighted(fabric, weight)
                        stage.rule.seed(seed_batch(seed, state.epoch, state.batch))
                        seed_batch(seed, state.epoch, state.batch, processes.rank)
                        try:
                            check_labels(y, splits.classes)
                            if fabric.device.type != "cpu":  # where the rule does not look, since that would wait
                                check_input(x)
                            x, y = _on(fabric, x, channels_last), fabric.to_device(y)
                            repeat = stage.steps if splits.static else None
                            with _counting(firing, count):
                                out = stage.rule(
                                    net, x, y, loss, steps=repeat, backward=backward, update=reduce_and_update
                                )
                            if not stage.rule.online:
                                reduce()
                            check_finite(out.loss, model, optim, scaled=precision == "16-mixed")
                        except (ValueError, FloatingPointError) as error:
                            error.add_note(f"at epoch {state.epoch + 1}, batch {state.batch + 1} of {batches}")
                            if (folder / LAST).exists():
                                error.add_note(f"the last good checkpoint is {folder / LAST}")
                            raise
                        if not stage.rule.online:
                            update()
                        state.count(out.loss, out.logits, y, count)
                        advance()
                        due = time.monotonic() - saved > 60 * checkpoint_minutes
                        if wanted := processes.highest(interrupt.requested or due / 2):  # a signal, or a checkpoint
                            state.seconds = time.monotonic() - began
                            state.firing = firing.state_dict()
                            save(LAST)
                            saved = time.monotonic()
                            interrupt.stop(int(wanted), folder)
                state.firing = firing.state_dict()
                measured = state.metrics(processes, time.monotonic() - began, fabric.device)
                processes.average_statistics(model)
                validation = None
                if splits.validation is not None:
                    batch = eval_loader(splits.validation, splits, batch_size, workers, processes.rank, processes.count)
                    validation = _measure(fabric, net, batch, splits, loss, stage.steps, channels_last)
                row = epoch_row(state.epoch + 1, optim, measured, validation)
                # the best before the last: that one says that there is a best
                save(*[BEST] * state.end_epoch(row, validation), LAST)
                saved = time.monotonic()
                if processes.rank == 0:
                    write_table(folder / METRICS, state.history)
                log(row)
                report.row(row)
                for warning in extreme_layers(measured.layers):
                    report.warn(warning)
                interrupt.stop(int(processes.highest(interrupt.requested)), folder)
        if processes.rank == 0:
            write_table(folder / METRICS, state.history)  # also after a resume that had nothing left to train
        path, selected = processes.first(lambda: _selected(folder))
        load_weights(model, selected, path)
        return Fit(folder, state.history, state.best_epoch or state.epoch)


def evaluate(
    model: nn.Module,
    data: Data,
    split: Literal["train", "validation", "test"] = "test",
    *,
    loss: Loss = CrossEntropyMSE(),
    steps: int = 4,
    batch_size: int = 128,
    precision: Precision = 32,
    channels_last: bool = False,
    workers: int = 0,
    device: Device = "auto",
    devices: int | None = None,
    num_nodes: int | None = None,
    strategy: Strategy = "ddp",
    compile: Compile = "auto",
) -> Metrics:
    """Measure a network on one of the splits, in evaluation mode and without a graph.

    Arguments are those of `fit`. Raises ValueError if the split is empty.
    """
    fabric = make_fabric(device, precision, devices, num_nodes, strategy)
    with Lifeline(fabric), using(compile=compile):
        processes = Processes(fabric)
        splits = processes.one_by_one(lambda: data.splits(steps))
        dataset = getattr(splits, split)
        if dataset is None:
            raise ValueError("there are no validation samples: the data was loaded with validation: 0")
        if not len(dataset):
            raise ValueError(f"there are no {split} samples")
        net = _set_up(fabric, model, channels_last)
        loader = eval_loader(dataset, splits, batch_size, workers, processes.rank, processes.count)
        return _measure(fabric, net, loader, splits, _on_device(loss, fabric), steps, channels_last)


def _measure(
    fabric: "Fabric", net: Any, loader: DataLoader[Any], splits: Splits, loss: Loss, steps: int, channels_last: bool
) -> Metrics:
    processes = Processes(fabric)
    batches: Any = loader.batch_sampler
    state = Progress()
    began = time.monotonic()
    reset_process_peak(fabric.device)
    training = net.training
    net.eval()
    try:
        with firing_rates(net.module) as firing, torch.no_grad():
            for x, y in loader:
                x, y = _on(fabric, x, channels_last), fabric.to_device(y)
                size = min(batches.batch_size, len(batches.sampler) - state.batch * batches.batch_size)
                _, count = share(size, processes.rank, processes.count)
                with _counting(firing, count):
                    logits = unroll(net, x, steps=steps if splits.static else None)
                value = torch.stack([step_loss(loss, o, y) for o in logits]).mean()
                state.count(value, logits, y, count)
    finally:
        net.train(training)
    state.firing = firing.state_dict()
    return state.metrics(processes, time.monotonic() - began, fabric.device)


@contextmanager
def _counting(firing: FiringRates, samples: int) -> Iterator[None]:
    """Let the spikes in this block count, unless another process counts those samples."""
    before = None if samples else firing.state_dict()
    yield
    if before is not None:
        firing.load_state_dict(before)


def _splits(data: Data, processes: Processes, steps: int) -> Splits:
    """The splits at T = `steps`, which all processes have to find the same."""
    splits = checked(processes.one_by_one(lambda: data.splits(steps)))
    processes.check_same(splits.fingerprint, "the split of the data")
    return splits


def _set_up(fabric: "Fabric", model: nn.Module, channels_last: bool) -> Any:
    """The model on its device, for calls under the precision of the training."""
    if channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    return fabric.setup_module(model)


def _on(fabric: "Fabric", x: Tensor, channels_last: bool) -> Tensor:
    """An input on the device; images channels-last if asked for: [B, C, H, W], or [T, B, C, H, W] step by step."""
    x = fabric.to_device(x)
    if channels_last and x.ndim == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if channels_last and x.ndim == 5:
        return x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, x.shape[:2])
    return x


def _on_device(loss: Any, fabric: "Fabric") -> Any:
    """A loss may be a plain function, without weights to move."""
    return loss.to(fabric.device) if isinstance(loss, nn.Module) else loss


def _check_shardable(rule: Rule) -> None:
    """Raise ValueError for a rule that fsdp cannot run: weights are there only while their layer runs."""
    problems = {
        "recompute=True runs layers again in the backward of others": getattr(rule, "recompute", None) is True,
        "hoist=True runs the backward of the first layers after the others": rule.hoist,
        "fold='auto' would choose another fold in each process": getattr(rule, "fold", None) == "auto",
    }
    for why, found in problems.items():
        if found:
            raise ValueError(f"{rule} does not run under fsdp, since {why}: use ddp")


def _weighted(fabric: "Fabric", weight: float) -> Callable[[Tensor], None]:
    """Backward of a process's mean loss, such that the gradients of all processes add up to that of the batch.

    `weight` is that of `share`.
    """
    return lambda value: fabric.backward(value * weight)


def _set_rates(
    optim: torch.optim.Optimizer, first: list[tuple[float, float]], stage: Stage, schedule: Schedule, epoch: float
) -> None:
    """Set learning rate and weight decay at `epoch`, a fraction in the middle of one; `first` are the optimizer's."""
    start, stop = stage.span
    factor = schedule.factor(epoch - start, stop - start)
    for group, (lr, weight_decay) in zip(optim.param_groups, first, strict=True):
        group["lr"] = factor * (lr if stage.lr is None else stage.lr)
        if "weight_decay" in group:
            group["weight_decay"] = weight_decay if stage.weight_decay is None else stage.weight_decay


def seed_everything(seed: int) -> None:
    """Seed every global random generator."""
    from lightning_fabric import seed_everything as seed_generators

    seed_generators(seed, verbose=False)


def _resume_point(run: str | Path | None) -> dict[str, Any] | None:
    """The last checkpoint of a run; None if it stopped before the first, and so starts again."""
    if run is None:
        raise ValueError("resume=True needs the folder of the run to continue: run=...")
    path = Path(run) / LAST
    return load_checkpoint(path) if path.exists() else None


def _check_fingerprint(splits: Splits, checkpoint: dict[str, Any], run: Path) -> None:
    if checkpoint["fingerprint"] != splits.fingerprint:
        raise CheckpointError(
            f"the run {run} was trained on the split {checkpoint['fingerprint']}, but the data now gives "
            f"{splits.fingerprint}: the samples or the settings of the data have changed"
        )


def _tidy(run: Path, config: dict[str, Any] | None) -> None:
    """Remove what a killed run was writing, and write the configuration."""
    for part in run.glob(".*.part"):
        part.unlink()
    if config is not None:
        write_config(run, config)


def _selected(run: Path) -> tuple[Path, dict[str, Any]]:
    path = find_checkpoint(run)
    return path, {"model": load_checkpoint(path)["model"]}


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
