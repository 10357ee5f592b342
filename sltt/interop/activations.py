"""Activations of an ANN and its spiking twin: the quantised clip, neurons with thresholds."""

import torch
from torch import Tensor, nn

from sltt.checks import number, whole_number


class QCFS(nn.Module):
    """The activation of an ANN that is to become spiking: L levels up to a learned clip λ.

        y = λ clip(⌊x L / λ + 1/2⌋ / L, 0, 1)

    The gradient takes the floor as the identity. `sltt.interop.spiking` makes λ the threshold; over T = L time steps,
    integrate-and-fire neurons that start at half of it then give the same mean, up to errors from uneven spike times.

    Args:
        levels: L, usually the T of the twin.
        clip: λ at the start, in units of the activation.

    Source: Bu et al., ICLR 2022 (arXiv 2303.04347).
    """

    def __init__(self, levels: int = 4, clip: float = 2.0):
        super().__init__()
        self.levels = whole_number("levels", levels, least=1)
        self.clip = nn.Parameter(torch.tensor(number("clip", clip, above=0)))

    def forward(self, x: Tensor) -> Tensor:
        share = (x / self.clip).clamp(0, 1)
        level = torch.floor(share * self.levels + 0.5) / self.levels
        return self.clip * (share + (level - share).detach())

    def extra_repr(self) -> str:
        return f"levels={self.levels}"


class Balanced(nn.Module):
    """Neurons whose input is in units of a threshold θ, and whose spikes are worth θ: y[t] = θ s[t].

    Args:
        neuron: of threshold 1, or any other in units of θ.
        threshold: θ, of a shape that broadcasts to the input [B, ...].
    """

    threshold: Tensor

    def __init__(self, neuron: nn.Module, threshold: Tensor):
        super().__init__()
        self.neuron = neuron
        self.register_buffer("threshold", threshold)

    def forward(self, x: Tensor) -> Tensor:
        return self.threshold * self.neuron(x / self.threshold)


def percentiles(activation: Tensor, channels: int, percentile: float) -> Tensor:
    """Return a percentile of each channel, of a shape that broadcasts; silent channels have the mean of the others.

    Args:
        activation: [B, ...].
        channels: the dimension of the channels.
        percentile: in (0, 100].
    """
    rows = activation.movedim(channels, 0).flatten(1)
    rank = min(rows.shape[1], max(1, round(rows.shape[1] * percentile / 100)))
    values = rows.kthvalue(rank, dim=1).values
    active = values > 0
    mean = values[active].mean() if active.any() else torch.ones((), dtype=values.dtype, device=values.device)
    shape = [1] * activation.ndim
    shape[channels] = -1
    return torch.where(active, values, mean).view(shape)
