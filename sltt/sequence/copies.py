"""Copies of networks."""

import copy
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def copy_model(model: M, shares: Callable[[nn.Parameter], bool] = lambda _: False) -> M:
    """Return a deep copy, also of layers whose weight is computed before each forward, as by pruning and weight norm.

    The parameters that it `shares` are those of the network.
    """
    computed = [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor) and value.grad_fn is not None  # which copy.deepcopy refuses
    ]
    try:
        for module, name, value in computed:
            vars(module)[name] = value.detach()
        return copy.deepcopy(model, {id(p): p for p in model.parameters() if shares(p)})
    finally:
        for module, name, value in computed:
            vars(module)[name] = value
