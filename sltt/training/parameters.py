"""Groups of parameters for the optimizer: those of normalisation may have rates of their own."""

from typing import Any

from torch import nn
from torch.optim.optimizer import ParamsT

from sltt._torch import _NormBase

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def parameter_groups(model: nn.Module, norm_weight_decay: float | None, norm_bias_lr: float = 1.0) -> ParamsT:
    """Return the parameters: all others, then those of normalisation layers as far as they have rates of their own.

    A group with the key `norm` keeps its weight decay in all phases. The learning rate of one with the key `lr_factor`
    is multiplied by it.

    Source of `norm_bias_lr`: Jordan 2024 (arXiv 2404.00498), where it is 64.

    Raises:
        ValueError: there is no normalisation layer with parameters.
    """
    if norm_weight_decay is None and norm_bias_lr == 1:
        return model.parameters()
    norms = [m for m in model.modules() if isinstance(m, _NORMS)]
    decay: dict[str, Any] = {} if norm_weight_decay is None else {"weight_decay": norm_weight_decay, "norm": True}
    biases = [m.bias for m in norms if norm_bias_lr != 1 and isinstance(getattr(m, "bias", None), nn.Parameter)]
    of_bias = set(map(id, biases))
    decayed = [p for m in norms if decay for p in m.parameters() if id(p) not in of_bias]
    for name, missing, what in (
        ("norm_bias_lr", norm_bias_lr != 1 and not biases, "a bias"),
        ("norm_weight_decay", decay and not biases and not decayed, "parameters"),
    ):
        if missing:
            raise ValueError(f"{name} is given, but no normalisation layer of the model has {what}: leave it out")
    own = of_bias | set(map(id, decayed))
    groups: list[dict[str, Any]] = [{"params": [p for p in model.parameters() if id(p) not in own]}]
    if decayed:
        groups.append({"params": decayed, **decay})
    if biases:
        groups.append({"params": biases, **decay, "lr_factor": norm_bias_lr})
    return groups
