"""Truncated backpropagation through time: BPTT, TBPTT and SLTT are one rule with windows of T, n and one steps."""

import copy
import math
import operator
from collections.abc import Collection, Container
from functools import reduce
from itertools import groupby
from typing import Any, Literal

import torch
from torch import nn

from sltt import kernels
from sltt.checks import flag, whole_number
from sltt.losses import SequenceLoss, is_mean
from sltt.rules.base import Rule
from sltt.rules.batch import Batch, Fold, Output
from sltt.rules.folding import fold_of
from sltt.rules.segments import run_in_segments, split
from sltt.sequence.padding import Padded

GRAPHS = 64  # of SLTT-K, one for each draw of its steps


class Truncated(Rule):
    """Backward at the end of each window of steps; the state that enters the next window is a constant.

    The arguments say how the rule runs, for time or memory; the gradient stays as it is.

    Args:
        recompute: run convolutions and linear layers again for the backward, from their spikes, instead of keeping
            their outputs: less memory, one more forward of these layers.
        fold: time steps in one call of the network: fewer and larger operations, for the memory of so many steps.
            "auto" takes several where all layers are small, as many as fit into 16 MB. It takes one where a layer's
            matrix products have 2,048 rows (samples × pixels) in a step, or where sharing a call would change results,
            and with recompute or hoist.
        hoist: with a static input, compute what the network marks by `sltt.once` once a sequence. Saves the time of
            these layers in all steps but one, for the memory of their outputs and of these outputs' gradients.

    Raises:
        ValueError: fold < 1, hoist together with a fold; when called, a layer that cannot be folded.

    Attributes:
        window: time steps of a window; None for those of the sequence.
        rescale: divide the loss by the number of trained steps, in place of T.
    """

    window: int | None = None
    rescale: bool = False

    def __init__(
        self,
        recompute: bool = False,
        fold: int | Literal["auto"] = "auto",
        hoist: bool = False,
    ):
        self.recompute = flag("recompute", recompute)
        self.fold = fold_of(fold)
        self.hoist = flag("hoist", hoist)
        if hoist and fold not in (1, "auto"):
            raise ValueError("hoist computes the first layers for one time step, and fold for several: choose one")

    def trained_steps(self, batch: Batch) -> Collection[int]:
        """Return the steps with a graph and a backward; the others run forward only."""
        return range(batch.steps)

    def run(self, batch: Batch) -> Output:
        steps, length, fold = range(batch.steps), self.window or batch.steps, batch.fold
        trained = self.trained_steps(batch)
        scale = batch.steps / len(trained) if self.rescale else 1.0
        cut = length == 1  # such windows share a call of the network: the neurons cut the gradient between its steps
        whole = batch.whole  # logits are collected, or losses
        if shared := cut and not whole:
            windows = _split_into_calls(steps, trained, fold, is_mean(batch.loss))
        else:
            windows = [(window, window.start in trained, None) for window in split(steps, length)]
        for window, graph, some in windows:
            values = []
            for call in [window] if shared else split(window, fold.trained if graph else fold.forward):
                how: Any = {"graph": graph, "cut": cut, "recompute": self.recompute}
                value = batch.run(call, **how) if whole else batch.forward(call, **how, trained=some)
                values.append(value.clone() if whole else value)  # the model may go on to change its logits
            value = batch.window_loss(window, torch.cat(values)) if whole else reduce(operator.add, values)
            if graph:
                batch.backward(value * scale)
            del values, value  # so that the graph of this window is gone before the next forward
            if not cut:
                batch.detach()
        return batch.output()


def step_by_step(rule: Rule) -> Rule:
    """Return a rule that runs one time step in a call, where it would choose by itself: its memory is SLTT's."""
    if rule.fold != "auto":
        return rule
    made = copy.copy(rule)
    vars(made)["fold"] = 1
    return made


def _split_into_calls(
    steps: range, trained: Container[int], fold: Fold, mixed: bool
) -> list[tuple[range, bool, Container[int] | None]]:
    """Return the time steps that share a call, whether it has a graph, and the trained ones if these are some of it.

    Where `mixed` allows it, a call has steps of both kinds if m ≥ n/8 + 1 of its n steps are trained. Measured on small
    networks, more and smaller calls take longer then.
    """
    kinds: list[Any] = [t in trained for t in steps]
    for part in split(steps, fold.trained) if mixed else []:
        count = sum(kinds[part.start : part.stop])
        if count < len(part) and 8 * (count - 1) >= len(part):
            kinds[part.start : part.stop] = [part] * len(part)
    found: list[Any] = []
    for kind, run in groupby(steps, kinds.__getitem__):
        if isinstance(kind, range):
            found.append((kind, True, trained))
            continue
        first, *others = run
        calls = split(range(first, first + 1 + len(others)), fold.trained if kind else fold.forward)
        found += [(call, kind, None) for call in calls]
    return found


