"""Truncated backpropagation through time: BPTT, TBPTT and SLTT are one rule with windows of T, n and one steps."""

import operator
from collections.abc import Collection
from functools import reduce
from typing import Any, Literal, get_args

import torch

from sltt import kernels
from sltt.checks import choice, flag, whole_number
from sltt.losses import SequenceLoss
from sltt.rules.base import Rule
from sltt.rules.batch import Batch, Output
from sltt.rules.credit import Credit, CreditStep
from sltt.rules.folding import fold_of
from sltt.rules.random_steps import RandomSteps, number_of_steps, split_into_calls
from sltt.rules.segments import choose_segments, run_in_segments, split
from sltt.sequence.step import Step


class Truncated(Rule):
    """Backward at the end of each window of steps; the state that enters the next window is a constant.

    The arguments say how the rule runs, for time or memory; the gradient stays as it is.

    Args:
        recompute: run convolutions and linear layers again for the backward, from their spikes, instead of keeping
            their outputs: less memory, one more forward of these layers.
        fold: time steps in one call of the network: fewer and larger operations, for the memory of so many steps.
            "auto" takes several where layers are small: until their matrix products have 2,048 rows (samples × pixels)
            in the mean, in 16 MB or the size of weights and gradients. It takes one where sharing a call would change
            results, and with recompute or hoist.
        hoist: with a static input, compute what the network marks by `sltt.once` once a sequence. Saves the time of
            these layers in all steps but one, for the memory of their outputs and of these outputs' gradients.

    Raises ValueError for fold < 1, and hoist together with a fold; when called, for a layer that cannot be folded.

    Attributes:
        window: time steps of a window; None for those of the sequence.
        rescale: divide the loss by the number of trained steps, in place of T.
    """

    window: int | None = None
    rescale: bool = False

    def __init__(self, recompute: bool = False, fold: int | Literal["auto"] = "auto", hoist: bool = False):
        self.recompute = flag("recompute", recompute)
        self.fold = fold_of(fold)
        self.hoist = flag("hoist", hoist)
        if hoist and fold not in (1, "auto"):
            raise ValueError("hoist computes the first layers for one time step, and fold for several: choose one")

    @property
    def repeats(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Layers that run again for the backward do so in each time step."""
        return self.recompute

    def trained_steps(self, batch: Batch) -> Collection[int]:
        """Return the steps with a graph and a backward; the others run forward only."""
        return range(batch.steps)

    def run(self, batch: Batch) -> Output:
        steps, length, fold = range(batch.steps), self.window or batch.steps, batch.fold
        trained = batch.network.step.trained = self.trained_steps(batch)
        scale = batch.steps / len(trained) if self.rescale else 1.0
        cut = length == 1  # such windows share a call of the network: the neurons cut the gradient between its steps
        whole = batch.whole  # logits are collected, or losses
        if shared := cut and not whole:
            windows = split_into_calls(steps, trained, batch)
        else:
            windows = [(window, window.start in trained, None) for window in split(steps, length)]
        for window, graph, some in windows:
            values = []
            for call in [window] if shared else split(window, fold.trained if graph else fold.forward):
                how: Any = {"graph": graph, "cut": cut, "recompute": self.recompute}
                value = batch.run(call, **how) if whole else batch.forward(call, **how, trained=some)
                values.append(value.clone() if whole else value)  # the model may go on to change its logits
            value = batch.window_loss(window, torch.cat(values)) if whole else reduce(operator.add, values)
            batch.backpropagate(value * scale if graph else None, window.stop)
            del values, value  # so that the graph of this window is gone before the next forward
            if not cut:
                batch.detach()
        return batch.output()


class BPTT(Truncated):
    """Backpropagation through time: the exact gradient of L = 1/T Σ_t ℓ(o[t], y), with surrogates for the spikes.

        ∂L/∂u[t] = ∂L/∂s[t] ∂s[t]/∂u[t] + ∂L/∂v[t] ∂v[t]/∂u[t]
        ∂L/∂v[t] = ∂L/∂u[t+1] ∂u[t+1]/∂v[t]                          0 for t = T

    One backward after the last step, through space and time. Memory and time grow with T. With fold=T it goes layer by
    layer instead of step by step, and computes the membrane potentials behind a BatchNorm again from its input instead
    of keeping them.

    Args:
        segment: n, the time steps of a segment. Only one segment has its graph at a time; the forward of the others
            runs again for their backward, from states that were kept. "auto" takes few steps and few states, so that
            no step runs forward more than three times: memory grows with √T. None keeps the graph of all steps.
        checkpoints: most states that are kept at a time; None keeps those at the start of each segment, T/n.
        how: how the rule runs, see `Truncated`.

    Raises:
        ValueError: segment < 1, together with recompute or hoist; checkpoints < 1, without a number as segment; and as
            of `Truncated`.
    """

    sequence_losses = (SequenceLoss,)

    def __init__(self, segment: int | Literal["auto"] | None = None, checkpoints: int | None = None, **how: Any):
        self.segment = segment if segment in (None, "auto") else whole_number("segment", segment, least=1)
        self.checkpoints = None if checkpoints is None else whole_number("checkpoints", checkpoints, least=1)
        if checkpoints is not None and not isinstance(self.segment, int):
            raise ValueError(f"checkpoints are of segments of n steps: give segment=n, got segment={segment!r}")
        super().__init__(**how)
        if segment is not None and (self.recompute or self.hoist):
            raise ValueError("segment runs all layers again, recompute and hoist some of them: choose one")

    @property
    def repeats(self) -> bool:
        return self.recompute or self.segment is not None

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
            if isinstance(self.segment, int):
                return run_in_segments(batch, self.segment, self.checkpoints, batch.fold)
            return run_in_segments(batch, *choose_segments(batch.steps, batch.fold.trained), batch.fold)


class TBPTT(Truncated):
    """Truncated BPTT: exact within windows of consecutive steps, no gradient from one window to the one before.

    Memory grows with the window, not with T. TBPTT(T) is BPTT, TBPTT(1) is SLTT(credit="none").

    Args:
        window: number of time steps, at least 1; the last window of a sequence may be shorter.
        how: how the rule runs, see `Truncated`. Windows are not joined by `fold`.

    Raises ValueError for window < 1, and as `Truncated` does.
    """

    sequence_losses = (SequenceLoss,)
    window: int

    def __init__(self, window: int, **how: Any):
        self.window = whole_number("window", window, least=1)  # pyright: ignore[reportIncompatibleVariableOverride]
        super().__init__(**how)


class SLTT(RandomSteps, Truncated):
    """Spatial learning through time: v[t−1] is a constant in step t, so backward runs at once, step by step.

        ∇W^l = Σ_t e^l[t] s^{l−1}[t]ᵀ,   e^l[t] = ((W^{l+1})ᵀ e^{l+1}[t]) ⊙ ∂s/∂u

    e^l[t] is the error ∂L/∂u^l[t] within step t. Memory does not grow with T. With `k`, SLTT-K: only k steps of T,
    drawn anew for every batch, run backward; the others run forward without a graph, BatchNorm still in training mode,
    and count with gradient zero. They are `torch.randperm(T)[:k]`, by the `seed` of the call if there is one.

    A `Delay` with trained layers before it gives them its error back, exactly, with the largest tap D of a delay:

        e^l[t] = (Σ_n (W_n^{l+1})ᵀ e^{l+1}[t+n]) ⊙ ∂s/∂u,   ∇W_n^l = Σ_t e^l[t] s^{l−1}[t−n]ᵀ

    Layer l runs its backward Δ_l steps later, the sum of D over the delays behind it, and keeps as many graphs. Under
    SLTT-K the error reaches the steps that run backward.

    Args:
        k: number of steps with a backward, at least 1; None trains all.
        rescale: multiply the gradient by T/k, an unbiased estimate of SLTT's gradient. The paper does not.
        credit: "exact", or "none": delayed taps are constants, and nothing waits.
        how: how the rule runs, see `Truncated`.

    Raises:
        ValueError: k < 1, `rescale` without k, or, when called, k > T; something goes around a delay, such as a
            residual connection, which the exact error needs to go through it; and as of `Truncated`.

    Source: Meng et al., ICCV 2023 (arXiv 2302.14311).
    """

    window = 1

    def __init__(self, k: int | None = None, rescale: bool = False, credit: Credit = "exact", **how: Any):
        self.credit = choice("credit", credit, get_args(Credit))
        self.k = number_of_steps(k)
        self.rescale = flag("rescale", rescale)
        if rescale and k is None:
            raise ValueError("rescale=True needs k: without it every step is trained and there is nothing to rescale")
        super().__init__(**how)

    def step(self) -> Step:
        return CreditStep(self.credit == "exact")
