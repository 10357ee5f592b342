"""Neurons under a current that is the same in all time steps: spikes and derivatives of all steps in one pass."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sltt.kernels.options import Kernel
from sltt.kernels.step import NeuronStep, dense

UNROLLED = 4  # time steps in one pass, so that a long sequence does not compile for minutes


@dataclass(frozen=True)
class Steady:
    """Sums over T time steps, [B, ...]: of the spikes, and of their derivatives with respect to x and, if asked, λ."""

    count: Tensor
    by_input: Tensor
    by_decay: Tensor | None


def steady_steps(
    step: NeuronStep,
    x: Tensor,
    steps: int,
    dtype: torch.dtype,
    start: float,
    decay: Tensor | None = None,
    see: Callable[[Tensor], None] | None = None,
) -> Steady:
    """Run T time steps under the current x, without a graph.

    Args:
        step: the neuron's constants.
        x: input current of every step, [B, ...].
        steps: T.
        dtype: of the membrane potential.
        start: membrane potential before the first step.
        decay: λ where it is a tensor; then with the derivative with respect to it.
        see: is called with the spikes of n ≤ 4 steps, one after the other, [n·B, ...] in x's type, until all were seen.
    """
    x = x if dense(x) else x.contiguous()

    def buffer(wanted: bool) -> Tensor | None:
        return torch.empty_like(x, dtype=dtype) if wanted else None

    sums = torch.promote_types(dtype, torch.float32)  # bfloat16 does not count further than 256
    learnable, several = decay is not None, steps > UNROLLED
    count, by_input = torch.empty_like(x, dtype=sums), torch.empty_like(x, dtype=sums)
    by_decay = torch.empty_like(x, dtype=sums) if learnable else None
    v, carried, carried_decay = buffer(several), buffer(several), buffer(several and learnable)
    for done in range(0, steps, UNROLLED):
        n = min(UNROLLED, steps - done)
        spikes = x.new_empty(n if see else 0, x.numel())
        run = _kernel(step, n, dtype, None if done else start)
        run(count, by_input, by_decay, v, carried, carried_decay, x, decay, *spikes)
        if see:
            see(spikes.as_strided((n, *x.shape), (x.numel(), *x.stride())).flatten(0, 1))
    return Steady(count, by_input, by_decay)


@functools.lru_cache(maxsize=64)
def _kernel(step: NeuronStep, steps: int, dtype: torch.dtype, start: float | None) -> Kernel:
    """Some of the time steps: the first ones of a sequence, from the membrane potential `start`, or further ones."""
    first = start is not None
    rest = step.v_reset or 0.0

    def run(
        count: Tensor,
        by_input: Tensor,
        by_decay: Tensor | None,
        v_kept: Tensor | None,
        carried: Tensor | None,
        carried_decay: Tensor | None,
        x: Tensor,
        decay: Tensor | None,
        *spikes: Tensor,
    ) -> None:
        rate = step.decay if decay is None else decay
        assert rate is not None
        current = x.to(dtype)
        gain = 1 - rate if step.decay_input else 1.0
        # tensors: the compiler would make a guard of a number that is computed from constants, and the guard fails
        v: Any = v_kept if start is None else torch.full_like(current, start)
        g: Any = torch.zeros_like(current) if first else carried
        g_decay: Any = torch.zeros_like(current) if first else carried_decay
        total: Any = 0.0 if first else count
        slope: Any = 0.0 if first else by_input
        slope_decay: Any = 0.0 if first else by_decay
        for t in range(steps):
            u = step.charge(v, current, rate)
            s = step.surrogate.fires(u - step.v_threshold).to(u.dtype)
            before, v = v, step.reset(u, s)
            kept = v if step.v_reset is None else u
            fires, stays = step.derivatives(kept, s)
            f = rate * g + gain
            g = f * stays
            total, slope = total + s.to(count.dtype), slope + (f * fires).to(count.dtype)
            if by_decay is not None:
                moved = before - rest - (current if step.decay_input else 0.0)
                f = rate * g_decay + moved
                g_decay = f * stays
                slope_decay = slope_decay + (f * fires).to(count.dtype)
            if spikes:
                spikes[t].copy_(s)
        sums = (count, total), (by_input, slope), (by_decay, slope_decay)
        state = (v_kept, v), (carried, g), (carried_decay, g_decay)
        for out, value in sums + state:
            if out is not None:
                out.copy_(value)

    return Kernel(run)
