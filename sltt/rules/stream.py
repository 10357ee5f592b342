"""Sequences in chunks [n, B, ...] of n time steps and B samples: the network keeps its state from one to the next."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sltt.checks import instance
from sltt.rules.folding import fold_of
from sltt.rules.unrolling import run_steps
from sltt.sequence.layout import Layout
from sltt.sequence.modes import evaluation_mode
from sltt.sequence.run import Run
from sltt.sequence.state import map_tensors, reset
from sltt.sequence.steps import Sequence, time_steps


class Stream:
    """A sequence that comes in chunks: each call goes on from the state that the one before left.

        stream = sltt.Stream(model)
        for chunk in microphone:        # [n, B, ...], n time steps, 1 or more
            logits = stream(chunk)      # [n, B, C]

    A call runs in evaluation mode and without a graph. The chunks may be of any lengths: their logits are those of
    `sltt.unroll` on the whole; with fold=1 to the bit, as long as no layer runs sparse. Between calls, the network may
    run other streams and batches. Rules train in chunks by `rule(model, chunk, target, loss, stream=stream)`.

    Args:
        model: maps the input of one time step [B, ...] to logits [B, C].
        fold: time steps in one call of the network, as of the rules. Matrix products of several steps round otherwise.
    """

    def __init__(self, model: nn.Module, *, fold: int | Literal["auto"] = "auto"):
        self.model = instance("model", model, nn.Module)
        self.fold: int | Literal["auto"] = fold_of(fold)
        self.reset()

    def __call__(self, x: Tensor) -> Tensor:
        """Run the time steps of a chunk x [n, B, ...]; return their logits [n, B, C]."""
        sequence = time_steps(x, None)
        self._check(sequence)
        with evaluation_mode(self.model):
            logits, self.states = run_steps(self.model, sequence, self.fold, self.states)
        return logits

    @contextmanager
    def carry(self, run: Run, rule: Any) -> Iterator[None]:
        """Go on in a run of a rule, with the traces that the same rule left."""
        self._check(run.sequence)
        if not rule.pads:
            raise ValueError(f"{rule} has mean rates of whole sequences, and a stream has no end: use SLTT or OTTT")
        run.resume(self.states)
        run.goes_on = True
        kept = vars(run.step)
        if self._traces and self._traces[0] == rule:
            kept["traces"] = self._traces[1]
        yield
        self.states, self._traces = run.states(), (rule, kept["traces"]) if "traces" in kept else None

    def _check(self, sequence: Sequence) -> None:
        form = [*sequence.input(range(1)).shape]
        if self.states and form != self.form:
            raise ValueError(f"expected time steps of shape {self.form} as before, got {form}: call reset() first")
        self.form = form

    def reset(self, samples: list[int] | Tensor | None = None) -> None:
        """Begin anew; or begin some samples of the batch anew, by their indices or a mask [B].

        Raises ValueError for these where OTTT left traces, or a layer does not say what its state is at the start.
        """
        if samples is None:
            self.states: dict[str, Any] = {}
            self.form: list[int] | None = None  # of the input of a time step
            self._traces: tuple[Any, Any] | None = None  # of OTTT
            return
        if self._traces is not None:
            raise ValueError("traces of OTTT are those of all samples: call stream.reset() without samples")
        reset(self.model)
        states = copy.deepcopy(self.states)
        for layer in Layout(self.model).keepers if states else ():
            start = getattr(layer.module, "first_states", dict)()
            for name, state in states[layer.name].items():
                # after a reset: a number; a tensor of no size, for zeros; or None, in place of what the layer says
                first = start[name] if name in start else getattr(layer.module, name)
                first = 0.0 if isinstance(first, Tensor) and not first.numel() else first
                if not isinstance(first, float | int) and state is not None:
                    raise ValueError(
                        f"{layer} does not say what its {name} is before the first step: give it a method "
                        f"first_states() -> {{{name!r}: number}}, or use sltt.interop.convert(model)"
                    )
                map_tensors(lambda s, first=first: s.__setitem__(torch.as_tensor(samples), first), state)  # pyright: ignore
        self.states = states

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the states; traces of a rule are no part of it."""
        return {"states": copy.deepcopy(self.states), "form": self.form}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.reset()
        self.states, self.form = copy.deepcopy(state["states"]), state["form"]
