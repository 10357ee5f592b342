"""Time steps: what a call of the network takes of them, and the state that it keeps between calls."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Fold:
    """How a call of the network folds time into the batch dimension.

    Attributes:
        steps: n, the number of time steps in the batch dimension, the first step first.
        cut: no gradient flows from one step to the step before.
    """

    steps: int = 1
    cut: bool = False


_fold = Fold()


def current_fold() -> Fold:
    """The fold of the call of the network that is in progress."""
    return _fold


@contextmanager
def folding(fold: Fold) -> Iterator[None]:
    """Inside this block, `current_fold` is `fold`."""
    global _fold
    before, _fold = _fold, fold
    try:
        yield
    finally:
        _fold = before


class Stateful(nn.Module):
    """A module that keeps tensors between time steps.

    A subclass lists the attributes that hold them in `states`. Each is None before the first step of a sequence, takes
    the shape, device and dtype of the input there, and is no part of the state dict: it belongs to one sequence.
    """

    states: ClassVar[tuple[str, ...]] = ()
    differentiable: ClassVar[bool] = True  # a gradient flows through the states; not through a mask that was drawn
    foldable: ClassVar[bool] = False  # unfolds the time steps that `sltt.folding` puts into the batch dimension

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def reset(self) -> None:
        """Forget the sequence: every state becomes None."""
        for name in self.states:
            setattr(self, name, None)

    def detach(self) -> None:
        """Keep the values and drop the graph behind them: no gradient flows to earlier time steps."""
        for name in self.states:
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, value.detach())

    def check_state(self, name: str, x: Tensor, dtype: torch.dtype) -> None:
        """Raise ValueError if the state `name` does not fit this time step's input x, or is not of `dtype`."""
        state: Tensor = getattr(self, name)
        if state.shape != x.shape or state.device != x.device or state.dtype != dtype:
            raise ValueError(
                f"{type(self).__name__} keeps a state {_describe(state)} of an earlier input, but got input "
                f"{_describe(x)}. Call sltt.reset(model) before a new sequence."
            )


def reset(model: nn.Module) -> None:
    """Reset the state of every stateful module in `model`, before a new sequence."""
    for module in model.modules():
        if isinstance(module, Stateful):
            module.reset()


def detach(model: nn.Module) -> None:
    """Cut the graph behind the state of every stateful module in `model`: v[t] becomes a constant of step t + 1."""
    for module in model.modules():
        if isinstance(module, Stateful):
            module.detach()


def _describe(x: Tensor) -> str:
    return f"{list(x.shape)} ({str(x.dtype).removeprefix('torch.')}, {x.device})"
