"""Batch normalisation of several time steps in one tensor, each with the statistics of its own batch."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sltt._torch import _BatchNorm, add_to_each
from sltt.kernels.spikes.saved import tag_made

Pair = tuple[Tensor | None, Tensor | None]
TAGGED_FROM = 2**17  # elements of one time step that are normalised again rather than saved
_counts: ContextVar[Counter[_BatchNorm] | None] = ContextVar("counts", default=None)  # batches of norms in a block


def stepwise_norm(norm: _BatchNorm, input: Tensor, steps: int) -> Tensor:
    """Normalise [n·B, C, ...] by the statistics of each of the n time steps, and count each as a batch."""
    if not (norm.training or norm.running_mean is None or norm.running_var is None):
        return _BatchNorm.forward(norm, input)
    norm._check_input_dim(input)
    if input.numel() == steps * input.shape[1]:
        raise ValueError(f"BatchNorm needs more than one value for each channel, got {list(input.shape)}: batch more")
    running, momenta = batch_statistics(norm, steps)
    y = _normalise(input, (norm.weight, norm.bias), running or (None, None), momenta, norm.eps)
    _tag(y, input, (norm.weight, norm.bias), running, momenta, norm.eps)
    return y


def plain_norm(norm: _BatchNorm, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Normalise as the norm does; `bias`, if given, stands for the norm's, whose values it has."""
    bias = norm.bias if bias is None else bias
    norm._check_input_dim(x)
    training = norm.training or norm.running_mean is None
    running, (momentum,) = batch_statistics(norm, 1)
    used = (running or (None, None)) if training else (norm.running_mean, norm.running_var)
    y = F.batch_norm(x, *used, norm.weight, bias, training, momentum, norm.eps)
    if training and x.is_cpu and x.numel() >= TAGGED_FROM:
        _tag(y, x, (norm.weight, bias), running, [momentum], norm.eps)
    return y


def _tag(y: Tensor, x: Tensor, affine: Pair, running: Any, momenta: list[float], eps: float) -> None:
    """Let what saves y normalise x again."""

    def again(x: Tensor) -> Tensor:  # the running statistics, which decide about types, change no more
        unused = (running[0].clone(), running[1].clone()) if running else (None, None)
        return _normalise(x, affine, unused, momenta, eps)

    tag_made(y, x, again)


def batch_statistics(norm: _BatchNorm, steps: int) -> tuple[tuple[Tensor, Tensor] | None, list[float]]:
    """Count so many batches of a norm in training mode: the running statistics to update, and the weight of each."""
    if not norm.training or not norm.track_running_stats or norm.running_mean is None or norm.running_var is None:
        return None, [0.0] * steps
    momenta = [0.0 if norm.momentum is None else norm.momentum] * steps
    if norm.num_batches_tracked is not None:
        if norm.momentum is None:  # the average of all batches
            seen = int(norm.num_batches_tracked)
            momenta = [1 / (seen + t) for t in range(1, steps + 1)]
        counts = _counts.get()
        if counts is None or norm.momentum is None:
            norm.num_batches_tracked.add_(steps)
        else:
            counts[norm] += steps
    return (norm.running_mean, norm.running_var), momenta


@contextmanager
def counting_batches() -> Iterator[Counter[_BatchNorm]]:
    """Add the batches that norms count in this block to their counters at its end, all in one launch."""
    counts: Counter[_BatchNorm] = Counter()
    token = _counts.set(counts)
    try:
        yield counts
    finally:
        _counts.reset(token)
        if counts:
            add_to_each([norm.num_batches_tracked for norm in counts], list(counts.values()))


def _normalise(x: Tensor, affine: Pair, running: Pair, momenta: list[float], eps: float) -> Tensor:
    """Return x [T·B, C, ...] normalised as by T calls."""
    steps = zip(x.chunk(len(momenta)), momenta, strict=True)
    return torch.cat([F.batch_norm(x_t, *running, *affine, True, momentum, eps) for x_t, momentum in steps])
