"""Neurons that read their own spikes through a linear layer: several time steps in one native call.

    u[t] = charge(v[t−1], x[t] + W s[t−1] + b),   s[t], v[t] as in `neuron_step`

The forward adds the rows of W of the neurons that fired. The weight gradient, Σ_t ∂L/∂x[t] s[t−1]ᵀ, touches active
inputs only where that is faster. The gradient through time, ∂L/∂s[t−1] += Wᵀ ∂L/∂x[t], is a dense product.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sltt.kernels.derivatives import differentiable_once
from sltt.kernels.layers import costs, sparse
from sltt.kernels.layers.weights import WeightCache
from sltt.kernels.neuron.native_step import NativeStep, native_step
from sltt.kernels.neuron.step import NeuronStep
from sltt.kernels.options import options
from sltt.kernels.spikes.bits import pack, unpack

Trace = Callable[[Tensor], tuple[Tensor, list[Any]]]
DTYPES = torch.float32, torch.bfloat16, torch.float16  # of tensors; all sums are in float32


def recurrent_steps(
    step: NeuronStep, x: Tensor, s: Tensor | None, v: Tensor, weight: Tensor, bias: Tensor | None, decay: Tensor | None,
    weights: WeightCache, steps: int, cut: bool, trace: Trace | None = None,
) -> tuple[Tensor, Tensor, Tensor] | None:  # fmt: skip
    """Spikes of the time steps in x, those of the last one, and the membrane potential; None where no kernel does it.

    Args as of `neuron_step`, for x [n·B, ..., H], and:
        s: spikes of the step before, [B, ..., H]; None at the first step.
        weight: W of the layer that reads the spikes, [H, H].
        bias: b of this layer, [H].
        weights: where the forms of weights are kept.
        trace: maps the spikes that the layer reads to what stands for them, and for 1 in each time step, in the
            gradients of W and b; with `cut` only.
    """
    tensors, dtype = [t for t in (x, s, v, weight, bias, decay) if t is not None], x.dtype
    kernel = _kernel_of(step, v, decay)
    plain = all(t.dtype in DTYPES and t.is_cpu and t.is_contiguous() for t in tensors)
    if kernel is None or not plain or not x.numel():
        return None
    x, s, weight, bias = (t if t is None else t.float() for t in (x, s, weight, bias))  # type: ignore[assignment]
    call = _RecurrentCall(kernel, step, weights, steps, cut, trace)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        spikes, s, last = _Recurrence.apply(x, s, v, weight, bias, decay, call)  # type: ignore[misc]
    else:
        spikes, last, _ = _forward(call, x, s, v, weight, bias, keep=False)
        s = spikes[-len(v) :].clone()
    return spikes.to(dtype), s.to(dtype), last  # type: ignore[union-attr]


def runs_recurrence(step: NeuronStep, weight: Tensor) -> bool:
    """Return whether `recurrent_steps` runs such neurons, with a weight W, in any number of time steps."""
    return weight.dtype in DTYPES and weight.is_contiguous() and _kernel_of(step, weight[:0].float(), None) is not None


def _kernel_of(step: NeuronStep, v: Tensor, decay: Tensor | None) -> NativeStep | None:
    return None if options().sparse == "off" else native_step(step, v, v.dtype, v.dtype, decay, gradient=True)


class _RecurrentCall(NamedTuple):
    """Arguments of a call besides its tensors, see `recurrent_steps`."""

    kernel: NativeStep
    step: NeuronStep
    weights: WeightCache
    steps: int
    cut: bool
    trace: Trace | None


def _forward(
    call: _RecurrentCall, x: Tensor, s: Tensor | None, v: Tensor, weight: Tensor, bias: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Spikes, the last membrane potential, and, if asked to `keep` it, what the backward needs of each step."""
    width = len(weight)
    packed = call.weights.pack_weight(sparse.linear_layer((1, width), (width, width)), weight, 1.0, keep=True)
    call.weights.note_sparse(weight)
    spikes, kept = torch.empty_like(x), torch.empty_like(x if keep else v)
    soft = call.step.v_reset is None
    after = kept if soft or not keep else torch.empty_like(v)
    call.kernel.library.sltt_recurrent(
        call.kernel.constants, x, packed, bias, s, v, spikes, after,
        v.numel() if keep and soft else 0, None if soft or not keep else kept,
        v.numel() // width, width, call.steps, torch.get_num_threads(),
    )  # fmt: skip
    return spikes, after if after.shape == v.shape else after[-len(v) :].clone(), kept


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, s: Any, v: Tensor, weight: Tensor, bias: Any, decay: Any, call: _RecurrentCall
    ) -> Any:  # type: ignore[override]
        spikes, last, kept = _forward(call, x, s, v, weight, bias, keep=True)
        whole, first = v.numel() % 8 == 0, torch.zeros_like(v) if s is None else s
        ctx.spikes = pack(spikes) if whole else spikes.clone()
        if whole and call.trace is None:  # bytes of bits in a time step
            ctx.read, ctx.ones = torch.cat([pack(first), ctx.spikes[: (len(x) - len(v)) * v[0].numel() // 8]]), None
        else:
            read = torch.cat([first, spikes[: len(x) - len(v)]])
            ctx.read, ctx.ones = (read, None) if call.trace is None else call.trace(read)
        ctx.call, ctx.first = call, len(v)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(kept, weight, decay, v if ctx.needs_input_grad[5] else None)
        return spikes, spikes[-len(v) :].clone(), last

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor | None) -> Any:  # type: ignore[override]
        with torch.autocast("cpu", enabled=False):  # a rule may call it inside of a user's
            return _gradients(ctx, *grads)


def _gradients(ctx: Any, grad: Tensor | None, grad_last: Tensor | None, grad_v: Tensor | None) -> Any:
    kept, weight, decay, v = ctx.saved_tensors
    needs_x, needs_s, needs_v, needs_weight, needs_bias, needs_decay, _ = ctx.needs_input_grad
    grad = torch.zeros_like(kept) if grad is None else grad.contiguous()
    if grad_last is not None:
        grad = grad.clone()
        grad[-ctx.first :] += grad_last
    of_v = torch.empty_like(kept[: ctx.first]) if needs_v else None
    delta = torch.empty_like(kept)
    kernel, step, _, steps, cut, _ = ctx.call
    gain = 1 - float(step.rate(decay)) if step.decay_input else 1.0
    if not cut and steps > 1:
        of_v = _through_time(ctx, grad, grad_v, kept, weight, delta, gain)
    else:
        arguments = grad, grad_v, kept, ctx.spikes, kept.dtype, None, False, kept
        kernel.gradient(delta, of_v, *arguments, steps, cut)
    of_decay = _decay_gradient(ctx, delta, kept, v, decay) if needs_decay else None
    if gain != 1:
        delta.mul_(gain)
    of_weight = _weight_gradient(ctx.read, delta.flatten(0, -2), weight) if needs_weight else None
    of_bias = None
    if needs_bias:
        ones = [1.0] if ctx.ones is None else ctx.ones  # what stands for 1 in each time step
        of_bias = sum(d.flatten(0, -2).sum(0) * row for d, row in zip(delta.chunk(len(ones)), ones, strict=True))
    of_s = delta[: ctx.first] @ weight if needs_s else None
    return delta if needs_x else None, of_s, of_v if needs_v else None, of_weight, of_bias, of_decay, None


def _through_time(
    ctx: Any, grad: Tensor, grad_v: Tensor | None, kept: Tensor, weight: Tensor, delta: Tensor, gain: float
) -> Tensor | None:
    """Write ∂L/∂u of all time steps, from the last to the first; return ∂L/∂v before the first."""
    steps, width = ctx.call.steps, len(weight)
    parts = zip(*(t.chunk(steps) for t in (grad.view(-1, width), kept, ctx.spikes, delta.view(-1, width))), strict=True)
    after, of_s = None, torch.empty_like(kept[: ctx.first]).view(-1, width)
    states = [torch.empty_like(kept[: ctx.first]) for _ in range(2)]  # in turn before and after a time step
    for grad_t, kept_t, s_t, out in reversed([*parts]):
        total = grad_t if after is None else torch.addmm(grad_t, after, weight, alpha=gain, out=of_s)
        ctx.call.kernel.gradient(out, states[0], total, grad_v, kept_t, s_t, kept.dtype, None, False, kept_t, 1, False)
        after, grad_v, states = out, states[0], states[::-1]
    return grad_v


def _decay_gradient(ctx: Any, delta: Tensor, kept: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    """Return ∂L/∂λ = Σ_t ∂L/∂u[t] (v[t−1] − v_r); with `decay_input` the factor is (v[t−1] − u[t]) / (1 − λ)."""
    step: NeuronStep = ctx.call.step
    s = unpack(ctx.spikes, 1.0, kept.dtype).view_as(kept) if ctx.spikes.dtype == torch.uint8 else ctx.spikes
    after = kept if step.v_reset is None else step.reset(kept, s)
    moved = torch.cat([v, after[: len(kept) - len(v)]])
    if step.decay_input:
        u = kept + step.amount * s if step.v_reset is None else kept
        moved = (moved - u) / (1 - decay)
    else:
        moved = moved - (step.v_reset or 0.0)
    return (delta * moved).sum().to(decay.dtype).reshape(decay.shape)


def _weight_gradient(read: Tensor, delta: Tensor, weight: Tensor) -> Tensor:
    """Return ∂L/∂W = Σ δᵀ s; the spikes that were read come as bits, or as they are."""
    if read.dtype == torch.uint8:
        layer = sparse.linear_layer(tuple(delta.shape), tuple(weight.shape))
        if layer.fits and sparse.density(read) < costs.break_even(layer, delta.dtype).weight_gradient:
            return sparse.weight_gradient(layer, read, delta)
        read = unpack(read, 1.0, delta.dtype)
    return delta.T @ read.view_as(delta)
