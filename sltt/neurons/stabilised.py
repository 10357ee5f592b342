"""Step-by-step training as stable as training over all steps: normalisation and thresholds that fit a whole sequence.

Source of both: Zhu, Ding, Huang, Xie & Yu, "Online Stabilization of Spiking Neural Networks", ICLR 2024.

Shapes: B samples, C channels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sltt._torch import _BatchNorm
from sltt.checks import flag, instance, number, whole_number
from sltt.kernels import differentiable_once
from sltt.neurons.base import Neuron
from sltt.neurons.leaky import valid_tau
from sltt.sequence.state import Stateful
from sltt.surrogates import Surrogate, Triangle


class OnlineRenorm(Stateful, _BatchNorm):
    """Normalises with running statistics in training too, so that all time steps and the test are normalised alike.

        y[t] = γ (x[t] − μ) / √(σ² + ε) + β                    μ, σ²: running, the same for all t of a sequence
        μ ← (1 − m) μ + m μ̄                                    μ̄ = 1/T Σ_t μ[t]
        σ² ← (1 − m) σ² + m (1/T Σ_t (σ[t]² + μ[t]²) − μ̄²)     μ[t], σ[t]²: of the batch at step t

    Backward is that of BatchNorm on the batch: with z = (x − μ[t]) / √(σ[t]² + ε) and h = γ ∂L/∂y / √(σ² + ε),

        ∂L/∂x = h − ⟨h⟩ − z ⟨h z⟩                              ⟨·⟩: mean over all values of a channel

    `BatchNorm` (Online Spiking Renormalization, OSR) for networks that SLTT or OTTT train. Where the deviations differ
    by a factor above `limit` in a channel, as at the start of a training, the layer takes the batch's statistics.
    In `fit`, several processes take the mean of their running statistics after every batch.

    Args:
        channels: C.
        eps: ε.
        momentum: m.
        limit: the largest factor between the deviations of a batch and the running ones; published: 20, and 50 for
            data of event cameras.

    Source: Zhu et al., ICLR 2024 ("Online Stabilization of Spiking Neural Networks").
    """

    states = ("before", "sums")
    differentiable = False
    timeless = True
    before: tuple[Tensor, Tensor] | None  # running statistics at the start of the sequence
    # the mean of the first step; sums of the distances to it and of the squares about it; the number of steps
    sums: tuple[Tensor, Tensor, Tensor, int] | None

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1, limit: float = 20.0):
        channels, eps = whole_number("channels", channels, least=1), number("eps", eps, above=0)
        _BatchNorm.__init__(self, channels, eps, number("momentum", momentum, above=0, most=1))
        self.limit = number("limit", limit, least=1)
        self.reset()

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2 or input.shape[1] != self.num_features:
            raise ValueError(f"expected input [B, {self.num_features}, ...], got shape {list(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalise x [B, C, ...] of one time step."""
        self._check_input_dim(input)
        if not self.training:
            return self._normalise(input, self.running_mean, self.running_var)
        return self._train(input)

    def _normalise(self, x: Tensor, mean: Tensor | None, var: Tensor | None) -> Tensor:
        return F.batch_norm(x, mean, var, self.weight, self.bias, False, 0.0, self.eps)

    def _train(self, x: Tensor) -> Tensor:
        if x.numel() == x.shape[1]:
            raise ValueError(f"expected more than one value for each channel, got {list(x.shape)}: use a larger batch")
        with torch.no_grad():
            running: Any = self.running_mean, self.running_var
            mean, var = torch.ops.aten.batch_norm_update_stats(x, *running, 0.0)  # which it leaves as they are
            if self.before is None:
                self.before = running[0].clone(), running[1].clone()
                assert self.num_batches_tracked is not None
                self.num_batches_tracked.add_(1)
            self._track(mean, var, running, self.before)
            factor = (var + self.eps) / (self.before[1] + self.eps)
            near = (torch.maximum(factor, 1 / factor) <= self.limit**2).all()
            used = [torch.where(near, run, of_batch) for run, of_batch in zip(self.before, (mean, var), strict=True)]
        if torch.is_grad_enabled() and x.requires_grad:
            x = _OfBatch.apply(x, mean, torch.sqrt(var + self.eps))  # type: ignore[assignment]
        return self._normalise(x, *used)

    def _track(self, mean: Tensor, var: Tensor, running: Any, before: Any) -> None:
        """Set the running statistics to what they are if the sequence ends with this step."""
        origin, first, second, steps = self.sums or (mean, 0, 0, 0)
        apart = mean - origin  # squares of the means themselves would be large beside a small variance
        self.sums = origin, first, second, steps = origin, first + apart, second + var + apart.square(), steps + 1
        apart = first / steps
        of_sequence = origin + apart, second / steps - apart.square()
        momentum: Any = self.momentum
        for now, was, of_batch in zip(running, before, of_sequence, strict=True):
            torch.lerp(was, of_batch, momentum, out=now)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, limit={self.limit}"


