"""Norse's modules, which pass their state through their calls, with the state kept: `KeepState`."""

# pyright: reportMissingImports=false

import inspect
from dataclasses import replace
from typing import Any, ClassVar

import norse.torch as norse
import torch
from norse.torch.functional.iaf import IAFFeedForwardState
from norse.torch.functional.lif import LIFFeedForwardState
from norse.torch.functional.lif_box import LIFBoxFeedForwardState
from norse.torch.functional.reset import reset_subtract, reset_value
from norse.torch.module.snn import SNN, SNNCell, SNNRecurrent, SNNRecurrentCell
from torch import Tensor, nn

from sltt import surrogates
from sltt.checks import instance
from sltt.interop.adapted import Adapter, make_adapter
from sltt.interop.conversion import ConversionError, layer_title, leaky, read_constant, require, synaptic
from sltt.neurons import CubaLIF
from sltt.sequence.hooks import own_forward, runs_hooks
from sltt.sequence.spikes import show
from sltt.sequence.state import Stateful, map_tensors, register, role_of, set_role


class KeepState(Stateful):
    """A module of Norse that takes (input, state) and gives (output, state), as one that takes and gives tensors.

        y[t], state[t] = module(x[t], state[t−1])

    Args:
        module: `SequentialState`, or a cell such as `LIFBoxCell`, of one time step.

    Raises ValueError for a module that has no state, or takes all time steps in one call.
    """

    states: ClassVar[tuple[str, ...]] = ("state",)
    state: Any

    def __init__(self, module: nn.Module):
        super().__init__()
        if not _passes_state(type(instance("module", module, nn.Module))):
            got = f"{type(module).__name__}, which needs no KeepState"
            raise ValueError(f"expected a module of Norse that is called with (input, state), got {got}")
        for name, inner in module.named_modules():
            if isinstance(inner, nn.RNNBase | _WHOLE):
                raise ValueError(f"{layer_title(name, inner)} takes all time steps in one call: use its cell")
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        """One time step x [B, ...]."""
        # SequentialState writes into the list that it is given, which others may hold: give it a new one
        y, self.state = self.module(x, map_tensors(lambda s: s, self.state))
        return y


_WHOLE = SNN | SNNRecurrent | norse.Lift  # take sequences


def _passes_state(cls: type) -> bool:
    return "state" in inspect.signature(cls.forward).parameters  # type: ignore[attr-defined]


def _check(module: Any, batch: int, kept: bool) -> str | None:
    if isinstance(module, _WHOLE):
        return "takes all time steps in one call: use its cell, such as LIFCell"
    return None if kept else "passes its state through its calls: wrap it in sltt.interop.norse.KeepState"


def _spikes(module: Any) -> bool:
    return isinstance(module, SNNCell | SNNRecurrentCell) and not isinstance(module, norse.LICell | norse.LIBoxCell)


def _translate(keeper: KeepState) -> nn.Module:
    module: Any = keeper.module
    if type(module) is norse.SequentialState:
        require(not module.return_hidden, "gives what its hidden layers give: use return_hidden=False")
        return nn.Sequential(*(KeepState(m) if _passes_state(type(m)) else m for m in module))
    return _translate_cell(module) if _spikes(module) else keeper


def _translate_cell(module: Any) -> nn.Module:
    p = module.p
    require(type(module) in _STATES, f"holds a {type(module).__name__}, of other dynamics than LIFBoxCell and LIFCell")
    reset: dict[str, Any] = {"v_threshold": read_constant("v_th", p.v_th), "surrogate": _surrogate(p)}
    if type(module) is norse.IAFCell:
        # IAFCell itself marks its v_reset, which is its first membrane potential, to require a gradient
        return leaky(1.0, v_reset=read_constant("v_reset", p.v_reset.detach()), **reset)
    rest = read_constant("v_leak", p.v_leak)
    if type(module) is norse.LIFCell or p.reset_method is reset_value:
        reset["v_reset"] = read_constant("v_reset", p.v_reset)
        require(rest == reset["v_reset"], "has a v_leak that is not v_reset")
    else:
        require(p.reset_method is reset_subtract, "has a reset that ours do not have")
        require(rest == 0, "has a v_leak that is not 0")
    rate = read_constant("tau_mem_inv", module.dt * p.tau_mem_inv)
    if type(module) is norse.LIFCell:
        return synaptic(1 - rate, 1 - read_constant("tau_syn_inv", module.dt * p.tau_syn_inv), rate, **reset)
    return leaky(1 - rate, decay_input=True, **reset)


