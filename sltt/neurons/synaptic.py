"""A neuron with a synaptic current: the input decays before it charges the membrane."""

import torch
from torch import Tensor

from sltt.checks import flag, instance, number
from sltt.kernels import neuron_step
from sltt.neurons.base import Neuron
from sltt.neurons.leaky import BELOW, LIF, kernel_step, lif_step, valid_tau
from sltt.surrogates import Surrogate, Triangle


class CubaLIF(Neuron):
    """Current-based leaky integrate-and-fire neuron, with two decays: of the synaptic current i and of the membrane.

        i[t] = α i[t−1] + x[t]                     α = 1 − 1/τ_syn
        u[t] = λ v[t−1] + g i[t]                   λ = 1 − 1/τ; with a hard reset, v_r + λ (v[t−1] − v_r) + g i[t]
        s[t] = H(u[t] − V_th)
        v[t] = u[t] − V_th s[t]                    soft reset; hard: u[t] − (u[t] − v_r) s[t]

    The current is linear in its input: its backward stores no tensors. The membrane runs in the kernel of `LIF`. The
    traces of `OTTT` follow both decays.

    Args:
        tau: membrane time constant τ in time steps, greater than 1; None has no leak, λ = 1.
        tau_syn: synaptic time constant τ_syn in time steps, at least 1; with 1 and gain 1 it is `LIF`.
        gain: g, factor on the current that charges the membrane, greater than 0.
        v_threshold: V_th.
        v_reset: potential after a spike; None subtracts V_th instead (soft reset).
        detach_reset: no gradient through the spike in the reset.
        surrogate: stands in for the derivative of the spike.
        half_state: keep the states in the input's type also where that has 16 bits.
        subtract: r that a soft reset subtracts in place of V_th, as of `LIF`.

    Source: Cramer et al., TNNLS 2022 (arXiv 1910.07407), there with exp(−1/τ) for the decays.
    """

    states = ("v", "i")

    def __init__(
        self,
        tau: float | None = 10.0,
        tau_syn: float = 5.0,
        gain: float = 1.0,
        v_threshold: float = 1.0,
        v_reset: float | None = None,
        detach_reset: bool = False,
        surrogate: Surrogate = Triangle(),
        half_state: bool = False,
        subtract: float | None = None,
    ):
        super().__init__()
        self.tau = None if tau is None else valid_tau(tau)
        self.tau_syn = number("tau_syn", tau_syn, least=1)
        self.gain = number("gain", gain, above=0)
        self.v_threshold = number("v_threshold", v_threshold, above=0 if v_reset is None else None)
        self.v_reset = v_reset if v_reset is None else number("v_reset", v_reset, below=v_threshold, remedy=BELOW)
        self.detach_reset = flag("detach_reset", detach_reset)
        self.surrogate = instance("surrogate", surrogate, Surrogate)
        self.half_state = flag("half_state", half_state)
        self.subtract = subtract if subtract is None else number("subtract", subtract, above=0)
        self.start = {"v": self.v_reset or 0.0, "i": 0.0}

    def decay(self) -> float:
        """Return λ."""
        return 1.0 if self.tau is None else 1 - 1 / self.tau

    def synaptic_decay(self) -> float:
        """Return α."""
        return 1 - 1 / self.tau_syn

    @staticmethod
    def step(
        x: Tensor,
        v: Tensor,
        i: Tensor,
        *,
        decay: float,
        synaptic_decay: float,
        gain: float,
        v_threshold: float,
        v_reset: float | None,
        detach_reset: bool,
        surrogate: Surrogate,
        subtract: float | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        i = synaptic_decay * i + x
        reset = {"v_threshold": v_threshold, "v_reset": v_reset, "detach_reset": detach_reset, "subtract": subtract}
        s, v = lif_step(v, gain * i, decay=decay, surrogate=surrogate, **reset)
        return s, v, i

    def fused_steps(self, x: Tensor, steps: int, cut: bool) -> Tensor:
        """Compute the current by plain operations, of which autograd keeps nothing, then the steps of `LIF`."""
        named = self.arguments()
        if type(self).step is not CubaLIF.step or any(isinstance(v, Tensor) for v in named.values()):
            return super().fused_steps(x, steps, cut)  # of a subclass, or with a parameter that is learned
        currents, decay, gain = [], named.pop("synaptic_decay"), named.pop("gain")
        i: Tensor = self.i  # type: ignore[assignment]
        for x_t in x.chunk(steps):
            i = torch.add(x_t.to(i.dtype), i.detach() if cut and currents else i, alpha=decay)
            currents.append(i)
        current = i if steps == 1 else torch.cat(currents)
        current = current if gain == 1 else gain * current
        step = kernel_step(LIF, decay_input=False, **named)
        v: Tensor = self.v  # type: ignore[assignment]
        spikes, self.v = neuron_step(step, v, current.to(x.dtype), None, steps, cut)
        self.i = i
        return spikes
