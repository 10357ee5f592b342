"""A neuron's step given as a pure function, fused: one pass over memory forward, one backward.

The backward runs the function again, from the input and the states before the step, and differentiates it. So these are
what is saved, however many operations the function has. Several time steps in one call save the first states only, and
replay the others.

Parameters are numbers, or have a value for each channel. Kernels see tensors as [outer, C, inner] in the second
case, and as their memory [n] else.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from sltt.kernels.derivatives import differentiable_once
from sltt.kernels.neuron.step import unfold
from sltt.kernels.options import Kernel, in_force, known_layout, match_format, memory, options
from sltt.kernels.spikes.bits import pack
from sltt.kernels.spikes.looks import can_pack
from sltt.kernels.spikes.saved import tag_spikes

States = tuple[Tensor, ...]


@dataclass(frozen=True)
class CustomStep:
    """spikes, *states = function(x, *states, **parameters, **constants), elementwise."""

    function: Callable[..., tuple[Tensor, ...]]  # pure; what it returns has the shape and type of x
    states: int  # their number
    parameters: tuple[tuple[str, bool], ...]  # the tensors, and whether each has a value for each channel
    constants: tuple[tuple[str, Any], ...]  # names and values of the others
    reads: tuple[Any, ...] = ()  # what the function reads from outside of its arguments, as it is now

    def __call__(self, x: Tensor, states: Sequence[Tensor], parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
        named = {name: value for (name, _), value in zip(self.parameters, parameters, strict=True)}
        results = self.function(x, *states, **named, **dict(self.constants))
        return (results,) if isinstance(results, Tensor) else tuple(results)

    @property
    def by_channel(self) -> bool:
        """Return whether a parameter has a value for each channel."""
        return any(by_channel for _, by_channel in self.parameters)


def custom_step(
    step: CustomStep, binary: bool, x: Tensor, states: States, parameters: States, steps: int = 1, cut: bool = False
) -> tuple[Tensor, States]:
    """Spikes in x's type, and the states after the time steps in x; as `neuron_step`, of any function.

    The states are of one type, and so are the parameters: of no dimension, or [C, 1, ...], to be broadcast to
    [B, C, ...]. Spikes that are `binary`, 0 or 1, can be saved as bits.
    """
    x = x if known_layout(unfold(x, steps)[0], step.by_channel) else x.contiguous()
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *states, *parameters)):
        s, *after = _CustomStep.apply(step, binary, steps, cut, x, *states, *parameters)  # type: ignore[misc]
        return s, tuple(after)
    s, every = _run(step, x, states, parameters, steps)
    return s, every[-1]


def _run(
    step: CustomStep, x: Tensor, states: Sequence[Tensor], parameters: Sequence[Tensor], steps: int, last: bool = True
) -> tuple[Tensor, list[States]]:
    """Spikes, and the states before the first step and after each; without those of the `last` step if not asked."""
    xs = unfold(x, steps)
    every = [tuple(match_format(v, xs[0]) for v in states)]
    if steps == 1 and not last:  # nothing to run
        return x, every
    s = torch.empty_like(x)
    forward = _forward_kernel(step)
    for s_t, x_t in zip(unfold(s, steps), xs, strict=True):
        if len(every) == steps and not last:
            break
        after = tuple(torch.empty_like(v) for v in every[-1])
        seen = seen_as(x_t, step.by_channel)
        forward(*map(seen, (s_t, *after, x_t, *every[-1])), *map(as_parameter, parameters))
        every.append(after)
    return s, every


class _CustomStep(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, step: CustomStep, binary: bool, steps: int, cut: bool, x: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        states, parameters = tensors[: step.states], tensors[step.states :]
        s, every = _run(step, x, states, parameters, steps)
        if binary and not s.is_cpu and can_pack(s):  # on a CPU, spikes are looked at
            tag_spikes(s, pack(s))
        ctx.step, ctx.steps, ctx.cut, ctx.options = step, steps, cut, options()
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *tensors)
        return s, *every[-1]

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        with in_force(ctx.options):
            return None, None, None, None, *_CustomStep._backward(ctx, *grads)

    @staticmethod
    def _backward(ctx: Any, grad_s: Tensor | None, *grad_states: Tensor | None) -> list[Tensor | None]:
        """Return ∂L/∂x, and the gradients of the states and parameters."""
        step, steps = ctx.step, ctx.steps
        x, *tensors = ctx.saved_tensors
        states, parameters = tensors[: step.states], tensors[step.states :]
        needs_x, *needs = ctx.needs_input_grad[4:]
        needs_states, learned = any(needs[: step.states]), tuple(needs[step.states :])
        _, every = _run(step, x, states, parameters, steps, last=False)
        grad_x = torch.empty_like(x)
        of_s = unfold(match_format(grad_s, grad_x), steps)
        after = [match_format(g, every[0][0]) for g in grad_states]
        totals: list[Tensor | None] = [None] * sum(learned)
        parts = zip(unfold(x, steps), unfold(grad_x, steps), of_s, every, strict=True)
        for x_t, grad_x_t, grad_s_t, before in reversed([*parts]):
            goes_on = needs_states if before is every[0] else not ctx.cut
            of_states = [torch.empty_like(v) for v in before] if goes_on else []
            # of no dimension, in float64, the compiler's code would leave it unwritten (PyTorch 2.13)
            of_parameters = [p.new_empty(p.shape or 1) for p in compress(parameters, learned)]
            of_outputs = [grad_s_t, *after]
            backward = _backward_kernel(step, goes_on, learned, tuple(g is not None for g in of_outputs))
            seen = seen_as(x_t, step.by_channel)
            outputs = *map(seen, (grad_x_t, *of_states)), *map(as_parameter, of_parameters)
            inputs = *map(seen, (x_t, *before)), *map(as_parameter, parameters)
            backward(*outputs, *inputs, *(seen(g) for g in of_outputs if g is not None))
            after = of_states or [None] * step.states
            totals = [g if sum_ is None else sum_ + g for sum_, g in zip(totals, of_parameters, strict=True)]
        sums: Any = iter(totals)
        of_learned = (next(sums).view_as(p) if learns else None for p, learns in zip(parameters, learned, strict=True))
        return [grad_x if needs_x else None, *after, *of_learned]


class FunctionKernel(Kernel):
    """Writes what a function returns. The compiler reads the function's graph, which may hold a backward.

    So many results are written over the first arguments, which are no inputs unless it is `in_place`.
    """

    def __init__(self, compute: Callable[..., tuple[Tensor, ...]], results: int, in_place: bool = False):
        self._compute, self._results = compute, results
        self._inputs_from = 0 if in_place else results
        super().__init__(self._writing(compute))

    def to_argument(self, a: Tensor) -> Tensor:
        return a.detach()

    def source(self, arguments: Sequence[Any]) -> Callable[..., None]:
        from torch.fx.experimental.proxy_tensor import make_fx  # takes a second to import

        inputs = arguments[self._inputs_from :]
        # other sizes than the compiler may take for constants
        sizes = {0: (), 1: (6,), 2: (3, 1), 3: (5, 3, 7)}
        samples = [torch.zeros(sizes[a.ndim], dtype=a.dtype, device=a.device) for a in inputs]
        return self._writing(make_fx(self._compute, tracing_mode="symbolic")(*samples))

    def _writing(self, compute: Callable[..., tuple[Tensor, ...]]) -> Callable[..., None]:
        results, begin = self._results, self._inputs_from

        def write(*arguments: Tensor) -> None:
            for out, value in zip(arguments[:results], compute(*arguments[begin:]), strict=True):
                out.copy_(value)

        return write


@functools.lru_cache(maxsize=1024)
def _forward_kernel(step: CustomStep) -> FunctionKernel:
    def forward(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        states, parameters = tensors[: step.states], tensors[step.states :]
        return step(x.to(states[0].dtype), states, parameters)

    return FunctionKernel(forward, 1 + step.states)


@functools.lru_cache(maxsize=1024)
def _backward_kernel(
    step: CustomStep, goes_on: bool, learned: tuple[bool, ...], given: tuple[bool, ...]
) -> FunctionKernel:
    """Gradients of x, of the states if they go on, and of the learned parameters, from those `given` of the results."""
    wanted = (True, *[goes_on] * step.states, *learned)

    def backward(*tensors: Tensor) -> tuple[Tensor, ...]:
        (x, *others), grads = tensors[: len(wanted)], tensors[len(wanted) :]
        inputs = x.to(others[0].dtype), *others
        with torch.enable_grad():
            x, *others = leaves = [t.detach().requires_grad_(wants) for t, wants in zip(inputs, wanted, strict=True)]
            results = compress(step(x, others[: step.states], others[step.states :]), given)
            pairs = [(r, g.to(r.dtype)) for r, g in zip(results, grads, strict=True) if r.requires_grad]
            leaves = list(compress(leaves, wanted))
            gradients: Any = [None] * len(leaves)
            if pairs:
                of, grads_of = zip(*pairs, strict=True)
                gradients = torch.autograd.grad(of, leaves, grads_of, allow_unused=True)
        return tuple(torch.zeros_like(t) if g is None else g for t, g in zip(leaves, gradients, strict=True))

    return FunctionKernel(backward, sum(wanted))


def seen_as(x: Tensor, channels: bool) -> Callable[[Tensor], Tensor]:
    """Return a function to a kernel's form of tensors with the layout of x; not as views, as in `memory`."""
    n = x.numel()
    if not channels:
        return memory
    inner = n // max(1, x.shape[0] * x.shape[1]) if x.is_contiguous() else 1
    shape = (n // max(1, x.shape[1] * inner), x.shape[1], inner)

    def to_argument(t: Tensor) -> Tensor:
        t = t.resolve_neg()
        strides = (shape[1] * inner, inner, 1)
        return t.new_empty(0).set_(t.untyped_storage(), t.storage_offset(), shape, strides)

    return to_argument


def as_parameter(p: Tensor) -> Tensor:
    """Return a kernel's form of a parameter: of no dimension, or [C, 1]."""
    return p.reshape(-1, 1) if p.ndim else p
