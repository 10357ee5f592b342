"""The fused neuron step: charge, fire and reset in one pass over memory, and a backward that saves almost nothing.

The backward needs the surrogate's input u − V_th. For a soft reset it is recovered from what is there anyway, the
membrane potential after the reset and the spikes: u − V_th = v − (V_th − r s), to the last bit where r is V_th. For a
hard reset v says nothing about the u of a neuron that fired, so u is saved too. A learnable decay (PLIF) saves the
membrane potential of the step before, and with `decay_input` the input, since its gradient is a sum over them.

Several time steps can be run in one call. The membrane potentials in between are then kept for the backward, or, where
the input can be restored from what is saved anyway, replayed from it. A few steps in Triton are always replayed.

All is elementwise on memory: tensors of any dense memory format are taken as flat, without a copy.
"""

import functools
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sltt.kernels.derivatives import differentiable_once
from sltt.kernels.neuron.equations import NeuronStep
from sltt.kernels.neuron.native_step import NativeStep, native_step
from sltt.kernels.neuron.triton_step import Tiles, TritonStep, by_channel, triton_step
from sltt.kernels.norm import triton_norm
from sltt.kernels.norm.normed import Normed, prepare_norm
from sltt.kernels.options import Kernel, in_force, known_layout, match_format, options, without_modes
from sltt.kernels.spikes.bits import pack, unpack
from sltt.kernels.spikes.looks import BITS, BITS_FROM, PACK_FROM, can_pack
from sltt.kernels.spikes.saved import keep_count, tag_of, tag_spikes


def neuron_step(
    step: NeuronStep, v: Tensor, x: Tensor, decay: Tensor | None = None, steps: int = 1, cut: bool = False
) -> tuple[Tensor, Tensor]:
    """Spikes in x's type, and the membrane potential in v's type, after the time steps in x.

    Args:
        step: the constants.
        v: membrane potential after the step before, [B, ...].
        x: input current of n time steps, one after the other, [n·B, ...].
        decay: λ where it is a tensor; or λ and V_th of each channel, [2, C], where `steps_by_channel` runs.
        steps: n.
        cut: no gradient flows from one time step to the step before.
    """
    return run_step(step, fast_step(step, v, x.dtype, decay), v, x, decay, steps, cut)


class _StepCall(NamedTuple):
    """Holds what a call of `neuron_step` has besides tensors; `of_batch` is `Normed.training`."""

    step: NeuronStep
    fast: NativeStep | TritonStep | None
    steps: int
    cut: bool
    of_batch: bool = False


def run_step(
    step: NeuronStep, fast: NativeStep | TritonStep | None, v: Tensor, x: Any, decay: Any, steps: int, cut: bool
) -> tuple[Tensor, Tensor]:
    """Run `neuron_step` in the form that `fast_step` gives; x may be a `Normed`, for `normed_step`."""
    x, weight, bias, factors, of_batch = x if isinstance(x, Normed) else (x, None, None, None, False)
    tensors, call = (v, x, decay, weight, bias, factors), _StepCall(step, fast, steps, cut, of_batch)
    trained = any(t.requires_grad for t in tensors if t is not None)
    with without_modes():
        if trained and torch.is_grad_enabled():
            return _NeuronStep.apply(*tensors, call)  # type: ignore[return-value]
        s, v, _, _ = _run(call, v, x, decay, factors)
        return s, v


def fast_step(step: NeuronStep, v: Tensor, dtype: torch.dtype, decay: Tensor | None) -> NativeStep | TritonStep | None:
    """Choose the form of a step: C++ on a CPU, Triton on CUDA; None for the plain one, which TorchInductor compiles."""
    return (native_step if v.is_cpu else triton_step)(step, v, dtype, v.dtype, decay)


def normed_step(
    step: NeuronStep, v: Tensor, x: Tensor, norm: Any, bias: Tensor | None, decay: Tensor | None, steps: int, cut: bool
) -> tuple[Tensor, Tensor] | None:
    """Run `neuron_step` and the BatchNorm before it in the same passes, or return None; `bias` as in `prepare_norm`."""
    fast = fast_step(step, v, x.dtype, decay)
    fits = isinstance(fast, TritonStep) or (isinstance(fast, NativeStep) and decay is None)
    if not (fits and fast.differentiates) or (normed := prepare_norm(norm, x, bias, steps)) is None:  # pyright: ignore[reportOptionalMemberAccess]
        return None
    return run_step(step, fast, v, normed, decay, steps, cut)


def steps_by_channel(step: NeuronStep, v: Tensor, x: Tensor, values: Tensor) -> bool:
    """Return whether `neuron_step` takes λ and V_th of each channel, of the type and device of `values` [C]."""
    if x.shape[1:2] != values.shape:
        return False
    fast = fast_step(step, v, x.dtype, values)
    return isinstance(fast, TritonStep) and fast.differentiates


