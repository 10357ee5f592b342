"""A shallow residual network for small images, made for training in an hour on a CPU.

Post-activation residual blocks whose spikes are added, as in SEW-ResNet (Fang et al. 2021). Max pooling comes before
BatchNorm and neuron: it pools currents, so that neurons run on a quarter of the positions and lose no spikes.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from sltt.checks import whole_number, whole_numbers
from sltt.dropout import Dropout
from sltt.models.base import NeuronFactory, NormFactory, check_frame, neuron_maker
from sltt.neurons import LIF
from sltt.sequence.once import once


class _Residual(nn.Module):
    """x + neuron(BatchNorm(3×3 convolution of x))."""

    def __init__(self, channels: int, neuron: NeuronFactory, norm: NormFactory):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = norm(channels)
        self.neuron = neuron()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.neuron(self.norm(self.conv(x)))


class ShallowResNet(nn.Module):
    """For each width: 3×3 convolution, 2×2 max pooling, BatchNorm, neuron, residual blocks; then one linear layer.

    Before the linear layer, spikes are averaged over the image. With the default widths, one block each
    and 10 classes it has 2,580,394 parameters.

    Args:
        widths: channels after each pooling.
        stem: channels of a 3×3 convolution with BatchNorm and neurons before the first pooling, 0 for none.
        blocks: residual blocks of one convolution at each width.
        in_channels: channels of the input.
        classes: number of logits.
        neuron: makes a neuron; called once for each convolution.
        dropout: probability of the dropout before the linear layer.
        norm: makes a normalisation of so many channels.
    """

    def __init__(
        self,
        widths: Sequence[int] = (96, 192, 384),
        stem: int = 0,
        blocks: int = 1,
        in_channels: int = 3,
        classes: int = 10,
        neuron: NeuronFactory = LIF,
        dropout: float = 0.0,
        norm: NormFactory = nn.BatchNorm2d,
    ):
        super().__init__()
        widths, stem = whole_numbers("widths", widths, least=1), whole_number("stem", stem, least=0)
        blocks = whole_number("blocks", blocks, least=0)
        neuron = neuron_maker(neuron)
        channels = self.in_channels = whole_number("in_channels", in_channels, least=1)
        currents, stages = [], []
        if stem:
            currents.append(nn.Sequential(nn.Conv2d(channels, stem, 3, padding=1, bias=False), norm(stem)))
            stages.append(neuron())
            channels = stem
        for width in widths:
            conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
            currents.append(nn.Sequential(conv, nn.MaxPool2d(2), norm(width)))
            stages.append(nn.Sequential(neuron(), *(_Residual(width, neuron, norm) for _ in range(blocks))))
            channels = width
        self.poolings = len(widths)
        self.currents = nn.ModuleList(currents)
        self.stages = nn.ModuleList(stages)
        self.dropout = Dropout(dropout)
        self.head = nn.Linear(channels, whole_number("classes", classes, least=1))

    def forward(self, x: Tensor) -> Tensor:
        """One time step [B, in_channels, H, W] to logits [B, classes]; H and W at least 2 to the number of widths."""
        check_frame(x, self.in_channels, least=2**self.poolings)
        for current, stage in zip(self.currents, self.stages, strict=True):
            x = stage(once(current, x))
        return self.head(self.dropout(F.adaptive_avg_pool2d(x, 1).flatten(1)))
