"""A run: one batch on one network. It alone touches modules, and undoes all at its end.

Shapes: T time steps, B samples, C classes; a call of the network takes n time steps, folded into the batch dimension,
[n·B, ...], the first step first.

Layers that treat their samples alike take a fold as it is: convolutions, linear layers, pooling. What depends on the
time step takes the steps apart: neurons run their recurrence, BatchNorm takes the statistics of each step by itself,
and what keeps a state of its own takes the steps one after the other. So outputs and gradients are those of n calls.
"""

import math
import threading
from collections import deque
from contextlib import AbstractContextManager, ExitStack
from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor, nn

from sltt import kernels
from sltt._torch import uncached_weights
from sltt.sequence.biases import Biases
from sltt.sequence.claims import claim, release
from sltt.sequence.hooks import Handler, count_hooks, runs_hooks
from sltt.sequence.layout import Layer, Layout, layout_of
from sltt.sequence.leftovers import plain_tensors, warn_of_leftovers
from sltt.sequence.once import Results, is_sharded
from sltt.sequence.proof import find_modes
from sltt.sequence.state import detach_module, map_tensors, reset_module, state_names, state_tensors
from sltt.sequence.steps import Sequence


class Run:
    """The time steps of a sequence on a network, which is reset at the beginning and at the end.

    Args:
        model: maps the input of one time step [B, ...] to logits [B, C].
        sequence: the input.
        step: what layers do in a time step, a `Step`.
        hoist: `sltt.once` keeps what it computes from a static input.
        repeats: the first layers, of a static input, run in each time step; else once, see `count_repeats`.
        grad: a graph is built in some steps.
        keep: keep what is made of weights; not where these change between time steps.

    Raises ValueError when it begins, for a layer that does not run step by step, or whose state is in use.
    """

    def __init__(
        self,
        model: nn.Module,
        sequence: Sequence,
        step: Any,
        *,
        hoist: bool = False,
        repeats: bool = True,
        grad: bool = True,
        keep: bool = True,
    ):
        self.bits = kernels.current_options().bits and not kernels.others_save()  # spikes are saved so
        self.fast = self.bits and sequence.x.is_cpu  # layers run by kernels of ours
        self.recompute = False  # the outputs of weight layers are made again in the backward
        self.layout = layout_of(model)
        self.model, self.sequence, self.batch = model, sequence, sequence.batch
        if self.layout.unproved is None:
            self.take_channels_last()
        self.step = step
        self.step.run = self
        self.thread = threading.get_ident()
        repeats = repeats or self.layout.distributed or find_modes() is not None
        self._hoists, self._repeats, self._grad = hoist, repeats, grad
        self.keep, self.weights, self.biases = keep, kernels.WeightCache(), Biases(self)
        self.seen: deque[Tensor] = deque(maxlen=2)  # with `recompute`, outputs that a sum may have
        self.fold = 1  # n, the time steps in the call in progress; 1 within a layer that takes them one after the other
        self.steps = 1  # n, within such a layer too
        self.cut = False  # no gradient flows from one of these steps to the step before
        self.counts_spikes = True  # what neurons give are spikes, not rates
        self.call = self._calls = self._forwards = 0
        self.pairs: dict[nn.Module, Layer] = {}
        self.paired: tuple[Layer, Tensor] | None = None
        self._kept: set[Layer] = set()  # in the second call, the layers that have a state
        self._handled: list[Layer] = []
        self._exit_stack = ExitStack()
        self.folds = False  # a call has taken several time steps
        self._unknown: list[Any] | None = None  # in the first run, tensors that no rule knows of, from before
        self.goes_on = False  # somebody reads the states behind the last step

    def __enter__(self) -> Self:
        if self.layout.in_use:
            self.layout = Layout(self.model)
        self.layout.check(self.batch)
        self._before = claim(self, self.layout)
        self.layout.in_use = True
        x = self.sequence.x
        fixed = x if self.sequence.static and (self._hoists or not x.requires_grad) else None
        keep = self.keep and not is_sharded(self.model)
        self.results = Results(fixed, self._hoists, self._grad, keep)
        self.drops_biases = keep and not (self._repeats or x.is_cpu)  # in front of a BatchNorm
        try:
            self.reset()
            self.handle()
            self.enter(uncached_weights())
            self.counted = self._exit_stack.enter_context(kernels.counting_batches())
            self._exit_stack.callback(self.biases.finish)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        self._unknown = None if self.layout.ran else [*plain_tensors(self.model)]
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        with self._exit_stack:
            self._exit_stack.callback(release, self._before)
            self._exit_stack.callback(self.reset)
            for layer in reversed(self._handled):
                self.drop(layer)
                layer.plain, layer.last_call = None, 0
            self._handled.clear()
            self.layout.in_use = False
        if error is None and self._unknown is not None:
            self.layout.ran = True
            warn_of_leftovers(self.model, self._unknown, self.batch)

    def take_channels_last(self) -> None:
        """Give images with their channels last in memory, before the run: convolutions on spikes are faster then."""
        if self.sequence.x.is_cpu and self.sequence.x.dtype == torch.float32:
            self.sequence = self.sequence.with_channels_last(self.layout.pixels)

    def handle(self) -> None:
        """Install what the step does instead of the forwards of layers."""
        for layer in self.layout.layers.values():
            if layer.plain is not None:
                continue
            advance = None if layer.compiled else layer.role.advance
            layer.advance = advance and advance(layer.module)
            if (do := self.step.handler(layer, self.folds)) is None:
                continue
            values = vars(layer.module)
            layer.before, layer.plain = values.get("forward"), layer.module.forward
            self._handled.append(layer)
            values["forward"] = Handler(torch.compiler.disable(do) if layer.compiled else do, layer)

    def count_repeats(self, x: Tensor, modules: list[nn.Module]) -> int:
        """Count the first of some layers that give the same in every time step: plain ones, of a fixed input.

        The last of them is a pooling or a linear layer, which leaves less to keep than it reads. The layer behind it is
        one that changes nothing in place.
        """
        if self._repeats or kernels.others_save() or not self.results.is_fixed(x, marked=False):
            return 0
        count = 0
        for i, (module, behind) in enumerate(pairwise(modules), 1):
            layer, following = (self.layout.layers.get(m) for m in (module, behind))
            if layer is None or following is None or not (type(module) is nn.Flatten or _is_plain(layer)):
                break
            if module._forward_hooks or count_hooks(module) or runs_hooks(module, behind):
                break  # also those who take several steps in a call see each of them
            reads = _is_plain(following) or (following.spikes and following.advance is not None)
            count = i if reads and (layer.role.kind == "pool" or isinstance(module, nn.Linear)) else count
        return count

    def enter(self, context: AbstractContextManager[Any]) -> None:
        """Enter a context until the end of the run."""
        self._exit_stack.enter_context(context)

    def drop(self, layer: Layer) -> None:
        """Give a layer the forward back that it had before the run."""
        if layer.before is None:
            vars(layer.module).pop("forward", None)
        else:
            vars(layer.module)["forward"] = layer.before

    def reset(self) -> None:
        """Forget the sequence."""
        for layer in self.layout.keepers:
            reset_module(layer.module)

    def detach(self) -> None:
        """Cut the graph behind the states: v[t] becomes a constant of step t + 1."""
        for layer in self.layout.keepers:
            layer.detach()

    def states(self) -> dict[str, Any]:
        """Return the states, for a run that goes on with the sequence: by layer and attribute, without a graph."""
        keepers = [(layer.name, layer.module) for layer in self.layout.keepers]
        kept = {key: {name: getattr(module, name) for name in state_names(module)} for key, module in keepers}
        for states in kept.values():
            if isinstance(past := states.get("past"), tuple):  # of a delay, which keeps bits
                states["past"] = tuple(x.dense() if isinstance(x, kernels.Spikes) else x for x in past)
        return map_tensors(Tensor.detach, kept)

    def resume(self, states: dict[str, Any]) -> None:
        """Go on from the states of another run."""
        if states and states.keys() != {layer.name for layer in self.layout.keepers}:
            raise ValueError(f"expected the network of the stream, with states in {', '.join(states)}")
        for layer in self.layout.keepers if states else ():
            for name, state in states[layer.name].items():
                setattr(layer.module, name, state)

    def __call__(self, x: Tensor, steps: int = 1, cut: bool = False, recompute: bool = False) -> Tensor:
        """Run time steps in one call of the network: [n·B, ...] to logits [n, B, C].

        Raises ValueError for logits of another form, and for a layer that does not take several time steps in a call.
        """
        if steps > 1 and not self.folds:
            self.require_folds()
            self.folds = True
            self.handle()
        if recompute and not self.recompute:
            self.recompute = True
            self.handle()
        if not (self.keep and self.layout.steady):  # weights may have changed
            self.weights.forget()
        if not self.keep:
            torch.clear_autocast_cache()
        self._calls += 1
        second, self._forwards = self._forwards == 1, self._forwards + 1
        self._kept = {k for k in self.layout.keepers if state_tensors(k.module)} if second else set()
        self.call, self.fold, self.steps, self.cut = self._calls, steps, steps, cut
        try:
            logits = self.model(x)
            if self.paired is not None:
                self.take_paired()
        finally:
            self.fold = self.steps = 1
            self.paired = None
            self.seen.clear()
        if not isinstance(logits, Tensor):
            raise ValueError(
                f"expected the model to return the logits [B, C] of one time step, got {type(logits).__name__}; "
                "keep the state in the modules and return the output only, two heads as torch.cat((a, b), 1)"
            )
        if self.sequence.last and logits.ndim > 2:  # a loss may view it
            logits = logits.contiguous()
        if logits.shape[:1] == x.shape[:1]:
            return logits.unsqueeze(0) if steps == 1 else logits.unflatten(0, (steps, self.batch))
        if steps == 1:
            raise ValueError(
                f"expected logits [{len(x)}, C] of the {len(x)} samples in a time step, got {list(logits.shape)}: an "
                "input is [T, B, ...], time first; [B, ...] without time needs steps=T"
            )
        raise ValueError(
            f"expected logits of {self.batch} samples in each of {steps} folded time steps, [{len(x)}, C], got "
            f"{list(logits.shape)}; a layer does not take the steps as samples: use fold=1"
        )

    @property
    def follows(self) -> bool:
        """Return whether what runs now is of a training: in a graph, or in a step that the rule runs without one."""
        return torch.is_grad_enabled() or not self.results.in_graph

    def require_folds(self) -> None:
        """Raise ValueError that names what cannot take several time steps in a call."""
        if problem := self.layout.fold_problem:
            raise ValueError(problem)
        self.step.require_folds()

    def result(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Return what was computed from the sequence; NaN if the input or a weight is.

        A neuron would swallow a NaN: it compares false with the threshold, so the neuron is silent and a value finite.
        That of a weight stands in the membrane potentials of each sample, the first one too; but that of a layer that
        reads the weights of active inputs only. Raises ValueError where neurons ran that are no part of the network.
        """
        if problem := self.layout.find_unseen():
            raise ValueError(problem)
        states = [s for layer in self.layout.keepers if layer.spikes for s in state_tensors(layer.module)]
        first = [s[:1] if s.ndim else s for s in states if s.is_floating_point() and s.numel()]
        device, bounds = values[0].device, [bound for s in first for bound in s.detach().aminmax()]
        bounds += [*self.weights.sums, *self.biases.bounds(), *self.sequence.bounds]
        bounds = [bound.to(device) for bound in bounds]
        damaged = ~torch.stack(bounds).isfinite().all() if bounds else False  # together: each look is a few launches
        if damaged is False or (device.type == "cpu" and not damaged):
            return values
        return tuple(value.masked_fill(damaged, math.nan) for value in values)

    def take_turn(self, layer: Layer, problem: str) -> None:
        """Note that a layer runs; raise ValueError with `problem` if it has run in this call of the network."""
        if layer.last_call == self.call:
            raise ValueError(f"{layer} {problem}")
        if layer in self._kept and not state_tensors(layer.module):
            raise ValueError(f"{layer} was reset in the middle of a sequence: leave the reset out of forward")
        layer.last_call = self.call

    def take_paired(self, layer: Layer | None = None, *args: Any) -> Tensor:
        """Return the spikes of the neurons that a BatchNorm has run, to the layer that reads its output next."""
        assert self.paired is not None
        (neuron, y), self.paired = self.paired, None
        if layer is not neuron or len(args) != 1 or args[0] is not y:
            raise ValueError(f"{neuron} ran behind a BatchNorm before, and does not now: use fold=1")
        return y

    def one_by_one(self, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any], forward: Any = None) -> Any:
        """Run the time steps of the call one after the other within a layer; None is its own forward."""
        n, call, outputs = self.fold, self.call, []
        forward = forward or layer.plain
        if n == 1:
            return forward(*args, **kwargs)
        whole, k = (*args, *kwargs.values()), len(args)
        parts = [a.unflatten(0, (n, len(a) // n)).unbind() if isinstance(a, Tensor) else (a,) * n for a in whole]
        self.fold = 1
        try:
            for t in range(n):
                if self.cut and t:
                    for part in layer.parts:
                        detach_module(part)
                self._calls += 1
                self.call = self._calls
                now = [part[t] for part in parts]
                y = forward(*now[:k], **dict(zip(kwargs, now[k:], strict=True)))
                outputs.append(_copy_output(y, layer.parts))
        finally:
            self.fold, self.call = n, call
        return _join_outputs(outputs)


def _is_plain(layer: Layer) -> bool:
    """Return whether a layer is a linear layer, a convolution or a pooling as PyTorch has it."""
    is_known = layer.is_known and layer.role.kind in ("weight", "pool") and not layer.compiled
    return is_known and "parametrizations" not in layer.module._modules


def _copy_output(output: Any, parts: list[nn.Module]) -> Any:
    """Return a layer's output, copied where it is a state, which may change in place in the next time step."""
    if not isinstance(output, Tensor):
        return output
    memory = output.untyped_storage()._cdata
    states = (state for part in parts for state in state_tensors(part))
    return output.clone() if any(state.untyped_storage()._cdata == memory for state in states) else output


def _join_outputs(outputs: list[Any]) -> Any:
    """Join a layer's outputs of n time steps to [n·B, ...]; of a tuple, which ends in the state, each part."""
    if isinstance(outputs[0], tuple):
        return tuple(map(_join_outputs, map(list, zip(*outputs, strict=True))))
    return torch.cat(outputs) if isinstance(outputs[0], Tensor) else outputs[-1]
