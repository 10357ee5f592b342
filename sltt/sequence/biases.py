"""Biases in front of a BatchNorm in training mode: it takes them off with the mean, so on a GPU layers run without.

    y = BatchNorm(W x + b) = BatchNorm(W x),   ∂L/∂b = 0

Only the running mean has b: with a momentum m, batch i of n adds m (1 − m)^(n − i) b to it. This saves launches, and
passes over memory; on a CPU, a convolution adds its bias in the same pass.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from sltt import kernels
from sltt._torch import _foreach_mul, _foreach_norm, _foreach_zero_, add_to_each, has_own_operations
from sltt.sequence.hooks import count_hooks, runs_hooks
from sltt.sequence.steps import in_backward


class Biases:
    """The biases that a run left out."""

    def __init__(self, run: Any):
        self._run = run
        # by layer and norm the calls: how many batches the norm had counted, and time steps; None where the bias stays
        self._calls: dict[tuple[Any, Any], list[tuple[int, int]] | None] = {}

    def weigh(self, module: nn.Module, norm: nn.Module, x: Tensor) -> Tensor | None:
        """Run a layer without its bias, whose output the norm alone reads; return None where the bias stays."""
        run, pair = self._run, (module, norm)
        if pair not in self._calls:
            self._calls[pair] = [] if self._may_leave_out(module, norm) else None
        operation, calls = kernels.operation_of(module), self._calls[pair]
        if calls is None or operation is None or not norm.training or x.ndim != operation.axes + 2:
            return None
        if kernels.others_save() or has_own_operations() or in_backward():
            return None
        calls.append((run.counted[norm], run.fold))
        return operation(x, module.weight, None)  # pyright: ignore[reportArgumentType]

    def _may_leave_out(self, module: Any, norm: Any) -> bool:
        run = self._run
        layer, after = (run.layout.layers.get(m) for m in (module, norm))
        if not run.drops_biases or not all(part and part.is_known and not part.compiled for part in (layer, after)):
            return False
        weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
        if layer.role.kind != "weight" or type(weight) is not nn.Parameter or type(bias) is not nn.Parameter:
            return False
        mean = norm.running_mean if norm.track_running_stats and norm.num_batches_tracked is not None else None
        if mean is None or mean.dtype != bias.dtype or norm.momentum is None:
            return False
        taken = any(norm is other for (_, other), calls in self._calls.items() if calls is not None)
        if taken or bias.requires_grad > weight.requires_grad:  # the weight's gradient tells of the bias's
            return False
        return not (module._forward_hooks or norm._forward_hooks or count_hooks(module) or runs_hooks(module, norm))

    def bounds(self) -> list[Tensor]:
        """Return the largest values of the biases: not finite where one is not."""
        biases = [module.bias.detach() for (module, _), calls in self._calls.items() if calls]
        return [*_foreach_norm(biases, math.inf)] if biases else []

    @torch.no_grad()
    def finish(self) -> None:
        """Add the biases to running means, and give them a gradient of zero where the weights have one."""
        pairs: list[Any] = [(*pair, calls) for pair, calls in self._calls.items() if calls]
        shares = []
        for _, norm, calls in pairs:
            left, n = 1 - norm.momentum, self._run.counted[norm]
            shares.append(sum(left ** (n - before - steps) - left ** (n - before) for before, steps in calls))
        if pairs:
            moved = _foreach_mul([module.bias for module, *_ in pairs], shares)
            add_to_each([norm.running_mean for _, norm, _ in pairs], [*moved])
        learned = [m for m, *_ in pairs if m.bias.requires_grad and m.bias.grad is None and m.weight.grad is not None]
        for module in learned:
            module.bias.grad = torch.empty_like(module.bias)
        if learned:
            _foreach_zero_([module.bias.grad for module in learned])  # in one launch
