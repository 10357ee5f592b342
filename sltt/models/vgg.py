"""VGG with BatchNorm and spiking neurons, one linear layer as the head.

Widths per block between average poolings; after Simonyan & Zisserman 2015, as used in the SLTT paper (Meng et al.
2023). VGG-11 with 2 input channels and 10 classes has 9,476,298 parameters.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from sltt.checks import sequence, whole_number, whole_numbers
from sltt.models.base import Delays, NeuronFactory, check_frame, delays_before, neuron_maker, run_features
from sltt.neurons import LIF
from sltt.neurons.dropout import Dropout

_OF_IMAGES = nn.Conv2d, nn.BatchNorm2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d


class VGG(nn.Module):
    """Blocks of (3×3 convolution, BatchNorm, neuron, dropout), average pooling between blocks, one linear layer.

    Args:
        blocks: the widths of each block's convolutions.
        in_channels: channels of the input.
        classes: number of logits.
        neuron: makes a neuron; called once for each convolution.
        dropout: probability of the dropout after each neuron.
        delays: as of `MLP`, before each convolution and the linear layer.
        dims: 2 for images, or 1 for signals [B, in_channels, L], such as the bands of a frame of sound.
    """

    def __init__(
        self,
        blocks: Sequence[Sequence[int]],
        in_channels: int = 3,
        classes: int = 10,
        neuron: NeuronFactory = LIF,
        dropout: float = 0.0,
        delays: Delays = (),
        dims: int = 2,
    ):
        super().__init__()
        neuron, self.dims = neuron_maker(neuron), whole_number("dims", dims, least=1, most=2)
        kinds = (nn.Conv1d, nn.BatchNorm1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d) if dims == 1 else _OF_IMAGES
        conv, norm, pool, adaptive = kinds
        layers: list[nn.Module] = []
        channels = self.in_channels = whole_number("in_channels", in_channels, least=1)
        self.poolings = len(sequence("blocks", blocks, "widths", fewest=1)) - 1
        blocks = [whole_numbers(f"blocks[{i}]", widths, least=1) for i, widths in enumerate(blocks)]
        before = delays_before(delays, sum(map(len, blocks)) + 1)
        for i, widths in enumerate(blocks):
            if i:
                layers.append(pool(2))
            for width in widths:
                delay, taps = before.pop(0)
                layers += [*delay, conv(channels * taps, width, 3, padding=1), norm(width), neuron()]
                layers.append(Dropout(dropout))
                channels = width
        ((delay, taps),) = before
        self.features = nn.Sequential(*layers, *delay)
        self.pool = adaptive(7)
        self.head = nn.Linear(channels * taps * 7**dims, whole_number("classes", classes, least=1))

    def forward(self, x: Tensor) -> Tensor:
        """One time step [B, in_channels, H, W] to logits [B, classes]; H and W at least 2 to the number of poolings."""
        check_frame(x, self.in_channels, least=2**self.poolings, dims=self.dims)
        return self.head(self.pool(run_features(self.features, x)).flatten(1))


def vgg11(in_channels: int = 3, classes: int = 10, neuron: NeuronFactory = LIF, dropout: float = 0.0) -> VGG:
    """VGG-11: 8 convolutions. See `VGG` for the arguments."""
    return VGG(((64,), (128,), (256, 256), (512, 512), (512, 512)), in_channels, classes, neuron, dropout)
