"""The exponential moving average of the weights, which is evaluated and saved in place of the weights themselves."""

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sltt._torch import _NormBase
from sltt.sequence.copies import copy_model


def make_average(model: nn.Module, decay: float) -> AveragedModel:
    """Return the network `module`, whose weights θ̄ begin as those of the model, θ.

        θ̄ ← d θ̄ + (1 − d) θ,   d = min(decay, n / (n + 9)) in step n

    by `update_parameters`, after each step of the optimizer; running statistics of BatchNorm likewise. Other buffers
    are copied. The first steps have a smaller d, so that the average soon leaves the weights before training.

    Raises:
        ValueError: the model has lazy weights, which are made by its first input.
    """
    if any(is_lazy(p) for p in model.parameters()):
        raise ValueError(
            "ema copies the weights, and lazy layers have none before their first input: run model(x) once, and "
            "then sltt.reset(model)"
        )

    def move(averages: Any, weights: Any, on_device: Any) -> None:
        step = averaged.n_averaged.item()  # lies on the CPU; to read `on_device` would wait for a GPU
        moving = {tensor.data_ptr() for tensor in _tensors_to_average(averaged.module)}
        moved: list[tuple[Tensor, Tensor]] = []
        for average, weight in zip(averages, weights, strict=True):
            if average.data_ptr() in moving:
                moved.append((average, weight))
            else:
                average.copy_(weight)
        if moved:
            ours, theirs = ([pair[i] for pair in moved] for i in (0, 1))
            get_ema_multi_avg_fn(min(decay, step / (step + 9)))(ours, theirs, on_device)

    averaged = AveragedModel(copy_model(model), multi_avg_fn=move, use_buffers=True)
    averaged.n_averaged.fill_(1)  # at 0, it would copy the weights in the first step
    return averaged


@torch.no_grad()
def take_average(model: nn.Module, averaged: AveragedModel) -> None:
    """Give the model the averaged weights and statistics."""
    tensors = (chain(one.parameters(), one.buffers()) for one in (model, averaged.module))
    for own, average in zip(*tensors, strict=True):
        own.copy_(average)


def _tensors_to_average(model: nn.Module) -> list[Tensor]:
    """List the tensors that have an average: an index or a mask in a buffer has none."""
    norms = (m for m in model.modules() if isinstance(m, _NormBase))
    return [*model.parameters(), *(b for m in norms for b in m.buffers(recurse=False) if b.is_floating_point())]


def select_weights(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the weights in a checkpoint to evaluate: averaged or rounded, where the training did that."""
    return checkpoint.get("averaged") or checkpoint["model"]
