"""Leaky integrate-and-fire neurons: the pure step function, and the modules that keep its membrane potential.

Shapes: a neuron takes any shape [B, ...] and works elementwise. u is the membrane potential after the charge, s the
spike, v the membrane potential after the reset, which is what is kept between time steps.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from sltt.checks import flag, instance, number
from sltt.kernels import CustomStep, NeuronStep, fast_step, run_step
from sltt.neurons.base import Neuron, split_steps, takes_any
from sltt.neurons.inspection import emits_bits
from sltt.surrogates import Surrogate, Triangle

_CONSTANTS = "v_threshold", "v_reset", "decay_input", "detach_reset", "surrogate", "subtract", "most"
BELOW = "it must be below v_threshold"


def lif_step(
    v: Tensor,
    x: Tensor,
    *,
    decay: float | Tensor,
    v_threshold: float = 1.0,
    v_reset: float | None = None,
    decay_input: bool = False,
    detach_reset: bool = False,
    surrogate: Surrogate = Triangle(),
    subtract: float | None = None,
    most: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """One time step of leaky integrate-and-fire neurons.

        u = λ v + x                      charge, soft reset
        u = v_r + λ (v − v_r) + x        charge, hard reset to v_r
        s = H(u − V_th)                  fire; backward through the surrogate
        v = u − r s                      soft reset by r, which is V_th by default
        v = u − (u − v_r) s              hard reset

    With `decay_input`, (1 − λ) x takes the place of x.

    Args:
        v: membrane potential after the step before, [B, ...].
        x: input current of this step, [B, ...].
        decay: λ = 1 − 1/τ, between 0 (no memory) and 1 (no leak): a number, or a tensor that broadcasts to [B, ...].
        v_threshold: V_th.
        v_reset: v_r of a hard reset; None is a soft reset.
        decay_input: scale the input by 1 − λ.
        detach_reset: no gradient through the spike in the reset.
        surrogate: stands in for the derivative of H.
        subtract: r of a soft reset; None is V_th.
        most: spikes in a time step at most; of more than one, s = ⌊u/V_th⌋ between 0 and this number.

    Returns the spikes s and the membrane potential v, both [B, ...].

    Source: Meng et al., ICCV 2023 (arXiv 2302.14311), with v[t] = u[t] − V_th s[t].
    """
    if not isinstance(decay, Tensor):
        number("decay", decay, least=0, most=1)
    rest = 0.0 if v_reset is None else v_reset
    current = (1 - decay) * x if decay_input else x
    u = decay * v + current if rest == 0 else rest + decay * (v - rest) + current
    s = surrogate(u - v_threshold)
    if most != 1:
        s = s + ((u / v_threshold).trunc().clamp(0, most) - s).detach()
    reset_s = s.detach() if detach_reset else s
    amount = v_threshold if subtract is None else subtract
    v = u - amount * reset_s if v_reset is None else u - (u - v_reset) * reset_s
    return s, v


class IntegrateAndFire(Neuron):
    """Base of LIF, IF and PLIF: threshold, reset and surrogate; `lif_step` with the membrane potential in `.v`.

    `.v` starts from `.start` with the input's shape and device, in float32 or the input's type if that is wider.
    """

    v: Tensor | None
    decay_input = False
    subtract: float | None = None
    most = 1.0

    def __init__(
        self,
        v_threshold: float = 1.0,
        v_reset: float | None = None,
        detach_reset: bool = False,
        surrogate: Surrogate = Triangle(),
        half_state: bool = False,
        v_init: float | None = None,
    ):
        super().__init__()
        # a soft reset subtracts the threshold; one that is not positive would leave the neuron above it for ever
        self.v_threshold = number("v_threshold", v_threshold, above=0 if v_reset is None else None)
        self.v_reset = v_reset if v_reset is None else number("v_reset", v_reset, below=v_threshold, remedy=BELOW)
        self.v_init = v_init if v_init is None else number("v_init", v_init, below=v_threshold, remedy=BELOW)
        self.detach_reset = flag("detach_reset", detach_reset)
        self.surrogate = instance("surrogate", surrogate, Surrogate, "such as sltt.surrogates.Triangle()")
        self.half_state = flag("half_state", half_state)

    def decay(self) -> float | Tensor:
        """Return λ: the share of the membrane potential that stays from one step to the next."""
        raise NotImplementedError

    @property
    def start(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The membrane potential before the first step."""
        return (self.v_reset or 0.0) if self.v_init is None else self.v_init

    @staticmethod
    def step(x: Tensor, v: Tensor, *, decay: float | Tensor, **constants: Any) -> tuple[Tensor, Tensor]:
        return lif_step(v, x, decay=decay, **constants)

    def arguments(self) -> dict[str, Any]:
        named = {"decay": self.decay(), **self.constants()}
        if type(self).step is IntegrateAndFire.step:
            return named
        return (named if takes_any(type(self)) else {}) | super().arguments()

    def constants(self) -> dict[str, Any]:
        """Return the arguments of `lif_step` that are never learned."""
        return {name: getattr(self, name) for name in _CONSTANTS}

    def kernel_step(self, x: Tensor | None = None) -> tuple[NeuronStep | None, Tensor | None]:
        """Return the constants for kernels, None if the neuron is more than `lif_step`; and λ if it is learned.

        It is more with a `step` of its own, a threshold that is learned, or a λ for each neuron.
        """
        decay = self.decay()
        learned = decay if isinstance(decay, Tensor) else None
        more = type(self).step is not IntegrateAndFire.step or (learned is not None and learned.numel() != 1)
        if more or isinstance(self.v_threshold, Tensor) or isinstance(self.v_reset, Tensor):
            return None, learned
        return kernel_step(type(self), decay if learned is None else None, **self.constants()), learned

    def prepare(self) -> Callable[[Tensor, int, bool], Tensor]:
        known = type(self).decay in (LIF.decay, IF.decay) and type(self).__module__.startswith("sltt.")
        if not known or self.kernel_step()[0] is None:
            return self.advance
        read = operator.attrgetter(*_CONSTANTS, *(["tau"] if type(self).decay is LIF.decay else []))
        states, step, learned, fast = vars(self), None, None, None
        constants: tuple[Any, ...] = ()
        seen: Any = None  # constants, and kind of input, that the step was chosen for

        def advance(x: Tensor, steps: int, cut: bool) -> Tensor:
            nonlocal step, learned, fast, constants, seen
            now = read(self)  # a forward or a hook may change them
            if not constants or not all(map(operator.is_, now, constants)):
                constants, seen, (step, learned) = now, None, self.kernel_step()
            if step is None or learned is not None:  # a `tau` that is a tensor
                return self.advance(x, steps, cut)
            v, first = states["v"], x if steps == 1 else split_steps(x, steps)
            if v is None:
                v = torch.full_like(first, self.start, dtype=self.state_type(x))
            elif v.shape != first.shape or v.device != first.device:
                self.check_state("v", first, v.dtype)
            if seen != (kind := (x.dtype, v.dtype, v.device, v.shape)):
                fast, seen = fast_step(step, v, x.dtype, None), kind
            spikes, states["v"] = run_step(step, fast, v, x, None, steps, cut)
            return spikes

        return advance


