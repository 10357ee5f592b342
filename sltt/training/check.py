"""Misuse that only running copies of a network can show."""

import sys
import warnings
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sltt import kernels
from sltt._torch import _BatchNorm, keep_generators
from sltt.checks import instance
from sltt.rules import SLTT, Rule
from sltt.sequence.copies import copy_model
from sltt.sequence.hooks import keep_hooks
from sltt.sequence.layout import Layout
from sltt.sequence.modes import evaluation_mode
from sltt.sequence.run import Run
from sltt.sequence.state import state_tensors
from sltt.sequence.step import Step
from sltt.sequence.steps import Sequence, time_steps

ModuleCall = tuple[str, Tensor | None, Tensor | None]  # of a module: its name, what sample 0 gave it and got


def check(model: nn.Module, x: Tensor, *, rule: Rule = SLTT(), steps: int | None = None) -> None:
    """Check that a network runs its samples and time steps apart, on copies of it; `sltt.fit` does so once.

        sltt.check(model, x)

    It finds neurons that run twice in a time step of compiled code, modules that mix the samples of a batch, time steps
    that cannot share a call as the rule's `fold` asks, and states that no rule knows of.
    A forward that moves something outside, such as a log, does so in copies too: with `fold=1` a rule runs none.

    Args:
        model: maps the input of one time step to logits. It is left as it was.
        x: a sequence, time first [T, B, ...]; or, with `steps`, a static input [B, ...]. Some samples are enough; five
            are few other dimensions' number.
        rule: that trains.
        steps: T for a static input.

    Raises ValueError for a neuron in two places, and time steps that cannot share a call.
    """
    instance("model", model, nn.Module)
    instance("rule", rule, Rule)
    sequence = time_steps(x, steps)
    _warn_of_unseen(model)
    if any(is_lazy(p) for p in model.parameters()):  # it has no weights before its first batch
        return
    try:
        mixing = _find_mixing(model, sequence)
    finally:
        torch.clear_autocast_cache()  # casts of weights without a graph would cut them off in the steps that follow
    if rule.fold != "auto":
        rule.choose_fold(Run(model, sequence, rule.step()))
    if any(isinstance(m, _BatchNorm) and m.running_mean is None for m in model.modules()):
        return  # what normalises by the statistics of the batch, in evaluation too, is not judged
    if mixing:
        warnings.warn(
            f"{mixing} mixes the samples of a batch, in evaluation mode too: what a sample gives depends on the others."
            " Attention is among tokens: of [B, heads, N, E], or nn.MultiheadAttention(batch_first=True) of [B, N, E]."
            " A sum over dimension 0 is one over samples",
            stacklevel=4,
        )


def _warn_of_unseen(model: nn.Module) -> None:
    """Warn of layers with weights in a plain list, which are neither trained nor saved."""
    for layer, key, module in Layout(model).unseen():
        if any(p.requires_grad for p in module.parameters(recurse=False)):
            warnings.warn(
                f"{layer} keeps {type(module).__name__} in a plain list `.{key}`, where PyTorch does not see it: its "
                "weights are neither trained nor saved. Use nn.ModuleList or nn.ModuleDict",
                stacklevel=4,
            )


def _find_mixing(model: nn.Module, sequence: Sequence) -> str | None:
    """Return the first module whose output for sample 0 depends on the others; neurons run once in a call."""
    x = sequence.input(range(1))
    others = 1 - x[1:] if x.is_floating_point() else x[1:].flip(0)
    try:
        twin = copy_model(model)
        for module in twin.modules():  # hooks see the batches alone
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        before = _run(twin, x, 0)
    except ValueError:
        raise
    except Exception:  # of any kind: it is the user's code
        return None
    try:
        again = _run(twin, x, 1)  # with other random numbers: what they change is not judged
        after = _run(twin, torch.cat([x[:1], others]), 0)
    except Exception:
        return None
    if len({tuple(name for name, *_ in seen) for seen in (before, again, after)}) > 1:
        return None  # it decides by values which modules run
    for (name, read, gave), (_, _, repeated), (_, read_then, gave_then) in zip(before, again, after, strict=True):
        if _equal_tensors(read, read_then) and _equal_tensors(gave, repeated) and not _equal_tensors(gave, gave_then):
            return name
    return None


def _run(model: nn.Module, x: Tensor, seed: int) -> list[ModuleCall]:
    """Return the calls of modules in a call of the network, in the order in which they end."""
    seen: list[ModuleCall] = []

    def look(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        states = (state for inner in module.modules() for state in state_tensors(inner))  # also of silent neurons
        given = output[0] if isinstance(output, tuple) else output, *states
        rows = [row.flatten().double() for value in given if (row := _first_row(value, len(x))) is not None]
        read = _first_row(inputs[0] if inputs else None, len(x))
        seen.append((f"{name or 'the model'} ({type(module).__name__})", read, torch.cat(rows) if rows else None))

    step = Step()
    step.eager = True
    hooks = [module.register_forward_hook(partial(look, name)) for name, module in model.named_modules()]
    with (
        keep_hooks(*hooks), evaluation_mode(model), torch.no_grad(), keep_generators(x.device),
        torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext(),
        kernels.using(sparse="off", compile="off"), Run(model, Sequence(x, 1, True), step, grad=False) as run,
    ):  # fmt: skip
        torch.manual_seed(seed)
        run.result(run(x))
    return seen


def _first_row(x: Any, rows: int) -> Tensor | None:
    """Return a copy of sample 0; None where the dimension of the samples is not plain to see."""
    plain = isinstance(x, Tensor) and x.shape.count(rows) == 1
    return x.select([*x.shape].index(rows), 0).clone() if plain else None


def _equal_tensors(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and a.shape == b.shape and torch.equal(a, b)
