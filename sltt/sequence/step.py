"""Forwards of layers in a time step: a rule overrides what it changes."""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sltt import kernels
from sltt._torch import _current_graph_task_id
from sltt.sequence.layout import Layer
from sltt.sequence.steps import in_backward

if TYPE_CHECKING:
    from sltt.sequence.run import Run

NEURON = (
    "runs twice in a time step, and has one membrane potential: use a neuron of its own for each place. A forward that "
    "loops over time: return the output of one time step, a rule calls it T times"
)
TWICE = "runs twice in a call of the network: use fold=1"


class Step:
    """Forwards of layers in a time step; this class runs them as they are.

    A rule overrides the methods of the roles that it changes. Each takes the layer and the arguments of its forward,
    and gives what the forward gives; `layer.plain` is that forward.

    Attributes:
        run: the batch that the step is in.
        eager: compiled code is not in force.
    """

    run: "Run"
    eager = False

    def handler(self, layer: Layer, folds: bool) -> Any:
        """Return the method that stands for a layer's forward, or None; `folds`: calls may take several time steps."""
        kind = "neuron" if layer.spikes else layer.role.kind
        if kind == "other":
            return None
        own = getattr(type(self), kind) is not getattr(Step, kind)
        if layer.compiled and not self.eager:  # compiled code stays as it is
            return getattr(self, kind) if own else None
        takes_part = {
            "neuron": True,
            "keeper": folds or layer.advance is not None,
            "norm": layer.role.stepwise and (folds or (layer.is_known and (self.run.fast or layer.module.training))),
            "weight": (self.run.fast or self.run.recompute) and layer.operation is not None,
            "pool": self.run.bits and layer.is_known,
        }
        return getattr(self, kind) if own or takes_part[kind] else None

    def require_folds(self) -> None:
        """Raise ValueError where several time steps cannot share a call; by default, they can."""

    def neuron(self, layer: Layer, *args: Any, **kwargs: Any) -> Any:
        """Run a layer of neurons."""
        if _current_graph_task_id() != -1:  # as `in_backward`
            return layer.plain(*args, **kwargs)  # which says what is wrong
        run = self.run
        run.take_turn(layer, NEURON)
        if run.seen and args and run.seen[-1] is args[0]:
            run.seen.pop()  # no term of a sum
        if layer.advance is None or len(args) != 1:
            return run.one_by_one(layer, args, kwargs)
        return layer.advance(args[0], run.fold, run.cut)

    def keeper(self, layer: Layer, *args: Any, **kwargs: Any) -> Any:
        """Another layer with a state."""
        if self.run.fold > 1 and layer.states and not in_backward():
            self.run.take_turn(layer, TWICE)
        if layer.advance is not None and len(args) == 1 and self._is_plain() and not in_backward():
            run = self.run
            if (y := layer.advance(kernels.materialise(args[0]), run.fold, run.cut, run.weights)) is not None:
                if run.fold == 1:
                    run.take_turn(layer, NEURON)
                return y
        return self.run.one_by_one(layer, args, kwargs)

    def _is_plain(self) -> bool:
        """Return whether neurons and weights run as they are."""
        return type(self).neuron is Step.neuron and type(self).weight is Step.weight and not self.run.recompute

    def weight(self, layer: Layer, *args: Any, **kwargs: Any) -> Any:
        """Run a linear layer or a convolution, on active inputs only where that is faster."""
        if layer.operation is None or len(args) != 1:
            return layer.plain(*args, **kwargs)
        module, run = layer.module, self.run
        x, weight = kernels.materialise(args[0]), layer.role.weight(module)
        if not run.recompute and kernels.is_small(layer.operation, x, weight):
            run.drop(layer)
            return layer.plain(x)
        same = run.fold > 1 and isinstance(module, nn.Linear) and run.sequence.same_at_each_step(x, run.fold)
        if same and not kernels.others_save():  # a checkpoint runs the layer again on all of x
            y = layer.plain(x[: run.batch])
            return y.repeat(run.fold, *[1] * (y.ndim - 1))
        y = kernels.run_layer(layer.operation, x, weight, module.bias, run.weights, run.recompute)
        if run.recompute and kernels.tag_of(y):
            run.seen.append(y)
        return y

    def norm(self, layer: Layer, *args: Any, **kwargs: Any) -> Any:
        """Run a normalisation; BatchNorm takes the statistics of each time step by itself."""
        steps = self.run.fold
        if not layer.role.stepwise:
            return layer.plain(*args, **kwargs)
        if self.run.folds and in_backward():  # a checkpoint runs it again, and does not know of the fold
            raise ValueError(f"{type(layer.module).__name__} {TWICE}")
        if steps > 1:
            self.run.take_turn(layer, TWICE)
        if self.run.recompute and args:
            kernels.tag_sum(kernels.materialise(args[0]), self.run.seen)
        wanted = self.run.fast or (self.run.bits and steps > 1)  # on a GPU, one step alone takes fewer launches apart
        may_wait = wanted and layer.is_known and len(args) == 1 and not kernels.others_save()
        waiting = kernels.deferred_norm(layer.module, *args, steps=steps) if may_wait else None
        if waiting is not None:
            return waiting
        if steps > 1:
            return kernels.stepwise_norm(layer.module, *args, **kwargs, steps=steps)
        known = layer.is_known and len(args) == 1
        return kernels.plain_norm(layer.module, *args) if known else layer.plain(*args, **kwargs)

    def pool(self, layer: Layer, *args: Any, **kwargs: Any) -> Any:
        """Run a pooling."""
        if not args:
            return layer.plain(**kwargs)
        x, module = args[0], layer.module
        if isinstance(module, nn.MaxPool2d):
            found = kernels.max_pool(module, x)
            return layer.plain(*args, **kwargs) if found is None else found
        y = layer.plain(*args, **kwargs)
        if torch.is_grad_enabled() and not kernels.others_save():
            spikes = kernels.look(x.detach())
            if spikes or kernels.tag_of(x):
                kernels.tag_made(y, x, partial(type(module).forward, module), spikes=spikes)
        return y
