"""Groups of parameters for the optimizer: those of normalisation may have rates of their own."""

from typing import Any

from torch import nn
from torch.optim.optimizer import ParamsT

from sltt._torch import _NormBase

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def parameter_groups(model: nn.Module, norm_weight_decay: float | None, norm_bias_lr: float = 1.0) -> ParamsT:
    """Return the parameters: all others, then those of normalisation layers as far as they have rates of their own.

    A group with the key `norm` keeps its weight decay in all phases. Its `lr_factor` multiplies its learning rate.

    Source of `norm_bias_lr`: Jordan 2024 (arXiv 2404.00498), where it is 64.

    Raises ValueError if there is no normalisation layer with parameters.
    """
    if norm_weight_decay is None and norm_bias_lr == 1:
        return model.parameters()
    norms = [m for m in model.modules() if isinstance(m, _NORMS)]
    decay: dict[str, Any] = {} if norm_weight_decay is None else {"weight_decay": norm_weight_decay, "norm": True}
    biases = [m.bias for m in norms if norm_bias_lr != 1 and isinstance(getattr(m, "bias", None), nn.Parameter)]
    own = set(map(id, biases))
    decayed = [p for m in norms if decay for p in m.parameters() if id(p) not in own]
    if not biases and (norm_bias_lr != 1 or not decayed):
        raise ValueError("norm_bias_lr needs normalisation with a bias, norm_weight_decay with weights: leave it out")
    own |= set(map(id, decayed))
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in own]},
        {"params": decayed, **decay},
        {"params": biases, **decay, "lr_factor": norm_bias_lr},
    ]
    return [groups[0], *(group for group in groups[1:] if group["params"])]
