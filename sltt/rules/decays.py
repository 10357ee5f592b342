"""The λ of the neurons that traces follow, ours and other libraries'."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from sltt.neurons import CubaLIF, Neuron
from sltt.sequence.state import role_of

Decay = float | Tensor
Decays = tuple[Decay, float]  # λ of the membrane potential, α of a synaptic current, or 0


def decay_of(neuron: nn.Module, name: str, decay: float | None) -> Callable[[], Decays]:
    """Return a function to the λ of neurons, as it is now; raise ValueError where no trace follows them."""
    if decay is not None:
        return lambda: (decay, 0.0)
    role = role_of(type(neuron))
    ours: Any = neuron
    if not isinstance(neuron, Neuron) and role.translate:
        with suppress(ValueError):  # it has another reset, say
            ours = role.translate(neuron)
    theirs = role.decay if role.decay and not isinstance(ours, Neuron) else None
    has_decay = theirs(neuron) is not None if theirs else isinstance(ours, Neuron) and hasattr(ours, "decay")
    if not has_decay:
        raise ValueError(
            f"the λ of {name} ({type(neuron).__name__}) is not known, and traces need it: give a neuron of ours an "
            "attribute `decay`, say it by sltt.register(…, decay=…), or set one λ for all traces, OTTT(decay=…)"
        )
    if (rest := getattr(ours, "v_reset", None)) is not None:
        remedy = "use the soft reset, v_reset=None, or an estimate, OTTT(decay=…)"
        raise ValueError(f"{name} ({type(neuron).__name__}) resets to v_reset = {rest}, and a trace does not: {remedy}")

    @torch.no_grad()
    def current() -> Decays:
        value: Any = _check_decay(theirs(neuron), name) if theirs else ours.decay
        value = value() if callable(value) else value
        synaptic = ours.synaptic_decay() if isinstance(ours, CubaLIF) else 0.0
        return value.detach().mean() if isinstance(value, Tensor) else value, synaptic

    return current


def _check_decay(value: Any, name: str) -> Decay:
    """Return the λ that `sltt.register(decay=)` gives a neuron; raise ValueError where it is none."""
    floats = isinstance(value, Tensor) and value.is_floating_point() and value.numel() > 0
    if floats and (value.device.type != "cpu" or bool(((value >= 0) & (value <= 1)).all())):  # to look waits for a GPU
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1:
        return float(value)
    raise ValueError(f"the λ of {name} is a number from 0 to 1, or a tensor of them, and sltt.register gives {value!r}")
