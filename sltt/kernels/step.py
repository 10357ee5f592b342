"""The fused neuron step: charge, fire and reset in one pass over memory, and a backward that saves almost nothing.

The backward needs the surrogate's input u − V_th. For a soft reset it is recovered from what is there anyway, the
membrane potential after the reset and the spikes: u − V_th = v + V_th (s − 1), to the last bit. For a hard reset v says
nothing about the u of a neuron that fired, so u is saved too. A learnable decay (PLIF) saves the membrane potential of
the step before, and with `decay_input` the input, since its gradient is a sum over them.

All is elementwise on memory: tensors of any dense memory format are taken as flat, without a copy.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sltt.kernels.bits import SpikeTag, packable
from sltt.kernels.options import Kernel
from sltt.surrogates import Surrogate


@dataclass(frozen=True)
class Step:
    """The constants of a neuron's step; `decay` is None where it is a tensor. The equations are those of `lif_step`."""

    decay: float | None
    v_threshold: float
    v_reset: float | None
    decay_input: bool
    detach_reset: bool
    surrogate: Surrogate

    def charge(self, v: Tensor, x: Tensor, decay: float | Tensor) -> Tensor:
        """u, the membrane potential after the charge."""
        current = (1 - decay) * x if self.decay_input else x
        if not self.v_reset:
            return decay * v + current
        return self.v_reset + decay * (v - self.v_reset) + current

    def reset(self, u: Tensor, s: Tensor) -> Tensor:
        """v, the membrane potential after the reset."""
        if self.v_reset is None:
            return u - self.v_threshold * s
        return u - (u - self.v_reset) * s

    def gradient(self, grad_s: Tensor | None, grad_v: Tensor | None, kept: Tensor, s: Tensor) -> Tensor:
        """∂L/∂u from ∂L/∂s and ∂L/∂v; `kept` is v for a soft reset and u for a hard one."""
        soft = self.v_reset is None
        x = kept - self.v_threshold * (1 - s) if soft else kept - self.v_threshold
        slope = self.surrogate.derivative(x)
        if grad_v is None:
            assert grad_s is not None
            return grad_s * slope
        through_v = grad_v if soft else grad_v * (1 - s)
        total = torch.zeros_like(kept) if grad_s is None else grad_s.to(kept.dtype)
        if not self.detach_reset:
            jump = self.v_threshold if self.v_reset is None else kept - self.v_reset
            total = total - grad_v * jump
        return through_v + total * slope


def neuron_step(step: Step, v: Tensor, x: Tensor, decay: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Spikes in x's type, and the membrane potential in v's type, after one time step.

    Args:
        step: the constants.
        v: membrane potential after the step before, of x's shape.
        x: input current.
        decay: λ where it is a tensor.
    """
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (v, x, decay)):
        return _NeuronStep.apply(v, x, decay, step)  # type: ignore[return-value]
    s, v, _ = _run(step, v, x, decay)
    return s, v


def _run(step: Step, v: Tensor, x: Tensor, decay: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Spikes, v, and for a hard reset u; without a graph."""
    if not _dense(x):
        x = x.contiguous()
    if v.stride() != x.stride():
        v = torch.empty_like(x, dtype=v.dtype).copy_(v)
    s, v_next = torch.empty_like(x), torch.empty_like(v)
    u = None if step.v_reset is None else torch.empty_like(v)
    forward, _ = _kernels(step)
    forward(s, v_next, u, v, x, decay)
    return s, v_next, u


@functools.lru_cache(maxsize=64)
def _kernels(step: Step) -> tuple[Kernel, Kernel]:
    """Forward and backward of a step; each set of constants is compiled on its own, since they are built in."""

    def forward(s_out: Tensor, v_out: Tensor, u_out: Tensor | None, v: Tensor, x: Tensor, decay: Tensor | None) -> None:
        rate = step.decay if decay is None else decay
        assert rate is not None
        u = step.charge(v, x.to(v.dtype), rate)
        s = (u - step.v_threshold >= 0).to(v.dtype)
        s_out.copy_(s)
        v_out.copy_(step.reset(u, s))
        if u_out is not None:
            u_out.copy_(u)

    def backward(out: Tensor, grad_s: Tensor | None, grad_v: Tensor | None, kept: Tensor, s: Tensor) -> None:
        out.copy_(step.gradient(grad_s, grad_v, kept, s.to(kept.dtype)))

    return Kernel(forward), Kernel(backward)


class _NeuronStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, x: Tensor, decay: Tensor | None, step: Step) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        s, v_next, u = _run(step, v, x, decay)
        kept = v_next if u is None else u
        ctx.tag = SpikeTag(s) if packable(s) else None
        learnable = decay is not None and ctx.needs_input_grad[2]
        ctx.step, ctx.x_dtype = step, x.dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            kept, None if ctx.tag else s, decay, v if learnable else None, x if learnable and step.decay_input else None
        )
        return s, v_next

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_s: Tensor | None, grad_v: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if grad_s is None and grad_v is None:
            return None, None, None, None
        step: Step = ctx.step
        kept, s, decay, v, x = ctx.saved_tensors
        s = s if ctx.tag is None else ctx.tag.take()
        grad_s, grad_v = _like(grad_s, kept), _like(grad_v, kept)
        rate: Any = step.decay if decay is None else decay
        gain = 1 - rate if step.decay_input else 1.0
        needs_v, needs_x, needs_decay = ctx.needs_input_grad[:3]
        # ∂L/∂x = ∂L/∂u unless the input is scaled; then ∂L/∂u is computed in the state's type, and scaled
        plain = not (needs_v or needs_decay or step.decay_input)
        grad_u = torch.empty_like(kept, dtype=ctx.x_dtype if plain else kept.dtype)
        _, backward = _kernels(step)
        backward(grad_u, grad_s, grad_v, kept, s)
        grad_x = (grad_u if plain else (grad_u * gain).to(ctx.x_dtype)) if needs_x else None
        grad_decay = None
        if needs_decay and decay is not None:
            moved = v - (step.v_reset or 0.0)
            if step.decay_input:
                moved = moved - x
            grad_decay = (grad_u * moved).sum().to(decay.dtype).reshape(decay.shape)
        return (grad_u * rate if needs_v else None), grad_x, grad_decay, None


def _dense(x: Tensor) -> bool:
    """Whether x's elements fill a stretch of memory without gaps or overlaps, in any order."""
    return x.is_contiguous() or bool(torch.ops.aten.is_non_overlapping_and_dense(x))


def _like(grad: Tensor | None, kept: Tensor) -> Tensor | None:
    """A gradient in the memory format of what was kept."""
    if grad is None or grad.stride() == kept.stride():
        return grad
    return torch.empty_like(kept, dtype=grad.dtype).copy_(grad)
