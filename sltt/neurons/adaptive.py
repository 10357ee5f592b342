"""Neurons whose threshold is no constant: it rises with each spike, or is learned for each channel."""

import math

import torch
from torch import Tensor, nn

from sltt.checks import instance, number, whole_number
from sltt.kernels import NeuronStep, steps_by_channel
from sltt.neurons.base import Neuron
from sltt.neurons.leaky import _Leaky, kernel_step, valid_tau
from sltt.surrogates import Surrogate, Triangle


class ALIF(_Leaky):
    """Adaptive leaky integrate-and-fire neuron: each spike raises the threshold, which decays back.

        u[t] = λ v[t−1] + x[t]                     λ = 1 − 1/τ
        s[t] = H(u[t] − V_th − β a[t−1])
        v[t] = u[t] − V_th s[t]
        a[t] = ρ a[t−1] + s[t]                     ρ = 1 − 1/τ_a

    Args:
        tau: membrane time constant τ in time steps, greater than 1.
        tau_a: time constant τ_a of the threshold in time steps, greater than 1.
        beta: β, what a spike adds to the threshold, at least 0.
        v_threshold: V_th.
        surrogate: stands in for the derivative of the spike.

    Source: Bellec et al., Nature Communications 2020 (doi 10.1038/s41467-020-17236-y).
    """

    states = ("v", "a")

    def __init__(
        self,
        tau: float = 10.0,
        tau_a: float = 50.0,
        beta: float = 0.2,
        v_threshold: float = 1.0,
        surrogate: Surrogate = Triangle(),
    ):
        super().__init__(tau, v_threshold, surrogate)
        self.tau_a = number("tau_a", tau_a, above=1)
        self.beta = number("beta", beta, least=0)

    def threshold_decay(self) -> float:
        """Return ρ."""
        return 1 - 1 / self.tau_a

    @staticmethod
    def step(
        x: Tensor,
        v: Tensor,
        a: Tensor,
        *,
        decay: float,
        threshold_decay: float,
        beta: float,
        v_threshold: float,
        surrogate: Surrogate,
    ) -> tuple[Tensor, Tensor, Tensor]:
        u = decay * v + x
        s = surrogate(u - v_threshold - beta * a)
        return s, u - v_threshold * s, threshold_decay * a + s


class ChannelLIF(Neuron):
    """LIF with a time constant and a threshold for each channel, both learned.

        u[t] = λ_c v[t−1] + x[t]                   λ_c = 1 − σ(w_c), so 1/τ_c = σ(w_c)
        s[t] = H(u[t] − θ_c)                       θ_c = exp(k_c), so it stays positive
        v[t] = u[t] − θ_c s[t]

    c is dimension 1 of the input [B, C, ...]. `OTTT` takes the mean of λ_c.

    Args:
        channels: C.
        tau: τ_c at the start, in time steps, greater than 1.
        v_threshold: θ_c at the start.
        surrogate: stands in for the derivative of the spike.

    Source: Rathi & Roy, TNNLS 2021 (arXiv 2008.03658), with one leak and one threshold for each layer; σ as in `PLIF`.
    """

    v: Tensor

    def __init__(self, channels: int, tau: float = 2.0, v_threshold: float = 1.0, surrogate: Surrogate = Triangle()):
        super().__init__()
        channels = whole_number("channels", channels, least=1)
        # σ(w) = 1/τ, so w = −ln(τ − 1)
        self.w = nn.Parameter(torch.full((channels,), -math.log(valid_tau(tau) - 1)))
        self.k = nn.Parameter(torch.full((channels,), math.log(number("v_threshold", v_threshold, above=0))))
        self.surrogate = instance("surrogate", surrogate, Surrogate)

    def decay(self) -> Tensor:
        """Return λ_c, [C]."""
        return 1 - torch.sigmoid(self.w)

    def threshold(self) -> Tensor:
        """Return θ_c, [C]."""
        return torch.exp(self.k)

    @staticmethod
    def step(x: Tensor, v: Tensor, *, decay: Tensor, threshold: Tensor, surrogate: Surrogate) -> tuple[Tensor, Tensor]:
        u = decay * v + x
        s = surrogate(u - threshold)
        return s, u - threshold * s

    def kernel_step(self, x: Tensor | None = None) -> tuple[NeuronStep | None, Tensor | None]:
        """Return the constants for the kernels of `LIF`, where these take λ and θ of each channel."""
        constants = {"v_threshold": 1.0, "v_reset": None, "decay_input": False, "detach_reset": False}
        step = kernel_step(type(self), None, **constants, surrogate=self.surrogate)
        if x is None or type(self).step is not ChannelLIF.step or not steps_by_channel(step, self.v, x, self.w):
            return None, None
        return step, torch.stack([self.decay(), self.threshold()])

    def extra_repr(self) -> str:
        tau, threshold = 1 / (1 - self.decay().detach()), self.threshold().detach()
        return (
            f"{len(self.w)}, tau={tau.min():.4g}…{tau.max():.4g}, "
            f"threshold={threshold.min():.4g}…{threshold.max():.4g}, surrogate={self.surrogate}"
        )