def _run(
    call: _StepCall, v: Tensor, x: Tensor, decay: Any, factors: Any = None, keep: bool = False, packs: bool = False
) -> tuple[Tensor, Tensor, Any, Tensor | None]:
    """Spikes, the last v, if asked to `keep` it what the backward needs of each step, and the bits of the spikes."""
    step, fast, steps, cut, _ = call
    x = x.resolve_neg()
    first = x if steps == 1 else x[: len(x) // steps]
    follow = x is first or x.stride(0) * len(first) == first.numel()  # each other in memory
    channels = (decay is not None and by_channel(decay)) or (factors is not None and isinstance(fast, TritonStep))
    if not x.is_contiguous() and not (known_layout(first, channels) and follow):
        x = x.contiguous()
        first = x if steps == 1 else x[: len(x) // steps]
    v = match_format(v, first) if v.stride() != first.stride() or v.is_neg() else v
    s = torch.empty_like(x)
    whole = v.numel() % 8 == 0 and (not channels or Tiles(first, True, 8).whole_bytes)
    # on another device, where no kernel packs, packing is a pass of its own, which a graph of one step is not worth
    packs = packs and step.most == 1 and (s.is_cpu or not cut or (fast is not None and keep and whole))
    packs = packs and s.numel() >= (BITS_FROM if cut else PACK_FROM) and can_pack(s)
    bits = s.new_empty(s.numel() // 8, dtype=torch.uint8) if fast and packs and whole else None
    kept = torch.empty_like(x, dtype=v.dtype) if keep else None
    u = None if step.v_reset is None else kept
    vs = torch.empty_like(v) if kept is None or kept is u else kept
    if isinstance(fast, NativeStep):
        fast.forward(s, vs, u, v, x, bits, factors)
    elif fast:
        keep_count(s, fast.forward(s, vs, u, v, x, bits, decay, factors))
    else:
        forward, _ = _kernels(step)
        after = unfold(vs, steps) if vs is kept else None
        for t, (s_t, x_t, u_t) in enumerate(zip(unfold(s, steps), unfold(x, steps), unfold(u, steps), strict=True)):
            before, v = v, torch.empty_like(v) if after is None else after[t]
            forward(s_t, v, u_t, before, x_t, decay)
        vs = vs if after else v
    last = vs if vs.shape == first.shape else vs[len(vs) - len(first) :].clone()  # all steps do not stay for its sake
    return s, last, kept, pack(s) if packs and bits is None else bits


def unfold(x: Any, steps: int) -> tuple[Any, ...]:
    """Return the time steps in x [n·B, ...], each [B, ...]; None of each if x is None."""
    return (x,) * steps if steps == 1 or x is None or not len(x) else x.chunk(steps)


@functools.lru_cache(maxsize=1024)
def _kernels(step: NeuronStep) -> tuple[Kernel, Kernel]:
    """Forward and backward of a step; each set of constants is compiled on its own, since they are built in."""

    def forward(s_out: Tensor, v_out: Tensor, u_out: Tensor | None, v: Tensor, x: Tensor, decay: Tensor | None) -> None:
        u = step.charge(v, x.to(v.dtype), step.rate(decay))
        s = step.fires(u).to(v.dtype)
        s_out.copy_(s)
        v_out.copy_(step.reset(u, s))
        if u_out is not None:
            u_out.copy_(u)

    def backward(out: Tensor, out_v: Any, grad_s: Any, grad_v: Any, kept: Tensor, s: Tensor, decay: Any) -> None:
        fires, stays = step.derivatives(kept, s.to(kept.dtype))
        grad_u = torch.zeros_like(kept) if grad_s is None else grad_s * fires
        grad_u = grad_u if grad_v is None else grad_u + grad_v * stays
        out.copy_(grad_u)
        if out_v is not None:
            out_v.copy_(grad_u * step.rate(decay))

    return Kernel(forward), Kernel(backward)


class _NeuronStep(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, v: Tensor, x: Tensor, decay: Any, weight: Any, bias: Any, factors: Any, call: _StepCall
    ) -> tuple[Tensor, Tensor]:
        step, fast, steps, cut, _ = call
        # Over several steps, an input that is saved as a tag costs nothing: then the steps are replayed from it. A few
        # steps are replayed in Triton within the backward's own pass, which reads less than what is kept of each.
        in_its_pass = isinstance(fast, TritonStep) and fast.replays(steps)
        ctx.replays = in_its_pass or (steps > 1 and factors is None and tag_of(x) is not None)
        s, v_next, kept, bits = _run(call, v, x, decay, factors, keep=not ctx.replays, packs=True)
        if bits is not None:
            if s.is_cpu:
                setattr(s.untyped_storage(), BITS, bits)  # for layers that look at the spikes
            elif not cut:  # else layers save spikes as they are, which takes no pass to unpack
                tag_spikes(s, bits)
        ctx.call, ctx.options, ctx.x_dtype = call, options(), x.dtype
        ctx.bits, ctx.layout, ctx.device = bits, (s.shape, s.stride()), s.device
        ctx.set_materialize_grads(False)
        learnable = decay is not None and ctx.needs_input_grad[2]
        ctx.save_for_backward(
            s if bits is None and not in_its_pass else None,
            decay,
            v if learnable or ctx.replays else None,
            x if (learnable and step.decay_input) or ctx.replays or factors is not None else None,
            factors,
            kept,
        )
        return s, v_next

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_s: Tensor | None, grad_v: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        same = ctx.options is options()  # but in a thread of autograd
        with nullcontext() if same else in_force(ctx.options), without_modes():
            call: _StepCall = ctx.call
            step, _, steps, cut, of_batch = call
            s, decay, v, x, factors, kept = ctx.saved_tensors
            needs_v, needs_x, needs_decay, needs_weight, needs_bias, *_ = ctx.needs_input_grad
            fast: Any = call.fast if call.fast and call.fast.differentiates else None
            in_triton = isinstance(fast, TritonStep)
            if ctx.replays and not (in_triton and fast.replays(steps)):
                _, _, kept, _ = _run(call, v, x, decay, keep=True)
            # ∂L/∂x is ∂L/∂u unless the input is scaled; then ∂L/∂u is computed in the state's type, and scaled below
            of_u = not in_triton and factors is None and (needs_decay or step.decay_input)
            out = torch.empty_strided(*ctx.layout, dtype=kept.dtype if of_u else ctx.x_dtype, device=ctx.device)
            first = out if steps == 1 else out[: len(out) // steps]
            grad_s, x = match_format(grad_s, out), match_format(x, out)
            grad_v, v = match_format(grad_v, first), match_format(v, first)
            before = torch.empty_like(first, dtype=(v if kept is None else kept).dtype) if needs_v else None
            if s is None and kept is not None:
                whole = first.numel() % 8 == 0 and not (needs_decay and step.v_reset is not None)
                if in_triton:  # bytes of each time step
                    whole = Tiles(first, by_channel(decay, factors), 8).whole_bytes
                s = ctx.bits if fast and whole else unpack(ctx.bits, 1.0, ctx.x_dtype).as_strided(*ctx.layout)
            of_decay, of_weight, of_bias = None, None, None
            if in_triton:
                arguments = grad_s, grad_v, kept, s, v, x, decay
                of_decay, parts = fast.gradient(out, before, *arguments, needs_decay, steps, cut, factors)
                of_decay = None if of_decay is None else of_decay.reshape(decay.shape).to(decay.dtype)
                if parts is not None:
                    assert factors is not None
                    out, of_weight, of_bias = triton_norm.gradients(out, x, factors, of_batch, parts)
            elif fast:
                arguments = grad_s, grad_v, kept, s, ctx.x_dtype, factors, of_batch, x
                of_weight, of_bias = fast.gradient(out, before, *arguments, steps, cut)
            else:
                assert factors is None, "there was one in the forward"
                _plain_gradient(call, out, before, grad_s, grad_v, kept, s, decay)
            if of_u and needs_decay:
                parts = (unfold(tensor, steps) for tensor in (out, kept, s))
                of_decay = _decay_gradient(step, decay, v, unfold(x, steps), *parts)
            if of_u and needs_x:
                out = (out * (1 - step.rate(decay) if step.decay_input else 1.0)).to(ctx.x_dtype)
            of_affine = of_weight if needs_weight else None, of_bias if needs_bias else None
            return before, out if needs_x else None, of_decay, *of_affine, None, None


def _plain_gradient(
    call: _StepCall, out: Tensor, out_v: Any, grad_s: Any, grad_v: Any, kept: Any, s: Any, decay: Any
) -> None:
    """Write ∂L/∂u of all time steps, and ∂L/∂v before the first if wanted."""
    _, backward = _kernels(call.step)
    of_u, of_s, ks, ss = (unfold(tensor, call.steps) for tensor in (out, grad_s, kept, s))
    for t in reversed(range(call.steps)):
        before = out_v if t == 0 else None if call.cut else torch.empty_like(ks[0])
        backward(of_u[t], before, of_s[t], grad_v, ks[t], ss[t], decay)
        grad_v = before


def _decay_gradient(step: NeuronStep, decay: Tensor, v: Tensor, x: Any, grad_u: Any, kept: Any, s: Any) -> Tensor:
    """Return ∂L/∂λ = Σ_t ∂L/∂u[t] (v[t−1] − v_r − x[t]), the last term with `decay_input` only."""
    total = torch.zeros((), dtype=v.dtype, device=v.device)
    for t, grad_u_t in enumerate(grad_u):
        if t:
            v = kept[t - 1] if step.v_reset is None else step.reset(kept[t - 1], s[t - 1])
        moved = v - (step.v_reset or 0.0)
        if step.decay_input:
            moved = moved - x[t]
        total = total + (grad_u_t * moved).sum()
    return total.to(decay.dtype).reshape(decay.shape)
