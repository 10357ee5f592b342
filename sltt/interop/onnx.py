"""ONNX: one time step of a network, with the neurons' states as inputs and outputs, for runtimes without PyTorch."""

# pyright: reportMissingImports=false

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sltt.checks import folder, instance
from sltt.interop.conversion import check_exportable, check_names, layer_title
from sltt.interop.reading import ONE_TENSOR
from sltt.kernels import using
from sltt.neurons import Delay, Neuron, Recurrent
from sltt.neurons.pooling import RunningMax
from sltt.rules import unroll
from sltt.sequence.copies import copy_model
from sltt.sequence.hooks import keep_hooks
from sltt.sequence.state import reset, state_names


def to_onnx(model: nn.Module, x: Tensor, path: str | Path, *, sequence: bool = False) -> dict[str, float]:
    """Write one time step of a network as an ONNX model; returns the first value of each state by its name.

        logits, v' = step(x, v)

        first = to_onnx(model, x[0], "step.onnx")      # {"1": 0.0}

    Inputs: `x`, and the state of each layer of neurons: the layer's name, or NAME.STATE where it has several, as
    `RunningMax` has; of a `Delay`, [B, D·N, ...] of the last D steps. Outputs: `logits`, and `next.NAME` for each
    state. Begin a sequence with the first values. The network is in evaluation mode, and takes any batch size.

    With `sequence`, the file has all T time steps one after the other, and no states: it takes a sequence [T, B, ...]
    of this length, and gives the logits [T, B, C].

    Args:
        model: maps one time step [B, ...] to logits [B, C]; its neurons are those of this library.
        x: the input of one time step [B, ...], for the shapes; with `sequence`, of all, [T, B, ...].
        path: of the file.
        sequence: write all time steps.

    Raises:
        ValueError: a module keeps a state in a way of its own; the message names all of them.
        ModuleNotFoundError: onnx or onnxscript is not installed.
    """
    instance("model", model, nn.Module)
    instance("x", x, Tensor)
    check_exportable(model)
    check_names(model)
    path = folder("path", path, "a file")
    frame = x[0] if sequence else x
    twin = copy_model(model).eval()
    pools = [m.register_forward_hook(_take_floor) for m in twin.modules() if getattr(m, "ceil_mode", False)]
    try:
        with keep_hooks(*pools):
            unroll(twin, x if sequence else x[None])  # which warns of a state that no export knows of
    except Exception as error:
        if sequence:
            error.add_note("for all steps of a static input [B, ...], give x.expand(T, *x.shape)")
        raise
    step = _OneStep(twin, frame)
    names = [] if sequence else list(step.first)
    if taken := {"x", "logits"} & {*names}:
        raise ValueError(f"the layer of neurons {min(taken)} has a name that the file needs: call it otherwise")
    batch = torch.export.Dim("batch")
    with torch.no_grad(), using(compile="off"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about itself
        model, inputs, shapes = step, (x, step.states), ({0: batch}, tuple({0: batch} for _ in names))
        if sequence:
            model, inputs, shapes = _Sequence(step.model), (x,), ({1: batch},)
        named: Any = {"input_names": ["x", *names], "output_names": ["logits", *(f"next.{name}" for name in names)]}
        options: Any = {"dynamic_shapes": shapes, "external_data": False, "dynamo": True, "verbose": False}
        torch.onnx.export(model, inputs, str(path), **named, **options)
    return {} if sequence else step.first


def _take_floor(pool: Any, inputs: Any, output: Tensor) -> None:
    """Have a pool leave out the last window where it does: ONNX Runtime has one that begins behind the image too."""
    pool.ceil_mode = False
    pool.ceil_mode = type(pool).forward(pool, *inputs).shape != output.shape


_KEEPERS = Neuron | Recurrent | RunningMax | Delay  # modules whose states go from step to step


class _OneStep(nn.Module):
    """One time step as a function of input and states."""

    def __init__(self, model: nn.Module, x: Tensor):
        super().__init__()
        self.model = model
        unknown = [
            layer_title(name, m)
            for name, m in model.named_modules()
            if state_names(m) and not (isinstance(m, _KEEPERS) or getattr(m, "timeless", False))
        ]
        if unknown:
            remedy = "of many neurons of other libraries sltt.interop.convert makes ours"
            raise ValueError(f"ONNX export knows the states of sltt.Neuron, not of {', '.join(unknown)}; {remedy}")
        # a delay of 0 steps keeps nothing
        layers = {n: m for n, m in model.named_modules() if isinstance(m, _KEEPERS) and getattr(m, "depth", 1)}
        self.places = [(m, state) for m in layers.values() for state in m.states]
        self.first = {
            (name or state) if len(m.states) == 1 else f"{name}.{state}".removeprefix("."): value
            for name, m in layers.items()
            for state, value in m.first_states().items()
        }
        reset(model)
        with torch.no_grad(), using(compile="off"):
            if not isinstance(logits := model(x), Tensor):
                raise ValueError(f"expected one tensor of logits, got {type(logits).__name__}: {ONE_TENSOR}")
        self.states = self._current()
        reset(model)

    def forward(self, x: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        for (module, name), state in zip(self.places, states, strict=True):
            past = isinstance(module, Delay)
            setattr(module, name, state.unflatten(1, (module.depth, -1)).unbind(1) if past else state)
        logits = self.model(x)
        after = self._current()
        reset(self.model)
        return logits, *after

    def _current(self) -> tuple[Tensor, ...]:
        states = [getattr(module, name) for module, name in self.places]
        return tuple(torch.cat(state, 1) if isinstance(state, tuple) else state for state in states)


class _Sequence(nn.Sequential):
    """All time steps of a network as a function of their inputs."""

    def forward(self, input: Tensor) -> Tensor:
        reset(self)
        logits = torch.stack([super(_Sequence, self).forward(x) for x in input.unbind()])
        reset(self)
        return logits
