"""Measure a network on the samples of a split."""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sltt.analysis import firing_rates
from sltt.data import Splits
from sltt.losses import CrossEntropyMSE, check_loss, prediction_of, to_score
from sltt.metrics import Accuracy, Metric, check_metric, name_of
from sltt.rules import unroll
from sltt.rules.batch import sequence_loss
from sltt.sequence.modes import evaluation_mode
from sltt.training.batches import finish_loaders, share, whole_epoch
from sltt.training.progress import BatchMemory, Metrics, Progress
from sltt.training.safeguards import check_length
from sltt.training.score import Score, count_scored
from sltt.training.session import Session, session
from sltt.training.settings import Execution, setting, takes, value
from sltt.training.trained import Trained

log = logging.getLogger("sltt")
Split = Literal["train", "validation", "test"]


def check_metrics(metric: Any) -> list[Any]:
    """Return the metric, or the metrics, as a list; raise ValueError unless their names differ."""
    metrics = list(metric) if isinstance(metric, list | tuple) else [metric]
    for name in metrics:
        check_metric(name)
    if len(names := set(map(name_of, metrics))) < len(metrics) or not metrics:
        raise ValueError(f"expected one metric or several of different names, got {', '.join(names) or 'none'}")
    return metrics


@value
class Evaluation(Execution):
    """The arguments of `sltt.evaluate`."""

    split: Split = setting(default="test", kw_only=False)
    """which samples; those of the training without augmentation, where the data has them so."""
    loss: nn.Module = setting(default=CrossEntropyMSE(), check=check_loss)
    """that of the training."""
    metric: Metric | Sequence[Any] = setting(default=Accuracy(), check=check_metrics)
    """one or several. Of several, `Metrics.score` is the first, and `Metrics.scores` has all by their names. A score
    may be any value here, such as the counts of torchmetrics' `MulticlassConfusionMatrix`."""
    steps: int | None = None
    """T; None is that of the training for a network of `sltt.load`, and 4 for another."""
    mirror: bool = False
    """take the mean logits of each image and its mirror image (as in Krizhevsky et al. 2012), in twice the time."""
    shift: int = setting(default=0, least=0)
    """take the mean logits of each image, which counts half, and of two views that are moved by so many pixels, up left
    and down right, over its reflected border (as in Jordan 2024, arXiv 2404.00498), in three times the time."""


@takes(Evaluation)
def evaluate(settings: Evaluation) -> Metrics:
    """Measure a network on one of the splits, in evaluation mode and without a graph.

    Returns:
        Loss, metric, firing rates, seconds, and the peak memory of a batch in bytes.

    Raises ValueError if the split is empty, or `mirror` or `shift` is given and the samples are no images.
    """
    steps, trained = settings.steps, getattr(settings.model, "trained", None)
    if isinstance(trained, Trained):
        steps = trained.steps if steps is None else steps
        if prediction_of(settings.loss) != trained.prediction:
            said = "the loss of the training predicts by %s, and this one by %s: give evaluate that of the training"
            log.warning(said, trained.prediction, prediction_of(settings.loss))
    settings = replace(settings, steps=4 if steps is None else steps)
    with session(settings) as here:
        return measure_split(here, settings, settings.split, settings.mirror, settings.shift, memory=True)


def measure_split(
    here: Session, settings: Any, split: Split, mirror: bool = False, shift: int = 0, memory: bool = False
) -> Metrics:
    """Do as `sltt.evaluate`, in a session, with settings of a training or an evaluation; `memory` takes time."""
    model, steps, size = settings.model, settings.steps, settings.size
    splits = here.splits(settings.data, steps)
    dataset = getattr(splits, split)
    if dataset is None or not len(dataset):
        hold_out = "hold some out, as by validation=0.1"
        cause = hold_out if split == "validation" else "the data was made without; choose another split"
        raise ValueError(f"there are no {split} samples: {cause}")
    if split == "train":
        dataset = splits.unaugmented_train
    elif (trained := getattr(model, "trained", None)) and trained.split not in (None, splits.fingerprint):
        said = "the network was trained on the split %s, and this is %s of other data: it may know some of these %s "
        said += "samples, and its classes may have other numbers"
        log.warning(said, trained.split, splits.fingerprint, split)
    here = here.choose_format(model, lambda: splits.collate_of(dataset)([dataset[0]])[0], splits.static)
    loader = here.eval_loader(dataset, splits, size)
    net, loss, metrics = here.set_up(model), here.set_up_loss(settings.loss), check_metrics(settings.metric)
    peak = BatchMemory(here.fabric.device) if memory else None
    look = partial(views, static=splits.static, mirror=mirror, shift=shift)
    with finish_loaders(loader):
        return measure(here, net, loader, splits, loss, metrics, steps, look, selects=False, memory=peak)


