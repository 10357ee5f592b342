"""Exact BPTT in less memory: keep the states every n steps, and replay the steps between them for their backward.

The sequence is cut into segments of n steps. All but the last run without a graph first, and only what the model was
like at their start is kept. Then, from the last segment to the first: run it with a graph, backward, and hand the
gradient of the states at its start to the segment before. Memory is that of n steps and of T/n states; the price is one
more forward of all segments but the last (Chen et al. 2016, arXiv 1604.06174).
"""

import torch
from torch import Tensor

from sltt.rules.batch import Batch, Fold, Output
from sltt.sequence.once import add_gradients
from sltt.sequence.snapshot import Snapshot


def run_in_segments(batch: Batch, length: int, fold: Fold) -> Output:
    """Forward and backward of BPTT, `length` time steps at a time; both passes take as many in a call."""
    run = batch.network
    segments = split(range(batch.steps), length)
    starts: list[Snapshot] = []
    weights = [] if run.layout.steady else [(name, p, p.detach().sum()) for name, p in batch.model.named_parameters()]
    of_logits: dict[int, list[Tensor | None]] = {}  # gradients, since a loss is called once for each step
    for segment in segments[:-1]:
        starts.append(Snapshot(run))
        for call in split(segment, fold.trained):
            of_logits[call.start] = batch.backpropagate_logits(call, batch.run(call, graph=False))
    starts.append(Snapshot(run))
    changes = [name for name, p, total in weights if not torch.equal(p.detach().sum(), total)]
    changed = run.layout.changes() if weights else {}  # of lists and tensors that it keeps, the logits tell
    changes += [name for name, value in changed.items() if not isinstance(value, tuple) or value[0] is dict]
    if changes:
        raise RuntimeError(
            f"segment runs time steps again for their backward, and the forward changes {changes[0]} in each: use BPTT "
            "without segment"
        )
    end: Snapshot | None = None
    leaves: list[Tensor | None] = []
    same: dict[int, Tensor] = {}
    try:
        for i in reversed(range(len(segments))):
            gradients = [None if leaf is None else leaf.grad for leaf in leaves]
            leaves = starts[i].restore(leaves=i > 0)
            total = torch.zeros((), device=batch.sequence.x.device)
            for call in split(segments[i], fold.trained):
                if end is None:
                    total = total + batch.forward(call)
                    continue
                before = [(t, batch.logits(t).clone()) for t in call]
                total = batch.add_gradients(total, batch.run(call), of_logits.pop(call.start))
                same |= {t: torch.isclose(batch.logits(t), o, 1e-3, 1e-5, equal_nan=True).all() for t, o in before}
            if end is None:
                end = Snapshot(run)
            else:
                states = zip(run.layout.state_tensors(), gradients, strict=True)
                total = add_gradients(total, [(s, g) for s, g in states if g is not None and s.requires_grad])
            batch.backward(total)
            starts.pop()
    finally:
        if end is not None:
            end.restore_surroundings()
    _check_same(same)
    return batch.output()


def split(steps: range, length: int) -> list[range]:
    """Return the time steps in runs of `length`; the last may be shorter."""
    return [steps[i : i + length] for i in range(0, len(steps), length)]


def _check_same(same: dict[int, Tensor]) -> None:
    """Raise RuntimeError unless every replayed step gave the same; once a sequence, since it waits for the device."""
    if same and not torch.stack(list(same.values())).all():
        step = next(t for t in sorted(same) if not same[t])
        raise RuntimeError(
            f"time step {step} gave other logits when it was run again for its backward: the model draws random "
            "numbers from a generator of its own, keeps a state outside sltt.Stateful, or has a checkpoint within. "
            "Use BPTT without segment."
        )
