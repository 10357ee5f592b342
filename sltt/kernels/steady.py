"""Neurons under a current that is the same in all time steps: their rate and its derivatives in one pass."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sltt.kernels.options import Kernel
from sltt.kernels.step import NeuronStep, dense

UNROLLED = 8  # time steps in one pass, so that a long sequence does not compile for minutes


@dataclass(frozen=True)
class Steady:
    """Means over T time steps, [B, ...]: of the spikes, and of their derivatives by x and by parameters that learn."""

    rate: Tensor
    by_input: Tensor
    by_parameters: tuple[Tensor, ...] = ()


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
        see: is called with the spikes of n ≤ 8 steps, one after the other, [n·B, ...] in x's type, until all were seen.

    Returns:
        Means in x's type, and that of the derivative with respect to λ in float32 at least.
    """
    x = x if dense(x) else x.contiguous()
    sums = torch.promote_types(dtype, torch.float32)  # bfloat16 does not count further than 256
    wanted = [sums, sums, None if decay is None else sums]  # of count, by_input, by_decay
    states = [dtype, dtype, None if decay is None else dtype]  # v and, carried from step to step, its derivatives

    def buffers(types: list[torch.dtype | None]) -> list[Tensor | None]:
        return [None if t is None else torch.empty_like(x, dtype=t) for t in types]

    rate, by_input = torch.empty_like(x), torch.empty_like(x)
    (by_decay,) = buffers(wanted[2:])
    kept = buffers([*wanted, *states]) if steps > UNROLLED else [None] * 6
    for done in range(0, steps, UNROLLED):
        n = min(UNROLLED, steps - done)
        spikes = x.new_empty(n if see else 0, x.numel())
        run = _kernel(step, n, dtype, None if done else start, steps if done + n == steps else None)
        run(rate, by_input, by_decay, *kept, x, decay, *spikes)
        if see:
            see(spikes.as_strided((n, *x.shape), (x.numel(), *x.stride())).flatten(0, 1))
    return Steady(rate, by_input, () if by_decay is None else (by_decay,))


@functools.lru_cache(maxsize=64)
def _kernel(step: NeuronStep, steps: int, dtype: torch.dtype, start: float | None, total: int | None) -> Kernel:
    """Some of the time steps.

    The first ones of a sequence begin with the membrane potential `start`, others with what was kept. The last ones
    write means over the `total` number of steps, others keep sums and states.
    """
    first = start is not None
    rest = step.v_reset or 0.0

    def run(
        rate: Tensor,
        by_input: Tensor,
        by_decay: Tensor | None,
        kept_count: Tensor | None,
        kept_slope: Tensor | None,
        kept_slope_decay: Tensor | None,
        kept_v: Tensor | None,
        kept_g: Tensor | None,
        kept_g_decay: Tensor | None,
        x: Tensor,
        decay: Tensor | None,
        *spikes: Tensor,
    ) -> None:
        stay = step.decay if decay is None else decay
        assert stay is not None
        current = x.to(dtype)
        sums = torch.promote_types(dtype, torch.float32)
        gain = 1 - stay if step.decay_input else 1.0
        # tensors: the compiler would make a guard of a number that is computed from constants, and the guard fails
        v: Any = torch.full_like(current, start) if start is not None else kept_v
        g: Any = torch.zeros_like(current) if first else kept_g
        g_decay: Any = torch.zeros_like(current) if first else kept_g_decay
        count: Any = 0.0 if first else kept_count
        slope: Any = 0.0 if first else kept_slope
        slope_decay: Any = 0.0 if first else kept_slope_decay
        for t in range(steps):
            u = step.charge(v, current, stay)
            s = step.surrogate.fires(u - step.v_threshold).to(u.dtype)
            before, v = v, step.reset(u, s)
            kept = v if step.v_reset is None else u
            fires, stays = step.derivatives(kept, s)
            f = stay * g + gain
            g = f * stays
            count, slope = count + s.to(sums), slope + (f * fires).to(sums)
            if by_decay is not None:
                moved = before - rest - (current if step.decay_input else 0.0)
                f = stay * g_decay + moved
                g_decay = f * stays
                slope_decay = slope_decay + (f * fires).to(sums)
            if spikes:
                spikes[t].copy_(s)
        if total is not None:
            written = (rate, count), (by_input, slope), (by_decay, slope_decay)
        else:
            summed = (kept_count, count), (kept_slope, slope), (kept_slope_decay, slope_decay)
            written = *summed, (kept_v, v), (kept_g, g), (kept_g_decay, g_decay)
        for out, value in written:
            if out is not None:
                out.copy_(value if total is None else value / total)

    return Kernel(run)
