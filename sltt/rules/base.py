"""What every rule shares: the contract, the checks of its arguments, the sequence of time steps.

Shapes: T time steps, B samples, C classes.
"""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sltt.hoisting import hoisting
from sltt.state import Fold, check_steps, folding, reset

Loss = Callable[[Tensor, Any], Tensor]
Backward = Callable[[Tensor], Any]


class Output(NamedTuple):
    """What a rule returns, without a graph: the loss of the sequence, a scalar, and the logits [T, B, C]."""

    loss: Tensor
    logits: Tensor


@dataclass(frozen=True)
class Sequence:
    """T time steps of input: x [T, B, ...], or the same image [B, ...] T times.

    Attributes:
        x: the input.
        steps: T.
        static: x is shown at every step.
        damaged: whether a value of x is NaN or infinite, not looked at yet since that waits for the device; None if it
            is finite.
    """

    x: Tensor
    steps: int
    static: bool
    damaged: Tensor | None = None

    def result(self, value: Tensor) -> Tensor:
        """What is computed from the input: NaN in place of `value` if the input is damaged."""
        return value if self.damaged is None else value.masked_fill(self.damaged, math.nan)

    def run(self, model: nn.Module, steps: range, cut: bool = False) -> Tensor:
        """Run time steps in one call of the model, folded into the batch: their logits [n, B, C].

        With `cut`, no gradient flows from one of them to the step before.
        """
        n = len(steps)
        if n == 1:
            x = self.x if self.static else self.x[steps.start]
            with folding(Fold(cut=cut)):  # also inside a call that is folded: a network in a network
                return checked_logits(model(x)).unsqueeze(0)
        x = (
            self.x.repeat(n, *[1] * (self.x.ndim - 1))
            if self.static
            else self.x[steps.start : steps.stop].flatten(0, 1)
        )
        with folding(Fold(n, cut)):
            logits = checked_logits(model(x))
        batch = self.x.shape[0 if self.static else 1]
        if logits.shape[:1] != (n * batch,):
            raise ValueError(
                f"expected logits of {batch} samples in each of {n} folded time steps, [{n * batch}, C], got "
                f"{list(logits.shape)}; a layer does not take the steps as samples: use fold=1"
            )
        return logits.unflatten(0, (n, batch))


class Rule(ABC):
    """Turns a batch into gradients: owns the time loop, cuts the graph, runs backward, and leaves the sum in `.grad`.

    Calling a rule resets the model, runs T steps and backpropagates L = 1/T Σ_t loss(model(x[t]), target). It adds to
    `.grad`, so call `optimizer.zero_grad()` before. The model is reset afterwards too, also after an exception: no
    state and no graph outlive the call.

    What a network marks by `sltt.once` is computed once a sequence, if it depends on weights alone.

    Attributes:
        hoist: compute once a sequence, too, what a network marks and depends on a static input.
        online: the rule updates the weights itself, at every time step.
    """

    hoist = False
    online = False

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        target: Any,
        loss: Loss,
        *,
        steps: int | None = None,
        backward: Backward | None = None,
        update: Callable[[], Any] | None = None,
    ) -> Output:
        """Run one batch.

        An input that is NaN or infinite raises on the CPU. On another device nothing is looked at, since that would
        wait for the device: the loss is NaN then.

        Args:
            model: maps the input of one time step [B, ...] to logits [B, C], and keeps its own state.
            x: a sequence, time first [T, B, ...]; or, with `steps`, a static input [B, ...] shown at every step.
            target: what `loss` compares the logits with, usually class indices [B].
            loss: `loss(logits [B, C], target) -> scalar`, of one time step.
            steps: T for a static input.
            backward: called instead of `Tensor.backward` with each scalar to backpropagate, e.g. `fabric.backward`.
            update: step and zero the optimizer; called by a rule that is `online`, after every time step.

        Raises:
            ValueError: no time step, too few dimensions, NaN or infinite input, a target of another batch size, a
                model that does not return logits, or a module that does not run step by step or whose state a rule
                cannot reach.
        """
        sequence = time_steps(x, steps, target)
        check_steps(model, x.shape[0 if sequence.static else 1])
        backward = backward or Tensor.backward
        reset(model)
        try:
            with hoisting(model, sequence.x if sequence.static and self.hoist else None, grad=True) as hoisted:
                extra = {"update": update} if self.online else {}
                out = self.run(model, sequence, target, loss, backward, **extra)
            hoisted.finish(backward)
            return Output(sequence.result(out.loss), out.logits)
        finally:
            reset(model)

    @abstractmethod
    def run(self, model: nn.Module, sequence: Sequence, target: Any, loss: Loss, backward: Backward) -> Output:
        """The time loop: forward, loss and backward over a checked sequence, on a model that was just reset."""

    def seed(self, seed: int) -> None:  # noqa: B027 most rules draw nothing
        """Fix what the rule draws in its next batch, whatever the global generators give.

        The processes of a data-parallel training give it the same seed, so that all train the same time steps.
        """

    def state_dict(self) -> dict[str, Any]:
        """What a rule carries from one batch to the next; nothing, for most."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave; raises ValueError if another rule gave it."""
        if state.keys() != self.state_dict().keys():
            raise ValueError(f"the state {sorted(state)} is not of the rule {self}")

    def __repr__(self) -> str:
        defaults = {k: p.default for k, p in inspect.signature(type(self).__init__).parameters.items()}
        settings = {k: v for k, v in vars(self).items() if k in defaults and v != defaults[k]}
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in settings.items())})"