@functools.lru_cache(maxsize=1024)
def kernel_step(kind: type[Neuron], decay: float | None, **constants: Any) -> NeuronStep:
    """Return the constants for kernels; decay is None if it is learned.

    Raises ValueError for a surrogate that no step can have, such as one that draws random numbers.
    """
    emits_bits(kind, CustomStep(IntegrateAndFire.step, 1, (), (("decay", 0.5), ("surrogate", constants["surrogate"]))))
    return NeuronStep(decay=decay, **constants)


class LIF(IntegrateAndFire):
    """Leaky integrate-and-fire neuron: `lif_step` with the membrane potential kept in `.v`.

        u[t] = λ v[t−1] + x[t]                     λ = 1 − 1/τ
        s[t] = H(u[t] − V_th)
        v[t] = u[t] − V_th s[t]                    soft reset; hard: u[t] − (u[t] − v_r) s[t]

    A hard reset leaks towards v_r: u[t] = v_r + λ (v[t−1] − v_r) + x[t]. With `decay_input`, x[t]/τ replaces x[t].

    Args:
        tau: membrane time constant τ in time steps, greater than 1.
        v_threshold: V_th.
        v_reset: potential after a spike; None subtracts V_th instead (soft reset).
        decay_input: scale the input by 1/τ.
        detach_reset: no gradient through the spike in the reset.
        surrogate: stands in for the derivative of the spike.
        half_state: keep the membrane potential in the input's type also where that has 16 bits.
        v_init: membrane potential before the first step; None is v_r, 0 for a soft reset. Half the threshold brings the
            first spikes forward, and rounds the rate instead of rounding it down (Bu et al. 2022, arXiv 2202.01440).
        subtract: r that a soft reset subtracts in place of V_th: u[t+1] = λ (u[t] − r s[t]) + x[t+1]. With r = V_th/λ
            the threshold is subtracted one step later, after the decay, as snnTorch does.

    Defaults are those of the SLTT paper (Meng et al. 2023).
    """

    def __init__(
        self,
        tau: float = 1.1,
        v_threshold: float = 1.0,
        v_reset: float | None = None,
        decay_input: bool = False,
        detach_reset: bool = False,
        surrogate: Surrogate = Triangle(),
        half_state: bool = False,
        v_init: float | None = None,
        subtract: float | None = None,
    ):
        super().__init__(v_threshold, v_reset, detach_reset, surrogate, half_state, v_init)
        self.tau = valid_tau(tau)
        self.decay_input = flag("decay_input", decay_input)
        self.subtract = subtract if subtract is None else number("subtract", subtract, above=0)

    @classmethod
    def from_beta(cls, beta: float, **kwargs: Any) -> Self:
        """Return a LIF with decay β = λ = 1 − 1/τ, the parameter of snnTorch. β is in (0, 1)."""
        beta = number("beta", beta, above=0, below=1, remedy="for no leak use sltt.IF")
        return cls(tau=1 / (1 - beta), **kwargs)

    def decay(self) -> float:
        return 1 - 1 / self.tau


