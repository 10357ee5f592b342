"""The exponential moving average of the weights, which is evaluated and saved in place of the weights themselves."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def averaged_model(model: nn.Module, decay: float) -> AveragedModel:
    """The network `module`, whose weights θ̄ begin as those of the model, θ.

        θ̄ ← d θ̄ + (1 − d) θ,   d = decay

    by `update_parameters`, after each step of the optimizer; running statistics of BatchNorm likewise.

    Raises:
        ValueError: the model has lazy weights, which are made by its first input.
    """
    if any(is_lazy(p) for p in model.parameters()):
        raise ValueError(
            "ema copies the weights, and lazy layers have none before their first input: run model(x) once, and "
            "then sltt.reset(model)"
        )
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    averaged.n_averaged.fill_(1)
    return averaged


def chosen(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The weights in a checkpoint to evaluate: averaged, where the training averaged them."""
    return checkpoint.get("averaged") or checkpoint["model"]