class BPTT(Truncated):
    """Backpropagation through time: the exact gradient of L = 1/T Σ_t ℓ(o[t], y), with surrogates for the spikes.

        ∂L/∂u[t] = ∂L/∂s[t] ∂s[t]/∂u[t] + ∂L/∂v[t] ∂v[t]/∂u[t]
        ∂L/∂v[t] = ∂L/∂u[t+1] ∂u[t+1]/∂v[t]                          0 for t = T

    One backward after the last step, through space and time. Memory and time grow with T. With fold=T it goes layer by
    layer instead of step by step, and computes the membrane potentials behind a BatchNorm again from its input instead
    of keeping them.

    Args:
        segment: n, the time steps of a segment. Only one segment has its graph at a time. Of the others the states at
            their start are kept, and their forward runs again for their backward. Memory is that of n steps and T/n
            states, so about √T is best. None keeps the graph of all steps.
        how: how the rule runs, see `Truncated`.

    Raises:
        ValueError: segment < 1, together with recompute or hoist; and as of `Truncated`.
    """

    sequence_losses = (SequenceLoss,)

    def __init__(self, segment: int | None = None, **how: Any):
        self.segment = None if segment is None else whole_number("segment", segment, least=1)
        super().__init__(**how)
        if segment is not None and (self.recompute or self.hoist):
            raise ValueError("segment runs all layers again, recompute and hoist some of them: choose one")

    @property
    def reads_logits(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """A replayed segment is compared with what it gave."""
        return self.segment is not None

    def no_graph(self, steps: int) -> str | None:
        return None if self.segment is None else "saves and restores random generators"

    def run(self, batch: Batch) -> Output:
        if self.segment is None:
            return super().run(batch)
        if batch.whole:
            raise ValueError("segment has no graph of all logits, which a loss of the whole sequence needs: use BPTT()")
        with kernels.choosing_once():
            return run_in_segments(batch, self.segment, batch.fold)


class TBPTT(Truncated):
    """Truncated BPTT: exact within windows of consecutive steps, no gradient from one window to the one before.

    Memory grows with the window, not with T. TBPTT(T) is BPTT, TBPTT(1) is SLTT.

    Args:
        window: number of time steps, at least 1; the last window of a sequence may be shorter.
        how: how the rule runs, see `Truncated`. Windows are not joined by `fold`.

    Raises:
        ValueError: window < 1; and as of `Truncated`.
    """

    sequence_losses = (SequenceLoss,)
    window: int

    def __init__(self, window: int, **how: Any):
        self.window = whole_number("window", window, least=1)  # pyright: ignore[reportIncompatibleVariableOverride]
        super().__init__(**how)


class SLTT(Truncated):
    """Spatial learning through time: v[t−1] is a constant in step t, so backward runs at once, step by step.

        ∇W^l = Σ_t e^l[t] s^{l−1}[t]ᵀ,   e^l[t] = ((W^{l+1})ᵀ e^{l+1}[t]) ⊙ ∂s/∂u

    e^l[t] is the error ∂L/∂u^l[t] within step t. Memory does not grow with T. With `k`, SLTT-K: only k steps of T,
    drawn anew for every batch, run backward; the others run forward without a graph, BatchNorm still in training mode,
    and count with gradient zero. They are `torch.randperm(T)[:k]`, by the `seed` of the call if there is one.

    Args:
        k: number of steps with a backward, at least 1; None trains all.
        rescale: multiply the gradient by T/k, which makes SLTT-K an unbiased estimate of SLTT's gradient. The paper
            does not.
        how: how the rule runs, see `Truncated`.

    Raises:
        ValueError: k < 1, `rescale` without k, or, when called, k > T; and as of `Truncated`.

    Source: Meng et al., ICCV 2023 (arXiv 2302.14311).
    """

    window = 1

    def __init__(self, k: int | None = None, rescale: bool = False, **how: Any):
        self.k = None if k is None else whole_number("k", k, least=1)
        self.rescale = flag("rescale", rescale)
        if rescale and k is None:
            raise ValueError("rescale=True needs k: without it every step is trained and there is nothing to rescale")
        super().__init__(**how)

    def check(self, model: nn.Module, steps: int) -> None:
        if self.k is not None and self.k > steps:
            raise ValueError(f"SLTT(k={self.k}) trains {self.k} steps, but the sequence has T = {steps}; use k ≤ T")

    def draw(self, steps: int, seed: int | None) -> frozenset[int] | None:
        if self.k is None:
            return None
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return frozenset(torch.randperm(steps, generator=generator, device="cpu")[: self.k].tolist())

    def no_graph(self, steps: int) -> str | None:
        if self.k is None:
            return None
        draws = math.comb(steps, self.k)
        if draws > GRAPHS:
            return f"has {draws} draws of {self.k} of {steps} steps, and each is a graph: {GRAPHS} at most"
        return None

    def trained_steps(self, batch: Batch) -> Collection[int]:
        if not isinstance(batch.target, Padded):  # T of a padded batch is that of its longest sequence
            self.check(batch.model, batch.steps)
        if self.k and batch.seed is None and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                f"SLTT(k={self.k}) draws its steps anew for each batch, and a CUDA graph would repeat one draw: "
                "capture SLTT(), or run SLTT-K without a graph"
            )
        drawn = self.draw(batch.steps, batch.seed)
        return range(batch.steps) if drawn is None else drawn
