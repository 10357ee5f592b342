"""Groups of parameters for the optimizer: those of normalisation may have a weight decay of their own."""

from torch import nn
from torch.optim.optimizer import ParamsT

from sltt._torch import _NormBase

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def parameter_groups(model: nn.Module, norm_weight_decay: float | None) -> ParamsT:
    """The parameters; with `norm_weight_decay`, in two groups: all others, and those of normalisation layers.

    The second one has the key `norm`, by which the training knows that its weight decay is not that of a phase.

    Raises:
        ValueError: there is no normalisation layer with parameters.
    """
    if norm_weight_decay is None:
        return model.parameters()
    norms = [p for m in model.modules() if isinstance(m, _NORMS) for p in m.parameters()]
    if not norms:
        raise ValueError(
            "norm_weight_decay is given, but no normalisation layer of the model has parameters: leave it out"
        )
    known = {id(p) for p in norms}
    others = [p for p in model.parameters() if id(p) not in known]
    return [{"params": others}, {"params": norms, "weight_decay": norm_weight_decay, "norm": True}]
