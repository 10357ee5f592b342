"""The derivative of a neuron's firing rate with respect to a constant added to its input, gathered step by step."""

import functools

import torch
from torch import Tensor

from sltt.kernels.options import Kernel
from sltt.kernels.step import NeuronStep


class Sensitivity:
    """∂(Σ_t s[t])/∂c for a change of u by `source` ∂c at every step: forward differentiation, elementwise, in place.

        f[t] = source[t] + λ g[t−1],   g[t] = ∂v[t]/∂u[t] f[t],   total = Σ_t ∂s[t]/∂u[t] f[t]

    Args:
        step: the neuron's constants.
    """

    def __init__(self, step: NeuronStep):
        self._add = _kernel(step)
        self._total: Tensor | None = None
        self._carried: Tensor | None = None

    def add(self, kept: Tensor, s: Tensor, decay: Tensor | None, source: Tensor | None = None) -> None:
        """Add a time step.

        Args:
            kept: v[t] for a soft reset, u[t] for a hard one.
            s: spikes, in the same memory format.
            decay: λ where it is a tensor.
            source: ∂u/∂c; None for c that is added to the input.
        """
        if self._total is None or self._carried is None:
            sums = torch.promote_types(kept.dtype, torch.float32)  # in 16 bits, a long sum would stand still
            self._total, self._carried = torch.zeros_like(kept, dtype=sums), torch.zeros_like(kept)
        elif self._total.stride() != kept.stride():
            of_memory = (torch.empty_like(kept, dtype=t.dtype).copy_(t) for t in (self._total, self._carried))
            self._total, self._carried = of_memory
        self._add(self._total, self._carried, kept, s, decay, source)

    def take(self) -> Tensor:
        """The total; no step is added after."""
        assert self._total is not None
        total, self._total, self._carried = self._total, None, None
        return total


@functools.lru_cache(maxsize=64)
def _kernel(step: NeuronStep) -> Kernel:
    def add(
        total: Tensor, carried: Tensor, kept: Tensor, s: Tensor, decay: Tensor | None, source: Tensor | None
    ) -> None:
        rate = step.decay if decay is None else decay
        assert rate is not None
        gain = (1 - rate if step.decay_input else 1.0) if source is None else source
        f = rate * carried + gain
        fires, stays = step.derivatives(kept, s.to(kept.dtype))
        total.add_(f * fires)
        carried.copy_(f * stays)

    return Kernel(add)
