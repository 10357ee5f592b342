"""Gradients of time steps on a GPU: one launch adds those of all parameters to `.grad`."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sltt._torch import add_to_each


def add_together(backward: Callable[[Tensor], Any], model: nn.Module) -> Callable[[Tensor], Any]:
    """Return `backward` that adds to `.grad` in one launch; autograd takes one for each parameter.

    It sets `.grad` aside, and adds what `backward` leaves there. Where somebody else looks at sums in the middle,
    autograd adds: hooks, DistributedDataParallel, tensors that are sharded.
    """
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        return backward
    parameters = [p for p in model.parameters() if type(p) is nn.Parameter and not p._post_accumulate_grad_hooks]

    def run(value: Tensor) -> Any:
        sums = [(p, p.grad) for p in parameters if p.grad is not None]
        for p, _ in sums:
            p.grad = None
        try:
            return backward(value)
        finally:
            pairs = [(of_before, p.grad) for p, of_before in sums if p.grad is not None]
            for p, of_before in sums:
                p.grad = of_before
            if pairs:
                add_to_each(*map(list, zip(*pairs, strict=True)))

    return run
