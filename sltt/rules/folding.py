"""Several time steps in one call of the network: which networks can, and how many steps fit a memory budget."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm

from sltt._torch import _BatchNorm, _InstanceNorm, _SpectralNorm
from sltt.kernels import stepwise_norms
from sltt.memory import available_memory, counts_peak, parse_bytes, peak_memory
from sltt.sequence.fold import clocked
from sltt.sequence.hooks import hooked, own_forward
from sltt.sequence.state import Stateful, emits_spikes, state_names
from sltt.sequence.steps import Network, OncePerCall, in_backward

# Of the memory that is free when the first batch comes; the rest is for the optimizer's state and fragmentation.
SHARE_OF_FREE = 0.7
MEASURED = 3  # so many batches, with 1, 2 and 3 steps in a call
TWICE = "runs twice in a call of the network: use fold=1"


@contextmanager
def foldable(network: Network) -> Iterator[None]:
    """Inside this block, calls of a network can fold time steps; raises ValueError naming a module that cannot."""
    check_foldable(network.model)
    modules = dict(network.model.named_modules())
    norms = {name: m for name, m in modules.items() if isinstance(m, _BatchNorm) and not isinstance(m, Stateful)}
    # Run twice, their steps would come in another order than without folding. Neurons are watched in any case.
    others = {n: m for n, m in modules.items() if isinstance(m, Stateful) and not emits_spikes(m)}
    watched = {**norms, **others}.items()
    once = (module.register_forward_pre_hook(OncePerCall(name, network.clock, TWICE)) for name, module in watched)
    forward = (norm.register_forward_pre_hook(_not_in_backward) for norm in norms.values())
    with clocked(norms.values(), network.clock), stepwise_norms(norms.values()), hooked(*once, *forward):
        yield


def _not_in_backward(norm: nn.Module, inputs: Any) -> None:
    """A checkpoint runs a layer again in the backward, where it does not know of the fold."""
    if in_backward():
        raise ValueError(f"{type(norm).__name__} {TWICE}")


def check_foldable(model: nn.Module) -> None:
    """Raise ValueError naming a module that would take several time steps for samples of one."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            why = "is scripted, so that it cannot be looked into"
        elif isinstance(module, Stateful) and not module.foldable:
            why = "keeps a state and does not say foldable = True"
        elif not isinstance(module, Stateful) and state_names(module):
            why = "keeps a state of its own (sltt.interop.convert makes ours of many neurons)"
        elif isinstance(module, _BatchNorm) and not isinstance(module, Stateful) and own_forward(module, _BatchNorm):
            why = "normalises over the batch in a way of its own"
        elif isinstance(module, _InstanceNorm) and module.training and module.track_running_stats:
            why = "keeps running statistics"
        elif module.training and (isinstance(module, _SpectralNorm) or _normalises_by_hook(module)):
            why = "changes its estimate in every call"
        elif isinstance(module, nn.RNNBase | nn.RNNCellBase):
            why = "is recurrent"
        else:
            continue
        raise ValueError(
            f"fold needs layers that treat time steps alike, but {name} ({type(module).__name__}) {why}; use fold=1"
        )


def _normalises_by_hook(module: nn.Module) -> bool:
    return any(isinstance(hook, SpectralNorm) for hook in module._forward_pre_hooks.values())


# What was measured of a model belongs to the model, not to a rule, which may train several.
_peaks: WeakKeyDictionary[nn.Module, dict[Any, tuple[int, list[int]]]] = WeakKeyDictionary()


def run_within(
    budget: str | int | None, key: Any, network: Network, x: Tensor, steps: int, run: Callable[[int], Any]
) -> Any:
    """Call `run` with the largest fold, at most T = `steps`, whose memory is within the budget.

    The first three batches of each shape are measured, with one, two and three steps in a call. Peak memory grows by a
    constant for each further step; that from one to two may be another. Results depend on the fold by rounding only.

    Args:
        budget: bytes that a batch may take above what is allocated before it, such as "8GB"; None is 70% of what is
            free at the first batch.
        key: what else the memory depends on: the rule.
        network: of the batch.
        x: input, whose shape and type the memory depends on.
        steps: T.
        run: runs the batch with so many time steps in a call, and gives what this function returns.
    """
    model = network.model
    key = key, budget, x.shape, x.dtype, x.device, steps, model.training
    found = _peaks.setdefault(model, {})
    if not counts_peak(x.device):
        raise ValueError(
            f"fold='auto' measures memory, which PyTorch does not count on {x.device.type}: take a number, fold=2"
        )
    if key not in found:
        free = int(SHARE_OF_FREE * available_memory(x.device)) if budget is None else parse_bytes(budget)
        found[key] = free, []
    limit, peaks = found[key]
    fold, results = 1 + len(peaks), []
    if fold > min(MEASURED, steps) or (peaks and peaks[-1] + peaks[0] > limit):
        return run(largest_fold(peaks, limit, steps))
    # gradients that are there already would be a part of the peak in a batch that makes them
    held = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    peaks.append(held + peak_memory(lambda: results.append(run(fold)), x.device))
    return results[0]


def largest_fold(peaks: list[int], limit: int, most: int) -> int:
    """The largest fold whose peak is within the limit; at least 1.

    Args:
        peaks: bytes at the peak with one step in a call, and with two and three if they were measured.
        limit: bytes.
        most: the largest fold that there is a use for.
    """
    if len(peaks) < 2:
        return 1
    slope = max(1, *(after - before for before, after in pairwise(peaks)))
    return int(min(most, max(1, 1 + (limit - peaks[0]) // slope)))
