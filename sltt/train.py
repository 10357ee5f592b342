"""Training and evaluation on Lightning Fabric, without a branch on data set or rule; the loop itself is in loop.py."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.optim.optimizer import ParamsT

from sltt.arguments import check_evaluation, check_training
from sltt.checkpoints import (
    CheckpointError,
    load_checkpoint,
    load_optimizer,
    load_weights,
    start_from,
)
from sltt.checks import choice, flag
from sltt.data import Data, Splits
from sltt.devices import Device, Precision, Strategy, make_fabric
from sltt.distributed import Processes
from sltt.groups import parameter_groups
from sltt.health import check_last_batch, checked
from sltt.kernels import Compile, using
from sltt.lifeline import Lifeline
from sltt.loading import EpochSampler, eval_loader
from sltt.loop import Loop, measure
from sltt.losses import CrossEntropyMSE, Loss
from sltt.metrics import BatchMemory, Metrics, Progress
from sltt.phases import Phase, plan
from sltt.progress import Report
from sltt.rules import SLTT, Rule
from sltt.runs import LAST, check_config, find_checkpoint, held, new_run, old_run, write_config
from sltt.schedules import Cosine, Schedule
from sltt.syncnorm import synchronise

if TYPE_CHECKING:
    from lightning_fabric import Fabric

OptimizerFactory = Callable[[ParamsT], torch.optim.Optimizer]


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
    norm_weight_decay: float | None = None,
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
        norm_weight_decay: weight decay of the parameters of BatchNorm and other normalisation, in all phases; None is
            that of the others. Decay makes the currents of spiking neurons smaller, which no normalisation makes up.
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
    check_evaluation(model, data, loss, steps, batch_size, workers, channels_last, compile)
    check_training(
        rule, optimizer, schedule, epochs, phases, clip_norm, norm_weight_decay, seed, sync_batchnorm,
        checkpoint_minutes, resume,
    )  # fmt: skip
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
    with Lifeline(fabric), using(compile=compile), ExitStack() as stack:
        processes = Processes(fabric)
        load = partial(_splits, data, processes)
        splits = load(stages[0].steps)
        check_last_batch(model, splits, batch_size, stages)
        folder = processes.first(lambda: old_run(run) if resume else new_run(run, config=config))
        if processes.rank == 0:
            stack.enter_context(held(folder))
        checkpoint = processes.first(lambda: _last(folder, config)) if resume else None
        seed_everything(seed)
        if checkpoint is None:
            start_from(model, weights)
        if sync_batchnorm:
            synchronise(model)
        net = _set_up(fabric, model, channels_last)
        optim: Any = fabric.setup_optimizers(optimizer(parameter_groups(model, norm_weight_decay)))
        loop = Loop(
            fabric=fabric,
            processes=processes,
            model=model,
            net=net,
            loss=_on_device(loss, fabric),
            optim=optim,
            initial=[(group["lr"], group.get("weight_decay", 0.0)) for group in optim.param_groups],
            schedule=schedule,
            stages=stages,
            phased=bool(phases),
            load=load,
            splits=splits,
            sampler=EpochSampler(len(splits.train), seed),  # type: ignore[arg-type]
            state=Progress(),
            epochs=epochs,
            batch_size=batch_size,
            clip_norm=clip_norm,
            scaled=precision == "16-mixed",
            channels_last=channels_last,
            seed=seed,
            workers=workers,
            checkpoint_minutes=checkpoint_minutes,
            folder=folder,
            config=config or (checkpoint or {}).get("config", {}),
            report=report,
        )
        if checkpoint is not None:
            _restore(loop, checkpoint)
        if config is not None and processes.rank == 0:
            write_config(folder, config)
        loop.run()
        path, selected = processes.first(lambda: _selected(folder))
        load_weights(model, selected, path)
        return Fit(folder, loop.state.history, loop.state.best_epoch or loop.state.epoch)


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
    mirror: bool = False,
) -> Metrics:
    """Measure a network on one of the splits, in evaluation mode and without a graph.

    Other arguments are those of `fit`.

    Args:
        split: which samples.
        mirror: take the mean logits of each image and of its mirror image, left to right (as in Krizhevsky et al.
            2012), in twice the time.

    Raises:
        ValueError: the split is empty, or `mirror` is given and the samples are no images.
    """
    check_evaluation(model, data, loss, steps, batch_size, workers, channels_last, compile)
    choice("split", split, ("train", "validation", "test"))
    flag("mirror", mirror)
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
        memory = BatchMemory(fabric.device)
        return measure(fabric, net, loader, splits, _on_device(loss, fabric), steps, channels_last, mirror, memory)


def _splits(data: Data, processes: Processes, steps: int) -> Splits:
    """The splits at T = `steps`, which all processes have to find the same."""
    splits = checked(processes.one_by_one(lambda: data.splits(steps)), steps)
    processes.check_same(splits.fingerprint, "the split of the data")
    return splits


def _set_up(fabric: "Fabric", model: nn.Module, channels_last: bool) -> Any:
    """The model on its device, for calls under the precision of the training."""
    if channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    return fabric.setup_module(model)


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


def seed_everything(seed: int) -> None:
    """Seed every global random generator."""
    from lightning_fabric import seed_everything as seed_generators

    seed_generators(seed, verbose=False)


def _last(run: Path, config: dict[str, Any] | None) -> dict[str, Any] | None:
    """The last checkpoint of a run, of the same settings; None if it stopped before the first, and so starts again."""
    if not (run / LAST).exists():
        return None
    checkpoint = load_checkpoint(run / LAST)
    check_config(run, checkpoint["config"], config)
    return checkpoint


def _restore(loop: Loop, checkpoint: dict[str, Any]) -> None:
    """Go on from a checkpoint."""
    if checkpoint["fingerprint"] != loop.splits.fingerprint:
        raise CheckpointError(
            f"the run {loop.folder} was trained on the split {checkpoint['fingerprint']}, but the data now gives "
            f"{loop.splits.fingerprint}: the samples or the settings of the data have changed"
        )
    load_weights(loop.model, checkpoint, loop.folder / LAST)
    load_optimizer(loop.optim, checkpoint["optimizer"], loop.folder / LAST)
    loop.fabric.strategy.precision.load_state_dict(checkpoint["scaler"])
    for stage, rule_state in zip(loop.stages, checkpoint["rules"], strict=False):
        stage.rule.load_state_dict(rule_state)
    loop.state = Progress(**checkpoint["progress"]).of_process(loop.processes.rank)


def _selected(run: Path) -> tuple[Path, dict[str, Any]]:
    path = find_checkpoint(run)
    return path, {"model": load_checkpoint(path)["model"]}
