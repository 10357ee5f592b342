"""Training with the int8 weights of the export to C: a batch sees rounded ones, the optimizer changes the float ones.

    Ŵ = s · round(W / s),   s = max |W| / 127 for each output channel; in the last layer, one for all channels

The gradient by Ŵ is taken for that by W: it passes straight through the rounding. A positive factor for each output
channel, such as a BatchNorm behind the layer, does not change Ŵ / s, so its folding in the export needs nothing here.

Source: Y. Bengio, N. Léonard, A. Courville: Estimating or Propagating Gradients Through Stochastic Neurons, 2013.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

Quantised = Literal["int8"]
LARGEST = 127


@contextmanager
def round_weights(model: nn.Module) -> Iterator[None]:
    """Round the weights of convolutions and linear layers inside this block."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d)]
    weights = [m.weight for m in layers if isinstance(m.weight, nn.Parameter)]
    kept = {weight: weight.detach().clone() for weight in weights}
    with torch.no_grad():
        for weight in kept:
            weight.copy_(_round(weight, weight is weights[-1]))
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, before in kept.items():
                weight.copy_(before)


def _round(weight: Tensor, last: bool) -> Tensor:
    largest = weight.abs().amax() if last else weight.abs().flatten(1).amax(1)
    scale = (largest / LARGEST).view(-1, *[1] * (weight.ndim - 1))
    return torch.where(scale > 0, (weight / scale).round() * scale, weight)
