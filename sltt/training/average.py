"""The exponential moving average of the weights, which is evaluated and saved in place of the weights themselves."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class Average:
    """θ̄ ← d θ̄ + (1 − d) θ after each step of the optimizer; running statistics of BatchNorm likewise.

    Args:
        model: the network, on its device; θ̄ begins as its weights.
        decay: d.

    Raises:
        ValueError: the model has lazy weights, which are made by its first input.
    """

    def __init__(self, model: nn.Module, decay: float):
        if any(is_lazy(p) for p in model.parameters()):
            raise ValueError(
                "ema copies the weights, and lazy layers have none before their first input: run model(x) once, and "
                "then sltt.reset(model)"
            )
        self._averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
        self._averaged.n_averaged.fill_(1)

    @property
    def model(self) -> nn.Module:
        """A network with the averaged weights."""
        return self._averaged.module

    def update(self, model: nn.Module) -> None:
        """Take the weights of the model into the average."""
        self._averaged.update_parameters(model)


def chosen(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The weights in a checkpoint to evaluate: averaged, where the training averaged them."""
    return checkpoint.get("averaged") or checkpoint["model"]
