"""Max pooling for sequences: of sums over time, where a pooling of each step would favour uneven currents."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sltt.checks import function
from sltt.kernels import running_max
from sltt.sequence.hooks import own_forward
from sltt.sequence.state import Stateful


class RunningMax(Stateful):
    """Max pooling of the sum over time; the output is what the pooled sum gains in a step.

        y[t] = pool(Σ_{s≤t} x[s]) − pool(Σ_{s<t} x[s])

    The mean of y over time is the pooling of the mean of x: spikes give what their rates give, and a pooling of spikes
    gives spikes. A pooling of each step takes the largest current or spike of the step, and gives more where they come
    unevenly. With a constant input, and with T = 1, both are the same. In step t, the gradient goes to the position
    whose sum is largest at t.

        sltt.RunningMax(nn.MaxPool2d(2))

    Args:
        pool: a max pooling, such as nn.MaxPool2d(2) or nn.AdaptiveMaxPool2d(1); or another function of one tensor with
            pool(a x) = a pool(x) for all a > 0.

    Source: Rueckauer et al. 2017 (doi 10.3389/fnins.2017.00682) let the position with the highest rate so far pass.
    """

    states = ("total", "largest")
    timeless = True
    total: Tensor | None
    largest: Tensor | None

    def __init__(self, pool: Callable[[Tensor], Tensor]):
        super().__init__()
        self.pool = function("pool", pool, "a tensor")

    def first_states(self) -> dict[str, float]:
        """Return the value of each state before the first step."""
        return {"total": 0.0, "largest": 0.0}

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, ...] of one time step to what `pool` makes of it."""
        if self.total is None or self.largest is None:
            pooled = self.pool(x)
            self.total, self.largest = x.clone(), pooled.clone()  # others may change x and what is given in place
            return pooled
        self.check_state("total", x, self.total.dtype)
        native = isinstance(self.pool, nn.MaxPool2d) and not own_forward(self.pool, nn.MaxPool2d)
        if native and (results := running_max(self.pool, self.total, self.largest, x)):
            self.total, self.largest, gained = results
            return gained
        kind = torch.promote_types(x.dtype, torch.float32)  # bfloat16 does not count further than 256
        total = self.total.to(kind) + x
        largest, before = self.pool(total), self.largest
        self.total, self.largest = total, largest
        return (largest - before).to(x.dtype)
