"""The equations of a neuron's step, with its constants: every form of it is made of them."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sltt.surrogates import Surrogate


@dataclass(frozen=True)
class NeuronStep:
    """The constants of a neuron's step; `decay` is None where it is a tensor. The equations are those of `lif_step`."""

    decay: float | None
    v_threshold: float
    v_reset: float | None
    decay_input: bool
    detach_reset: bool
    surrogate: Surrogate
    subtract: float | None = None
    most: float = 1.0

    @property
    def amount(self) -> float:
        """Return what a soft reset subtracts."""
        return self.v_threshold if self.subtract is None else self.subtract

    def charge(self, v: Tensor, x: Tensor, decay: float | Tensor) -> Tensor:
        """Return u, the membrane potential after the charge."""
        current = (1 - decay) * x if self.decay_input else x
        if not self.v_reset:
            return decay * v + current
        return self.v_reset + decay * (v - self.v_reset) + current

    def fires(self, u: Tensor) -> Tensor:
        """Return the spikes: one at the threshold; where `most` is not 1, ⌊u/V_th⌋ of them up to it."""
        if self.most == 1:
            return self.surrogate.fires(u - self.v_threshold)
        return (u / self.v_threshold).trunc().clamp(0, self.most)

    def reset(self, u: Tensor, s: Tensor) -> Tensor:
        """Return v, the membrane potential after the reset."""
        if self.v_reset is None:
            return u - self.amount * s
        return u - (u - self.v_reset) * s

    def derivatives(self, kept: Tensor, s: Tensor) -> tuple[Tensor, Any]:
        """Return ∂s/∂u and ∂v/∂u; `kept` is v for a soft reset and u for a hard one."""
        soft = self.v_reset is None
        fires = self.surrogate.derivative(kept - (self.v_threshold - self.amount * s if soft else self.v_threshold))
        stays: Any = 1.0 if soft else 1 - s
        if not self.detach_reset:
            stays = stays - fires * (self.amount if self.v_reset is None else kept - self.v_reset)
        return fires, stays

    def rate(self, decay: Tensor | None) -> Any:
        """Return λ: the constant, or the tensor in its place."""
        return self.decay if decay is None else decay
