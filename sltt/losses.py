"""Losses of one time step: `loss(logits [B, C], target [B]) -> scalar`. The rules divide by T."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sltt.checks import flag, instance, number


class Loss(nn.Module):
    """What a recipe may name as its loss; in Python any callable of the same form serves."""


class CrossEntropyMSE(Loss):
    """ℓ(o, y) = (1 − α) CE(o, y) + α MSE(o, m): the loss of the SLTT paper (Meng et al. 2023).

    m is the constant 1.0 for every class, or the one-hot vector of y.

    Args:
        alpha: share of the mean squared error, in [0, 1].
        one_hot: m is the one-hot vector of y, as for DVS-CIFAR10; else the constant 1.0.
        label_smoothing: smoothing of the cross entropy's target, in [0, 1).
    """

    def __init__(self, alpha: float = 0.05, one_hot: bool = False, label_smoothing: float = 0.0):
        super().__init__()
        self.alpha = number("alpha", alpha, least=0, most=1)
        self.one_hot = flag("one_hot", one_hot)
        self.label_smoothing = number("label_smoothing", label_smoothing, least=0, below=1)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Logits o [B, C] and class indices y [B] to a scalar.

        Raises ValueError for labels outside 0 … C − 1, on the CPU; on other devices, where looking at the labels
        would wait for the device at every step, PyTorch's own assertion fires.
        """
        _check_labels(logits, target)
        loss = F.cross_entropy(logits, target, label_smoothing=self.label_smoothing)
        if self.alpha == 0:
            return loss
        goal = F.one_hot(target, logits.shape[1]).to(logits.dtype) if self.one_hot else torch.ones_like(logits)
        return (1 - self.alpha) * loss + self.alpha * F.mse_loss(logits, goal)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, one_hot={self.one_hot}, label_smoothing={self.label_smoothing}"


def _check_labels(logits: Tensor, target: Tensor) -> None:
    instance("logits", logits, Tensor)
    instance("target", target, Tensor)
    if logits.ndim != 2 or target.shape != logits.shape[:1]:
        raise ValueError(
            f"expected logits [B, C] and labels [B], got {list(logits.shape)} and {list(target.shape)}; "
            "end the model with nn.Flatten() and a linear layer"
        )
    if target.dtype != torch.int64:
        raise ValueError(f"labels must be class indices in int64, got {target.dtype}; use target.long()")
    if (
        target.device.type == "cpu"
        and len(target)
        and not 0 <= int(target.min()) <= int(target.max()) < logits.shape[1]
    ):
        raise ValueError(
            f"labels must be in 0 … {logits.shape[1] - 1} (the model has {logits.shape[1]} outputs), "
            f"got {int(target.min())} … {int(target.max())}; set the model's `classes` to the data's"
        )
