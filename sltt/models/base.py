"""What the networks share."""

from collections.abc import Callable

from torch import Tensor, fx, nn

from sltt.hoisting import once

NeuronFactory = Callable[[], nn.Module]


def check_frame(x: Tensor, channels: int) -> None:
    """Raise ValueError unless x is the input of one time step, [B, channels, H, W]."""
    if isinstance(x, fx.Proxy):  # the network is being traced, and has no shapes yet
        return
    if x.ndim != 4 or x.shape[1] != channels:
        hint = "; a sequence [T, B, C, H, W] goes through a rule or sltt.unroll" if x.ndim == 5 else ""
        raise ValueError(f"expected one time step [B, {channels}, H, W], got shape {list(x.shape)}{hint}")


def run_features(layers: nn.Sequential, x: Tensor) -> Tensor:
    """x through layers that begin with a convolution and BatchNorm, which are computed once for a static image."""
    for i, layer in enumerate(layers):
        x = once(layer, x) if i < 2 else layer(x)
    return x
