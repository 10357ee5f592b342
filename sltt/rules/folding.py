"""Choose how many time steps go into one call of the network: from the shapes of its layers, never from a clock.

A matrix product of few rows (samples × pixels) takes the time of one with many, since it reads its whole weight. So
several time steps share a call, until the layers' products have some 2,048 rows: in the mean over layers, each by its
weights, which is that of the time. A network whose products have as many in one time step runs step by step. A GPU
needs far more rows to be busy, and fuses a BatchNorm with its neurons where they run several steps: as many share a
call there as fit a part of its memory (`sltt.memory.call_memory`), so that memory does not grow with T any further.

Steps share a call only where that changes no result. Structure proves it (`sltt.sequence.proof`), or the operations of
the forward (`operations`); else the first real batch shows it (`fold_trial`), and the next batch of a network that has
changed; else each step runs by itself.
"""

import math
from types import FunctionType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sltt import kernels
from sltt._torch import unwrapped
from sltt.checks import whole_number
from sltt.memory import call_memory
from sltt.rules.batch import Fold
from sltt.rules.fold_trial import PlainError, apart_from_user, copy_apart, find_difference, run_cut
from sltt.rules.operations import Sizes, takes_channels_last, watch_samples
from sltt.sequence.hooks import gradient_hooks, put_forward, without_marked_hooks
from sltt.sequence.layout import KnownBatch, Layout
from sltt.sequence.once import is_sharded
from sltt.sequence.proof import find_modes
from sltt.sequence.reach import refers_to
from sltt.sequence.run import Run
from sltt.sequence.snapshot import Buffers
from sltt.sequence.state import Stateful, role_of
from sltt.sequence.step import Step
from sltt.sequence.steps import Sequence

ROWS = 2048  # of a layer's matrix product in a call; more save no time
ROOM = 2**24  # bytes that the further steps of a call may take, or those of the weights and their gradients
TRIED = 2**26  # bytes of weights up to which a network is copied to try it: copies and gradients take six times as many


def fold_of(fold: Any) -> int | Literal["auto"]:
    """Return the argument `fold` of a rule; raise ValueError if it is none."""
    return "auto" if fold == "auto" else whole_number("fold", fold, least=1, remedy="or use 'auto'")


def choose_fold(run: Run, fold: int | Literal["auto"] = "auto", rule: Any = None, loss: Any = None) -> Fold:
    """Return how many time steps of a sequence share a call of its network, before it runs.

    Args:
        run: of the batch.
        fold: a number asks for so many.
        rule: is tried by its `run_trial`; None tries steps with a backward of their own.
        loss: what refers to the network may read its states, of which a call leaves those of its last step.

    Raises ValueError if so many steps as were asked for would change results.
    """
    if fold == 1 or run.sequence.steps == 1 or not run.sequence.batch:
        return Fold()
    if run.layout.lazy and any(map(is_lazy, run.model.parameters())):
        return Fold()
    if fold != "auto":
        run.require_folds()
        if is_sharded(run.model):  # no copy can be made, and the user asks for it
            return Fold(fold, fold)
    x, layout, problem = run.sequence.input(range(1)), run.layout, find_modes()
    known = layout.batches.setdefault((rule, run.sequence.static, x.shape, x.dtype, x.device), KnownBatch())
    key = fold, run.sequence.steps, kernels.current_options().fold_memory
    if not problem and loss is not None and refers_to(loss, layout.layers):
        problem = "has a loss that refers to it, which may read the states of one time step"
    if gradient_hooks(run.sequence.x):
        problem = "has an input with hooks"
    if not problem:
        if key not in known.folds:
            known.folds[key] = _choose(run, x, fold, known, rule)
        run.pairs = known.pairs
        if known.channels_last:
            run.take_channels_last()
    layout.chosen = chosen = Fold(why=problem) if problem else known.folds[key]
    if fold != "auto" and chosen.why:
        marked = ", or mark a hook that takes several, hook.sees_folds = True" if "hooks on" in chosen.why else ""
        raise ValueError(f"fold={fold} would change results: the network {chosen.why}; use fold=1{marked}")
    return chosen


