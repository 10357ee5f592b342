"""Find the layers that run sparse, computing on active inputs only."""

from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sltt import kernels
from sltt.analysis.energy import LAYERS
from sltt.rules import unroll
from sltt.rules.folding import choose_fold
from sltt.sequence.hooks import keep_hooks
from sltt.sequence.layout import Layout
from sltt.sequence.run import Run
from sltt.sequence.step import Step
from sltt.sequence.steps import time_steps


@dataclass
class LayerPath:
    """A convolution or linear layer in a training batch of T time steps.

    Attributes:
        name: of the layer in the model.
        density: share of its inputs that are not zero.
        calls: how often it ran.
        sparse_forward: in how many of them the forward computes on active inputs only.
        sparse_gradient: in how many of them the weight gradient does.
    """

    name: str
    density: float = 0.0
    calls: int = 0
    sparse_forward: int = 0
    sparse_gradient: int = 0


def layer_paths(model: nn.Module, x: Tensor, *, steps: int | None = None) -> list[LayerPath]:
    """Return the path of each convolution and linear layer, from the decision that a training takes.

        [path.name for path in layer_paths(model, x) if path.sparse_forward]

    The decision depends on the batch size, the precision, the memory format and `kernels.using(sparse=…)`: measure
    under those of the training. See `measure_energy` for the arguments.
    """
    paths: dict[str, LayerPath] = {}
    inputs = Counter[str]()

    def look(name: str, layer: Any, args: Any, kwargs: Any) -> None:
        path, x = paths.setdefault(name, LayerPath(name)), args[0] if args else kwargs["input"]
        path.calls += 1
        path.density += int(torch.count_nonzero(x))
        inputs[name] += x.numel()
        operation = kernels.operation_of(layer) if layout[layer].is_known else None
        if operation is None:  # always dense
            return
        with torch.enable_grad():  # as in a training
            operands = operation, x, layout[layer].role.weight(layer)
            call = kernels.spike_call(*kernels.as_images(*operands) or operands, layer.bias, kernels.WeightCache())
        if call is None:  # dense
            return
        path.sparse_forward += call.sparse_forward
        path.sparse_gradient += call.sparse_gradient

    layout = Layout(model).layers
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, LAYERS)]
    hooks = {m: partial(look, name) for name, m in layers}
    for hook in hooks.values():
        hook.sees_folds = True  # pyright: ignore[reportAttributeAccessIssue]
    with keep_hooks(*(m.register_forward_pre_hook(hook, with_kwargs=True) for m, hook in hooks.items())):
        fold = choose_fold(Run(model, time_steps(x, steps), Step())).trained  # as in a training
        unroll(model, x, steps=steps, fold=fold)
    for name, path in paths.items():
        path.density /= max(1, inputs[name])
    return list(paths.values())
