"""Measure one training iteration: its memory by parts, and its seconds by parts."""

import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sltt.checks import instance, whole_number
from sltt.losses import keeps_mean
from sltt.memory import trace_memory
from sltt.rules import SLTT, Rule
from sltt.rules.batch import StepLoss
from sltt.sequence.state import state_tensors

DRAWS = 4  # of the steps that SLTT-K trains: the first step, which has no state behind it, takes less than the others


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a training iteration, which begins without gradients, as after `zero_grad()`.

    `gradients`, `states` and `saved` are those when a backward begins, at the backward with most before it.

    Attributes:
        parameters: and buffers.
        optimizer: its state, such as momentum.
        input: of a batch.
        gradients: of the parameters; SLTT has them from its second call of the network on, BPTT has none at first.
        states: of the neurons between two time steps.
        saved: activations kept for a backward, with what is kept of the logits.
        rest: what is alive besides at the peak: mostly temporaries of the backward.
    """

    parameters: int
    optimizer: int
    input: int
    gradients: int
    states: int
    saved: int
    rest: int

    @property
    def total(self) -> int:
        """Return the sum of the parts: the peak of the iteration."""
        return sum(vars(self).values())

    @property
    def batch(self) -> int:
        """Return the memory of a batch above that in use before it: what tables call memory."""
        return self.gradients + self.states + self.saved + self.rest


@dataclass(frozen=True)
class Seconds:
    """Wall-clock seconds of a training iteration, medians.

    Attributes:
        data: loading a batch.
        forward: everything in the rule that is not backward; also what `BPTT(segment=n)` repeats.
        backward: with what `recompute=True` repeats.
        step: of the optimizer.
        least, most: seconds of the shortest and of the longest iteration.
    """

    data: float
    forward: float
    backward: float
    step: float
    least: float
    most: float

    @property
    def total(self) -> float:
        """Return the sum of the parts."""
        return self.data + self.forward + self.backward + self.step


def memory_parts(
    model: nn.Module,
    x: Tensor,
    target: Any,
    loss: StepLoss,
    rule: Rule,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    steps: int | None = None,
) -> Memory:
    """Measure the memory of one training iteration; as exact as `peak_memory`.

        memory_parts(model, x, y, loss, SLTT()).total

    It runs the rule twice, since the first batch also tries what is faster, and SLTT-K five times: it returns
    the largest of four draws, always the same. It changes gradients and the statistics of BatchNorm, but no weight.
    Without a step of the optimizer before, the optimizer's state counts as 0. As in a training, the logits of all steps
    are kept only if the loss or the prediction takes them.

    See `agreement` for the other arguments.

    Args:
        rule: whose iteration is measured.
        optimizer: whose state is counted.
    """
    instance("rule", rule, Rule)
    if optimizer is not None:
        instance("optimizer", optimizer, torch.optim.Optimizer)
    at_marks: list[tuple[int, int]] = []  # gradients and states at each mark

    def run(mark: Any, seed: int) -> None:
        def backward(total: Tensor) -> None:
            mark()
            states = _nbytes(state for module in model.modules() for state in state_tensors(module))
            at_marks.append((_nbytes(p.grad for p in model.parameters() if p.grad is not None), states))
            total.backward()

        how: Any = {"backward": backward, "update": lambda: None, "mean_logits": keeps_mean(loss, target)}
        rule(model, x, target, loss, steps=steps, seed=seed, **how)

    def measure(seed: int) -> tuple[int, int, int, int]:
        at_marks.clear()
        for p in model.parameters():
            p.grad = None
        peak, levels = trace_memory(lambda mark: run(mark, seed), x.device)
        begin, (gradients, states) = max(zip(levels, at_marks, strict=True), default=(0, (0, 0)))
        states = min(states, begin - gradients)  # a state may be the input itself, which is alive before
        return peak, gradients, states, begin - gradients - states

    run(lambda: None, 0)
    draws = range(DRAWS if isinstance(rule, SLTT) and rule.k is not None else 1)
    peak, gradients, states, saved = max(map(measure, draws))
    of_optimizer = [] if optimizer is None else optimizer.state.values()
    return Memory(
        parameters=_nbytes([*model.parameters(), *model.buffers()]),
        optimizer=_nbytes(value for state in of_optimizer for value in state.values() if isinstance(value, Tensor)),
        input=min(x.untyped_storage().nbytes(), x.numel() * x.element_size()),  # a view counts for itself
        gradients=gradients,
        states=states,
        saved=saved,
        rest=peak - gradients - states - saved,
    )


def iteration_seconds(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Any]],
    loss: StepLoss,
    rule: Rule,
    optimizer: torch.optim.Optimizer,
    *,
    steps: int | None = None,
    warmup: int = 2,
) -> Seconds:
    """Train on `batches`, and return the medians of the seconds of each part; the weights change.

        iteration_seconds(model, batches, loss, SLTT(), optimizer).backward

    See `agreement` for the other arguments.

    Args:
        batches: (x, target) of each iteration, at least one more than `warmup`; loading them is timed too.
        rule: whose iterations are timed.
        optimizer: steps after each.
        warmup: iterations at the beginning that do not count, in which kernels are compiled.

    Raises ValueError if there are not more batches than `warmup`.
    """
    instance("rule", rule, Rule)
    instance("optimizer", optimizer, torch.optim.Optimizer)
    warmup = whole_number("warmup", warmup, least=0)
    rows: list[tuple[float, ...]] = []
    spent = stepped = 0.0

    def backward(total: Tensor) -> None:
        nonlocal spent
        before = _device_time(total.device)
        total.backward()
        spent += _device_time(total.device) - before

    def update() -> None:
        nonlocal stepped
        before = _device_time(x.device)
        optimizer.step()
        optimizer.zero_grad()
        stepped += _device_time(x.device) - before

    optimizer.zero_grad()
    began = time.perf_counter()
    for x, target in batches:
        loaded = _device_time(x.device)
        spent = stepped = 0.0
        rule(model, x, target, loss, steps=steps, backward=backward, update=update)
        if not rule.online:
            update()
        ended = _device_time(x.device)
        rows.append((loaded - began, ended - loaded - spent - stepped, spent, stepped))
        began = ended
    if len(rows) <= warmup:
        raise ValueError(f"expected more than {warmup} batches, of which {warmup} do not count, got {len(rows)}")
    totals = [sum(row) for row in rows[warmup:]]
    medians = (statistics.median(part) for part in zip(*rows[warmup:], strict=True))
    return Seconds(*medians, least=min(totals), most=max(totals))


def _device_time(device: torch.device) -> float:
    """Return the time when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _nbytes(tensors: Iterable[Tensor]) -> int:
    """Return bytes of the memory behind tensors; what several share counts once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
