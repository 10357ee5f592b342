"""Dropout for sequences: one mask for all time steps."""

import torch
from torch import Tensor

from sltt.checks import number
from sltt.sequence.state import Stateful


class Dropout(Stateful):
    """Dropout whose mask is drawn at the first time step and kept until `sltt.reset`.

    y[t] = m ⊙ x[t] / (1 − p), m ~ Bernoulli(1 − p) once per sequence; the identity in evaluation mode. A mask that
    changed at every step would average out over time.

    Args:
        p: probability that an element is dropped, in [0, 1).
    """

    states = ("mask",)
    differentiable = False
    timeless = True
    mask: Tensor | None

    def __init__(self, p: float = 0.5):
        super().__init__()
        self.p = number("p", p, least=0, below=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, ...] of one time step to the same shape."""
        if not self.training or self.p == 0:
            return x
        if self.mask is None:
            self.mask = torch.empty_like(x).bernoulli_(1 - self.p).mul_(1 / (1 - self.p))
        else:
            self.check_state("mask", x, x.dtype)
        return x * self.mask

    def extra_repr(self) -> str:
        return f"p={self.p}"
