"""Exact BPTT in less memory: keep the states of some time steps, and replay the steps between them for their backward.

The sequence is cut into segments of n steps. They run without a graph first, and what the model was like at the start
of some is kept. From the last segment to the first: run it with a graph, backward, and hand the gradient of the states
at its start to the segment before. Where that start was not kept, the steps run again from the nearest one that was.
Memory is that of n steps and of the kept states; the price is the forward that runs again: once where all T/n starts
are kept (Chen et al. 2016, arXiv 1604.06174), r times for c of them with C(c + r + 1, r) ≥ T/n, and no order runs fewer
(Griewank and Walther 2000, doi 10.1145/347837.347846).
"""

import itertools
import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sltt.losses import Watching
from sltt.rules.batch import Batch, Fold, Output
from sltt.sequence.once import add_gradients
from sltt.sequence.snapshot import Snapshot, Surroundings
from sltt.sequence.spikes import watches


def run_in_segments(batch: Batch, length: int, checkpoints: int | None, fold: Fold) -> Output:
    """Forward and backward of BPTT, `length` time steps at a time; both passes take as many in a call."""
    run = batch.network
    segments = split(range(batch.steps), length)
    weights = [] if run.layout.steady else [(name, p, p.detach().sum()) for name, p in batch.model.named_parameters()]
    of_logits: dict[int, list[Tensor | None] | None] = {}  # logits, since a loss is called once for each step
    same: dict[int, Tensor] = {}
    watching = [watch for layer in run.layout.neurons.values() for watch in watches(layer)]
    counters: list[Any] = [watch.see for watch in watching if watch.counts]

    def forward(call: range, graph: bool) -> Tensor:
        again = call.start in of_logits
        for counter in counters:
            counter.replays = again
        before = [(t, batch.logits(t).clone()) for t in call] if again else []
        first = not of_logits  # with a graph, to see whether the loss reads more of it than logits and states
        logits = batch.run(call, graph=graph or first)
        if first:
            run.detach()
        if not again:
            late = not first and of_logits[0] is None  # the loss is called as the step runs with a graph
            of_logits[call.start] = None if late else batch.backpropagate_logits(call, logits)
        if not graph and isinstance(batch.loss, Watching) and (again or of_logits[call.start] is None):
            batch.loss.rates.clear()  # spikes of a call that ran again count once
        for t, o in before:
            same[t] = torch.isclose(batch.logits(t), o, 1e-3, 1e-5, equal_nan=True).all() & same.get(t, True)
        return logits

    def differentiate(segment: range, leaves: list[Tensor | None], after: list[Tensor | None]) -> list[Tensor | None]:
        """Run steps with a graph, and backward; `after` are the leaves behind them, which know their gradient."""
        gradients = [None if leaf is None else leaf.grad for leaf in after]
        total = torch.zeros((), device=batch.sequence.x.device)
        for call in split(segment, fold.trained):
            if segment.stop == batch.steps:
                total = total + batch.forward(call)
            else:
                total = batch.add_gradients(total, call, forward(call, graph=True), of_logits.pop(call.start))
        if after:
            states = zip(run.layout.state_tensors(), gradients, strict=True)
            total = add_gradients(total, [(s, g) for s, g in states if g is not None and s.requires_grad])
        batch.backward(total)
        return leaves

    kept = [(0, Snapshot(run))]
    end: Any = None
    leaves: list[Tensor | None] = []
    try:
        for last in reversed(range(len(segments))):
            at, start = kept[-1]
            if end is not None and at < last:
                start.restore()
            while at < last:
                free = len(segments) if checkpoints is None else checkpoints + 1 - len(kept)
                ahead = steps_ahead(last + 1 - at, free)
                for segment in segments[at : at + ahead]:
                    for call in split(segment, fold.trained):
                        forward(call, graph=False)
                at += ahead
                kept.append((at, Snapshot(run)))
            if end is None:
                _check_unchanged(batch, weights)
            leaves = differentiate(segments[last], kept.pop()[1].restore(leaves=last > 0), leaves)
            if end is None:
                run.detach()
                end = Snapshot(run) if run.goes_on else Surroundings(run)
    finally:
        for counter in counters:
            counter.replays = False
        if end is not None:
            end.restore()
    _check_same(same)
    return batch.output()


def steps_ahead(segments: int, checkpoints: int) -> int:
    """Return after how many of the segments the next state is kept, so that the fewest run again for a backward."""
    if not checkpoints:
        return segments - 1
    c, r = checkpoints, _repeats(segments, checkpoints)
    return min(math.comb(c + r, c + 1), segments - math.comb(c + r - 1, c))


def repeated_segments(segments: int, checkpoints: int) -> int:
    """Return how many times a segment runs again without a graph, all of them together."""
    repeats = _repeats(segments, checkpoints)
    return repeats * segments - math.comb(checkpoints + 1 + repeats, repeats - 1)


def _repeats(segments: int, checkpoints: int) -> int:
    return next(r for r in itertools.count(1) if math.comb(checkpoints + 1 + r, r) >= segments)


def choose_segments(steps: int, least: int) -> tuple[int, int]:
    """Return the steps of a segment, and how many states are kept, for little memory in up to two more forwards.

    With the graph of a step as large as three states, the memory 3 n + √(2 T/n) is least at n = (√(2 T) / 6)^⅔.
    """
    length = max(least, round((math.sqrt(2 * steps) / 6) ** (2 / 3)), 1)
    return length, next(c for c in itertools.count(1) if _repeats(math.ceil(steps / length), c) <= 2)


def split(steps: range, length: int) -> list[range]:
    """Return the time steps in runs of `length`; the last may be shorter."""
    return [steps[i : i + length] for i in range(0, len(steps), length)]


def _check_unchanged(batch: Batch, weights: Sequence[tuple[str, Tensor, Tensor]]) -> None:
    """Raise RuntimeError where the forward changed a weight, or what a module keeps beside its states."""
    changes = [name for name, p, total in weights if not torch.equal(p.detach().sum(), total)]
    changed = batch.network.layout.changes() if weights else {}
    changes += [name for name, value in changed.items() if not _has_tensors(value)]  # of which the logits tell
    if changes:
        raise RuntimeError(f"segment runs time steps again, and each changes {changes[0]}: use BPTT without segment")


def _has_tensors(value: Any) -> bool:
    """Return whether what a module keeps, as fingerprints have it, is a tensor or a list of such."""
    if not isinstance(value, tuple) or value[0] in (list, tuple, deque):
        return isinstance(value, tuple) and any(isinstance(part, tuple) for part in value)
    return len(value) == 2 and value[0] is not dict


def _check_same(same: dict[int, Tensor]) -> None:
    """Raise RuntimeError unless every replayed step gave the same; once a sequence, since it waits for the device."""
    if same and not torch.stack(list(same.values())).all():
        step = next(t for t in sorted(same) if not same[t])
        raise RuntimeError(f"time step {step} gave other logits when it was run again: use BPTT without segment")
