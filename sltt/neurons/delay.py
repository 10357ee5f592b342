"""Delays: a layer reads what came some time steps ago.

Shapes: B samples, K taps; a call takes n time steps, [n·B, ...].
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sltt.checks import whole_numbers
from sltt.kernels import Spikes, look
from sltt.neurons.base import check_forward
from sltt.sequence.hooks import own_forward
from sltt.sequence.state import Role, Stateful, set_role


class Delay(Stateful):
    """Join the inputs of n_1 … n_K time steps ago along dimension 1: [B, N, ...] to [B, K·N, ...].

        y[t] = (x[t − n_1], …, x[t − n_K])          x[t] = 0 for t < 0

        nn.Sequential(sltt.Delay([0, 4, 8]), nn.Linear(3 * 64, 64), sltt.LIF(), ...)

    The linear layer or convolution behind it has a weight for each tap, and learns under every rule. The error also
    goes back through the delay to the layers before it: under `SLTT` and `OTTT` all of it, at memory that does not grow
    with T; under `BPTT` too, and under `TBPTT` and `Mixed` within their windows. `RateBased` has no time, and refuses.

    The states are the inputs of the last D steps, D the largest tap. On a CPU, SLTT and OTTT keep spikes as bits.

    Args:
        taps: n_1 … n_K, delays in time steps; 0 is the current step.

    Raises ValueError for no tap, one below 0, one twice, or one that is no whole number.

    Attributes:
        depth: D.
    """

    states = ("past",)
    past: tuple[Tensor | Spikes, ...] | None

    def __init__(self, taps: Sequence[int]):
        super().__init__()
        self.taps = whole_numbers("taps", taps, least=0)
        if len(set(self.taps)) < len(self.taps):
            raise ValueError(f"taps must be different delays, got {list(self.taps)}: a layer reads each of them once")
        self.depth = max(self.taps)

    @property
    def newest(self) -> Tensor | Spikes:
        """The input of the step before."""
        assert self.past
        return self.past[-1]

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, N, ...] of one time step to [B, K·N, ...]."""
        return self.advance(x)

    def advance(self, x: Tensor, steps: int = 1, cut: bool = False, weights: Any = None) -> Tensor:
        """Run n time steps in x [n·B, ...]; with `cut`, no gradient flows from one of them to the steps before."""
        check_forward(self)
        now = x.chunk(steps) if steps > 1 else (x,)
        if self.past:
            self.check_state("newest", now[0], x.dtype)
        old = self.past or ()
        if missing := self.depth - len(old):
            old = (torch.zeros_like(now[0]),) * missing + old  # in the memory format of x, which y then has
        read = {t - n for n in self.taps for t in range(steps)}
        parts = [p.dense() if isinstance(p, Spikes) and i - self.depth in read else p for i, p in enumerate(old)]
        parts += [part.detach() for part in now] if cut else now
        y = torch.cat([self._tap(x, n, parts, steps) for n in self.taps], 1)
        kept = now[-self.depth :] if self.depth else ()
        # copies: a network may go on to change its spikes in place, and a user to fill the same input again
        new = [look(part.detach()) or part.detach().clone() for part in kept] if cut else [p.clone() for p in kept]
        self.past = (*old, *new)[len(old) + len(new) - self.depth :]
        return y

    def _tap(self, x: Tensor, n: int, parts: list[Any], steps: int) -> Tensor:
        """Return the inputs [n·B, ...] of n time steps ago, among those of the D steps before and of the call."""
        if n == 0:
            return x
        start = self.depth - n
        return parts[start] if steps == 1 else torch.cat(parts[start : start + steps])

    def first_states(self) -> dict[str, float]:
        """Return what the states are before the first time step."""
        return {"past": 0.0}

    def extra_repr(self) -> str:
        return f"taps={list(self.taps)}"


def _advance_of(delay: Delay) -> Any:
    return None if own_forward(delay, Delay) else delay.advance


set_role(Delay, Role("keeper", lambda m: m.states, lambda m: m.reset(), advance=_advance_of))
