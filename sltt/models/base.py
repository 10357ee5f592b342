"""What the networks share: a check of the input of one time step, and the type of a neuron factory."""

from collections.abc import Callable

from torch import Tensor, nn

NeuronFactory = Callable[[], nn.Module]


def check_frame(x: Tensor, channels: int) -> None:
    """Raise ValueError unless x is the input of one time step, [B, channels, H, W]."""
    if x.ndim != 4 or x.shape[1] != channels:
        hint = "; a sequence [T, B, C, H, W] goes through a rule or sltt.unroll" if x.ndim == 5 else ""
        raise ValueError(f"expected one time step [B, {channels}, H, W], got shape {list(x.shape)}{hint}")
