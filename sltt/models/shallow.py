"""Two shallow networks for small images, made for training in an hour on a CPU.

`ShallowResNet` has post-activation residual blocks whose spikes are added, as in SEW-ResNet (Fang et al. 2021).
`ShallowVGG` is the network of a CIFAR-10 speed record (Jordan 2024) with spiking neurons. In both, max pooling comes
before BatchNorm and neuron: it pools currents, so that neurons run on a quarter of the positions and lose no spikes.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sltt.checks import number, whole_number, whole_numbers
from sltt.models.base import NeuronFactory, check_frame, neuron_maker
from sltt.neurons import LIF
from sltt.neurons.dropout import Dropout
from sltt.neurons.pooling import RunningMax
from sltt.sequence.once import once
from sltt.sequence.pairs import normalise_and_fire, run_layers


class _Residual(nn.Module):
    """x + neuron(BatchNorm(3×3 convolution of x))."""

    def __init__(self, channels: int, neuron: NeuronFactory):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.neuron = neuron()

    def forward(self, x: Tensor) -> Tensor:
        return x + normalise_and_fire(self.norm, self.neuron, self.conv(x))


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
    ):
        super().__init__()
        widths, stem = whole_numbers("widths", widths, least=1), whole_number("stem", stem, least=0)
        blocks = whole_number("blocks", blocks, least=0)
        neuron = neuron_maker(neuron)
        channels = self.in_channels = whole_number("in_channels", in_channels, least=1)
        currents, stages = [], []
        if stem:
            currents.append(nn.Sequential(nn.Conv2d(channels, stem, 3, padding=1, bias=False), nn.BatchNorm2d(stem)))
            stages.append(neuron())
            channels = stem
        for width in widths:
            conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
            currents.append(nn.Sequential(conv, nn.MaxPool2d(2), nn.BatchNorm2d(width)))
            stages.append(nn.Sequential(neuron(), *(_Residual(width, neuron) for _ in range(blocks))))
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
            x = run_layers([current, stage], x, hoisted=1)
        return self.head(self.dropout(F.adaptive_avg_pool2d(x, 1).flatten(1)))


class _Contrasts(nn.Conv2d):
    """The fixed first convolution: contrasts of 2×2 pixels in opponent colours, each with both signs: 24 channels."""

    def __init__(self) -> None:
        super().__init__(3, 24, 2, bias=False)
        hadamard = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
        patterns = torch.stack([torch.outer(rows, columns) for rows in hadamard for columns in hadamard])
        colours = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -2.0, 1.0]])
        filters = F.normalize(torch.einsum("cr,phw->cprhw", colours, patterns).reshape(12, 12)).reshape(12, 3, 2, 2)
        self.weight = nn.Parameter(torch.cat([filters, -filters]), requires_grad=False)


def _shift_norm(channels: int) -> nn.BatchNorm2d:
    """BatchNorm that learns shifts alone, and whose statistics follow the last few batches."""
    norm = nn.BatchNorm2d(channels, momentum=0.4)
    norm.weight.requires_grad_(False)
    return norm


def _identity_conv(inputs: int, outputs: int) -> nn.Conv2d:
    """Return a 3×3 convolution whose first outputs are its inputs before training."""
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    nn.init.dirac_(conv.weight.data[:inputs])
    return conv


class ShallowVGG(nn.Module):
    """Fixed contrasts of 2×2 pixels and neurons; for each width two 3×3 convolutions; then one linear layer.

    Behind the first convolution of each width comes 2×2 max pooling, and behind each one BatchNorm and neuron. The
    poolings, and one over the image before the linear layer, are of sums over time, see `sltt.RunningMax`. BatchNorm
    learns shifts alone. With the default widths and 10 classes it has 1,972,816 parameters.

    Args:
        widths: channels after each pooling.
        classes: number of logits.
        neuron: makes a neuron; called once for each convolution.
        scale: factor on the logits.

    Source: Jordan 2024 (arXiv 2404.00498), there with GELU and a first layer that whitens patches of the data.
    """

    def __init__(
        self, widths: Sequence[int] = (64, 256, 256), classes: int = 10, neuron: NeuronFactory = LIF, scale: float = 1.0
    ):
        super().__init__()
        widths = whole_numbers("widths", widths, least=1)
        self.scale = number("scale", scale, above=0)
        neuron = neuron_maker(neuron)
        self.contrasts = nn.Sequential(_Contrasts(), _shift_norm(24))
        layers, channels = [neuron()], 24
        for width in widths:
            layers += [_identity_conv(channels, width), RunningMax(nn.MaxPool2d(2)), _shift_norm(width), neuron()]
            layers += [_identity_conv(width, width), _shift_norm(width), neuron()]
            channels = width
        self.features = nn.Sequential(*layers, RunningMax(nn.AdaptiveMaxPool2d(1)))
        self.poolings = len(widths)
        self.head = nn.Linear(channels, whole_number("classes", classes, least=1), bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """One time step [B, 3, H, W] to logits [B, classes]; H and W greater than 2 to the number of widths."""
        check_frame(x, 3, least=2**self.poolings + 1)
        return self.scale * self.head(self.features(once(self.contrasts, x)).flatten(1))
