"""Tensors that a network keeps from step to step, and that no rule knows of."""

import warnings
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from sltt._torch import FABRIC
from sltt.sequence.state import Stateful, map_tensors, role_of, state_names


def to_state(module: nn.Module, attribute: str) -> str:
    """Return how a tensor that a module keeps becomes one of its states."""
    kind = type(module).__name__
    known = isinstance(module, Stateful)
    return f"add it to {kind}.states" if known else f"say so, sltt.register({kind}, states=['{attribute}'])"


def plain_tensors(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Tensors in attributes and buffers of modules that no rule knows: module's name, module, attribute's name, tensor.

    Tensors in lists there too. Of what keeps a state, those that are none of its states and have no private name.
    """
    for name, module in model.named_modules():
        name = name.removeprefix(FABRIC).removesuffix(FABRIC[:-1])
        library = type(module).__module__.partition(".")[0]
        is_registered = role_of(type(module)).kind == "keeper" and not isinstance(module, Stateful)
        if library in ("torch", "sltt") or is_registered:
            continue
        states, private = {"_parameters", "_buffers", *state_names(module)}, isinstance(module, Stateful)
        for key, value in (*vars(module).items(), *module._buffers.items()):
            tensors: list[Tensor] = []
            if key not in states and not (private and key.startswith("_")):
                map_tensors(tensors.append, value)
            yield from ((name, module, key, tensor) for tensor in tensors)


def warn_of_leftovers(model: nn.Module, before: list[Any], samples: int) -> None:
    """Warn of a tensor of the batch that a module keeps after a time step: a state that nobody resets."""
    there = {id(value) for *_, value in before}
    shapes = {(name, attribute, value.shape) for name, _, attribute, value in before}
    for name, module, attribute, value in plain_tensors(model):
        new = id(value) not in there and (name, attribute, value.shape) not in shapes  # or it is of that size anyway
        if value.ndim > 1 and len(value) == samples and new:
            kind = type(module).__name__
            known = isinstance(module, Stateful)
            other = "give it a name that begins with _" if known else f"sltt.register({kind}, states=[])"
            warnings.warn(
                f"{name or 'the model'} ({kind}) keeps a tensor of the batch in `.{attribute}` "
                f"after the sequence. If it is a state, {to_state(module, attribute)}; if it is not, {other}",
                stacklevel=1,  # of one line, so that it is shown once
            )