def _surrogate(p: Any) -> surrogates.Surrogate:
    if p.method == "super":  # Norse does not use alpha here
        return surrogates.Above(surrogates.FastSigmoid(1.0, scale=2.0))
    if p.method == "triangle" and p.alpha == 1:
        return surrogates.Above(surrogates.Triangle())
    surrogate = f"{p.method} of alpha = {float(p.alpha):g}"
    raise ConversionError(f"has the surrogate {surrogate}, which is not in sltt.surrogates")


def _refuse_spiking(module: Any) -> nn.Module:
    require(not _spikes(module), "passes its state through its calls: wrap it in sltt.interop.norse.KeepState")
    return module


class _Cell(Adapter):
    """A cell that passes its state; that of a synaptic current is kept as it is after its decay, α i[t]."""

    half_state = property(lambda self: type(self.module) is not norse.LIFCell)  # pyright: ignore[reportAssignmentType]

    def __call__(self, x: Tensor, steps: int, cut: bool, state: Any) -> Any:
        """Return spikes and state, or None where only the cell's own code runs."""
        if not self.find_ours():
            return None
        decay = self.ours.synaptic_decay() if isinstance(self.ours, CubaLIF) else 1.0
        states = [None] * len(self.ours.states) if state is None else [*state]
        if len(states) == 2 and states[1] is not None:
            states[1] = states[1] / decay
        if not decay or (spikes := self.run(x, steps, cut, states)) is None:
            return None
        states_after = [getattr(self.ours, name) for name in self.ours.states]
        if len(states_after) == 2:
            states_after[1] = decay * states_after[1]
        return spikes, _STATES[type(self.module)](*states_after)


_STATES = {norse.LIFCell: LIFFeedForwardState, norse.LIFBoxCell: LIFBoxFeedForwardState}
_STATES[norse.IAFCell] = IAFFeedForwardState


def _constants(cell: Any) -> list[Any]:
    names = "v_th v_reset v_leak tau_mem_inv tau_syn_inv method alpha reset_method"
    return [cell.dt, *(getattr(cell.p, name, None) for name in names.split())]


def _advance(keeper: KeepState) -> Any:
    """Return what runs the time steps of a call layer by layer; None where the module runs each by itself."""
    whole: Any = keeper.module
    several = type(whole) is norse.SequentialState
    modules: list[Any] = [*whole] if several else [whole]
    passes = [_passes_state(type(module)) for module in modules]
    outer = [whole, *(module for module, p in zip(modules, passes, strict=True) if p)]
    cells: list[Any] = [make_adapter(_Cell, m, _translate_cell, _constants) if _spikes(m) else None for m in modules]
    if any(runs_hooks(m) or own_forward(m, type(m)) for m in outer) or getattr(whole, "return_hidden", False):
        return None
    if not all(isinstance(module, SNNCell) for module in outer[1:]):
        return None

    def advance(x: Tensor, steps: int, cut: bool, *_: Any) -> Tensor:
        state = keeper.state
        states = [None] * len(modules) if state is None else [*state] if several else [state]
        for i, module in enumerate(modules):
            if not passes[i]:
                x = module(x)
                continue
            if cells[i] and (stepped := cells[i](x, steps, cut, states[i])) is not None:
                x, states[i] = stepped
            else:
                outputs: list[Tensor] = []
                for part in x.chunk(steps):
                    before = map_tensors(Tensor.detach, states[i]) if cut and outputs else states[i]
                    y, states[i] = type(module).forward(module, part, before)  # without the handler of a run
                    outputs.append(y)
                x = torch.cat(outputs)
            show(module, x)
        keeper.state = states if several else states[0]
        return x

    return advance if any(cells) else None


register(KeepState, KeepState.states, reset=KeepState.reset, translate=_translate)
set_role(KeepState, replace(role_of(KeepState), advance=_advance))
for _cls in (SNN, SNNCell, SNNRecurrent, SNNRecurrentCell, *vars(norse).values()):
    if isinstance(_cls, type) and issubclass(_cls, nn.Module) and _passes_state(_cls):
        register(_cls, (), spikes=_spikes, check=_check, translate=_refuse_spiking)
