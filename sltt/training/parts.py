"""A batch in parts, one after the other: the memory of a part, and the gradient of the whole batch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sltt.rules import Output
from sltt.sequence.padding import Padded

Run = Callable[[Tensor, Any, float], Output]  # of x, the target, and the part's weight in the loss of the batch


def count_parts(asked: int, size: int, processes: int) -> int:
    """Into how many parts a batch of `size` samples is cut, in all processes alike.

    A part has two samples at least, which BatchNorm needs.
    """
    smallest = size if size < 2 * processes else size // processes  # as `share` has it
    return max(1, min(asked, smallest // 2))


def run_in_parts(run: Run, x: Tensor, y: Tensor | Padded, count: int, *, static: bool, per_step: bool) -> Output:
    """Run a batch in so many parts: x [B, ...] or [T, B, ...], y [B, ...] or with `per_step` [T, B, ...]."""
    xs = x.tensor_split(count, dim=0 if static else 1)
    if isinstance(y, Padded):
        ys = y.split(count)
        weights = [part.steps / y.steps for part in ys]
    else:
        ys = y.tensor_split(count, dim=1 if per_step else 0)
        weights = [part.shape[0 if static else 1] / x.shape[0 if static else 1] for part in xs]
    outs = [run(*part) for part in zip(xs, ys, weights, strict=True)]
    loss = torch.stack([out.loss * weight for out, weight in zip(outs, weights, strict=True)]).sum()
    return Output(loss, torch.cat([out.logits for out in outs], dim=1))