class IF(IntegrateAndFire):
    """Integrate-and-fire neuron: `lif_step` with λ = 1, no leak.

        u[t] = v[t−1] + x[t]
        s[t] = H(u[t] − V_th)
        v[t] = u[t] − V_th s[t]                    soft reset; hard: u[t] − (u[t] − v_r) s[t]

    Arguments are those of `LIF`, without a time constant.
    """

    def decay(self) -> float:
        return 1.0


class PLIF(IntegrateAndFire):
    """LIF with a learnable time constant, shared by the layer.

        u[t] = λ v[t−1] + x[t]                     λ = 1 − σ(w), so τ = 1/σ(w) is at least 1 whatever w is
        s[t] = H(u[t] − V_th)
        v[t] = u[t] − V_th s[t]                    soft reset; hard: u[t] − (u[t] − v_r) s[t]

    Arguments are those of `LIF`, `tau` being τ at the start, and so is the charge with a hard reset or `decay_input`.

    Source: Fang et al., ICCV 2021 (arXiv 2007.05785).
    """

    def __init__(
        self,
        tau: float = 1.1,
        v_threshold: float = 1.0,
        v_reset: float | None = None,
        decay_input: bool = False,
        detach_reset: bool = False,
        surrogate: Surrogate = Triangle(),
        half_state: bool = False,
        v_init: float | None = None,
    ):
        super().__init__(v_threshold, v_reset, detach_reset, surrogate, half_state, v_init)
        # σ(w) = 1/τ, so w = −ln(τ − 1)
        self.w = nn.Parameter(-torch.log(torch.tensor(valid_tau(tau) - 1)))
        self.decay_input = flag("decay_input", decay_input)

    @property
    def tau(self) -> float:
        """The time constant as it is now, in time steps."""
        return 1 / torch.sigmoid(self.w.detach().double()).item()

    def decay(self) -> Tensor:
        return 1 - torch.sigmoid(self.w)


class _Leaky(Neuron):
    """Base of neurons with a constant τ and a soft reset: time constant, threshold and surrogate."""

    def __init__(self, tau: float = 2.0, v_threshold: float = 1.0, surrogate: Surrogate = Triangle()):
        super().__init__()
        self.tau = valid_tau(tau)
        self.v_threshold = number("v_threshold", v_threshold, above=0)
        self.surrogate = instance("surrogate", surrogate, Surrogate)

    def decay(self) -> float:
        """Return λ."""
        return 1 - 1 / self.tau


def valid_tau(tau: float) -> float:
    """Return a time constant in time steps, checked."""
    return number("tau", tau, above=1, remedy="τ is in time steps, and λ = 1 − 1/τ must be positive")


class LI(Neuron):
    """Leaky integrator: a readout whose output is its membrane potential, and which never spikes.

        v[t] = λ v[t−1] + x[t]                     λ = 1 − 1/τ

    With `decay_input`, x[t]/τ replaces x[t]. SLTT drops the gradient through the leak; BPTT and OTTT keep it.

    Args:
        tau: membrane time constant τ in time steps, greater than 1.
        decay_input: scale the input by 1/τ.
    """

    spikes = False

    def __init__(self, tau: float = 2.0, decay_input: bool = False):
        super().__init__()
        self.tau = valid_tau(tau)
        self.decay_input = flag("decay_input", decay_input)

    def decay(self) -> float:
        """Return λ."""
        return 1 - 1 / self.tau

    @staticmethod
    def step(x: Tensor, v: Tensor, *, decay: float, decay_input: bool) -> tuple[Tensor, Tensor]:
        v = decay * v + ((1 - decay) * x if decay_input else x)
        return v, v
