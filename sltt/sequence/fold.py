"""Which call of the network is in progress, and how many time steps it takes.

Several time steps can be folded into the batch dimension, [n, B, ...] to [n·B, ...], which every layer that treats its
samples alike takes as it is: convolutions, linear layers, pooling. What depends on the time step takes them apart:
neurons run their recurrence, BatchNorm takes the statistics of each step by itself, so that the outputs and gradients
are those of n calls. Fewer and larger operations, for the memory of n steps.

A network that mixes the samples of a batch in another way (`x.mean(0)`) would mix time steps; `fit` notices it.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import nn

from sltt.sequence.hooks import replaced


@dataclass(frozen=True)
class Fold:
    """How a call of the network folds time into the batch dimension.

    Attributes:
        steps: n, the number of time steps in the batch dimension, the first step first.
        cut: no gradient flows from one step to the step before.
    """

    steps: int = 1
    cut: bool = False


ONE_STEP = Fold()


class Clock:
    """Where a sequence is.

    Attributes:
        calls: calls of the network so far, the one in progress included.
        fold: of the call in progress.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.fold = ONE_STEP


CLOCK = "_sltt_clock"  # the attribute of a module that holds the clock of the sequence that it is in


def clock_of(module: nn.Module) -> Clock | None:
    """The clock of the sequence that a module is in; None where no rule runs the module."""
    return getattr(module, CLOCK, None)


def fold_of(module: nn.Module) -> Fold:
    """How the call in progress folds time, for a module in it; one time step where no rule runs the module."""
    clock = clock_of(module)
    return ONE_STEP if clock is None else clock.fold


def clocked(modules: Iterable[nn.Module], clock: Clock) -> AbstractContextManager[None]:
    """Inside this block, modules go by a clock; after it, by the one before, as of a network around theirs."""
    return replaced(CLOCK, dict.fromkeys(modules, clock))


def folding(modules: Iterable[nn.Module], fold: Fold) -> AbstractContextManager[None]:
    """Inside this block, modules run calls that fold time."""
    clock = Clock()
    clock.fold = fold
    return clocked(modules, clock)
