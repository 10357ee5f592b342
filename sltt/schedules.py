"""Learning-rate schedules: pure functions of how far the training is, so that there is nothing to save or restore."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

from sltt.checks import number, sequence


class Schedule(ABC):
    """The factor on the optimizer's learning rate: 0 to 1 over the warm-up, then what the subclass says.

    Args:
        warmup: epochs over which the learning rate rises linearly from 0; may be a fraction.
    """

    def __init__(self, warmup: float = 0.0):
        self.warmup = number("warmup", warmup, least=0)

    def factor(self, epoch: float, epochs: int) -> float:
        """Return the factor at `epoch` of `epochs`; 2.5 is in the middle of the third epoch."""
        if epoch < self.warmup:
            return epoch / self.warmup
        return self.decay(epoch - self.warmup, max(epochs - self.warmup, 1e-9))

    @abstractmethod
    def decay(self, epoch: float, epochs: float) -> float:
        """Return the factor at `epoch` of `epochs`, both counted from the end of the warm-up."""


class Constant(Schedule):
    """Always 1, after the warm-up."""

    def decay(self, epoch: float, epochs: float) -> float:
        return 1.0


class Cosine(Schedule):
    """(1 + cos(π e / E)) / 2: from 1 to 0 along half a cosine (Loshchilov & Hutter 2017), updated at every batch.

    e are the epochs since the warm-up, E all epochs after it.

    Args:
        warmup: epochs over which the learning rate rises linearly from 0; may be a fraction.
    """

    def decay(self, epoch: float, epochs: float) -> float:
        return (1 + math.cos(math.pi * min(epoch / epochs, 1))) / 2


class Linear(Schedule):
    """1 + (last − 1) e / E: from 1 to `last` along a line, updated at every batch.

    e are the epochs since the warm-up, E all epochs after it.

    Args:
        last: the factor at the end.
        warmup: epochs over which the learning rate rises linearly from 0; may be a fraction.
    """

    def __init__(self, last: float = 0.0, warmup: float = 0.0):
        super().__init__(warmup)
        self.last = number("last", last, least=0)

    def decay(self, epoch: float, epochs: float) -> float:
        return 1 + (self.last - 1) * min(epoch / epochs, 1)


class MultiStep(Schedule):
    """gamma to the power of the number of milestones passed.

    Args:
        milestones: epochs, counted from the end of the warm-up, at which the learning rate is multiplied by gamma.
        gamma: the factor.
        warmup: epochs over which the learning rate rises linearly from 0; may be a fraction.
    """

    def __init__(self, milestones: Sequence[float], gamma: float = 0.1, warmup: float = 0.0):
        super().__init__(warmup)
        milestones = sequence("milestones", milestones, "epochs")
        self.milestones = [number(f"milestones[{i}]", epoch, least=0) for i, epoch in enumerate(milestones)]
        self.gamma = number("gamma", gamma, above=0)

    def decay(self, epoch: float, epochs: float) -> float:
        return self.gamma ** sum(epoch >= milestone for milestone in self.milestones)
