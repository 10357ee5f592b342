"""Spiking transformers, run step by step: every attention is among the tokens of one time step.

Spikformer (Zhou et al., ICLR 2023, arXiv 2209.15425) and QKFormer (Zhou et al., NeurIPS 2024, arXiv 2403.16552). Their
neurons are `LIF(tau=2, v_reset=0, decay_input=True, detach_reset=True)`, with threshold 1/2 behind attention. Here all
have the same threshold, and the output of attention is doubled: the spikes are the same.

Shapes: B samples, D channels, h heads of d = D/h channels, N = H·W tokens, which stay an image [B, D, H, W].
"""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from sltt.checks import choice, whole_number, whole_numbers
from sltt.models.base import NeuronFactory, check_frame, neuron_maker, run_features
from sltt.neurons import LIF

Patch = Literal[4, 16]


class SelfAttention(nn.Module):
    """Spiking self-attention: a = neuron(2 · 0.125 (v kᵀ) q), then a layer of its own; q, k, v [d, N] are spikes.

    Without a softmax, keys and values are multiplied first: the cost grows with N, not with N².

    Args:
        channels: D.
        heads: h.
        neuron: makes a neuron; called for q, k, v, a and the output.
    """

    def __init__(self, channels: int, heads: int, neuron: NeuronFactory):
        super().__init__()
        self.heads = _heads(heads, channels)
        self.q, self.k, self.v = (nn.Sequential(*_layer(channels, channels, 1, neuron)) for _ in range(3))
        self.attend = neuron()
        self.project = nn.Sequential(*_layer(channels, channels, 1, neuron, bias=True))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (_split(layer(x), self.heads) for layer in (self.q, self.k, self.v))
        attention = 0.25 * (v @ k.mT) @ q
        return self.project(self.attend(attention.reshape(x.shape)))


class TokenAttention(nn.Module):
    """Q-K token attention: of every head, the tokens where neuron(2 Σ_d q) fires keep their k; then a layer.

    Args:
        channels: D.
        heads: h.
        neuron: makes a neuron; called for q, k, the choice of tokens and the output.
    """

    def __init__(self, channels: int, heads: int, neuron: NeuronFactory):
        super().__init__()
        self.heads = _heads(heads, channels)
        self.q, self.k = (nn.Sequential(*_layer(channels, channels, 1, neuron)) for _ in range(2))
        self.attend = neuron()
        self.project = nn.Sequential(*_layer(channels, channels, 1, neuron, bias=True))

    def forward(self, x: Tensor) -> Tensor:
        q, k = _split(self.q(x), self.heads), _split(self.k(x), self.heads)
        tokens = self.attend(2 * q.sum(2, keepdim=True))
        return self.project((tokens * k).reshape(x.shape))


class Block(nn.Module):
    """x + attention(x), then x + MLP(x), with four times as many channels inside."""

    def __init__(self, attention: nn.Module, channels: int, neuron: NeuronFactory):
        super().__init__()
        self.attention = attention
        wider = _layer(channels, 4 * channels, 1, neuron, bias=True)
        self.mlp = nn.Sequential(*wider, *_layer(4 * channels, channels, 1, neuron, bias=True))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.mlp(x)


class Residual(nn.Module):
    """main(x) + shortcut(x), both spikes."""

    def __init__(self, main: nn.Module, shortcut: nn.Module):
        super().__init__()
        self.main = main
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x) + self.shortcut(x)


class SpikingTransformer(nn.Module):
    """A stem of convolutions, layers and blocks on images of tokens, the mean over tokens, one linear layer.

    Args:
        stem: begins with a convolution and BatchNorm. With `hoist=True` these run once per sequence for a static image.
        blocks: of the tokens.
        channels: of the last block.
        patch: side of the square of pixels that a token is made of.
        in_channels: channels of the input.
        classes: number of logits.
    """

    def __init__(
        self, stem: nn.Sequential, blocks: nn.Sequential, channels: int, patch: int, in_channels: int, classes: int
    ):
        super().__init__()
        self.in_channels = in_channels
        self.patch = patch
        self.stem = stem
        self.blocks = blocks
        self.head = nn.Linear(channels, whole_number("classes", classes, least=1))

    def forward(self, x: Tensor) -> Tensor:
        """One time step [B, in_channels, H, W] to logits [B, classes]; H and W at least `patch`."""
        check_frame(x, self.in_channels, least=self.patch)
        return self.head(self.blocks(run_features(self.stem, x)).mean((2, 3)))


