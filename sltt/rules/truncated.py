"""Truncated backpropagation through time: BPTT, TBPTT and SLTT are one rule with windows of T, n and one steps."""

from collections.abc import Container
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from sltt import kernels
from sltt.rules.base import Backward, Loss, Output, Rule, Sequence, step_loss
from sltt.rules.replay import run_in_segments
from sltt.state import detach


class _Truncated(Rule):
    """Backward at the end of each window of steps; the state that enters the next window is a constant."""

    def window_length(self, steps: int) -> int:
        raise NotImplementedError

    def trained_steps(self, steps: int) -> Container[int]:
        """The steps with a graph and a backward; the others run forward only."""
        return range(steps)

    def loss_scale(self, steps: int) -> float:
        """Weight of a step's loss."""
        return 1 / steps

    def run(self, model: nn.Module, sequence: Sequence, target: Any, loss: Loss, backward: Backward) -> Output:
        steps = sequence.steps
        window = self.window_length(steps)
        trained = self.trained_steps(steps)
        scale = self.loss_scale(steps)
        total = window_loss = None
        outputs = []
        for t, x in enumerate(sequence):
            with torch.set_grad_enabled(t in trained):
                with kernels.saving_bits() if t in trained else nullcontext():
                    logits = model(x)
                value = step_loss(loss, logits, target)
                if t in trained:
                    window_loss = value * scale if window_loss is None else window_loss + value * scale
                else:
                    # Casts of weights that autocast caches without a graph would cut the weights off in later steps.
                    torch.clear_autocast_cache()
            outputs.append(logits.detach())
            total = value.detach() if total is None else total + value.detach()
            del logits, value  # so that a step's graph is gone before the next step's forward
            if (t + 1) % window == 0 or t + 1 == steps:
                if window_loss is not None:
                    backward(window_loss)
                    window_loss = None
                detach(model)
        assert total is not None
        return Output(total / steps, torch.stack(outputs))


class BPTT(_Truncated):
    """Backpropagation through time: the exact gradient of L = 1/T Σ_t ℓ(o[t], y), with surrogates for the spikes.

    ∂L/∂v[t] = ∂L/∂u[t+1] ∂u[t+1]/∂v[t] + …: one backward after the last step, through space and time. Memory and time
    grow with T.

    Args:
        recompute: keep the graph of at most so many time steps at once, and of the others the states in between, from
            which they are run again for their backward. The gradient is the same, memory that of `recompute` steps and
            T / `recompute` states, so about √T steps are best; the forward runs almost twice.

    Raises:
        ValueError: recompute < 1.
    """

    def __init__(self, recompute: int | None = None):
        if recompute is not None and recompute < 1:
            raise ValueError(f"recompute must be at least 1 time step, got {recompute}")
        self.recompute = recompute

    def window_length(self, steps: int) -> int:
        return steps

    def run(self, model: nn.Module, sequence: Sequence, target: Any, loss: Loss, backward: Backward) -> Output:
        if self.recompute is None:
            return super().run(model, sequence, target, loss, backward)
        return run_in_segments(model, list(sequence), target, loss, backward, self.recompute)


class TBPTT(_Truncated):
    """Truncated BPTT: exact within windows of consecutive steps, no gradient from one window to the one before.

    Memory grows with the window, not with T. TBPTT(T) is BPTT, TBPTT(1) is SLTT.

    Args:
        window: number of time steps, at least 1; the last window of a sequence may be shorter.
    """

    def __init__(self, window: int):
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

    Raises:
        ValueError: k < 1, `rescale` without k, or, when called, k > T.

    Source: Meng et al., ICCV 2023 (arXiv 2302.14311).
    """

    def __init__(self, k: int | None = None, rescale: bool = False, generator: torch.Generator | None = None):
        if k is not None and k < 1:
            raise ValueError(f"k must be at least 1 time step, got {k}")
        if rescale and k is None:
            raise ValueError("rescale=True needs k: without it every step is trained and there is nothing to rescale")
        self.k = k
        self.rescale = rescale
        self.generator = generator

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
        return set(torch.randperm(steps, generator=self.generator)[: self.k].tolist())

    def loss_scale(self, steps: int) -> float:
        return 1 / self.k if self.rescale and self.k is not None else 1 / steps
