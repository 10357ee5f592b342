"""Neurons under a current that is the same in all time steps: their rate and its derivatives in one pass."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sltt.kernels.neuron.native_step import native_step
from sltt.kernels.neuron.step import NeuronStep
from sltt.kernels.options import Kernel, dense

UNROLLED = 8  # time steps in one pass, so that a long sequence does not compile for minutes


@dataclass(frozen=True)
class Steady:
    """Means over T time steps, [B, ...]: of the spikes, and of their derivatives by x and by parameters that learn."""

    rate: Tensor
    by_input: Tensor
    by_parameters: tuple[Tensor, ...] = ()


def steady_steps(
    step: NeuronStep, x: Tensor, steps: int, dtype: torch.dtype, start: float, decay: Any = None, see: Any = None
) -> Steady:
    """Run T time steps under the current x [B, ...], without a graph.

    Args:
        step: the neuron's constants.
        x: input current of every step, [B, ...].
        steps: T.
        dtype: of the membrane potential.
        start: membrane potential before the first step.
        decay: λ where it is a tensor; then with the derivative with respect to it, in float32 at least.
        see: is called with the spikes of n ≤ 8 steps, one after the other, [n·B, ...] in x's type, until all were seen.
    """
    x = x if dense(x) else x.contiguous()
    plain = decay is None and see is None
    if plain and (native := native_step(step, x, x.dtype, dtype, None, gradient=True)):
        rate, by_input = torch.empty_like(x), torch.empty_like(x)
        native.steady(rate, by_input, x, steps, start)
        return Steady(rate, by_input)
    sums = torch.promote_types(dtype, torch.float32)  # bfloat16 does not count further than 256
    by_decay = [] if decay is None else [torch.empty_like(x, dtype=sums)]
    means = torch.empty_like(x), torch.empty_like(x), *by_decay
    types = [sums] * len(means) + [dtype] * len(means) if steps > UNROLLED else []
    kept = [torch.empty_like(x, dtype=t) for t in types]
    for done in range(0, steps, UNROLLED):
        n = min(UNROLLED, steps - done)
        last = done + n == steps
        spikes = x.new_empty(n if see else 0, x.numel())
        run = _kernel(step, n, dtype, None if done else start, steps if last else None)
        run(*(means if last else ()), *kept, x, decay, *spikes)
        if see:
            see(spikes.as_strided((n, *x.shape), (x.numel(), *x.stride())).flatten(0, 1))
    rate, by_input, *_ = means
    return Steady(rate, by_input, tuple(by_decay))


@functools.lru_cache(maxsize=1024)
def _kernel(step: NeuronStep, steps: int, dtype: torch.dtype, start: float | None, total: int | None) -> Kernel:
    """Some of the time steps, on (means, kept, x, decay, spikes).

    The first ones of a sequence begin with the membrane potential `start`, others with what was kept: the sums of the
    spikes and of their derivatives; v and its derivatives. The last ones write means over the `total` number of steps,
    others keep. Derivatives are those by x and, where λ is a tensor, by λ.
    """
    results = 2 + (step.decay is None)  # spikes and their derivatives
    end_of_means = 0 if total is None else results
    end_of_kept = end_of_means + (0 if start is not None and total is not None else 2 * results)

    def run(*tensors: Any) -> None:
        means, kept = tensors[:end_of_means], tensors[end_of_means:end_of_kept]
        x, decay, *spikes = tensors[end_of_kept:]
        stay = step.rate(decay)
        current = x.to(dtype)
        kind = torch.promote_types(dtype, torch.float32)
        gain = 1 - stay if step.decay_input else 1.0
        sums: Any
        if start is None:
            sums, (v, *g) = kept[:results], kept[results:]
        else:
            # tensors: the compiler would make a guard of a number that is computed from constants, and the guard fails
            v, g = torch.full_like(current, start), [torch.zeros_like(current)] * (results - 1)
            sums = [0.0] * results
        for t in range(steps):
            u = step.charge(v, current, stay)
            s = step.surrogate.fires(u - step.v_threshold).to(u.dtype)
            before, v = v, step.reset(u, s)
            fires, stays = step.derivatives(v if step.v_reset is None else u, s)
            direct = [gain]  # ∂u/∂x and ∂u/∂λ, at the v before
            if step.decay is None:
                direct.append(before - (step.v_reset or 0.0) - (current if step.decay_input else 0.0))
            slopes = [stay * of_v + of_u for of_v, of_u in zip(g, direct, strict=True)]
            g = [f * stays for f in slopes]
            sums = [a + b.to(kind) for a, b in zip(sums, [s, *(f * fires for f in slopes)], strict=True)]
            if spikes:
                spikes[t].copy_(s)
        if total is None:
            outputs, values = kept, [*sums, v, *g]
        else:
            outputs, values = means, [value / total for value in sums]
        for out, value in zip(outputs, values, strict=True):
            out.copy_(value)

    return Kernel(run)
