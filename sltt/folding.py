"""Several time steps in one call of the network.

The time steps are folded into the batch dimension, [n, B, ...] to [n·B, ...], which every layer that treats its samples
alike takes as it is: convolutions, linear layers, pooling. What depends on the time step unfolds it: neurons run their
recurrence, BatchNorm in training mode takes the statistics of each step by itself, so that the outputs and gradients
are those of n calls. Fewer and larger operations, for the memory of n steps.

A network that mixes the samples of a batch in another way (`x.mean(0)`) would mix time steps, and is not noticed.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sltt.hoisting import same_each_step
from sltt.kernels import stepwise_batch_norm
from sltt.state import Fold, Stateful, folding


@contextmanager
def folded(model: nn.Module, steps: int, cut: bool) -> Iterator[None]:
    """Inside this block, calls of `model` take `steps` time steps in the batch dimension."""
    with ExitStack() as stack:
        stack.enter_context(folding(Fold(steps, cut)))
        for module in model.modules():
            if isinstance(module, _BatchNorm) and module.training:
                stack.enter_context(_stepwise(module, steps))
        yield


def check_foldable(model: nn.Module) -> None:
    """Raise ValueError naming a module that would take several time steps for samples of one."""
    for name, module in model.named_modules():
        if isinstance(module, Stateful) and not module.foldable:
            why = "keeps a state and does not say foldable = True"
        elif isinstance(module, _BatchNorm) and type(module).forward is not _BatchNorm.forward:
            why = "normalises over the batch in a way of its own"
        elif isinstance(module, nn.RNNBase | nn.RNNCellBase):
            why = "is recurrent"
        else:
            continue
        raise ValueError(f"fold needs layers that treat time steps alike, but {name} ({type(module).__name__}) {why}; "
                         "use fold=1")  # fmt: skip


@contextmanager
def _stepwise(norm: _BatchNorm, steps: int) -> Iterator[None]:
    """Inside this block, `norm` takes the statistics of each step, and counts each as a batch."""

    def forward(input: Tensor) -> Tensor:
        if not norm.training:  # the model may have switched it after this was set up
            return _BatchNorm.forward(norm, input)
        if same_each_step(input):  # one batch, as many times
            return [_BatchNorm.forward(norm, input) for _ in range(steps)][-1]
        norm._check_input_dim(input)
        running, momenta = None, [norm.momentum or 0.0] * steps
        if norm.running_mean is not None and norm.running_var is not None:
            running = norm.running_mean, norm.running_var
        if norm.num_batches_tracked is not None:
            if norm.momentum is None:  # the average of all batches
                seen = int(norm.num_batches_tracked)
                momenta = [1 / (seen + t) for t in range(1, steps + 1)]
            norm.num_batches_tracked.add_(steps)
        return stepwise_batch_norm(input, steps, running, norm.weight, norm.bias, momenta, norm.eps)

    norm.forward = forward  # an attribute of the instance, in front of the method
    try:
        yield
    finally:
        del norm.forward