@torch.no_grad()
def unroll(model: nn.Module, x: Tensor, *, steps: int | None = None) -> Tensor:
    """Run T time steps without a graph and return the logits [T, B, C]; the prediction is their mean over time.

    An input that is NaN or infinite raises ValueError on the CPU, and gives logits that are NaN on another device.

    Args:
        model: maps the input of one time step [B, ...] to logits [B, C]; its mode, training or not, stays as it is.
        x: a sequence, time first [T, B, ...]; or, with `steps`, a static input [B, ...] shown at every step.
        steps: T for a static input.
    """
    sequence = time_steps(x, steps)
    check_steps(model, x.shape[0 if sequence.static else 1])
    reset(model)
    try:
        with hoisting(model, sequence.x if sequence.static else None, grad=False):
            return sequence.result(torch.cat([sequence.run(model, range(t, t + 1)) for t in range(sequence.steps)]))
    finally:
        reset(model)


def time_steps(x: Tensor, steps: int | None, target: Any = None) -> Sequence:
    """Check an input, and its batch size against the target's; return it as a sequence of time steps."""
    static = steps is not None
    form = "[B, ...] with steps=T" if static else "[T, B, ...], time first"
    if x.ndim < 2:
        raise ValueError(f"expected input {form}, got shape {list(x.shape)}")
    length = steps if steps is not None else x.shape[0]
    if length < 1:
        where = f"steps={steps}" if static else f"an input of shape {list(x.shape)}"
        raise ValueError(f"expected at least one time step, got {where}")
    if isinstance(target, Tensor) and target.ndim and target.shape[0] != (batch := x.shape[0 if static else 1]):
        raise ValueError(
            f"expected a target for each of the {batch} samples of an input {form}, "
            f"got input {list(x.shape)} and target {list(target.shape)}"
        )
    damaged = None
    if x.device.type == "cpu":
        check_input(x)
    elif x.is_floating_point():
        damaged = ~x.isfinite().all()
    return Sequence(x, length, static, damaged)


def check_input(x: Tensor) -> None:
    """Raise ValueError for a value that is NaN or infinite; waits for the device of x.

    A neuron would swallow a NaN: it compares false with the threshold, so the neuron is silent and the loss finite.
    """
    if x.is_floating_point() and not x.isfinite().all():
        bad = x.numel() - int(x.isfinite().sum())
        raise ValueError(f"expected a finite input, got {bad} NaN or infinite of {x.numel()} values")


def checked_logits(logits: Any) -> Tensor:
    """What a model returned, if it is a tensor."""
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"expected the model to return the logits [B, C] of one time step, got {type(logits).__name__}; "
            "keep the state in the modules and return the output only"
        )
    return logits


def step_loss(loss: Loss, logits: Tensor, target: Any) -> Tensor:
    """The loss of one time step, checked to be a scalar."""
    value = loss(logits, target)
    if value.ndim:
        raise ValueError(f"expected a loss that returns a scalar, got shape {list(value.shape)}; use reduction='mean'")
    return value
