"""Choose how many time steps go into one call of the network: from the shapes of its layers, never from a clock.

A matrix product of few rows (samples × pixels) takes the time of one with many, since it reads its whole weight. So
several time steps share a call, until the layers' products have some 2,048 rows. A network whose products have as many
in one time step runs step by step.

Steps share a call only where that changes no result, which a `Trial` finds once a network and shape.
"""

import math
import random
from contextlib import ExitStack
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from sltt import kernels
from sltt._torch import _disable_current_modes
from sltt.checks import whole_number
from sltt.rules.fold_trial import SAMPLES, Seen, Trial
from sltt.sequence.once import is_sharded
from sltt.sequence.run import Run

ROWS = 2048  # of a layer's matrix product in a call; more save no time
ROOM = 2**24  # bytes that the further steps of a call may take, or half of those of the weights


class Fold(NamedTuple):
    """Time steps in a call of the network.

    Attributes:
        trained: with a graph.
        forward: without one.
        why: why it is one; None if the network's layers are large, or if there are several.
    """

    trained: int = 1
    forward: int = 1
    why: str | None = None


_folds: WeakKeyDictionary[nn.Module, dict[Any, Fold]] = WeakKeyDictionary()


def fold_of(fold: Any) -> int | Literal["auto"]:
    """Return the argument `fold` of a rule; raise ValueError if it is none."""
    return "auto" if fold == "auto" else whole_number("fold", fold, least=1, remedy="or use 'auto'")


def choose_fold(run: Run) -> Fold:
    """Return how many time steps of a sequence share a call of its network, which is at its first one."""
    model, sequence = run.model, run.sequence
    # a lazy layer has no weights before its first batch
    if sequence.steps == 1 or not sequence.batch or any(is_lazy(p) for p in model.parameters()):
        return Fold()
    x = sequence.input(range(1))
    modules = tuple((type(m), m.training, count_hooks(m)) for m in run.layout.layers)
    shape = x.shape, x.dtype, x.device, type(run.step), modules
    found, key = _folds.setdefault(model, {}), (shape, sequence.steps)
    if key not in found:
        compared = max((_steps_in_call(fold) for (of, _), fold in found.items() if of == shape), default=1)
        found[key] = _choose(run, x, compared)
    return found[key]


def chosen_fold(model: nn.Module) -> Fold | None:
    """Return what was chosen last for a network; None before its first batch, and under rules that do not fold."""
    return next(reversed(_folds.get(model, {}).values()), None)


def _choose(run: Run, x: torch.Tensor, compared: int) -> Fold:
    """Choose; as many steps as were `compared` at another T share a call without a further comparison."""
    if problem := _problem(run):
        return Fold(why=problem)
    try:
        with ExitStack() as stack:
            stack.enter_context(_disable_current_modes())  # which count operations, say
            stack.enter_context(kernels.without_modes())
            stack.enter_context(torch.random.fork_rng([x.device] if x.is_cuda else []))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(kernels.using(bits=False, compile="off"))  # no kernel looks at values
            stack.callback(random.setstate, random.getstate())
            stack.callback(np.random.set_state, np.random.get_state())
            torch.manual_seed(0)
            trial = Trial(run.model, x)
            fold = _of_sizes(run, trial.seen, len(x) / SAMPLES)
            if fold.forward == 1:
                return fold
            problem = trial.problem
            if not problem and _steps_in_call(fold) > compared:
                problem = trial.compare(_steps_in_call(fold))
    except Exception as error:  # of any kind: it is the user's code
        return Fold(why=f"does not run so ({type(error).__name__}: {error})")
    return Fold(why=problem) if problem else fold


def _steps_in_call(fold: Fold) -> int:
    """Return the time steps in a call, with a graph if these are several."""
    return fold.trained if fold.trained > 1 else fold.forward


def _of_sizes(run: Run, seen: Seen, scale: float) -> Fold:
    """Return how many steps share a call by the sizes of layers, of `scale` times the samples that were seen."""
    if not seen.rows:
        return Fold(why="has no linear layer and no convolution of PyTorch's")
    rows, size = seen.rows * scale, 1.5 * seen.bytes * scale  # measured: what layers keep, and gradients
    room = max(ROOM, sum(p.nbytes for p in run.model.parameters()) // 2)
    most, further = min(ROWS / rows, 1 + room / size), min(2 * ROWS / rows, 1 + 2 * room / size)
    return Fold(_even(run.sequence.steps, most), _even(run.sequence.steps, further))


def _even(steps: int, most: float) -> int:
    """Return at most `most` time steps, so that as few calls as possible have about as many each."""
    return math.ceil(steps / math.ceil(steps / max(1, int(most))))


def _problem(run: Run) -> str | None:
    """Return why the steps of a network cannot share a call, where that shows without running it."""
    if is_sharded(run.model):
        return "has sharded weights"
    for layer in run.layout.layers.values():
        if count_hooks(layer.module):
            return f"has hooks on {layer}, which see one time step in a call"
        if layer.compiled:
            return f"has compiled code in {layer}"
    try:
        run.require_folds()
    except ValueError as error:
        return f"cannot fold: {str(error).removesuffix('; use fold=1')}"
    return None


def count_hooks(module: nn.Module) -> int:
    """Count the hooks on a module and its weights, without those that compute its weights, and those of ours."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    hooks += [*module._backward_hooks.values(), *module._backward_pre_hooks.values()]
    for p in module._parameters.values():  # which see the gradient of one time step
        for some in (getattr(p, "_backward_hooks", None), getattr(p, "_post_accumulate_grad_hooks", None)):
            hooks += (some or {}).values()
    ours = (type(hook).__module__.startswith("torch.nn.utils") or hasattr(hook, "sees_folds") for hook in hooks)
    return len(hooks) - sum(ours)
