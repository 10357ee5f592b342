"""A small network for the digits: three convolutions, trained on two CPU cores in a minute or two."""

from torch import Tensor, nn

from sltt.checks import whole_number
from sltt.models.base import NeuronFactory, check_frame, neuron_maker, run_features
from sltt.neurons import LIF
from sltt.neurons.dropout import Dropout


class DigitsNet(nn.Module):
    """Three times (3×3 convolution, BatchNorm, neuron), average pooling after the second and third, one linear layer.

    Args:
        in_channels: channels of the input: 1 for the images, 2 for the events.
        classes: number of logits.
        width: channels of the first convolution; the others have twice as many.
        neuron: makes a neuron; called three times.
        dropout: probability of the dropout before the linear layer.
    """

    def __init__(
        self, in_channels: int = 1, classes: int = 10, width: int = 32, neuron: NeuronFactory = LIF, dropout: float = 0
    ):
        super().__init__()
        self.in_channels = whole_number("in_channels", in_channels, least=1)
        width = whole_number("width", width, least=1)
        neuron = neuron_maker(neuron)
        self.features = nn.Sequential(
            *(nn.Conv2d(in_channels, width, 3, padding=1), nn.BatchNorm2d(width), neuron()),
            *(nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), neuron()),
            nn.AvgPool2d(2),
            *(nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), neuron()),
        )
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.dropout = Dropout(dropout)
        self.head = nn.Linear(2 * width * 2 * 2, whole_number("classes", classes, least=1))

    def forward(self, x: Tensor) -> Tensor:
        """One time step [B, in_channels, H, W] to logits [B, classes]; H and W at least 4."""
        check_frame(x, self.in_channels, least=4)
        return self.head(self.dropout(self.pool(run_features(self.features, x)).flatten(1)))
