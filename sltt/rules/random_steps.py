"""Rules whose backward runs in k random steps of T, and the calls of such a sequence."""

import math
from collections.abc import Collection, Container
from itertools import groupby
from typing import Any

import torch
from torch import nn

from sltt.checks import whole_number
from sltt.losses import is_mean
from sltt.rules.base import Rule
from sltt.rules.batch import Batch
from sltt.rules.segments import split
from sltt.sequence.padding import Padded

GRAPHS = 64  # one for each draw of steps


class RandomSteps(Rule):
    """A rule that may run its backward in k random steps only.

    Attributes:
        k: number of these steps; None for all.
    """

    k: int | None = None

    def check(self, model: nn.Module, steps: int) -> None:
        if self.k is not None and self.k > steps:
            name = f"{type(self).__name__}(k={self.k})"
            raise ValueError(f"{name} trains {self.k} steps, but the sequence has T = {steps}; use k ≤ T")

    def draw(self, steps: int, seed: int | None) -> frozenset[int] | None:
        if self.k is None:
            return None
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return frozenset(torch.randperm(steps, generator=generator, device="cpu")[: self.k].tolist())

    def no_graph(self, steps: int) -> str | None:
        if self.k is None:
            return super().no_graph(steps)
        draws = math.comb(steps, self.k)
        if draws > GRAPHS:
            return f"has {draws} draws of {self.k} of {steps} steps, and each is a graph: {GRAPHS} at most"
        return None

    def trained_steps(self, batch: Batch) -> Collection[int]:
        """Return the steps with a backward."""
        if not isinstance(batch.target, Padded):  # T of a padded batch is that of its longest sequence
            RandomSteps.check(self, batch.model, batch.steps)
        if self.k and batch.seed is None and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            kind = type(self).__name__
            raise ValueError(f"{kind}(k={self.k}) draws its steps for each batch: capture {kind}(), or use no graph")
        drawn = self.draw(batch.steps, batch.seed)
        return range(batch.steps) if drawn is None else drawn


def number_of_steps(k: Any) -> int | None:
    """Return the argument `k` of a rule; raise ValueError if it is none."""
    return None if k is None else whole_number("k", k, least=1)


def split_into_calls(steps: range, trained: Container[int], batch: Batch) -> list[tuple[range, bool, Any]]:
    """Return the time steps that share a call, whether it has a graph, and the trained ones if these are some of it.

    A call has steps of both kinds if m ≥ n/8 + 1 of its n steps are trained. Measured on small networks, more and
    smaller calls take longer then.
    """
    fold, mixed = batch.fold, is_mean(batch.loss)
    kinds: dict[int, Any] = {t: t in trained for t in steps}
    for part in split(steps, fold.trained) if mixed else []:
        count = sum(kinds[t] for t in part)
        if count < len(part) and 8 * (count - 1) >= len(part):
            kinds |= dict.fromkeys(part, part)
    plan: list[Any] = []
    for kind, run in groupby(steps, kinds.__getitem__):
        if isinstance(kind, range):
            plan.append((kind, True, trained))
            continue
        first, *others = run
        calls = split(range(first, first + 1 + len(others)), fold.trained if kind else fold.forward)
        plan += [(call, kind, None) for call in calls]
    return plan
