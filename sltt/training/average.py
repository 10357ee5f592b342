"""The exponential moving average of the weights, which is evaluated and saved in place of the weights themselves."""

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from sltt._torch import _NormBase
from sltt.sequence.copies import copy_model


class Average:
    """The network `module`, whose weights θ̄ begin as those of a model, θ.

        θ̄ ← d θ̄ + (1 − d) θ,   d = min(decay, n / (n + 9)) in step n

    by `update`, after each step of the optimizer; running statistics of BatchNorm likewise. Other buffers are copied.
    The first steps have a smaller d, so that the average soon leaves the weights before training.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.module, self.decay, self.step = copy_model(model), decay, 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the weights of the model."""
        self.step += 1
        ours, theirs = map(_tensors_to_average, (self.module, model))
        averaged = set(map(id, ours))
        for own, other in zip(self.module.buffers(), model.buffers(), strict=True):
            if id(own) not in averaged:
                own.copy_(other)
        get_ema_multi_avg_fn(min(self.decay, self.step / (self.step + 9)))(ours, theirs, None)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Give the model the averaged weights and statistics."""
        tensors = (chain(net.parameters(), net.buffers()) for net in (model, self.module))
        for own, average in zip(*tensors, strict=True):
            own.copy_(average)


def _tensors_to_average(model: nn.Module) -> list[Tensor]:
    """List the tensors that have an average: an index or a mask in a buffer has none."""
    norms = (m for m in model.modules() if isinstance(m, _NormBase))
    tensors = [*model.parameters(), *(b for m in norms for b in m.buffers(recurse=False))]
    return [tensor for tensor in tensors if tensor.is_floating_point() or tensor.is_complex()]


def select_weights(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the weights in a checkpoint to evaluate: averaged or rounded, where the training did that."""
    return checkpoint.get("averaged") or checkpoint["model"]
