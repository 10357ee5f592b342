"""ResNets without normalisation layers, for ImageNet, with spiking neurons.

Instead of normalising activations, weights are standardised and every block divides its input by the standard deviation
that it is expected to have (Brock et al. 2021, arXiv 2101.08692; with spiking neurons Meng et al. 2023). There are no
statistics of a batch, so that the weights of a training at T = 1 can be trained on at T = 6.
NF-ResNet-34, -50 and -101 have 21,797,688, 25,557,048 and 44,549,193 parameters for 1000 classes.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sltt.checks import flag, whole_number
from sltt.models.base import NeuronFactory, check_frame, neuron_maker, stage_blocks
from sltt.neurons import LIF
from sltt.sequence.once import once
from sltt.sequence.state import Role, set_role

SPIKE_SCALE = 2.74  # spikes times this have about the variance of a unit normal input
ALPHA = 0.2  # share of a block's output in the sum
EPS = 1e-4  # ε, keeps a constant weight finite


class ScaledWSConv2d(nn.Conv2d):
    """Convolution with scaled weight standardisation.

        Ŵ = g (W − mean W) / √max(n var W, ε)

    mean and variance over the n inputs of each output channel; g a learnable gain for each. The standardised weight is
    computed once a sequence under a rule.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: height and width of the kernel.
        stride: of the kernel; the input is padded by half the kernel.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2)
        self.gain = nn.Parameter(torch.ones(out_channels, 1, 1, 1))
        nn.init.kaiming_normal_(self.weight)
        assert self.bias is not None
        nn.init.zeros_(self.bias)

    def standardised_weight(self) -> Tensor:
        """Ŵ, of the weight's shape."""
        inputs = self.weight[0].numel()
        var, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True, unbiased=False)
        scale = torch.rsqrt(torch.clamp(var * inputs, min=EPS)) * self.gain
        return (self.weight - mean) * scale

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, once(self.standardised_weight), self.bias, self.stride, self.padding)


set_role(ScaledWSConv2d, Role("weight", of=ScaledWSConv2d, weight=lambda conv: once(conv.standardised_weight)))


class NFBlock(nn.Module):
    """x + α g f(x / β): neuron and convolution, two or three times; g is a gain that starts at zero.

    Where the shape changes, the shortcut is a 1×1 convolution of the block's first spikes; elsewhere the identity.

    Args:
        in_channels: channels of the input.
        width: channels of the 3×3 convolutions.
        out_channels: channels of the output; other than `width` in a bottleneck.
        stride: of the block.
        beta: expected standard deviation of the input.
        neuron: makes a neuron.
    """

    def __init__(
        self, in_channels: int, width: int, out_channels: int, stride: int, beta: float, neuron: NeuronFactory
    ):
        super().__init__()
        self.beta = beta
        if width == out_channels:
            convs = [ScaledWSConv2d(in_channels, width, 3, stride), ScaledWSConv2d(width, width, 3)]
        else:
            convs = [
                ScaledWSConv2d(in_channels, width, 1),
                ScaledWSConv2d(width, width, 3, stride),
                ScaledWSConv2d(width, out_channels, 1),
            ]
        self.neurons = nn.ModuleList(neuron() for _ in convs)
        self.convs = nn.ModuleList(convs)
        changes = stride != 1 or in_channels != out_channels
        self.shortcut = ScaledWSConv2d(in_channels, out_channels, 1, stride) if changes else None
        self.skip_gain = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        y = SPIKE_SCALE * self.neurons[0](x / self.beta)
        shortcut = x if self.shortcut is None else self.shortcut(y)
        y = self.convs[0](y)
        for neuron, conv in zip(self.neurons[1:], self.convs[1:], strict=True):
            y = conv(SPIKE_SCALE * neuron(y))
        return y * (self.skip_gain * ALPHA) + shortcut


class NFResNet(nn.Module):
    """7×7 stem, average pooling, four stages of blocks, neuron, pooling, one linear layer.

    Args:
        blocks: number of blocks in each stage.
        bottleneck: blocks of 1×1, 3×3 and 1×1 convolutions with four times as many channels outside.
        in_channels: channels of the input.
        classes: number of logits.
        neuron: makes a neuron.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        bottleneck: bool,
        in_channels: int = 3,
        classes: int = 1000,
        neuron: NeuronFactory = LIF,
    ):
        super().__init__()
        bottleneck = flag("bottleneck", bottleneck)
        neuron = neuron_maker(neuron)
        self.in_channels = whole_number("in_channels", in_channels, least=1)
        self.stem = ScaledWSConv2d(in_channels, 64, 7, stride=2)
        self.stem_pool = nn.AvgPool2d(3, 2, padding=1)
        self.blocks = nn.Sequential()
        channels, variance = 64, 1.0
        for width, stride in stage_blocks(blocks):
            out_channels = 4 * width if bottleneck else width
            block = NFBlock(channels, width, out_channels, stride, variance**0.5, neuron)
            self.blocks.append(block)
            # a convolution in the shortcut gives unit variance again; the sum adds α² in each block
            variance = (variance if block.shortcut is None else 1.0) + ALPHA**2
            channels = out_channels
        self.neuron = neuron()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, whole_number("classes", classes, least=1))

    def forward(self, x: Tensor) -> Tensor:
        """One time step [B, in_channels, H, W] to logits [B, classes]."""
        check_frame(x, self.in_channels)
        x = self.blocks(once(self.stem_pool, once(self.stem, x)))
        return self.head(self.pool(SPIKE_SCALE * self.neuron(x)).flatten(1))


def nfresnet34(in_channels: int = 3, classes: int = 1000, neuron: NeuronFactory = LIF) -> NFResNet:
    """NF-ResNet-34. See `NFResNet` for the arguments."""
    return NFResNet((3, 4, 6, 3), False, in_channels, classes, neuron)


def nfresnet50(in_channels: int = 3, classes: int = 1000, neuron: NeuronFactory = LIF) -> NFResNet:
    """NF-ResNet-50. See `NFResNet` for the arguments."""
    return NFResNet((3, 4, 6, 3), True, in_channels, classes, neuron)


def nfresnet101(in_channels: int = 3, classes: int = 1000, neuron: NeuronFactory = LIF) -> NFResNet:
    """NF-ResNet-101. See `NFResNet` for the arguments."""
    return NFResNet((3, 4, 23, 3), True, in_channels, classes, neuron)
