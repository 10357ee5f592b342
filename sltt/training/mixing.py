"""A network that mixes the samples of a batch, or the time steps of a fold: found by running it with others changed."""

import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sltt import kernels
from sltt._torch import _BatchNorm
from sltt.data import Splits
from sltt.sequence.copies import copied
from sltt.sequence.fold import Fold, clocked
from sltt.sequence.hooks import hooked
from sltt.sequence.modes import evaluating
from sltt.sequence.spikes import spiking_layers
from sltt.sequence.state import Stateful, reset
from sltt.sequence.steps import Network, Sequence
from sltt.training.phases import Stage
from sltt.training.safeguards import SAMPLES

Seen = list[tuple[str, Tensor | None, Tensor | None]]  # of each call of a module, what sample 0 gave it and got


def check_mixing(model: nn.Module, splits: Splits, samples: list[Any], stage: Stage) -> None:
    """Warn of a module that mixes the samples of a batch; raise ValueError for one that mixes folded time steps.

    A copy of the network runs a time step in evaluation mode, and again with other samples beside the first one.
    Networks that do not run so, or that normalise by the statistics of the batch then, are not judged.
    """
    if len(samples) < SAMPLES or any(isinstance(m, _BatchNorm) and m.running_mean is None for m in model.modules()):
        return
    x, _ = splits.collate(samples)
    x = x.to(next((p.device for p in model.parameters()), "cpu"))
    sequence = Sequence(x, stage.steps if splits.static else len(x), splits.static)
    fold = sequence.steps if stage.rule.fold == "auto" else min(stage.rule.fold, sequence.steps)
    if fold > 1 and (found := _mixing(model, sequence, fold)):
        raise ValueError(
            f"{found} mixes the time steps that are folded into a batch, or its samples: use fold=1. Attention over "
            "time has no form step by step: let neurons carry the past"
        )
    if found := _mixing(model, sequence, 1):
        warnings.warn(
            f"{found} mixes the samples of a batch, in evaluation mode too: what a sample gives depends on the others. "
            "Attention is among tokens, [B, N, E] and not [N, B, E]; a sum over dimension 0 is one over samples",
            stacklevel=4,
        )


def _copy(model: nn.Module) -> nn.Module:
    """The network without hooks, which would see more than the batches."""
    twin = copied(model)
    for module in twin.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return twin


def _mixing(model: nn.Module, sequence: Sequence, steps: int) -> str | None:
    """The first module whose output for sample 0 depends on the others, with `steps` time steps in a call.

    None too where the network does not run so: the training says what is wrong.
    """
    x = sequence.input(range(steps))
    others = 1 - x[1:] if x.is_floating_point() else x[1:].flip(0)
    changed = torch.cat([x[:1], others])
    try:
        twin = _copy(model)
        # the same once more with other random numbers: what they change is not judged
        calls = (x, 0), (x, 1), (changed, 0)
        before, again, after = (_run(twin, sequence.batch, steps, one, seed) for one, seed in calls)
    except Exception:  # of any kind: it is the user's code
        return None
    if len({tuple(name for name, *_ in seen) for seen in (before, again, after)}) > 1:
        return None  # it decides by values which modules run
    for (name, read, gave), (_, _, repeated), (_, read_then, gave_then) in zip(before, again, after, strict=True):
        if _same(read, read_then) and _same(gave, repeated) and not _same(gave, gave_then):
            return name
    return None


def _run(model: nn.Module, batch: int, steps: int, x: Tensor, seed: int) -> Seen:
    """The calls of modules in a call of the network, in the order in which they end."""
    network, seen = Network(model, batch), []
    modules = {*(m for m in model.modules() if isinstance(m, Stateful)), *spiking_layers(model).values()}
    hooks = [m.register_forward_hook(partial(_look, name, len(x), seen)) for name, m in model.named_modules()]
    devices = [x.device] if x.is_cuda else []
    reset(model)
    with (
        hooked(*hooks), clocked(modules, network.clock), evaluating(model), torch.no_grad(),
        torch.random.fork_rng(devices), kernels.using(sparse="off", compile="off"),
    ):  # fmt: skip
        torch.manual_seed(seed)
        network(x, Fold(steps))
    reset(model)
    return seen


def _look(name: str, rows: int, seen: Seen, module: nn.Module, inputs: Any, output: Any) -> None:
    """A forward hook, once it has its first three arguments."""
    read, gave = (_first_row(one, rows) for one in (inputs[0] if inputs else None, output))
    seen.append((f"{name or 'the model'} ({type(module).__name__})", read, gave))


def _first_row(x: Any, rows: int) -> Tensor | None:
    """What belongs to sample 0; None where the dimension of the samples is not plain to see."""
    plain = isinstance(x, Tensor) and x.ndim > 0 and x.shape.count(rows) == 1 and len(x) == rows
    return x[0].clone() if plain else None


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and a.shape == b.shape and torch.equal(a, b)
