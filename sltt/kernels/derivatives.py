"""A backward that has no second derivative, and says so."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def differentiable_once(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., Any]:
    """Return a backward whose gradients raise an error when they are differentiated, for `create_graph=True`.

    PyTorch's `once_differentiable` gives gradients without a graph where the incoming ones are constants, as of a sum.
    A penalty on such gradients would vanish without a word.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Any) -> Any:
        with torch.no_grad():
            gradients = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return gradients
        # what they depend on, so that every way to differentiate them comes by here
        of = [t for t in (*grads, *ctx.saved_tensors) if isinstance(t, Tensor) and t.requires_grad]
        return tuple(_Once.apply(g, *of) if isinstance(g, Tensor) else g for g in gradients)

    return run


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, *of: Tensor) -> Tensor:  # type: ignore[override]
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        raise RuntimeError("neurons, and layers on spikes, are not differentiated twice: leave gradient penalties out")
