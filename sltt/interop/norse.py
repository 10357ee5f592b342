"""Norse's modules, which pass their state through their calls, with the state kept: `KeepState`."""

import inspect
from typing import Any, ClassVar

import norse.torch as norse
from norse.torch.module.snn import SNN, SNNCell, SNNRecurrent, SNNRecurrentCell
from torch import Tensor, nn

from sltt.state import Stateful, map_tensors, register


class KeepState(Stateful):
    """A module of Norse that takes (input, state) and gives (output, state), as one that takes and gives tensors.

        y[t], state[t] = module(x[t], state[t−1])

    Args:
        module: `SequentialState`, or a cell such as `LIFBoxCell`, of one time step.

    Raises:
        ValueError: a module that has no state, or takes all time steps in one call.
    """

    states: ClassVar[tuple[str, ...]] = ("state",)
    state: Any

    def __init__(self, module: nn.Module):
        super().__init__()
        if not _passes_state(type(module)):
            raise ValueError(
                f"expected a module of Norse that is called with (input, state), got {type(module).__name__}, which "
                "needs no KeepState"
            )
        for name, inner in module.named_modules():
            if isinstance(inner, nn.RNNBase):
                raise ValueError(
                    f"{name} ({type(inner).__name__}) takes all time steps in one call, and has no cell here"
                )
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        """One time step x [B, ...]."""
        # SequentialState writes into the list that it is given, which others may hold: give it a new one
        y, self.state = self.module(x, map_tensors(lambda s: s, self.state))
        return y


def _passes_state(cls: type) -> bool:
    return "state" in inspect.signature(cls.forward).parameters  # type: ignore[attr-defined]


def _check(module: Any, batch: int, kept: bool) -> str | None:
    if isinstance(module, SNN | SNNRecurrent | norse.Lift):
        return "takes all time steps in one call: use its cell, such as LIFCell"
    return None if kept else "passes its state through its calls: wrap it in sltt.interop.norse.KeepState"


def _spikes(module: Any) -> bool:
    return isinstance(module, SNNCell | SNNRecurrentCell) and not isinstance(module, norse.LICell)


for _cls in (SNN, SNNCell, SNNRecurrent, SNNRecurrentCell, *vars(norse).values()):
    if isinstance(_cls, type) and issubclass(_cls, nn.Module) and _passes_state(_cls):
        register(_cls, (), spikes=_spikes, check=_check)
