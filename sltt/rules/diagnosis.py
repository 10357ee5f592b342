"""What an error in the middle of a sequence comes from, said of the user's network."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sltt._torch import FABRIC
from sltt.sequence.hooks import hooked
from sltt.sequence.state import Stateful, emits_spikes, kind_of, map_tensors, reset, state_names
from sltt.sequence.steps import Sequence

_NO_GRADIENT = "does not require grad and does not have a grad_fn"
_SECOND_TIME = "backward through the graph a second time"
_IN_PLACE = ("modified by an inplace operation", "changed by an in-place operation")


@contextmanager
def explained(model: nn.Module, sequence: Sequence) -> Iterator[None]:
    """Inside this block, an error that PyTorch raises about a graph becomes a ValueError that names a module.

    Others get a note where the input may have been meant as a static one.
    """
    try:
        yield
    except Exception as error:
        if _SECOND_TIME in str(error) and sequence.x.grad_fn is not None:
            raise ValueError(
                "the input has a graph, through which the backward of each time step would go: make it in the network, "
                "once a sequence by sltt.once, or detach it"
            ) from error
        found = [one for one in _plain_tensors(model) if one[-1].grad_fn is not None]
        if _SECOND_TIME in str(error) and found:
            name, module, attribute, _ = found[0]
            kind = type(module).__name__
            remedy = (
                f"add it to {kind}.states"
                if isinstance(module, Stateful)
                else f"make it a sltt.Stateful with states = ('{attribute}',), or call "
                f"sltt.register({kind}, states=['{attribute}'])"
            )
            raise ValueError(
                f"{name or 'the model'} ({kind}) keeps a tensor in `.{attribute}` from step to step, which no rule "
                f"knows of: {remedy}"
            ) from error
        if _NO_GRADIENT in str(error):
            frozen = not any(p.requires_grad for p in model.parameters())
            why = "every parameter of the model is frozen" if frozen else "the model or the loss detaches it"
            raise ValueError(f"the loss has no gradient for any parameter: {why}") from error
        if any(words in str(error) for words in _IN_PLACE) and (changed := _changed_in_place(model, sequence)):
            raise ValueError(
                f"{changed} are changed in place, and a backward needs them: use an operation that is not in place, "
                "such as `x = x * 2` for `x *= 2`, or nn.ReLU(inplace=False)"
            ) from error
        if not sequence.static and sequence.x.ndim in (2, 4):
            shape = list(sequence.x.shape)
            error.add_note(
                f"the input {shape} was taken as T = {shape[0]} time steps of {shape[1]} samples; "
                "for a static input [B, ...] say steps=T"
            )
        if isinstance(error, ValueError) and FABRIC in str(error):
            raise ValueError(str(error).replace(FABRIC, "")) from error
        raise


@contextmanager
def leftovers_noticed(model: nn.Module, batch: int) -> Iterator[None]:
    """Warn of a tensor of the batch that a module keeps after the sequence: a state that nobody resets."""
    before = [*_plain_tensors(model)]  # held, so that no other tensor gets their ids
    there = {id(value) for *_, value in before}
    shapes = {(name, attribute, value.shape) for name, _, attribute, value in before}
    yield
    for name, module, attribute, value in _plain_tensors(model):
        new = id(value) not in there and (name, attribute, value.shape) not in shapes  # or it is of that size anyway
        if value.ndim > 1 and len(value) == batch and new:
            kind = type(module).__name__
            remedy = (
                f"add it to {kind}.states. If it is not: give it a name that begins with _"
                if isinstance(module, Stateful)
                else f"say so: sltt.register({kind}, states=['{attribute}']). If it is not: sltt.register({kind}, "
                "states=[])"
            )
            place = name.removeprefix(FABRIC) or "the model"
            warnings.warn(
                f"{place} ({kind}) keeps a tensor of the batch in `.{attribute}` after the sequence. If it is a state, "
                + remedy,
                stacklevel=6,
            )


def _plain_tensors(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Tensors in attributes and buffers of modules that no rule knows: module's name, module, attribute's name, tensor.

    Tensors in lists there too. Of what keeps a state, those that are none of its states and have no private name.
    """
    for name, module in model.named_modules():
        library = type(module).__module__.partition(".")[0]
        if library in ("torch", "sltt") or (kind_of(type(module)) and not isinstance(module, Stateful)):
            continue
        known, private = {"_parameters", "_buffers", *state_names(module)}, isinstance(module, Stateful)
        for key, value in (*vars(module).items(), *module._buffers.items()):
            tensors: list[Tensor] = []
            if key not in known and not (private and key.startswith("_")):
                map_tensors(tensors.append, value)
            yield from ((name, module, key, tensor) for tensor in tensors)


def _changed_in_place(model: nn.Module, sequence: Sequence) -> str | None:
    """The first spikes, or other outputs that their layer's backward needs, that are changed in place after it.

    Found by running a time step.
    """
    seen: list[tuple[str, Tensor, int]] = []

    def look(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        spikes = emits_spikes(module)
        if isinstance(output, Tensor) and (spikes or hasattr(output.grad_fn, "_saved_result")):
            what = f"the {'spikes' if spikes else 'outputs'} of {name or 'the model'} ({type(module).__name__})"
            seen.append((what, output, output._version))

    hooks = [m.register_forward_hook(partial(look, name)) for name, m in model.named_modules()]
    try:
        with hooked(*hooks), torch.enable_grad():
            model(sequence.input(range(1)))
    except Exception:
        return None  # the error that is to be explained says more
    finally:
        reset(model)
    return next((what for what, output, version in seen if output._version != version), None)