class _OfBatch(torch.autograd.Function):
    """The same tensor; its gradient without what BatchNorm on the batch would not let through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, mean, deviation)
        return x.view_as(x)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, mean, deviation = ctx.saved_tensors
        # of a BatchNorm with γ = √(σ² + ε), which is no factor then
        of_x, _, _ = torch.ops.aten.native_batch_norm_backward(
            grad, x, deviation, None, None, mean, 1 / deviation, True, 0.0, [True, False, False]
        )
        return of_x, None, None


class StableLIF(Neuron):
    """Leaky integrate-and-fire neuron whose threshold follows the membrane potentials of its layer.

        u[t] = λ v[t−1] + x[t]                     λ = 1 − 1/τ
        θ[t] = μ[t] + r σ[t]                       r = (V_th − μ[1]) / σ[1], so θ[1] = V_th
        s[t] = H(u[t] − θ[t])
        v[t] = u[t] − θ[t] s[t]

    μ[t] and σ[t]: mean and deviation of u[t] over all neurons and samples, constants in the backward. Where the first
    steps have σ = 0, as empty frames do, θ = V_th, and r is that of the next step. In evaluation, θ[t] is its running
    mean over the training sequences. Steps after the longest of them take its last mean; from the 64th on, all steps
    share one.

    Args:
        tau: membrane time constant τ in time steps, greater than 1; None has no leak, λ = 1.
        v_threshold: V_th, the threshold of the first step.
        detach_reset: no gradient through the spike in the reset.
        surrogate: stands in for the derivative of the spike.
        momentum: weight of a sequence in the running mean of θ.
    """

    def __init__(
        self,
        tau: float | None = 2.0,
        v_threshold: float = 1.0,
        detach_reset: bool = False,
        surrogate: Surrogate = Triangle(),
        momentum: float = 0.1,
    ):
        super().__init__()
        self.tau = None if tau is None else valid_tau(tau)
        self.detach_reset = flag("detach_reset", detach_reset)
        self.surrogate = instance("surrogate", surrogate, Surrogate)
        self.follow = _Threshold(number("v_threshold", v_threshold, above=0), momentum)

    def decay(self) -> float:
        """Return λ."""
        return 1.0 if self.tau is None else 1 - 1 / self.tau

    def threshold(self) -> Tensor:
        """Return θ of the step in progress."""
        assert self.follow.now is not None
        return self.follow.now

    @staticmethod
    def step(
        x: Tensor, v: Tensor, *, decay: float, threshold: Tensor, detach_reset: bool, surrogate: Surrogate
    ) -> tuple[Tensor, Tensor]:
        u = decay * v + x
        s = surrogate(u - threshold)
        return s, u - threshold * (s.detach() if detach_reset else s)

    def forward(self, x: Tensor) -> Tensor:
        """Input current x [B, ...] of one time step to spikes [B, ...]."""
        v: Tensor | None = self.v  # pyright: ignore[reportAssignmentType]
        with torch.no_grad():
            self.follow(x if v is None else self.decay() * v + x)
        return super().forward(x)


class _Threshold(Stateful):
    """θ[t] of a layer, from its membrane potentials."""

    states = ("now", "ratio", "step", "before")
    differentiable = False
    now: Tensor | None  # θ[t]
    ratio: Tensor | None  # r; NaN until a step has a deviation
    before: Tensor | None  # running means at the start of the sequence
    step: int | None  # t, counted from 0
    running: Tensor

    def __init__(self, first: float, momentum: float):
        super().__init__()
        self.first = first
        self.momentum = number("momentum", momentum, above=0, most=1)
        self.register_buffer("running", torch.full((LONGEST,), first))

    def forward(self, u: Tensor) -> None:
        self.step = t = 0 if self.step is None else self.step + 1
        t = min(t, LONGEST - 1)
        if not self.training:
            self.now = self.running[t]
            return
        deviation, mean = torch.std_mean(u.to(self.running.dtype), correction=0)
        if self.before is None or self.ratio is None:
            self.before, self.ratio = self.running.clone(), torch.full_like(mean, torch.nan)
        spread = deviation > _SPREAD
        deviation = deviation.clamp(min=_SPREAD)
        self.ratio = torch.where(self.ratio.isnan() & spread, (self.first - mean) / deviation, self.ratio)
        self.now = torch.where(self.ratio.isnan(), self.first, mean + self.ratio * deviation)
        average = torch.lerp(self.before[t], self.now, self.momentum)
        later = self.running[t:]  # no step behind the longest sequence has an average of its own: they are all alike
        later.copy_(torch.where(self.before[t] == self.before[-1], average, later))
        later[0] = average

    def extra_repr(self) -> str:
        return f"{self.first}, momentum={self.momentum}"


LONGEST = 64  # time steps with a running threshold of their own
_SPREAD = 1e-6  # deviations up to this are none
