"""Pre-activation ResNets with spiking neurons, for small images.

After He et al. 2016 (identity mappings), as used in the SLTT paper (Meng et al. 2023): every convolution but the first
reads spikes. ResNet-18 with 3 input channels has 11,176,906 parameters for 10 classes.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from sltt.checks import whole_number
from sltt.models.base import NeuronFactory, check_frame, neuron_maker, stage_blocks
from sltt.neurons import LIF
from sltt.neurons.dropout import Dropout
from sltt.sequence.once import once
from sltt.sequence.pairs import normalise_and_fire, run_before_norm


class Block(nn.Module):
    """BatchNorm, neuron, 3×3 convolution, twice, plus the shortcut.

    Where the shape changes, the shortcut is a 1×1 convolution of the block's first spikes; elsewhere it is the identity
    of the block's input.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, neuron: NeuronFactory, dropout: float):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.neuron1 = neuron()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.neuron2 = neuron()
        self.dropout = Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        changes = stride != 1 or in_channels != out_channels
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        y = normalise_and_fire(self.norm1, self.neuron1, x, hoist=True)
        shortcut = x if self.shortcut is None else self.shortcut(y)
        y = run_before_norm(self.conv1, y, self.norm2)  # one name, so that each tensor goes when the next is there
        y = normalise_and_fire(self.norm2, self.neuron2, y)
        y = self.conv2(self.dropout(y))
        return y + shortcut


class ResNet(nn.Module):
    """3×3 stem, four stages of pre-activation blocks with 64, 128, 256 and 512 channels, pooling, one linear layer.

    Args:
        blocks: number of blocks in each of the four stages.
        in_channels: channels of the input.
        classes: number of logits.
        neuron: makes a neuron; called twice for each block and once at the end.
        dropout: probability of the dropout before each block's second convolution.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        in_channels: int = 3,
        classes: int = 10,
        neuron: NeuronFactory = LIF,
        dropout: float = 0.0,
    ):
        super().__init__()
        neuron = neuron_maker(neuron)
        self.in_channels = whole_number("in_channels", in_channels, least=1)
        self.stem = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
        self.blocks = nn.Sequential()
        channels = 64
        for width, stride in stage_blocks(blocks):
            self.blocks.append(Block(channels, width, stride, neuron, dropout))
            channels = width
        self.norm = nn.BatchNorm2d(channels)
        self.neuron = neuron()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, whole_number("classes", classes, least=1))

    def forward(self, x: Tensor) -> Tensor:
        """One time step [B, in_channels, H, W] to logits [B, classes]."""
        check_frame(x, self.in_channels)
        spikes = normalise_and_fire(self.norm, self.neuron, self.blocks(once(self.stem, x)))
        return self.head(self.pool(spikes).flatten(1))


def resnet18(in_channels: int = 3, classes: int = 10, neuron: NeuronFactory = LIF, dropout: float = 0.0) -> ResNet:
    """Pre-activation ResNet-18. See `ResNet` for the arguments."""
    return ResNet((2, 2, 2, 2), in_channels, classes, neuron, dropout)


def resnet34(in_channels: int = 3, classes: int = 10, neuron: NeuronFactory = LIF, dropout: float = 0.0) -> ResNet:
    """Pre-activation ResNet-34. See `ResNet` for the arguments."""
    return ResNet((3, 4, 6, 3), in_channels, classes, neuron, dropout)
