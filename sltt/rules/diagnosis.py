"""Explain an error of PyTorch in terms of the user's network."""

import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sltt.sequence.leftovers import plain_tensors, to_state
from sltt.sequence.reach import graph_nodes, operations
from sltt.sequence.run import Run


def note(error: Exception, run: Run) -> None:
    """Note in an error how the input was taken, and which layer it came through."""
    sequence = run.sequence
    if not sequence.static and sequence.x.ndim in (2, 4):
        shape = list(sequence.x.shape)
        error.add_note(
            f"the input {shape} was taken as T = {shape[0]} time steps of {shape[1]} samples; for a static input "
            "[B, ...] say steps=T"
        )
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    ours = isinstance(error, ValueError) and not frame.f_globals.get("__name__", "").startswith("torch.")
    pairs = [layer for layer in run.layout.keepers if getattr(layer.module, "output", False) is True]
    if pairs and "tuple" in str(error):
        error.add_note(f"{pairs[0]} gives a tuple, its spikes and its state: leave out output=True")
    elif not ours and (place := _place(run, error)):
        error.add_note(place)
    if (unseen := run.layout.find_unseen()) and unseen != str(error):
        error.add_note(unseen)


def _place(run: Run, error: Exception) -> str | None:
    """Return the innermost layer that an error came through, with its input, and what to do where types differ."""
    layers = run.layout.layers
    for frame, _ in reversed([*traceback.walk_tb(error.__traceback__)]):
        names = ("forward", "weight", "plain_norm", "stepwise_norm")
        if frame.f_code.co_name not in names:  # to look at another one might keep the error alive
            continue
        module = next((frame.f_locals[name] for name in ("module", "norm", "self") if name in frame.f_locals), None)
        x = next((value for value in frame.f_locals.values() if isinstance(value, Tensor)), None)
        if x is None or not isinstance(module, nn.Module) or module not in layers:
            continue
        weights = [*module.parameters(recurse=False)]
        kind = f"{type(module).__name__}({module.extra_repr()})"
        text = f"in {layers[module].name or 'the model'}, {kind}, on an input {list(x.shape)} of {x.dtype}"
        for has, types in ((x.dtype, {p.dtype for p in weights}), (x.device.type, {p.device.type for p in weights})):
            if types and has not in types:
                return f"{text}, with weights of {(of := types.pop())}: give x.to({of}), or change the network"
        return f"{text}: make the layer for such an input, or see what comes before it" if weights else text
    return None


def explain_errors(own: Callable[[Tensor], Any] | None, run: Run) -> Callable[[Tensor], Any]:
    """Return a backward, the user's own or PyTorch's, with errors about a graph turned into ValueErrors."""

    def run_backward(value: Tensor) -> Any:
        if not value.requires_grad:
            frozen = not any(p.requires_grad for p in run.model.parameters())
            why = "the model has none that is not frozen" if frozen else "the model or the loss detaches it"
            raise ValueError(f"the loss has no gradient for any parameter: {why}")
        try:
            if own is None:
                return value.backward()
            anchor = torch.zeros_like(value, requires_grad=True)
            result = own(value + anchor)
            nodes = set() if anchor.grad is not None else graph_nodes([value.grad_fn])
            known = {*run.model.parameters(), run.sequence.x}
            if {leaf.variable for leaf in nodes - operations(nodes)} - known:
                raise ValueError("backward=… asked for some gradients alone: call value.backward() without inputs")
            return result
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if cause := _cause(run):
                raise ValueError(cause) from error
            raise

    return run_backward


def check_reached(model: nn.Module) -> None:
    """Raise ValueError where a batch gave no weight a gradient: its loss is made of other weights than the model's."""
    if all(p.grad is None and not p._post_accumulate_grad_hooks for p in model.parameters()):  # which may clear it
        why = "the loss does not depend on the logits, or the rule called no backward"
        raise ValueError(f"no parameter of the model has a gradient: {why}")


def _cause(run: Run) -> str | None:
    """Return why a backward fails, as far as that can be found."""
    if leftover := next((kept for kept in plain_tensors(run.model) if kept[-1].grad_fn is not None), None):
        name, module, attribute, _ = leftover
        kind = type(module).__name__
        said = f"{name or 'the model'} ({kind}) keeps a tensor in `.{attribute}` from step to step"
        return f"{said}, which no rule knows of: {to_state(module, attribute)}"
    return run.layout.find_unseen()