def measure(
    here: Session,
    net: Any,
    loader: DataLoader[Any],
    splits: Splits,
    loss: nn.Module,
    metrics: Sequence[Any],
    steps: int,
    look: Callable[[Tensor], list[tuple[float, Tensor]]] = lambda x: [(1.0, x)],
    *,
    selects: bool = True,
    memory: BatchMemory | None = None,
) -> Metrics:
    """Run a network over the batches of a split, in evaluation mode and without a graph.

    Logits are the mean over what `look` makes of a batch, such as `views`, with their weights. With `memory`, the first
    batch is measured. An epoch that `selects` has scores that are numbers.
    """
    processes = here.processes
    batches: Any = loader.batch_sampler
    state = Progress()
    scores = {name_of(metric): Score(metric, processes, state, selects) for metric in metrics}
    began = time.monotonic()
    waiting = deque[Callable[[], None]]()  # the batch before, whose numbers are read while a GPU works on the next one

    def finish(read: Callable[[], list[Any]], counted: int, y: Any) -> None:
        value, *totals = read()
        for score, total in zip(scores.values(), totals, strict=True):
            score.add(total, counted)
        state.count(float(value), counted, y)

    with evaluation_mode(net), firing_rates(net.module) as firing, torch.no_grad():
        for i, (x, y) in enumerate(whole_epoch(loader)):
            check_length(x, y, splits, steps)
            x, y = here.batch(x, y, splits.per_step)
            size = min(batches.batch_size, len(batches.sampler) - i * batches.batch_size)
            _, count = share(size, processes.rank, processes.count)
            run = partial(_logits, net, look(x), steps if splits.static else None)
            fired = None if count else firing.state_dict()
            logits = memory.measure(run) if memory and memory.is_due(len(x)) else run()
            if fired is not None:  # another process counts these samples
                firing.load_state_dict(fired)
            pair, counted = to_score(loss, logits, y), count_scored(loss, y, count)
            values = [sequence_loss(loss, logits, y), *(score.measure(*pair, counted) for score in scores.values())]
            waiting.append(partial(finish, here.read_later(values), counted, y))
            while len(waiting) > (here.copies is not None):
                waiting.popleft()()
        for read_last in waiting:
            read_last()
    state.firing = firing.state_dict()
    seconds, peak = time.monotonic() - began, memory.peak if memory else None
    values = {name: score.value() for name, score in scores.items()}
    first = next(iter(values))
    return replace(state.metrics(first, values[first], processes, seconds, peak), scores=values)


def _logits(net: Any, seen: list[tuple[float, Tensor]], steps: int | None) -> Tensor:
    """Return the weighted mean over the views [B, ...] or [T, B, ...] of the logits [T, B, C]."""
    return torch.stack([weight * unroll(net, view, steps=steps) for weight, view in seen]).sum(0)


def views(x: Tensor, static: bool, mirror: bool, shift: int) -> list[tuple[float, Tensor]]:
    """Views of images [B, C, H, W], or with time [T, B, C, H, W], and their weights, whose sum is 1.

    Args:
        x: the images.
        static: without time.
        mirror: each view in its mirror image too.
        shift: two views more, moved by so many pixels; the image itself counts as much as both.

    Raises ValueError for no images, or images that are not larger than the shift.
    """
    if (mirror or shift) and x.ndim != (4 if static else 5):
        name = "mirror=True" if mirror else f"shift={shift}"
        raise ValueError(f"{name} needs images [C, H, W] as samples of a time step, got a batch {list(x.shape)}")
    weighted = [(1.0, x)]
    if shift:
        weighted = [(0.5, x), *((0.25, shift_image(x, pixels)) for pixels in (-shift, shift))]
    return [(w / 2, image) for w, view in weighted for image in (view, view.flip(-1))] if mirror else weighted


def shift_image(x: Tensor, pixels: int) -> Tensor:
    """Images [..., H, W] moved right and down, or with negative `pixels` left and up; reflected at the border."""
    flat = x.flatten(0, -4) if x.ndim > 4 else x
    padded = F.pad(flat, [abs(pixels)] * 4, mode="reflect")
    start = abs(pixels) - pixels
    return padded[..., start : start + x.shape[-2], start : start + x.shape[-1]].reshape(x.shape)
