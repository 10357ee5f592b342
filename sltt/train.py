"""Training and evaluation: one loop on Lightning Fabric, without a branch on data set or rule."""

import math
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import yaml
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sltt.analysis import FiringRates, firing_rates, process_peak, reset_process_peak
from sltt.checkpoints import (
    CheckpointError,
    load_checkpoint,
    load_weights,
    random_states,
    save_checkpoint,
    set_random_states,
    start_from,
    write_atomically,
    write_table,
)
from sltt.data import Data, Splits
from sltt.health import check_finite, check_labels, check_weights, checked, extreme_layers
from sltt.interrupt import Interrupt
from sltt.kernels import Compile, using
from sltt.loading import EpochSampler, eval_loader, train_loader
from sltt.losses import CrossEntropyMSE, Loss
from sltt.phases import Phase, Stage, plan, stage_at
from sltt.progress import Report
from sltt.rules import SLTT, Rule, unroll
from sltt.rules.base import step_loss
from sltt.runs import BEST, CONFIG, LAST, METRICS, find_checkpoint, new_run
from sltt.schedules import Cosine, Schedule

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Precision = Literal[32, "bf16-mixed", "16-mixed"]
Device = Literal["auto", "cpu", "cuda"]
OptimizerFactory = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


@dataclass
class Metrics:
    """What an epoch or an evaluation measured.

    Attributes:
        loss: mean over samples of the sequence's loss.
        accuracy: share of samples whose mean logits over time are largest for the right class.
        firing_rate: mean over all neurons and time steps.
        seconds: wall-clock time.
        peak_memory: bytes, allocated on the CUDA device or resident in the process.
        layers: firing rate of each layer of neurons.
    """

    loss: float
    accuracy: float
    firing_rate: float
    seconds: float
    peak_memory: int
    layers: dict[str, float] = field(default_factory=dict)


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
    seed: int = 0,
    workers: int = 0,
    device: Device = "auto",
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
        batch_size: samples in a batch.
        clip_norm: scale gradients down to this norm where theirs is larger.
        precision: float32, or mixed with bfloat16 or float16.
        seed: of the order of samples, augmentation, dropout, and the steps that SLTT draws.
        workers: processes that load data; 0 loads in this one.
        device: auto takes CUDA where there is a GPU.
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
        OSError: the run folder cannot be written.
    """
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"expected at least 1 epoch and 1 sample in a batch, got {epochs=} and {batch_size=}")
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"clip_norm must be greater than 0, got {clip_norm}")
    report = report or Report()
    stages = plan(phases, epochs, steps, rule)
    if stages[-1].steps != steps and phases and sum(phase.epochs for phase in phases) <= epochs:
        raise ValueError(f"steps={steps} is the T of evaluation, but the last phase trains T = {stages[-1].steps}")
    splits = checked(data.splits(stages[0].steps))
    checkpoint = _resume_point(run) if resume else None
    folder = Path(run) if resume and run is not None else new_run(run)
    fabric = make_fabric(device, precision)
    seed_everything(seed)

    if checkpoint is None:
        start_from(model, weights)
    loss = _on_device(loss, fabric)
    net, optim = fabric.setup(model, optimizer(model.parameters()))
    first = [(group["lr"], group.get("weight_decay", 0.0)) for group in optim.param_groups]
    sampler = EpochSampler(len(splits.train), seed)  # type: ignore[arg-type]
    loader = None
    batches = math.ceil(sampler.length / batch_size)
    state = _State()
    if checkpoint is not None:
        load_weights(model, checkpoint, folder / LAST)
        optim.load_state_dict(checkpoint["optimizer"])
        fabric.strategy.precision.load_state_dict(checkpoint["scaler"])
        for stage, rule_state in zip(stages, checkpoint["rules"], strict=False):
            stage.rule.load_state_dict(rule_state)
        state = _State(**checkpoint["progress"])
        _check_fingerprint(splits, checkpoint, folder)

    def save(name: str) -> None:
        check_weights(model)
        save_checkpoint(
            folder / name,
            {
                "model": model.state_dict(),
                "optimizer": optim.state_dict(),
                "scaler": fabric.strategy.precision.state_dict(),
                "rules": [stage.rule.state_dict() for stage in stages],
                "progress": vars(state),
                "random": random_states(),
                "fingerprint": splits.fingerprint,
                "config": config or {},
            },
        )

    def update() -> None:
        if clip_norm is not None:
            fabric.clip_gradients(net, optim, max_norm=clip_norm)
        optim.step()
        optim.zero_grad()

    for part in folder.glob(".*.part"):  # of a file that a killed run was writing
        part.unlink()
    if config is not None:
        write_atomically(folder / CONFIG, lambda file: file.write(yaml.safe_dump(config, sort_keys=False).encode()))
    log = _scalar_log(folder, state.history)
    saved = time.monotonic()
    if checkpoint is not None:
        set_random_states(checkpoint["random"])
    with closing(log), Interrupt() as interrupt, using(compile=compile):
        while state.epoch < epochs:
            stage = stage_at(stages, state.epoch)
            if loader is None or stage.start == state.epoch:
                if phases:
                    report.line(f"epochs {stage.start + 1} to {stage.stop}: T = {stage.steps}, {stage.rule}")
                splits = checked(data.splits(stage.steps))
                loader = train_loader(splits, batch_size, sampler, workers, pin=fabric.device.type == "cuda")
                if (
                    state.batch == 0
                    and stage is not stages[0]
                    and stage_at(stages, state.epoch - 1).steps != stage.steps
                ):
                    state.best, state.best_epoch = [], None  # accuracies at another T do not compare
            sampler.set_epoch(state.epoch, state.samples)
            began = time.monotonic() - state.seconds
            reset_process_peak(fabric.device)
            net.train()
            bar = report.bar(f"epoch {state.epoch + 1}/{epochs}", batches, done=state.batch)
            with firing_rates(model) as firing, bar as advance:
                firing.load_state_dict(state.firing)
                for x, y in loader:
                    _set_rates(optim, first, stage, schedule, state.epoch + state.batch / batches)
                    optim.zero_grad()
                    try:
                        check_labels(y, splits.classes)
                        x, y = fabric.to_device(x), fabric.to_device(y)
                        repeat = stage.steps if splits.static else None
                        out = stage.rule(net, x, y, loss, steps=repeat, backward=fabric.backward, update=update)
                        check_finite(out.loss, model, optim, scaled=precision == "16-mixed")
                    except (ValueError, FloatingPointError) as error:
                        error.add_note(f"at epoch {state.epoch + 1}, batch {state.batch + 1} of {batches}")
                        if (folder / LAST).exists():
                            error.add_note(f"the last good checkpoint is {folder / LAST}")
                        raise
                    if not stage.rule.online:
                        update()
                    state.count(out.loss, out.logits, y)
                    advance()
                    if interrupt.requested or time.monotonic() - saved > 60 * checkpoint_minutes:
                        state.seconds = time.monotonic() - began
                        state.firing = firing.state_dict()
                        save(LAST)
                        saved = time.monotonic()
                        interrupt.stop(folder)
            measured = state.metrics(firing, time.monotonic() - began, fabric.device)
            validation = _validate(fabric, net, splits, loss, stage.steps, batch_size, workers)
            row = _row(state.epoch + 1, optim, measured, validation)
            if state.end_epoch(row, validation):
                save(BEST)  # before the last: that one says that there is a best
            save(LAST)
            saved = time.monotonic()
            write_table(folder / METRICS, state.history)
            _log(log, row)
            report.row(row)
            for warning in extreme_layers(measured.layers):
                report.warn(warning)
            interrupt.stop(folder)
    write_table(folder / METRICS, state.history)  # also after a resume that had nothing left to train
    path = find_checkpoint(folder)
    load_weights(model, load_checkpoint(path), path)
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
    workers: int = 0,
    device: Device = "auto",
    compile: Compile = "auto",
) -> Metrics:
    """Measure a network on one of the splits, in evaluation mode and without a graph.

    Arguments are those of `fit`. Raises ValueError if the split is empty.
    """
    splits = data.splits(steps)
    dataset = getattr(splits, split)
    if dataset is None:
        raise ValueError("there are no validation samples: the data was loaded with validation: 0")
    if not len(dataset):
        raise ValueError(f"there are no {split} samples")
    fabric = make_fabric(device, precision)
    net = fabric.setup_module(model)
    loss = _on_device(loss, fabric)
    with using(compile=compile):
        return _measure(fabric, net, eval_loader(dataset, splits, batch_size, workers), splits, loss, steps)


def make_fabric(device: Device, precision: Precision) -> "Fabric":
    """Fabric for one device; with `16-mixed`, gradients are scaled on the CPU as they are on CUDA."""
    from lightning_fabric import Fabric  # takes seconds to import
    from lightning_fabric.plugins import MixedPrecision

    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, but PyTorch sees no CUDA device; `sltt doctor` says what it sees")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if precision == "16-mixed":
        scaler = torch.amp.GradScaler(device)
        return Fabric(accelerator=device, devices=1, plugins=[MixedPrecision("16-mixed", device, scaler)])
    return Fabric(accelerator=device, devices=1, precision=precision)


@dataclass
class _State:
    """How far the training is; saved and restored as a whole."""

    epoch: int = 0  # finished epochs
    batch: int = 0  # finished batches of the epoch in progress, and what they sum to
    loss: float = 0.0
    correct: int = 0
    samples: int = 0
    seconds: float = 0.0
    firing: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int | None = None
    best: list[float] = field(default_factory=list)

    def count(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        self.batch += 1
        self.loss += loss.item() * len(labels)
        self.correct += _correct(logits, labels)
        self.samples += len(labels)

    def metrics(self, firing: FiringRates, seconds: float, device: torch.device) -> Metrics:
        samples = max(self.samples, 1)
        return Metrics(
            self.loss / samples,
            self.correct / samples,
            firing.mean(),
            seconds,
            process_peak(device),
            firing.by_layer(),
        )

    def end_epoch(self, row: dict[str, Any], validation: Metrics | None) -> bool:
        """Start the next epoch; true if this one is the best so far by validation."""
        self.history = [*self.history, row]
        self.epoch += 1
        self.batch, self.loss, self.correct, self.samples, self.seconds, self.firing = 0, 0.0, 0, 0, 0.0, {}
        if validation is None:
            return False
        score = [validation.accuracy, -validation.loss]
        if self.best and score <= self.best:
            return False
        self.best, self.best_epoch = score, self.epoch
        return True


def _measure(fabric: "Fabric", net: Any, loader: DataLoader[Any], splits: Splits, loss: Loss, steps: int) -> Metrics:
    state = _State()
    began = time.monotonic()
    reset_process_peak(fabric.device)
    training = net.training
    net.eval()
    try:
        with firing_rates(net.module) as firing, torch.no_grad():
            for x, y in loader:
                x, y = fabric.to_device(x), fabric.to_device(y)
                logits = unroll(net, x, steps=steps if splits.static else None)
                value = torch.stack([step_loss(loss, o, y) for o in logits]).mean()
                state.count(value, logits, y)
    finally:
        net.train(training)
    return state.metrics(firing, time.monotonic() - began, fabric.device)


def _on_device(loss: Any, fabric: "Fabric") -> Any:
    """A loss may be a plain function, without weights to move."""
    return loss.to(fabric.device) if isinstance(loss, nn.Module) else loss


def _validate(
    fabric: "Fabric", net: Any, splits: Splits, loss: Loss, steps: int, batch_size: int, workers: int
) -> Metrics | None:
    if splits.validation is None:
        return None
    return _measure(fabric, net, eval_loader(splits.validation, splits, batch_size, workers), splits, loss, steps)


def _correct(logits: Tensor, labels: Tensor) -> int:
    return int((logits.mean(0).argmax(1) == labels).sum())


def _row(epoch: int, optim: Any, training: Metrics, validation: Metrics | None) -> dict[str, Any]:
    return {
        "epoch": epoch,
        "learning_rate": optim.param_groups[0]["lr"],
        "train_loss": training.loss,
        "train_accuracy": training.accuracy,
        "validation_loss": validation.loss if validation else None,
        "validation_accuracy": validation.accuracy if validation else None,
        "firing_rate": training.firing_rate,
        "seconds": training.seconds,
        "peak_memory": training.peak_memory,
    }


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


def _scalar_log(run: Path, history: list[dict[str, Any]]) -> Any:
    """TensorBoard's writer; a resumed run logs anew what its checkpoint says was trained."""
    from torch.utils.tensorboard import SummaryWriter

    log = SummaryWriter(str(run / "tensorboard"), purge_step=0)
    for row in history:
        _log(log, row)
    return log


def _log(log: Any, row: dict[str, Any]) -> None:
    for key, value in row.items():
        if value is not None:
            log.add_scalar(key, value, row["epoch"])
    log.flush()
