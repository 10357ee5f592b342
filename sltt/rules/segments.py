"""Exact BPTT in less memory: keep the states every n steps, and replay the steps between them for their backward.

The sequence is cut into segments of n steps. All but the last run without a graph first, and only what the model was
like at their start is kept. Then, from the last segment to the first: run it with a graph, backward, and hand the
gradient of the states at its start to the segment before. Memory is that of n steps and of T/n states; the price is one
more forward of all segments but the last (Chen et al. 2016, arXiv 1604.06174).
"""

import torch
from torch import Tensor

from sltt.rules.base import Batch, Output
from sltt.rules.folding import Fold
from sltt.sequence.once import hand_over
from sltt.sequence.run import Run
from sltt.sequence.state import map_tensors, state_names


def run_in_segments(batch: Batch, length: int, fold: Fold) -> Output:
    """Forward and backward of BPTT, `length` time steps at a time; both passes take as many in a call."""
    run = batch.network
    segments = split(range(batch.steps), length)
    starts: list[Snapshot] = []
    for segment in segments[:-1]:
        starts.append(Snapshot(run))
        for call in split(segment, fold.trained):
            batch.forward(call, graph=False)
    starts.append(Snapshot(run))
    end: Snapshot | None = None
    leaves: list[Tensor | None] = []
    same: dict[int, Tensor] = {}
    try:
        for i in reversed(range(len(segments))):
            gradients = [None if leaf is None else leaf.grad for leaf in leaves]
            leaves = starts[i].restore(leaves=i > 0)
            total = torch.zeros((), device=batch.sequence.x.device)
            for call in split(segments[i], fold.trained):
                before = [] if end is None else [(t, batch.logits(t).clone()) for t in call]
                total = total + batch.forward(call)
                same |= {t: torch.isclose(batch.logits(t), o, 1e-3, 1e-5, equal_nan=True).all() for t, o in before}
            if end is None:
                end = Snapshot(run)
            else:
                states = zip(run.layout.state_tensors(), gradients, strict=True)
                total = hand_over(total, [(s, g) for s, g in states if g is not None and s.requires_grad])
            batch.backward(total)
            starts.pop()
    finally:
        if end is not None:
            end.restore_surroundings()
    _check_same(same)
    return batch.output()


def split(steps: range, length: int) -> list[range]:
    """The time steps in runs of `length`; the last may be shorter."""
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


class Buffers:
    """The buffers that are no state, as they are now; some libraries keep states as buffers."""

    def __init__(self, run: Run):
        self._run = run
        self._before = {name: (buffer, buffer._version, buffer.clone()) for name, buffer in self._now().items()}

    def _now(self) -> dict[str, Tensor]:
        states = set(map(id, self._run.layout.state_tensors()))
        return {name: buffer for name, buffer in self._run.model.named_buffers() if id(buffer) not in states}

    def restore(self) -> None:
        """Set them back."""
        with torch.no_grad():
            for name, buffer in self._now().items():
                before, version, value = self._before.get(name, (None, 0, buffer))
                if value.shape != buffer.shape:  # of a module that remembers more and more
                    continue
                same = buffer is before and buffer._version == version
                # what is the same keeps its version: the graph of `sltt.once` may have saved it
                (buffer.data if same else buffer).copy_(value)


class Snapshot:
    """States, buffers and random generators, so that a segment's second run is its first: masks, statistics and all."""

    def __init__(self, run: Run):
        names = [(layer, name) for layer in run.layout.keepers for name in state_names(layer.module)]
        # in containers of their own: a module may change a list in place
        self.states = [(layer, name, map_tensors(lambda s: s, getattr(layer.module, name))) for layer, name in names]
        self.buffers = Buffers(run)
        self.generator = torch.get_rng_state()
        devices = {p.device for p in run.model.parameters() if p.device.type == "cuda"}
        self.cuda = {device: torch.cuda.get_rng_state(device) for device in devices}

    def restore(self, leaves: bool = True) -> list[Tensor | None]:
        """Set everything back; returns the states as leaves that collect their gradient, None for those without one.

        With leaves=False states are as they were, with the graph behind them, as a learnable first state has one.
        """
        collected: list[Tensor | None] = []

        def leaf(state: Tensor) -> Tensor:
            collected.append(state.detach().requires_grad_() if state.is_floating_point() else None)
            return state if collected[-1] is None else collected[-1]

        for layer, name, state in self.states:
            if not layer.differentiable:
                map_tensors(lambda _: collected.append(None), state)
            elif leaves:
                state = map_tensors(leaf, state)
            setattr(layer.module, name, state)
        self.restore_surroundings()
        return collected

    def restore_surroundings(self) -> None:
        """Set buffers and random generators back."""
        self.buffers.restore()
        torch.set_rng_state(self.generator)
        for device, state in self.cuda.items():
            torch.cuda.set_rng_state(state, device)
