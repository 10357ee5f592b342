"""Multiplications of one batch under a rule, counted from the operations that run."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sltt import kernels
from sltt._torch import DispatchMode
from sltt.checks import instance
from sltt.rules import Rule
from sltt.rules.batch import StepLoss
from sltt.sequence.copies import copy_model


class Operations(NamedTuple):
    """Multiplications in layers and in matrix products: of all forward passes of a batch, and of its backward."""

    forward: int
    backward: int


def count_operations(
    model: nn.Module, x: Tensor, target: Any, loss: StepLoss, rule: Rule, *, steps: int | None = None
) -> Operations:
    """Count the multiplications of one batch; the model is left as it was.

        count_operations(model, x, y, loss, SLTT(k=1)).backward

    A layer n → m has, for each sample and time step, n·m multiplications forward and n·m for the gradient of its
    weights. All layers but the first have n·m more, for the gradient of their input. Matrix products, as in attention,
    count likewise. Neurons and other work on single elements are left out: they are of a lower order.

    See `agreement` for the other arguments.

    Args:
        rule: whose passes count. What `recompute=True` repeats is backward, what `BPTT(segment=n)` repeats forward.
    """
    instance("rule", rule, Rule)
    of_backward = 0

    def backward(value: Tensor) -> None:
        nonlocal of_backward
        before = counter.total
        value.backward()
        of_backward += counter.total - before

    counter = _Multiplications()
    with kernels.using(compile="off", sparse="off"), counter:
        rule(copy_model(model), x, target, loss, steps=steps, seed=0, update=lambda: None, backward=backward)
    # a multiplication and an addition
    return Operations((counter.total - of_backward) // 2, of_backward // 2)


class _Multiplications(DispatchMode):
    """Counts floating-point operations by PyTorch's table. Its own mode hooks all modules: layers then run plain."""

    def __init__(self) -> None:
        super().__init__()
        from torch.utils.flop_counter import flop_registry  # imports Triton where it is installed

        self.table, self.total = {**flop_registry, **_OWN}, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if count := self.table.get(func.overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def _convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, *settings: Any, out_val: Any = None) -> int:
    """Return the floating-point operations of a convolution's gradients; PyTorch's own count leaves the groups out."""
    transposed, mask = settings[4], settings[7]
    pixels = x if transposed else grad
    return 2 * (mask[0] + mask[1]) * (pixels.numel() // pixels.shape[1]) * weight.numel()


_OWN = {
    torch.ops.aten.convolution_backward: _convolution_backward,
    torch.ops.aten.mv: lambda a, b, out_val: 2 * a.numel(),
    torch.ops.aten.dot: lambda a, b, out_val: 2 * a.numel(),
}
