"""Forwards of layers in a time step: a rule overrides what it changes."""

from collections.abc import Callable, Container
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sltt import kernels
from sltt._torch import _current_graph_task_id, has_own_operations
from sltt.sequence.hooks import runs_hooks
from sltt.sequence.layout import Layer
from sltt.sequence.pairs import run_layers
from sltt.sequence.run import Run
from sltt.sequence.steps import channels_last, in_backward, repeat

NEURON = (
    "runs twice in a time step, and has one membrane potential: use a neuron of its own for each place. A forward that "
    "loops over time: return the output of one time step, a rule calls it T times"
)
KEEPER = "runs twice in a time step, and keeps one state: use a layer of its own for each place"
TWICE = "runs twice in a call of the network: use fold=1"


class Step:
    """Forwards of layers in a time step; this class runs them as they are.

    A rule overrides the methods of the roles that it changes. Each takes the layer and the arguments of its forward,
    and gives what the forward gives; `layer.plain` is that forward.

    Attributes:
        run: the batch that the step is in.
        eager: compiled code is not in force.
        waits: graphs of a rule that cuts every step wait for their backward.
        trained: the steps that have one.
    """

    run: Run
    eager = False
    waits = False
    trained: Container[int] = ()

    def handler(self, layer: Layer, folds: bool) -> Any:
        """Return the method that stands for a layer's forward, or None; `folds`: calls may take several time steps."""
        kind = "neuron" if layer.spikes else layer.role.kind
        if kind == "other":
            return None
        own, run = getattr(type(self), kind) is not getattr(Step, kind), self.run
        if layer.compiled and not self.eager:  # compiled code stays as it is
            return getattr(self, kind) if own else None
        match kind:
            case "keeper":
                takes_part = folds or layer.advance is not None
            case "norm":
                counts = layer.is_known and layer.module.training  # batches, all in one launch
                takes_part = layer.role.stepwise and (folds or counts or (run.recompute and layer.is_known))
            case "weight":
                takes_part = layer.is_known and (run.fast or run.recompute)
            case "pool" | "sequence":
                takes_part = layer.is_known and run.bits
            case _:
                takes_part = True
        return getattr(self, kind) if own or takes_part else None

    def require_folds(self) -> None:
        """Raise ValueError where several time steps cannot share a call; by default, they can."""

    def backward(self, value: Tensor | None, backward: Callable[[Tensor], Any], ran: int, steps: int) -> None:
        """Run the backward of a call, after which `ran` of T = `steps` ran; the value is None without a graph."""
        if value is not None:
            backward(value)

    def neuron(self, layer: Layer, *args: Any, **kwargs: Any) -> Any:
        """Run a layer of neurons."""
        if _current_graph_task_id() != -1:  # as `in_backward`
            return layer.plain(*args, **kwargs)  # which says what is wrong
        run = self.run
        if run.paired is not None:
            return run.take_paired(layer, *args)
        run.take_turn(layer, NEURON)
        if run.seen and args and run.seen[-1] is args[0]:
            run.seen.pop()  # no term of a sum
        y = None
        if layer.advance is not None and len(args) == 1:
            y = layer.advance(args[0], run.fold, run.cut)
        return run.one_by_one(layer, args, kwargs) if y is None else y

    def keeper(self, layer: Layer, *args: Any, **kwargs: Any) -> Any:
        """Another layer with a state."""
        if self.run.fold > 1 and layer.states and not in_backward():
            self.run.take_turn(layer, TWICE)
        if layer.advance is not None and len(args) == 1 and self._is_plain() and not in_backward():
            run = self.run
            if run.fold == 1:
                run.take_turn(layer, KEEPER)
            if (y := layer.advance(args[0], run.fold, run.cut, run.weights)) is not None:
                return y
        return self.run.one_by_one(layer, args, kwargs)

    def _is_plain(self) -> bool:
        """Return whether neurons and weights run as they are."""
        return type(self).neuron is Step.neuron and type(self).weight is Step.weight and not self.run.recompute

    def weight(self, layer: Layer, *args: Any, **kwargs: Any) -> Any:
        """Run a linear layer or a convolution, on active inputs only where that is faster."""
        module, run = layer.module, self.run
        operation = kernels.operation_of(module)
        if operation is None or len(args) != 1 or has_own_operations():
            return layer.plain(*args, **kwargs)
        x, weight, bias = args[0], layer.role.weight(module), module.bias
        if operation.axes == 1 and run.sequence.last and x.ndim == 3:
            x = channels_last(x)  # which PyTorch's BatchNorm, and torch.cat, are not
        # a parametrised weight is computed by now, and once a step
        plain = partial(operation, weight=weight, bias=bias) if "parametrizations" in module._modules else layer.plain
        if not run.recompute and kernels.is_small(operation, x, weight):
            run.drop(layer)
            return plain(x)
        # a checkpoint runs the layer again on all of x
        if run.fold > 1 and run.sequence.same_at_each_step(x, run.fold) and not kernels.others_save():
            return repeat(plain(x[: run.batch]), run.fold)
        y = kernels.run_layer(operation, x, weight, bias, run.weights, run.recompute)
        if run.recompute and kernels.tag_of(y):
            run.seen.append(y)
        return y

    def norm(self, layer: Layer, *args: Any, **kwargs: Any) -> Any:
        """Run a normalisation; BatchNorm takes the statistics of each time step by itself."""
        steps = self.run.fold
        if not layer.role.stepwise:
            return layer.plain(*args, **kwargs)
        neuron = self.run.pairs.get(layer.module)
        if neuron is not None and len(args) == 1 and (y := self.pair(layer, neuron, args[0])) is not None:
            self.run.paired = neuron, y
            return y
        if self.run.folds and in_backward():  # a checkpoint runs it again, and does not know of the fold
            raise ValueError(f"{type(layer.module).__name__} {TWICE}")
        if steps > 1:
            self.run.take_turn(layer, TWICE)
        if self.run.recompute and args:
            kernels.tag_sum(args[0], self.run.seen)
        if steps > 1:
            return kernels.stepwise_norm(layer.module, *args, **kwargs, steps=steps)
        is_known = layer.is_known and len(args) == 1
        return kernels.plain_norm(layer.module, *args) if is_known else layer.plain(*args, **kwargs)

    def pair(self, norm: Layer, neuron: Layer, x: Tensor) -> Tensor | None:
        """Run a BatchNorm and the neurons behind it in one pass; return None where each runs by itself."""
        own = type(self).norm is not Step.norm or type(self).neuron is not Step.neuron
        return None if own or not self.may_pair(norm, neuron) else self.run_pair(norm, neuron, x)

    def may_pair(self, norm: Layer, neuron: Layer) -> bool:
        """Return whether nothing of the user's is called between, before or behind the two."""
        known = norm.is_known and neuron.advance is not None
        # on a GPU, one step alone takes fewer launches apart
        wanted = known and (self.run.fast or (self.run.bits and self.run.fold > 1))
        if not wanted or has_own_operations() or runs_hooks(norm.module, neuron.module):
            return False
        return not kernels.others_save() and not in_backward()

    def run_pair(self, norm: Layer, neuron: Layer, x: Tensor, bias: Tensor | None = None) -> Tensor | None:
        """Run a pair by a kernel; return None without one. `bias` stands for the norm's, whose values it has."""
        run = self.run
        # of ours, or of another library
        advance = getattr(neuron.module, name := "advance_normalised", getattr(neuron.advance, name, None))
        if advance is None or (y := advance(norm.module, x, bias, run.fold, run.cut)) is None:
            return None
        if run.fold > 1:
            run.take_turn(norm, TWICE)
        run.take_turn(neuron, NEURON)
        if run.recompute:
            kernels.tag_sum(x, run.seen)
        return y

    def sequence(self, layer: Layer, *args: Any, **kwargs: Any) -> Any:
        """Run an `nn.Sequential`, whose pairs of a BatchNorm and neurons are known."""
        return run_layers(layer.module, *args) if len(args) == 1 and not kwargs else layer.plain(*args, **kwargs)

    def pool(self, layer: Layer, *args: Any, **kwargs: Any) -> Any:
        """Run a pooling."""
        if not args or has_own_operations():
            return layer.plain(*args, **kwargs)
        x, module = args[0], layer.module
        if isinstance(module, nn.MaxPool1d | nn.MaxPool2d):
            pooled = kernels.max_pool(module, x)
            return layer.plain(*args, **kwargs) if pooled is None else pooled
        y = layer.plain(*args, **kwargs)
        if torch.is_grad_enabled() and not kernels.others_save():
            spikes = kernels.look(x.detach())
            if spikes or kernels.tag_of(x):
                kernels.tag_made(y, x, partial(type(module).forward, module), spikes=spikes)
        return y
