"""Claims of runs on modules: a state belongs to one sequence at a time."""

import threading
from typing import Any

from torch import nn

from sltt.sequence.layout import Layout
from sltt.sequence.state import state_tensors

_claims: dict[nn.Module, Any] = {}
_lock = threading.Lock()


def run_of(module: nn.Module) -> Any:
    """Return the run that a module is in, or None."""
    return _claims.get(module)


def claim(run: Any, layout: Layout) -> dict[nn.Module, Any]:
    """Claim the modules of a network for a run; returns the runs that had them before.

    A part of a network may run a sequence of its own in the middle of the network's, as long as its states are empty.

    Raises ValueError if a module's state is in use.
    """
    thread = threading.get_ident()
    with _lock:
        for layer in layout.keepers:
            other = _claims.get(layer.module)
            if other and (other.thread != thread or any(state.numel() for state in state_tensors(layer.module))):
                raise ValueError(f"{layer} is in the middle of another sequence: wait, or copy.deepcopy before")
        before = {module: _claims.get(module) for module in layout.layers}
        _claims.update(dict.fromkeys(before, run))
    return before


def release(before: dict[nn.Module, Any]) -> None:
    """Give modules back to the runs that had them before."""
    with _lock:
        for module, run in before.items():
            if run is None:
                _claims.pop(module, None)
            else:
                _claims[module] = run
