"""Neurons whose spikes have more values than 0 and 1."""

from torch import Tensor

from sltt.checks import whole_number
from sltt.neurons.leaky import _Leaky
from sltt.surrogates import Rectangle, Surrogate


class IntegerLIF(_Leaky):
    """Integer leaky integrate-and-fire neuron (I-LIF): up to D spikes in a time step, as one number.

        u[t] = λ v[t−1] + x[t]                            λ = 1 − 1/τ
        s[t] = clip(⌊u[t]/V_th + ½⌋, 0, D) = Σ_{k=1…D} H(u[t]/V_th − k + ½)
        v[t] = u[t] − V_th s[t]

    With the default surrogate ∂s/∂u is 1/V_th for 0 < u < D V_th, and 0 elsewhere.

    Args:
        levels: D.
        tau: membrane time constant τ in time steps, greater than 1.
        v_threshold: V_th, the step between two levels.
        surrogate: stands in for the derivative of each H, of u/V_th.

    Source: Luo et al., ECCV 2024 (arXiv 2407.20708), there with V_th = 1.
    """

    def __init__(self, levels: int = 4, tau: float = 2.0, v_threshold: float = 1.0, surrogate: Surrogate = Rectangle()):
        super().__init__(tau, v_threshold, surrogate)
        self.levels = whole_number("levels", levels, least=1)

    @staticmethod
    def step(
        x: Tensor, v: Tensor, *, decay: float, levels: int, v_threshold: float, surrogate: Surrogate
    ) -> tuple[Tensor, Tensor]:
        u = decay * v + x
        s = surrogate(u / v_threshold - 0.5)
        for k in range(2, levels + 1):
            s = s + surrogate(u / v_threshold - k + 0.5)
        return s, u - v_threshold * s


class TernaryLIF(_Leaky):
    """Leaky integrate-and-fire neuron with spikes −1, 0 and 1.

        u[t] = λ v[t−1] + x[t]                            λ = 1 − 1/τ
        s[t] = H(u[t] − V_th) − H(−u[t] − V_th)
        v[t] = u[t] − V_th s[t]

    Args:
        tau: membrane time constant τ in time steps, greater than 1.
        v_threshold: V_th.
        surrogate: stands in for the derivative of each H.

    Source: Guo et al., AAAI 2024 (arXiv 2312.06372), there with a reset to 0.
    """

    @staticmethod
    def step(x: Tensor, v: Tensor, *, decay: float, v_threshold: float, surrogate: Surrogate) -> tuple[Tensor, Tensor]:
        u = decay * v + x
        s = surrogate(u - v_threshold) - surrogate(-u - v_threshold)
        return s, u - v_threshold * s
