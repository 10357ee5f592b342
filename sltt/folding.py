"""Several time steps in one call of the network.

The time steps are folded into the batch dimension, [n, B, ...] to [n·B, ...], which every layer that treats its samples
alike takes as it is: convolutions, linear layers, pooling. What depends on the time step unfolds it: neurons run their
recurrence, BatchNorm takes the statistics of each step by itself, so that the outputs and gradients are those of n
calls. Fewer and larger operations, for the memory of n steps.

A network that mixes the samples of a batch in another way (`x.mean(0)`) would mix time steps, and is not noticed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrizations import _SpectralNorm

from sltt.kernels import stepwise_batch_norm
from sltt.state import Fold, Stateful, current_fold, state_names


@contextmanager
def foldable(model: nn.Module) -> Iterator[None]:
    """Inside this block, calls of `model` can fold time steps; raises ValueError naming a module that cannot."""
    check_foldable(model)
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    once = [
        m.register_forward_pre_hook(_OncePerCall()) for m in model.modules() if isinstance(m, Stateful | _BatchNorm)
    ]
    for norm in norms:
        norm.forward = _stepwise(norm)  # an attribute of the instance, in front of the method
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward
        for hook in once:
            hook.remove()


def check_foldable(model: nn.Module) -> None:
    """Raise ValueError naming a module that would take several time steps for samples of one."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            why = "is scripted, so that it cannot be looked into"
        elif isinstance(module, Stateful) and not module.foldable:
            why = "keeps a state and does not say foldable = True"
        elif not isinstance(module, Stateful) and state_names(module):
            why = "keeps a state of its own (sltt.interop.convert makes ours of many neurons)"
        elif isinstance(module, _BatchNorm) and (
            type(module).forward is not _BatchNorm.forward or "forward" in vars(module)
        ):
            why = "normalises over the batch in a way of its own"
        elif (
            isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.training and module.track_running_stats
        ):
            why = "keeps running statistics"
        elif isinstance(module, _SpectralNorm) and module.training:
            why = "changes its estimate in every call"
        elif isinstance(module, nn.RNNBase | nn.RNNCellBase):
            why = "is recurrent"
        else:
            continue
        raise ValueError(
            f"fold needs layers that treat time steps alike, but {name} ({type(module).__name__}) {why}; use fold=1"
        )


class _OncePerCall:
    """A hook that lets a module with a state, or with statistics, run once in a call of the network.

    Run twice, its steps would come in another order than without folding; run again in the backward, by a checkpoint,
    it would not know of the fold.
    """

    seen: Fold | None = None

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        fold = current_fold()
        again = isinstance(module, _BatchNorm) and torch._C._current_graph_task_id() != -1
        if again or (fold.steps > 1 and fold is self.seen):
            raise ValueError(f"{type(module).__name__} runs twice in a call of the network: use fold=1")
        self.seen = fold


def _stepwise(norm: _BatchNorm) -> Any:
    """The forward of `norm`, which takes the statistics of each step, and counts each as a batch."""

    def forward(input: Tensor) -> Tensor:
        steps = current_fold().steps
        tracked = norm.running_mean is not None and norm.running_var is not None
        if steps == 1 or not (norm.training or not tracked):
            return _BatchNorm.forward(norm, input)
        norm._check_input_dim(input)
        if input.numel() == steps * input.shape[1]:
            raise ValueError(
                f"BatchNorm needs more than one value for each channel, got {list(input.shape)} of {steps} steps"
            )
        momenta = [0.0 if norm.momentum is None else norm.momentum] * steps
        if norm.training and norm.track_running_stats and norm.num_batches_tracked is not None:
            if norm.momentum is None:  # the average of all batches
                seen = int(norm.num_batches_tracked)
                momenta = [1 / (seen + t) for t in range(1, steps + 1)]
            norm.num_batches_tracked.add_(steps)
        running = None
        if norm.running_mean is not None and norm.running_var is not None and norm.track_running_stats:
            running = norm.running_mean, norm.running_var
        return stepwise_batch_norm(input, steps, running, norm.weight, norm.bias, momenta, norm.eps)

    return forward
