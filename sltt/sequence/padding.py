"""Targets of sequences of several lengths in one batch: the steps behind a sample's own length do not count."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Padded(NamedTuple):
    """Targets of a batch of sequences that are padded at the end to one length.

        L = 1/N Σ_t Σ_b [t < T_b] ℓ(o_b[t], y_b),   N = Σ_b T_b

    Every rule but `RateBased` takes it as the target, for sequences and a loss of one step. Every real step counts
    alike, and the others not at all.

        rule(model, x, sltt.Padded(y, lengths=[12, 9, 30]), loss)

    Attributes:
        target: y [B, ...], for a loss that is a mean over samples; y [T, B, ...] for `sltt.losses.PerStep`.
        lengths: T_b, the number of real steps of each sample, 1 … T.
    """

    target: Tensor
    lengths: Sequence[int]

    @property
    def steps(self) -> int:
        """N, the number of real steps of all samples."""
        return sum(self.lengths)

    def at(self, t: int, rows: Sequence[Tensor], per_step: bool) -> "Real":
        """Return the targets of the samples that are real at step t, whose `rows` are those of `real_rows`."""
        target, index = self.target[t] if per_step else self.target, rows[t]
        weight = len(index) * len(rows) / self.steps
        if len(index) == len(self.lengths):
            return Real(target, None, weight)
        return Real(target[index], index, weight)

    def real_rows(self, steps: int) -> tuple[Tensor, ...]:
        """Return the rows of the samples that are real at each step, on the device of the targets."""
        real = torch.as_tensor(self.lengths, device="cpu") > torch.arange(steps, device="cpu")[:, None]
        rows = _copy_to(self.target.device, real.nonzero()[:, 1])  # of all steps in one copy
        return rows.split(real.sum(1).tolist())

    def rows(self, index: Sequence[int], per_step: bool) -> "Padded":
        """Return the targets of some samples."""
        return Padded(self.target.index_select(int(per_step), torch.tensor(index)), [self.lengths[b] for b in index])

    def split(self, count: int, per_step: bool) -> list["Padded"]:
        """Return the targets in so many parts, as `Tensor.tensor_split`."""
        targets, rows = self.target.tensor_split(count, int(per_step)), torch.arange(len(self.lengths))
        parts = (part.tolist() for part in rows.tensor_split(count))
        return [Padded(y, [self.lengths[b] for b in part]) for y, part in zip(targets, parts, strict=True)]


class Real(NamedTuple):
    """Targets of the samples that are real at a step: their rows in the batch, None for all, and the step's weight."""

    target: Tensor
    rows: Tensor | None
    weight: float


def pad(x: Tensor, steps: int) -> Tensor:
    """Return a sequence, or a batch of them, [T, ...], with zeros behind its end: [steps, ...]."""
    return x if len(x) == steps else torch.cat([x, x.new_zeros(steps - len(x), *x.shape[1:])])


def pad_batch(x: Tensor, y: Padded, steps: int, per_step: bool) -> tuple[Tensor, Padded]:
    """Return a batch of so many steps; with `per_step`, its targets too."""
    return pad(x, steps), y._replace(target=pad(y.target, steps)) if per_step else y


def check_lengths(lengths: Sequence[Any], steps: int, batch: int) -> None:
    """Raise ValueError unless there is a length of 1 … T for each sample."""
    numbers = torch.as_tensor(lengths)
    one_each = numbers.shape == (batch,) and numbers.dtype != torch.bool
    if not one_each or not ((numbers >= 1) & (numbers <= steps) & (numbers == numbers.floor())).all():
        raise ValueError(f"expected lengths from 1 to T = {steps} of {batch} samples, got {lengths!r:.77}")


def target_of(target: Any) -> Any:
    """Return the target itself, of `Padded` or not."""
    return target.target if isinstance(target, Padded) else target


def lengths_of(target: Any) -> Sequence[int] | None:
    """Return the lengths of the samples; None where they are not padded."""
    return target.lengths if isinstance(target, Padded) else None


def real_steps(lengths: Sequence[int], steps: int, like: Tensor) -> Tensor:
    """Return whether each step is real: [T, B], on the device of a tensor."""
    length = _copy_to(like.device, torch.as_tensor(lengths, device="cpu"))
    return torch.arange(steps, device=like.device)[:, None] < length


def _copy_to(device: torch.device, values: Tensor) -> Tensor:
    """Copy what the host made; to CUDA from pinned memory, so that the host does not wait."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)
