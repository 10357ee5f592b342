"""Checks of a training: samples, labels, losses, gradients and weights, and layers that pass nothing on."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from sltt.data import Splits
from sltt.distributed import local, total


def extreme_layers(rates: dict[str, float]) -> list[str]:
    """A warning for each layer that never fired, or always, in a whole epoch."""
    cause = {0.0: "never", 1.0: "always"}
    remedy = {0.0: "lower v_threshold, or check the normalisation before it", 1.0: "raise v_threshold"}
    return [
        f"layer {name} {cause[rate]} fired in this epoch, so nothing passes it: {remedy[rate]}"
        for name, rate in rates.items()
        if rate in cause
    ]


def check_finite(loss: Tensor, model: nn.Module, optim: Any, scaled: bool) -> None:
    """Raise FloatingPointError unless loss and gradients are finite; scaled gradients may overflow, and are skipped.

    The loss alone would not tell: a neuron that gets NaN is silent, and the loss behind it finite.
    """
    norm = total(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
    if math.isfinite(loss.item()) and (scaled or math.isfinite(norm.item())):
        return
    rate = optim.param_groups[0]["lr"]
    remedy = f"lower the learning rate (it is {rate:.3g}) or set clip_norm"
    check_weights(model, remedy)
    cause = f"with 16-mixed use bf16-mixed, else {remedy}" if scaled else remedy
    raise FloatingPointError(f"the loss is {loss.item()}, the norm of its gradient {norm.item()}: {cause}")


def check_weights(model: nn.Module, remedy: str = "lower the learning rate or set clip_norm") -> None:
    """Raise FloatingPointError, with the name of the parameter, if a weight is not finite."""
    for name, parameter in model.named_parameters():
        if not local(parameter).isfinite().all():
            raise FloatingPointError(f"the weights of {name} are not finite any more: {remedy}")


def check_labels(labels: Tensor, classes: int) -> None:
    """Before they go to a GPU, where an assertion would end the process without saying which."""
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(
            f"labels must be in 0 … {classes - 1}, got {int(labels.min())} … {int(labels.max())}: the data is damaged"
        )


def checked(splits: Splits) -> Splits:
    """The splits; raises ValueError if there is nothing to train on or to test."""
    for name in ("train", "test"):
        if not len(getattr(splits, name)):
            raise ValueError(f"there are no {name} samples")
    return splits
