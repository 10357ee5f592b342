"""The input of a sequence, time step by time step.

Shapes: T time steps, B samples; a call of the network takes n time steps.
"""

from collections.abc import Container
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sltt._torch import _current_graph_task_id, transforms_active
from sltt.checks import instance, whole_number


@dataclass(frozen=True)
class Sequence:
    """T time steps of input: x [T, B, ...], or the same image [B, ...] T times."""

    x: Tensor
    steps: int  # T
    static: bool  # x is shown at every step
    # the least and the largest value of x, not looked at yet since that waits for the device; none if x is finite
    bounds: tuple[Tensor, ...] = ()
    last: bool = False  # images are given with their channels last in memory
    _folded: dict[int, Tensor] = field(default_factory=dict, repr=False)

    @property
    def batch(self) -> int:
        """B."""
        return self.x.shape[0 if self.static else 1]

    def input(self, steps: range) -> Tensor:
        """Return the input of time steps, folded into the batch dimension: [n·B, ...]."""
        if self.static:
            return self.x if len(steps) == 1 else self._repeat(len(steps))
        x = self.x[steps.start] if len(steps) == 1 else self.x[steps.start : steps.stop].flatten(0, 1)
        return channels_last(x) if self.last else x

    def with_channels_last(self, pixels: Container[int]) -> "Sequence":
        """Return the sequence with its channels last in memory; itself if it has other axes of `pixels`."""
        if self.x.ndim - (2 if self.static else 3) not in pixels or not self.x.numel():
            return self
        return replace(self, x=channels_last(self.x) if self.static else self.x, last=True, _folded={})

    def _repeat(self, steps: int) -> Tensor:
        """Return x of so many time steps; calls of a sequence share it, unless the network changed it in place."""
        folded = self._folded.get(steps)
        if folded is None or self.x.requires_grad or folded.is_inference() or folded._version:
            whole = repeat(self.x, steps)
            folded = self._folded[steps] = channels_last(whole) if self.last else whole
        return folded

    def same_at_each_step(self, x: Tensor, steps: int) -> bool:
        """Return whether x [n·B, ...] is a static input of n time steps, as it is or with its pixels reshaped."""
        folded = self._folded.get(steps)
        return (
            folded is not None
            and not transforms_active()
            and x.untyped_storage()._cdata == folded.untyped_storage()._cdata
            and (x.shape[0], x.stride(0), x.numel()) == (len(folded), folded.stride(0), folded.numel())
            and not (x.is_inference() or x._version)
        )

    def mean(self) -> Tensor:
        """Return the mean input over time, [B, ...]."""
        if self.static:
            return self.x
        return self.x.mean(0) if self.x.is_floating_point() else self.x.mean(0, dtype=torch.get_default_dtype())


def channels_last(x: Tensor) -> Tensor:
    """Return images or signals [B, C, ...] channels-last; of one channel, with the strides that say so."""
    if x.shape[1] == 1:
        return x.reshape(len(x), *x.shape[2:], 1).movedim(-1, 1)
    last = x.movedim(1, -1)
    return x if last.is_contiguous() else last.contiguous().movedim(-1, 1)


def repeat(x: Tensor, steps: int) -> Tensor:
    """Return x [B, ...] n times, [n·B, ...], in its memory format; its gradient is one sum, not one of sums."""
    last = x.ndim > 2 and not x.is_contiguous() and x.movedim(1, -1).is_contiguous()
    x = x.movedim(1, -1) if last else x
    whole = x.expand(steps, *x.shape).contiguous().flatten(0, 1)
    return whole.movedim(-1, 1) if last else whole


def in_backward() -> bool:
    """Return whether autograd runs a backward in this thread, in which a checkpoint may run a forward again."""
    return _current_graph_task_id() != -1


_SAMPLES_FIRST = "; for a static input [B, ...] say steps=T, for [B, T, ...] give x.transpose(0, 1), also where T = B"


def time_steps(x: Tensor, steps: int | None, target: Any = None) -> Sequence:
    """Check an input, and its batch size against the target's; return it as a sequence of time steps."""
    static = steps is not None
    form = "[B, ...] with steps=T" if static else "[T, B, ...], time first"
    instance("x", x, Tensor, "of an array, torch.from_numpy(x).float()")
    if x.ndim < 2:
        raise ValueError(f"expected input {form}, got shape {list(x.shape)}")
    length = x.shape[0] if steps is None else whole_number("steps", steps, least=1)
    if length < 1:
        raise ValueError(f"expected at least one time step, got an input of shape {list(x.shape)}")
    sequence = Sequence(x, length, static)
    if isinstance(target, Tensor) and target.ndim and target.shape[0] != sequence.batch:
        remedy = "" if static or len(target) != len(x) else _SAMPLES_FIRST
        if remedy and target.shape[1:2] == x.shape[1:2]:
            remedy = "; for a target at each time step: sltt.losses.PerStep(loss)"
        raise ValueError(
            f"expected a target for each of the {sequence.batch} samples of an input {form}, "
            f"got input {list(x.shape)} and target {list(target.shape)}{remedy}"
        )
    if x.device.type == "cpu":
        check_input(x)
    elif x.is_floating_point() and x.numel():
        return Sequence(x, length, static, tuple(x.detach().aminmax()))
    return sequence


def check_input(x: Tensor) -> None:
    """Raise ValueError for a value that is NaN or infinite; waits for the device of x.

    A neuron would swallow a NaN: it compares false with the threshold, so the neuron is silent and the loss finite.
    """
    if not x.is_floating_point() or not x.numel():
        return
    if x.detach().sum().isfinite():  # reads x once; the sum of large values may be infinite
        return
    # NaN if a value is; `x.isfinite()` would take more memory than x, at a small network's peak
    if not torch.stack(x.detach().aminmax()).isfinite().all():
        bad = x.numel() - int(x.isfinite().sum())
        raise ValueError(f"expected a finite input, got {bad} NaN or infinite of {x.numel()} values: look at the data")