def spikformer(
    in_channels: int = 3,
    classes: int = 10,
    channels: int = 384,
    depth: int = 4,
    heads: int = 12,
    patch: Patch = 4,
    neuron: NeuronFactory = LIF,
) -> SpikingTransformer:
    """Spikformer. The defaults are Spikformer-4-384 for CIFAR; -8-768 for ImageNet has patches of 16 pixels.

        spikformer()                                                       # 9.32 million parameters
        spikformer(classes=1000, channels=768, depth=8, heads=12, patch=16)  # 66.34 million

    Args:
        in_channels: channels of the input.
        classes: number of logits.
        channels: D, a multiple of 8 and of `heads`.
        depth: number of blocks.
        heads: h.
        patch: side of a token in pixels: pooling after the last two convolutions of the stem, or after all four.
        neuron: makes a neuron; published: LIF(tau=2, v_reset=0, decay_input=True, detach_reset=True).

    Source: Zhou et al., ICLR 2023 (arXiv 2209.15425).
    """
    channels = whole_number("channels", channels, least=8)
    depth, neuron = whole_number("depth", depth, least=1), neuron_maker(neuron)
    pooled = 2 if choice("patch", patch, (4, 16)) == 4 else 4
    inside = before = whole_number("in_channels", in_channels, least=1)
    stem: list[nn.Module] = []
    for i in range(4):
        after = channels // 2 ** (3 - i)
        stem += [*_layer(before, after, 3, neuron), *([nn.MaxPool2d(3, 2, 1)] if i >= 4 - pooled else [])]
        before = after
    position = Residual(nn.Sequential(*_layer(channels, channels, 3, neuron)), nn.Identity())
    blocks = [Block(SelfAttention(channels, heads, neuron), channels, neuron) for _ in range(depth)]
    return SpikingTransformer(nn.Sequential(*stem), nn.Sequential(position, *blocks), channels, patch, inside, classes)


def qkformer(
    in_channels: int = 3,
    classes: int = 10,
    channels: int = 384,
    depths: Sequence[int] = (1, 1, 2),
    heads: int = 8,
    patch: Patch = 4,
    neuron: NeuronFactory = LIF,
) -> SpikingTransformer:
    """QKFormer: three stages of D/4, D/2 and D channels; token attention in two, self-attention in the last.

        qkformer(classes=100)                                                         # 6.74 million parameters
        qkformer(classes=1000, channels=384, depths=(1, 2, 7), heads=6, patch=16)     # HST-10-384: 16.47 million
        qkformer(classes=1000, channels=768, depths=(1, 2, 7), heads=12, patch=16)    # HST-10-768: 64.96 million

    Args:
        in_channels: channels of the input.
        classes: number of logits.
        channels: D; a quarter of it is a multiple of 2 and of `heads`.
        depths: number of blocks in each stage.
        heads: h, the same in all stages.
        patch: side of a token of the last stage in pixels: 4 for CIFAR, 16 for ImageNet.
        neuron: makes a neuron; published: LIF(tau=2, v_reset=0, decay_input=True, detach_reset=True).

    Source: Zhou et al., NeurIPS 2024 (arXiv 2403.16552).
    """
    channels = whole_number("channels", channels, least=8)
    depths, neuron = whole_numbers("depths", depths, least=1, fewest=3), neuron_maker(neuron)
    if len(depths) != 3:
        raise ValueError(f"depths must be the number of blocks in each of 3 stages, got {depths}")
    in_channels, small = whole_number("in_channels", in_channels, least=1), choice("patch", patch, (4, 16)) == 4
    stem = nn.Sequential(*_layer(in_channels, channels // 8, 3, neuron, pool=not small))
    blocks = nn.Sequential()
    for stage, attention in enumerate((TokenAttention, TokenAttention, SelfAttention)):
        width = channels // 2 ** (2 - stage)
        if small and stage == 0:
            main, shortcut = _layer(width // 2, width, 3, neuron), _layer(width // 2, width, 1, neuron)
            blocks.append(Residual(nn.Sequential(*main), nn.Sequential(*shortcut)))
        else:
            blocks.append(_merge(width, neuron, pool_last=small))
        blocks.extend(Block(attention(width, heads, neuron), width, neuron) for _ in range(depths[stage]))
    return SpikingTransformer(stem, blocks, channels, patch, in_channels, classes)


def _merge(channels: int, neuron: NeuronFactory, pool_last: bool) -> nn.Module:
    """Half as many tokens on a side, of twice as many channels; QKFormer's CIFAR networks pool in the second layer."""
    main = _layer(channels // 2, channels, 3, neuron, pool=not pool_last)
    main += _layer(channels, channels, 3, neuron, pool=pool_last)
    shortcut = _layer(channels // 2, channels, 1, neuron, stride=2)
    return Residual(nn.Sequential(*main), nn.Sequential(*shortcut))


def _layer(
    in_channels: int,
    out_channels: int,
    kernel: int,
    neuron: NeuronFactory,
    bias: bool = False,
    stride: int = 1,
    pool: bool = False,
) -> list[nn.Module]:
    """Convolution, BatchNorm, pooling of the currents, neuron."""
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=bias)
    return [conv, nn.BatchNorm2d(out_channels), *([nn.MaxPool2d(3, 2, 1)] if pool else []), neuron()]


def _heads(heads: int, channels: int) -> int:
    if channels % whole_number("heads", heads, least=1):
        raise ValueError(f"{heads} heads must share the channels evenly, got {channels} channels")
    return heads


def _split(spikes: Tensor, heads: int) -> Tensor:
    """Return [B, D, H, W] to [B, h, d, N]."""
    return spikes.flatten(2).unflatten(1, (heads, -1))
