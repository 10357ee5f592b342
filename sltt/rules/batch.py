"""A batch in the hands of a rule: its time steps, its loss, and what the rule gives back.

Shapes: T time steps, B samples, C classes; a call of the network takes n time steps.
"""

from collections.abc import Callable, Container
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sltt import kernels
from sltt.losses import SequenceLoss, Watching, is_mean, is_per_step
from sltt.sequence.once import add_gradients
from sltt.sequence.padding import Padded, Real
from sltt.sequence.reach import graph_nodes, operations, refers_to
from sltt.sequence.run import Run
from sltt.sequence.steps import Sequence

StepLoss = Callable[[Tensor, Any], Tensor]
Backward = Callable[[Tensor], Any]


class Output(NamedTuple):
    """Result of a rule, without a graph: the loss of the sequence, a scalar, and the logits [T, B, C] or their mean."""

    loss: Tensor
    logits: Tensor


class Fold(NamedTuple):
    """Time steps in a call of the network."""

    trained: int = 1  # with a graph
    forward: int = 1  # without one
    why: str | None = None  # why it is one, where that is not by size, option or rule


@dataclass
class Batch:
    """A batch in the hands of a rule, on a model that was just reset.

    Attributes:
        network: the run, which calls the model.
        target: what `loss` compares with.
        loss: of one time step; of the whole sequence, if it is `whole`.
        backward: of a scalar; call it in place of `Tensor.backward`.
        update: steps and zeroes the optimizer, for a rule that is `online`.
        seed: of what the rule draws in this batch; None draws from the global generator.
        fold: time steps that share a call of the network.
        mean: only the mean of the logits over time is kept.
        sequence: the input.
        steps: T.
        whole: the loss is one of the whole sequence.
    """

    network: Run
    target: Any
    loss: StepLoss
    backward: Backward = Tensor.backward
    update: Callable[[], Any] | None = None
    seed: int | None = None
    fold: Fold = field(default_factory=Fold)
    mean: bool = False
    _logits: Tensor | None = None  # [T, B, C], of the steps that ran; or the sum of these over T, [1, B, C]
    _ran: set[int] = field(default_factory=set)
    _total: Tensor | float = 0.0
    _largest: int = 0  # elements of the largest state; 0 before the first time step

    def __post_init__(self) -> None:
        self.sequence: Sequence = self.network.sequence
        self.steps: int = self.sequence.steps
        self._per_step = is_per_step(self.loss)
        self.whole = isinstance(self.loss, SequenceLoss)

    @property
    def model(self) -> nn.Module:
        return self.network.model

    def run(self, steps: range, *, graph: bool = True, cut: bool = False, recompute: bool = False) -> Tensor:
        """Run time steps in one call of the model: their logits [n, B, C].

        Args:
            steps: one or several time steps in a row; several are folded into the batch dimension.
            graph: build a graph for a backward.
            cut: no gradient flows from one of the steps to the step before.
            recompute: convolutions and linear layers run again in the backward, instead of keeping their outputs.
        """
        if cut and self._ran:  # the states before the first step may be learned
            self.network.detach()
        self.network.results.in_graph = graph
        with torch.set_grad_enabled(graph), self._saving_context(len(steps), graph, cut, recompute):
            logits = self.network(self.sequence.input(steps), len(steps), cut, recompute)
        self.network.results.in_graph = True
        self._largest = self._largest or max(map(Tensor.numel, self.network.layout.state_tensors()), default=0)
        detached = logits.detach()
        if self.mean:
            part = detached.sum(0, keepdim=True, dtype=torch.promote_types(detached.dtype, torch.float32)) / self.steps
            self._logits = part if self._logits is None else self._logits + part
        else:
            if self._logits is None:
                self._logits = detached.new_empty(self.steps, *detached.shape[1:])
            # a copy, since a model may go on to change what it gave, such as a sum over time
            self._logits[steps.start : steps.stop] = detached
        self._ran.update(steps)
        if not graph:
            # Casts of weights that autocast caches without a graph would cut the weights off in later steps.
            torch.clear_autocast_cache()
        return logits

    def backpropagate(self, value: Tensor | None, ran: int) -> None:
        """Run the backward of a call, after which so many time steps ran, and of earlier ones that waited for it."""
        self.network.step.backward(value, self.backward, ran, self.steps)

    def rates(self) -> Tensor:
        """Run the network once on the mean input, with a graph: its logits [B, C]."""
        with kernels.save_as_bits():
            return self.network(self.sequence.mean())[0]

    def _saving_context(self, steps: int, graph: bool, cut: bool, recompute: bool) -> AbstractContextManager[None]:
        """Return the context that saves spikes; small ones of a brief graph stay, and where packing is a pass."""
        if recompute and not self.network.bits:
            raise ValueError("recompute needs spikes as bits: leave out using(bits=False) and saved-tensor hooks")
        if not (graph and self.network.bits):
            return nullcontext()
        brief = cut and not recompute and (self.network.fast or not self.network.step.waits) and self._largest
        pays = not brief or (self.network.fast and kernels.bits_pay(self._largest * steps))
        return kernels.save_as_bits() if pays else nullcontext()

    def forward(
        self,
        steps: range,
        *,
        graph: bool = True,
        cut: bool = False,
        recompute: bool = False,
        trained: Container[int] | None = None,
    ) -> Tensor:
        """Run time steps as `run`, and return the sum of their losses over T, to backpropagate.

        With `trained`, it is the sum of the losses of these steps; the others count in the batch's loss only.
        """
        again = steps.start in self._ran
        logits, others = self.run(steps, graph=graph, cut=cut, recompute=recompute), 0.0
        with torch.set_grad_enabled(graph):
            if trained is None:
                total = self._sum_losses(steps, logits)
            else:
                of, rest = ([t for t in steps if (t in trained) is wanted] for wanted in (True, False))
                total = self._sum_losses(of, torch.stack([logits[t - steps.start] for t in of]))
                others = self._sum_losses(rest, torch.stack([logits[t - steps.start] for t in rest]).detach())
        if not again:
            self._total = self._total + total.detach() + others
        return total

    def backpropagate_logits(self, steps: range, logits: Tensor) -> list[Tensor | None] | None:
        """Call the loss of time steps that run again, once for each; return the gradients that it gives.

        These are of the logits [n, B, C], and of the states behind the last step if the loss may read them. It is None
        where logits have a graph, and the loss reads more of it.
        """
        leaf, watching = logits.detach().requires_grad_(), self.loss if isinstance(self.loss, Watching) else None
        reads = watching is None and refers_to(self.loss, self.network.layout.layers)
        states = [s for s in self.network.layout.state_tensors() if s.is_floating_point()] if reads else []
        for state in states:
            state.requires_grad_()
        with torch.enable_grad():
            value = self._sum_losses(steps, leaf, watching and watching.loss)
            late = operations(graph_nodes([logits.grad_fn])) & graph_nodes([value.grad_fn])
            if value.requires_grad and not late:
                self.backward(value)
        if late:
            return None
        with torch.no_grad():
            self._total = self._total + value.detach() + (watching.penalty() / self.steps if watching else 0.0)
        gradients = [leaf.grad, *(state.grad for state in states)]
        for state in states:
            state.grad = None
            state.requires_grad_(False)
        return gradients

    def add_gradients(self, total: Tensor, steps: range, logits: Tensor, gradients: Any) -> Tensor:
        """Return `total`, whose backward gives time steps that ran again what `backpropagate_logits` found."""
        if gradients is None:
            value = self._sum_losses(steps, logits)
            self._total = self._total + value.detach()
            return total + value
        if isinstance(self.loss, Watching):
            total = total + self.loss.penalty() / self.steps
        states = [s for s in self.network.layout.state_tensors() if s.is_floating_point()]
        pairs = zip([logits.clone(), *states], gradients, strict=False)
        return add_gradients(total, [(x, g) for x, g in pairs if g is not None and x.requires_grad])

    def _sum_losses(self, steps: range | list[int], logits: Tensor, loss: Any = None) -> Tensor:
        """Return the sum of the losses of logits [n, B, C] of time steps, over T."""
        loss = loss or self.loss
        shapes, target = (logits.shape[1:2] + logits.shape[3:], logits.shape[1:]), self.target
        whole = isinstance(target, Tensor) and target.shape in shapes[target.is_floating_point() :]  # no broadcast
        if len(steps) > 1 and is_mean(loss) and whole:
            target = target.repeat(len(steps), *[1] * (target.ndim - 1))
            return step_loss(loss, logits.flatten(0, 1), target) * (len(steps) / self.steps)
        values, changes = [], self._per_step or isinstance(self.target, Padded)
        for t, o in zip(steps, logits, strict=True):
            values.append(step_loss(loss, o, self.targets(t) if changes else self.target))
        return (values[0] if len(values) == 1 else torch.stack(values).sum()) / self.steps

    def window_loss(self, steps: range, logits: Tensor) -> Tensor:
        """Return the loss of the logits [n, B, C] of a window, for a loss of a whole sequence; it counts n/T."""
        value = step_loss(self.loss, logits, self.targets(slice(steps.start, steps.stop))) * len(steps) / self.steps
        self._total = self._total + value.detach()
        return value

    def targets(self, steps: int | slice) -> Any:
        """Return the target of time steps; the same for all of them, unless the loss takes one for each."""
        if isinstance(self.target, Padded) and isinstance(steps, int):
            return self.target.at(steps, self._real_rows, self._per_step)
        return self.target[steps] if self._per_step else self.target

    @cached_property
    def _real_rows(self) -> tuple[Tensor, ...]:
        return self.target.real_rows(self.steps)

    def detach(self) -> None:
        """Make the states constants of the steps to come."""
        self.network.detach()

    def logits(self, step: int) -> Tensor:
        """Return the logits [B, C] of a time step that has run, without a graph."""
        assert not self.mean, "the mean alone was kept"
        assert self._logits is not None, "no step has run"
        return self._logits[step]

    def output(self) -> Output:
        """Return the loss and the logits of all time steps; raise ValueError where the rule left one out."""
        if self._logits is None or len(self._ran) < self.steps:
            ran = ", ".join(map(str, sorted(self._ran)))
            raise ValueError(
                f"a rule runs all T = {self.steps} time steps, and this one ran {ran or 'none'}: call batch.run or "
                "batch.forward for each, with graph=False for one without a gradient"
            )
        return Output(torch.as_tensor(self._total), self._logits)


