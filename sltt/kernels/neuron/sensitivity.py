"""The derivative of a neuron's firing rate with respect to its input or a parameter, gathered step by step."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from sltt.kernels.neuron.custom import CustomStep, FunctionKernel, as_parameter, seen_as
from sltt.kernels.options import known_layout, match_format


class Sensitivity:
    """∂(Σ_t s[t])/∂c by forward differentiation, elementwise; c is added to the input in every step, or a parameter.

        d_s[t] = ∂s[t]/∂c + Σ_z ∂s[t]/∂z[t−1] d_z[t−1]         z: each state
        d_z[t] = ∂z[t]/∂c + Σ_y ∂z[t]/∂y[t−1] d_y[t−1],        d_z[0] = 0;  y: each state
        total = Σ_t d_s[t]

    `parameter` is the position of c among the function's parameters, or None for the input.
    """

    def __init__(self, step: CustomStep, parameter: int | None = None):
        self._step = step
        self._add = _kernel(step, parameter)
        self._sums: list[Tensor] = []  # the total, and d_z of each state

    @property
    def total(self) -> Tensor:
        """The total of the steps that were added, in float32 at least."""
        return self._sums[0]

    def add(self, x: Tensor, states: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
        """Add a time step: its input, the states before it, and the parameters as `custom_step` takes them."""
        x = x if known_layout(x, self._step.by_channel) else x.contiguous()
        states = [match_format(v, x) for v in states]
        if not self._sums:
            sums = torch.promote_types(states[0].dtype, torch.float32)  # in 16 bits, a long sum would stand still
            self._sums = [torch.zeros_like(x, dtype=sums), *map(torch.zeros_like, states)]
        self._sums = [match_format(d, x) for d in self._sums]
        seen = seen_as(x, self._step.by_channel)
        self._add(*map(seen, (*self._sums, x, *states)), *map(as_parameter, parameters))


@functools.lru_cache(maxsize=1024)
def _kernel(step: CustomStep, parameter: int | None) -> FunctionKernel:
    n = step.states

    def add(total: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        carried, x, states, parameters = tensors[:n], tensors[n], tensors[n + 1 : 2 * n + 1], [*tensors[2 * n + 1 :]]
        with torch.enable_grad():
            x, states = x.to(states[0].dtype).detach(), [v.detach().requires_grad_() for v in states]
            if parameter is None:
                c = x.requires_grad_()
            else:
                c = parameters[parameter] = parameters[parameter].expand_as(x).detach().requires_grad_()
            results = step(x, states, parameters)
            changes = [_change(result, c, states, carried) for result in results]
        return total + changes[0].to(total.dtype), *changes[1:]

    return FunctionKernel(add, 1 + n, in_place=True)


def _change(result: Tensor, c: Tensor, states: Sequence[Tensor], carried: Sequence[Tensor]) -> Tensor:
    """Return a result's derivative along c, direct and through the states, whose derivatives are `carried`."""
    change = torch.zeros_like(c)
    if result.requires_grad:
        ones = torch.ones_like(result)
        of_c, *slopes = torch.autograd.grad(result, (c, *states), ones, retain_graph=True, allow_unused=True)
        change = change if of_c is None else change + of_c
        for slope, d in zip(slopes, carried, strict=True):
            change = change if slope is None else change + slope * d
    return change.detach()
