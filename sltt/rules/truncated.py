"""Truncated backpropagation through time: BPTT, TBPTT and SLTT are one rule with windows of T, n and one steps."""

from collections.abc import Container, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from sltt import kernels
from sltt.folding import foldable
from sltt.rules.autofold import AutoFold
from sltt.rules.base import Backward, Loss, Output, Rule, Sequence, step_loss
from sltt.rules.replay import run_in_segments
from sltt.state import detach

Fold = int | Literal["auto"]


class _Truncated(Rule):
    """Backward at the end of each window of steps; the state that enters the next window is a constant."""

    def __init__(self, recompute: bool | int, fold: Fold, budget: str | int | None, hoist: bool):
        if fold != "auto" and fold < 1:
            raise ValueError(f"fold must be 'auto' or at least 1 time step, got {fold}")
        if budget is not None and fold != "auto":
            raise ValueError("budget is the memory for fold='auto', and fold is a number")
        if hoist and fold != 1:
            raise ValueError("hoist computes the first layers for one time step, and fold for several: choose one")
        self.recompute = recompute
        self.fold = fold
        self.budget = budget
        self.hoist = hoist
        self._auto = AutoFold(budget)

    def window_length(self, steps: int) -> int:
        raise NotImplementedError

    def trained_steps(self, steps: int) -> Container[int]:
        """The steps with a graph and a backward; the others run forward only."""
        return range(steps)

    def loss_scale(self, steps: int) -> float:
        """Weight of a step's loss."""
        return 1 / steps

    def run(self, model: nn.Module, sequence: Sequence, target: Any, loss: Loss, backward: Backward) -> Output:
        run = partial(self.run_folded, model, sequence, target, loss, backward)
        if self.fold == 1:
            return run(1)
        with foldable(model):
            if isinstance(self.fold, int):
                return run(self.fold)
            return self._auto.run(model, sequence, sequence.steps, run)

    def run_folded(
        self, model: nn.Module, sequence: Sequence, target: Any, loss: Loss, backward: Backward, fold: int
    ) -> Output:
        """`run` with at most `fold` time steps in a call of the network."""
        steps = sequence.steps
        window = self.window_length(steps)
        trained = self.trained_steps(steps)
        scale = self.loss_scale(steps)
        total = window_loss = None
        outputs = []
        for call in _calls(steps, fold, window, trained):
            has_graph = call.start in trained
            with torch.set_grad_enabled(has_graph):
                with kernels.saving(recompute=self.recompute is True) if has_graph else nullcontext():
                    logits = sequence.run(model, call, cut=window == 1)
                value = torch.stack([step_loss(loss, o, target) for o in logits]).sum()
                if has_graph:
                    window_loss = value * scale if window_loss is None else window_loss + value * scale
                else:
                    # Casts of weights that autocast caches without a graph would cut the weights off in later steps.
                    torch.clear_autocast_cache()
            outputs.append(logits.detach())
            total = value.detach() if total is None else total + value.detach()
            del logits, value  # so that the graph of these steps is gone before the next forward
            if window == 1 or call.stop % window == 0 or call.stop == steps:
                if window_loss is not None:
                    backward(window_loss)
                    window_loss = None
                detach(model)
        assert total is not None
        return Output(total / steps, torch.cat(outputs))


def _calls(steps: int, fold: int, window: int, trained: Container[int]) -> Iterator[range]:
    """The time steps cut into calls of the network: `fold` at most, all trained or none, within a window.

    Windows of one step need no call of their own: the neurons cut the gradient between the steps of a call.
    """
    start = 0
    for t in range(1, steps + 1):
        ends_window = window > 1 and t % window == 0
        if t == steps or t - start == fold or ends_window or (t in trained) != (start in trained):
            yield range(start, t)
            start = t


class BPTT(_Truncated):
    """Backpropagation through time: the exact gradient of L = 1/T Σ_t ℓ(o[t], y), with surrogates for the spikes.

    ∂L/∂v[t] = ∂L/∂u[t+1] ∂u[t+1]/∂v[t] + …: one backward after the last step, through space and time. Memory and time
    grow with T.

    Args:
        recompute: run the forward again for the backward instead of keeping it; the gradient is the same. True: the
            convolutions and linear layers, from their spikes; what is kept are spikes as bits and membrane potentials.
            A number n: keep the graph of n time steps at once, and of the others the states in between; memory is that
            of n steps and T/n states, so about √T steps are best.
        fold: time steps in one call of the network. With T, BPTT goes layer by layer instead of step by step, and the
            membrane potentials behind a BatchNorm are computed again from its input instead of kept.
        budget: for fold="auto", which measures the first two batches and then takes the largest fold that fits: the
            memory for a batch, such as "8GB"; None is 70% of what is free at the first batch.
        hoist: with a static input, compute what the network marks by `sltt.once` once a sequence. Saves the time of
            these layers in all steps but one, for the memory of their outputs and of these outputs' gradients.

    Raises:
        ValueError: recompute or fold < 1, or a layer that cannot be folded.
    """

    def __init__(
        self, recompute: bool | int = False, fold: Fold = 1, budget: str | int | None = None, hoist: bool = False
    ):
        if recompute is not False and recompute < 1:
            raise ValueError(f"recompute must be True or at least 1 time step, got {recompute}")
        if hoist and not isinstance(recompute, bool):
            raise ValueError(
                "hoist keeps what the replay of recompute=n would run again: choose one, or recompute=True"
            )
        super().__init__(recompute, fold, budget, hoist)

    def window_length(self, steps: int) -> int:
        return steps

    def run_folded(
        self, model: nn.Module, sequence: Sequence, target: Any, loss: Loss, backward: Backward, fold: int
    ) -> Output:
        if isinstance(self.recompute, bool):
            return super().run_folded(model, sequence, target, loss, backward, fold)
        return run_in_segments(model, sequence, target, loss, backward, self.recompute, fold)


