"""Checks of a training: samples, labels, losses, gradients and weights, and layers that pass nothing on."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from sltt._torch import _BatchNorm, _NormBase
from sltt.data import Splits
from sltt.rules import SLTT, Rule, unroll
from sltt.sequence.copies import copy_model
from sltt.sequence.padding import Padded
from sltt.training.phases import Stage

SAMPLES = 5  # that are looked at before a training; a number that few other dimensions have


def extreme_layers(rates: dict[str, float]) -> list[str]:
    """Return a warning for each layer that never fired, or always, in a whole epoch."""
    lower = "lower v_threshold, or check the normalisation before it"
    extreme = {0.0: ("never", lower), 1.0: ("always", "raise v_threshold")}
    said = "layer {} {} fired in this epoch, so nothing passes it: {}".format
    return [said(name, *extreme[rate]) for name, rate in rates.items() if rate in extreme]


def rising_loss(losses: Sequence[float], rule: Rule) -> list[str]:
    """Return a warning where the last three training losses under SLTT are above the best before, by 5% at the end."""
    best, last = min(losses[:-3], default=math.inf), losses[-3:]
    least = max(0.05 * abs(best), 0.01 * abs(losses[0]))  # a loss near 0 moves by chance
    if min(last) <= best or not last[-1] - best > least or not isinstance(rule, SLTT):
        return []
    return [
        f"the training loss has risen in three epochs, from {best:.4g} to {last[-1]:.4g}. SLTT drops the gradient "
        "through time, which this network may need: use BPTT, or OTTT in less memory; else a smaller learning rate"
    ]


def check_finite(loss: float, norm: float, model: nn.Module, optim: Any, scaled: bool) -> None:
    """Raise FloatingPointError unless loss and gradients are finite; scaled gradients may overflow, and are skipped.

    The loss alone would not tell: a neuron that gets NaN is silent, and the loss behind it finite.
    """
    if math.isfinite(loss) and (scaled or math.isfinite(norm)):
        return
    rate = optim.param_groups[0]["lr"]
    remedy = f"lower the learning rate (it is {rate:.3g}) or set clip_norm"
    check_weights(model, remedy)
    cause = f"with 16-mixed use bf16-mixed, else {remedy}" if scaled else remedy
    raise FloatingPointError(f"the loss is {loss}, the norm of its gradient {norm}: {cause}")


def check_weights(model: nn.Module, remedy: str = "lower the learning rate or set clip_norm") -> None:
    """Raise FloatingPointError, with the name of the parameter, if a weight or a statistic is not finite."""
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise FloatingPointError(f"the weights of {name} are not finite any more: {remedy}")
    for name, module in model.named_modules():
        for key in ("running_mean", "running_var") if isinstance(module, _NormBase) else ():
            statistics = getattr(module, key)
            if statistics is not None and not statistics.isfinite().all():  # training goes on, as it does not read them
                raise FloatingPointError(f"the statistics {name}.{key} of BatchNorm are not finite any more: {remedy}")


def check_labels(labels: Tensor, classes: int | None, loss: Any) -> None:
    """Before they go to a GPU, where an assertion would end the process without saying which."""
    labels = labels[labels != getattr(getattr(loss, "loss", loss), "ignore_index", None)]
    if classes is None or labels.is_floating_point() or not labels.numel():
        return
    low, high = int(labels.min()), int(labels.max())
    if not 0 <= low <= high < classes:
        raise ValueError(f"labels must be in 0 … {classes - 1}, got {low} … {high}: the data is damaged")


def first_samples(splits: Splits, steps: int) -> list[Any]:
    """Training samples, which all checks share: a data set with a generator of its own draws whenever it is read.

    Raises ValueError if there is nothing to train on or to test, or if T is not that of the data.
    """
    first: list[Any] = []
    for name, most in (("test", 1), ("train", SAMPLES)):
        if (samples := getattr(splits, name)) is not None:
            if not len(samples):
                raise ValueError(f"there are no {name} samples: expected one or more")
            first = [samples[i] for i in range(min(most, len(samples)))]
            check_length(*splits.collate(first[:1]), splits, steps)
    return first


def check_length(x: Tensor, y: Any, splits: Splits, steps: int) -> None:
    """Raise ValueError for a batch of sequences [T, B, ...] whose T is not `steps`, or more than that if `Padded`."""
    if not splits.static and (len(x) > steps if isinstance(y, Padded) else len(x) != steps):
        raise ValueError(
            f"expected sequences of steps={steps} time steps, but the data gives {len(x)}: set steps={len(x)}, "
            f"or let the data load sequences of {steps}; sequences of several lengths: from_datasets(…, pad=True)"
        )


def check_samples(model: nn.Module, splits: Splits, samples: list[Any]) -> None:
    """Raise ValueError where the network takes no samples to validate by or to test on, unlike those that train it."""
    device, steps = next((p.device for p in model.parameters()), "cpu"), 1 if splits.static else None
    trained = splits.collate(samples[:1])[0]
    for name, tested in (("validation", splits.validation), ("test", splits.test)):
        x = trained if tested is None else splits.collate([tested[0]])[0]
        shape = [*x.shape[1 if splits.static else 2 :]]
        if (x.dtype, shape) == (trained.dtype, [*trained.shape[-len(shape) :]]):
            continue
        try:
            unroll(copy_model(model).eval(), x[:1].to(device), steps=steps)
        except (RuntimeError, ValueError, TypeError) as error:
            like = f"training samples are {[*trained.shape[-len(shape) :]]} of {trained.dtype}"
            raise ValueError(f"the network takes no {name} samples {shape} of {x.dtype}; {like}: {error}") from error


def check_last_batch(model: nn.Module, splits: Splits, samples: list[Any], size: int, stages: Sequence[Stage]) -> None:
    """Raise ValueError where a batch of one sample is too few for BatchNorm, before the end of an epoch shows it."""
    count = splits.sizes["train"]
    whole = math.ceil(count / size)
    most = max((stage.count_batches(whole) for stage in stages if not stage.freeze_norm), default=0)
    single = size == 1 or (most == whole and count % size == 1)
    if not most or not single or not any(isinstance(module, _BatchNorm) for module in model.modules()):
        return
    x, _ = splits.collate(samples[:1])
    x = x.to(next((p.device for p in model.parameters()), "cpu"))
    try:
        unroll(copy_model(model).train(), x if splits.static else x[:1], steps=1 if splits.static else None)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        other = next((n for n in range(max(size, 2), count + 2) if count % n != 1), None)
        remedy = f"set batch_size={other}" if other and count > 1 else "add samples"
        raise ValueError(
            f"the last of {count} training samples is a batch by itself, with batch_size={size}, and "
            f"BatchNorm needs two: {remedy}"
        ) from error