def _choose(run: Run, x: Tensor, fold: Any, known: KnownBatch, rule: Any) -> Fold:
    layout: Layout = run.layout
    if problem := _problem(run) or layout.refused:
        return Fold(why=problem)
    weights = sum(p.nbytes for p in run.model.parameters())
    with apart_from_user(x.device):
        chosen = Fold(fold, fold)
        if fold == "auto":
            try:
                chosen = _of_sizes(run, _measure(run.model, x, layout.unproved is None), weights)
            except Exception as error:  # of any kind: it is the user's code
                return Fold(why=f"does not run so ({type(error).__name__}: {error})")
        n = min(chosen.trained if chosen.trained > 1 else chosen.forward, run.sequence.steps)
        if layout.unproved is None or n <= (known.tried or (0 if x.is_cpu else 1)):
            return chosen
        twin = copy_apart(run.model)
        if (pairs := watch_samples(run, twin, n)) is not None:
            find = unwrapped(run.model).get_submodule
            known.pairs = {find(norm): layout.layers[find(neuron)] for norm, neuron in pairs.items()}
            known.channels_last = takes_channels_last(run, twin)
        elif n > 1:  # one step is watched for the memory format and the pairs only
            if weights > TRIED and fold == "auto":
                size = f"{weights / 1e6:.0f} MB of weights"
                return Fold(why=f"{layout.unproved}, and {size} are too many to try it on copies")
            try:
                layout.refused = find_difference(run, n, *((rule.step, rule.run_trial) if rule else (Step, run_cut)))
            except PlainError:
                return Fold()
    known.tried, layout.steady = n, layout.refused is None and (n > 1 or pairs is not None)
    return Fold(why=layout.refused) if layout.refused else chosen


@torch.no_grad()
def _measure(model: nn.Module, x: Tensor, proved: bool) -> tuple[float, float]:
    """Return the mean rows of a layer's product in a time step x [B, ...], and the bytes that its layers give."""
    few, step = x[:2].clone(), Sizes()
    ours = all(role_of(type(m)).kind != "keeper" or isinstance(m, Stateful) for m in model.modules())
    model = model if proved and ours else copy_apart(model)  # states of other libraries keep the size of their batch
    with without_marked_hooks(model.modules()), Run(model, Sequence(few, 1, True), step, grad=False) as run:
        buffers = Buffers(run)
        run(few)
        buffers.restore()
    scale = len(x) / len(few)
    return step.products * scale / max(1, step.weights), step.bytes * scale


def _of_sizes(run: Run, sizes: tuple[float, float], weights: int) -> Fold:
    """Return how many steps share a call by the sizes of layers."""
    rows, size = sizes[0], 1.5 * sizes[1]  # measured: what layers keep, and gradients
    if not rows:
        return Fold(why="has no linear layer and no convolution of PyTorch's")
    asked = kernels.current_options().fold_memory
    on_device = call_memory(run.sequence.x.device)
    room = (on_device or max(ROOM, 2 * weights)) if asked is None else asked
    enough = ROWS / rows if on_device is None else math.inf
    most, further = min(enough, 1 + room / size), min(2 * enough, 1 + 2 * room / size)
    trained, forward = (int(min(run.sequence.steps, max(1, n))) for n in (most, further))
    return Fold(trained, forward)  # of longer sequences the same, and so is memory


def _problem(run: Run) -> str | None:
    """Return why the steps of a network cannot share a call, where that shows without running it."""
    if is_sharded(run.model):
        return "has sharded weights"
    for layer in run.layout.layers.values():
        if layer.compiled:
            return f"has compiled code in {layer}"
    if run.layout.unproved and run.layout.unproved.startswith("has hooks"):
        return run.layout.unproved
    functions = [f for m in run.model.modules() if isinstance(f := put_forward(m), FunctionType)]
    if refers_to(functions, run.layout.layers):
        return "has a function in place of a forward, which reads layers that a copy to try would share"
    try:
        run.require_folds()
    except ValueError as error:
        return f"cannot fold: {str(error).removesuffix('; use fold=1')}"
    return None