def sequence_loss(loss: StepLoss, logits: Tensor, target: Any) -> Tensor:
    """Return the loss of a sequence of logits [T, B, C], as the rules take it."""
    if isinstance(loss, SequenceLoss):
        return step_loss(loss, logits, target)
    if isinstance(target, Padded):
        rows = target.real_rows(len(logits))
        targets: Any = [target.at(t, rows, is_per_step(loss)) for t in range(len(logits))]
    else:
        targets = target if is_per_step(loss) else [target] * len(logits)
    return torch.stack([step_loss(loss, o, y) for o, y in zip(logits, targets, strict=True)]).mean()


def step_loss(loss: StepLoss, logits: Tensor, target: Any) -> Tensor:
    """Return the loss of one time step, checked to be a scalar; 0 where no sample is real any more."""
    if isinstance(target, Real):
        if not len(target.target):
            return logits.sum() * 0
        return step_loss(loss, logits if target.rows is None else logits[target.rows], target.target) * target.weight
    try:
        value = loss(logits, target)
    except Exception as error:
        kind = f"{list(target.shape)} ({target.dtype})" if isinstance(target, Tensor) else f"{target!r:.80}"
        error.add_note(
            f"in the loss of one time step, of outputs {list(logits.shape)} ({logits.dtype}) and targets {kind}; for a "
            "target at each time step: sltt.losses.PerStep(loss), and from_datasets(…, per_step=True)"
        )
        raise
    if not isinstance(value, Tensor):
        raise ValueError(f"expected a loss that returns a scalar tensor, got {value!r}")
    if value.ndim:
        raise ValueError(f"expected a loss that returns a scalar, got shape {list(value.shape)}; use reduction='mean'")
    return value
