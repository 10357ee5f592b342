"""Base of the networks."""

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor, fx, nn

from sltt.checks import instance, sequence, whole_numbers
from sltt.neurons import Delay
from sltt.sequence.pairs import run_layers

NeuronFactory = Callable[[], nn.Module]
Delays = Sequence[Sequence[int] | None]
SHIPPED = {path.stem: path for path in sorted(Path(__file__).with_name("weights").glob("*.sltt"))}  # trained networks


def neuron_maker(neuron: NeuronFactory) -> NeuronFactory:
    """Return the factory; raise ValueError for what is none, such as a neuron."""
    if not callable(neuron) or isinstance(neuron, nn.Module):
        remedy = "such as sltt.LIF or functools.partial(sltt.LIF, tau=2.0)"
        raise ValueError(f"neuron must be a class or a function that makes a neuron, got {neuron!r}; {remedy}")
    return neuron


def delays_before(delays: Delays, layers: int) -> list[tuple[list[nn.Module], int]]:
    """Return for each layer with weights the `Delay` before it, if there is one, and how many taps it reads."""
    if len(sequence("delays", delays, "taps")) > layers:
        raise ValueError(f"delays must be taps of at most {layers} layers with weights, got {len(delays)}")
    modules = [[] if taps is None else [Delay(taps)] for taps in [*delays, *[None] * (layers - len(delays))]]
    return [([*delay], len(delay[0].taps) if delay else 1) for delay in modules]


def stage_blocks(blocks: Sequence[int]) -> list[tuple[int, int]]:
    """Return the width and the stride of each block of a ResNet, of the number of blocks in each of its four stages."""
    blocks = whole_numbers("blocks", blocks, least=1)
    if len(blocks) != 4:
        raise ValueError(f"blocks must be the number of blocks in each of 4 stages, got {blocks}")
    stages = zip((64, 128, 256, 512), (1, 2, 2, 2), blocks, strict=True)
    return [(width, stride if i == 0 else 1) for width, stride, count in stages for i in range(count)]


def check_frame(x: Tensor, channels: int, least: int = 1, dims: int = 2) -> None:
    """Raise ValueError unless x is the input of one time step, [B, channels, H, W], or [B, channels, L] with dims=1.

    Its height and width, or its length, are at least `least`.
    """
    if isinstance(x, fx.Proxy):  # the network is being traced, and has no shapes yet
        return
    instance("the input", x, Tensor)
    size = "L" if dims == 1 else "H, W"
    if x.ndim != dims + 2 or x.shape[1] != channels:
        hint = f"; a sequence [T, B, C, {size}] goes through a rule or sltt.unroll" if x.ndim == dims + 3 else ""
        raise ValueError(f"expected one time step [B, {channels}, {size}], got shape {list(x.shape)}{hint}")
    if min(x.shape[2:]) < least:
        what = "a length" if dims == 1 else "a height and a width"
        raise ValueError(f"expected {what} of at least {least}, got shape {list(x.shape)}")


def run_features(layers: nn.Sequential, x: Tensor) -> Tensor:
    """Run layers that begin with a convolution and BatchNorm, which are computed once for a static image."""
    return run_layers(layers, x, hoisted=0 if isinstance(layers[0], Delay) else 2)
