"""Keep what a network is like at a time step, to run from there again."""

import torch
from torch import Tensor

from sltt._torch import get_generators, set_generators
from sltt.sequence.run import Run
from sltt.sequence.state import map_tensors, state_names


class Buffers:
    """The buffers that are no state, as they are now; some libraries keep states as buffers."""

    def __init__(self, run: Run):
        self._run = run
        self._counted = run.counted.copy()
        self._before = {name: (buffer, buffer._version, buffer.clone()) for name, buffer in self._buffers().items()}

    def _buffers(self) -> dict[str, Tensor]:
        states = set(map(id, self._run.layout.state_tensors()))
        return {name: buffer for name, buffer in self._run.model.named_buffers() if id(buffer) not in states}

    def restore(self) -> None:
        """Set them back."""
        self._run.counted.clear()
        self._run.counted.update(self._counted)
        with torch.no_grad():
            for name, buffer in self._buffers().items():
                before, version, value = self._before.get(name, (None, 0, buffer))
                if value.shape != buffer.shape:  # of a module that remembers more and more
                    continue
                same = buffer is before and buffer._version == version
                # what is the same keeps its version: the graph of `sltt.once` may have saved it
                (buffer.data if same else buffer).copy_(value)


class Surroundings:
    """Buffers and random generators, so that a segment's second run is its first: masks, statistics and all."""

    def __init__(self, run: Run):
        self.buffers = Buffers(run)
        self.generators = get_generators({p.device for p in run.model.parameters()})

    def restore(self) -> None:
        """Set them back."""
        self.buffers.restore()
        set_generators(self.generators)


class Snapshot:
    """States of a network at a time step, and its surroundings."""

    def __init__(self, run: Run):
        names = [(layer, name) for layer in run.layout.keepers for name in state_names(layer.module)]
        # in containers of their own: a module may change a list in place
        self.states = [(layer, name, map_tensors(lambda s: s, getattr(layer.module, name))) for layer, name in names]
        self.surroundings = Surroundings(run)

    def restore(self, leaves: bool = False) -> list[Tensor | None]:
        """Set everything back; returns the states as leaves that collect their gradient, None for those without one.

        Without `leaves` states are as they were, with the graph behind them, as a learnable first state has one.
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
        self.surroundings.restore()
        return collected