class TBPTT(_Truncated):
    """Truncated BPTT: exact within windows of consecutive steps, no gradient from one window to the one before.

    Memory grows with the window, not with T. TBPTT(T) is BPTT, TBPTT(1) is SLTT.

    Args:
        window: number of time steps, at least 1; the last window of a sequence may be shorter.
        recompute: run convolutions and linear layers again for the backward, as in `SLTT`.
        fold: time steps in one call of the network; windows are not joined.
        budget: for fold="auto", which measures the first two batches and then takes the largest fold that fits: the
            memory for a batch, such as "8GB"; None is 70% of what is free at the first batch.
        hoist: with a static input, compute what the network marks by `sltt.once` once a sequence. Saves the time of
            these layers in all steps but one, for the memory of their outputs and of these outputs' gradients.

    Raises:
        ValueError: window or fold < 1, or a layer that cannot be folded.
    """

    def __init__(
        self, window: int, recompute: bool = False, fold: Fold = 1, budget: str | int | None = None, hoist: bool = False
    ):
        super().__init__(recompute, fold, budget, hoist)
        if window < 1:
            raise ValueError(f"window must be at least 1 time step, got {window}")
        self.window = window

    def window_length(self, steps: int) -> int:
        return self.window


class SLTT(_Truncated):
    """Spatial learning through time: v[t−1] is a constant in step t, so backward runs at once, step by step.

        ∇W^l = Σ_t e^l[t] s^{l−1}[t]^T,   e^l[t] = (W^{l+1,T} e^{l+1}[t]) ⊙ ∂s/∂u

    Memory does not grow with T. With `k`, SLTT-K: only k steps of T, drawn anew for every batch, run backward; the
    others run forward without a graph, BatchNorm still in training mode, and count with gradient zero.

    Args:
        k: number of steps with a backward, at least 1; None trains all.
        rescale: multiply the gradient by T/k, which makes SLTT-K an unbiased estimate of SLTT's gradient. The paper
            does not.
        generator: where the steps are drawn from, `torch.randperm(T, generator=generator)[:k]`; None is PyTorch's
            global generator.
        recompute: run convolutions and linear layers again for the backward, from their spikes, instead of keeping
            their outputs: less memory, the same gradient, one more forward of these layers.
        fold: time steps in one call of the network, for the memory of so many steps: fewer and larger operations,
            which pays on a GPU that waits for launches.
        budget: for fold="auto", which measures the first two batches and then takes the largest fold that fits: the
            memory for a batch, such as "8GB"; None is 70% of what is free at the first batch.
        hoist: with a static input, compute what the network marks by `sltt.once` once a sequence. Saves the time of
            these layers in all steps but one, for the memory of their outputs and of these outputs' gradients.

    Raises:
        ValueError: k or fold < 1, `rescale` without k, a layer that cannot be folded, or, when called, k > T.

    Source: Meng et al., ICCV 2023 (arXiv 2302.14311).
    """

    def __init__(
        self,
        k: int | None = None,
        rescale: bool = False,
        generator: torch.Generator | None = None,
        recompute: bool = False,
        fold: Fold = 1,
        budget: str | int | None = None,
        hoist: bool = False,
    ):
        super().__init__(recompute, fold, budget, hoist)
        if k is not None and k < 1:
            raise ValueError(f"k must be at least 1 time step, got {k}")
        if rescale and k is None:
            raise ValueError("rescale=True needs k: without it every step is trained and there is nothing to rescale")
        self.k = k
        self.rescale = rescale
        self.generator = generator
        self._seed: int | None = None

    def seed(self, seed: int) -> None:
        self._seed = seed

    def state_dict(self) -> dict[str, Any]:
        return {"generator": None if self.generator is None else self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if self.generator is not None and state["generator"] is not None:
            self.generator.set_state(state["generator"])

    def window_length(self, steps: int) -> int:
        return 1

    def trained_steps(self, steps: int) -> Container[int]:
        if self.k is None:
            return range(steps)
        if self.k > steps:
            raise ValueError(f"SLTT(k={self.k}) trains {self.k} steps, but the sequence has T = {steps}; use k ≤ T")
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                f"SLTT(k={self.k}) draws its steps anew for each batch, and a CUDA graph would repeat one draw: "
                "capture SLTT(), or run SLTT-K without a graph"
            )
        generator, seed = self.generator, self._seed
        if generator is None and seed is not None:
            generator, self._seed = torch.Generator().manual_seed(seed), None
        return set(torch.randperm(steps, generator=generator)[: self.k].tolist())

    def loss_scale(self, steps: int) -> float:
        return 1 / self.k if self.rescale and self.k is not None else 1 / steps
