"""Credit through delays: the error of a time step goes back through each `Delay` once it is complete.

A delay cuts the graph of a time step: what is behind it reads a leaf for each step that it taps. The error of step t is
complete when the layers behind the delay have run their backward for step t + D. Then it is sent through the graph of
step t before the delay, which has waited. With a Δ of so many steps between a layer and the loss, memory is that of Δ
steps of the layer, and does not grow with T; each graph runs backward once.
"""

from collections import deque
from collections.abc import Callable, Container
from typing import Any, Literal

import torch
from torch import Tensor

from sltt import kernels
from sltt.neurons import Delay
from sltt.rules.mixed import graph_nodes, operations
from sltt.sequence.layout import Layer
from sltt.sequence.once import is_sharded
from sltt.sequence.step import KEEPER, Step

Credit = Literal["exact", "none"]
CHANGED = "runs in another order than in the first time step, so its error comes too late: use credit='none' or BPTT"


class CreditStep(Step):
    """Time steps whose error goes back through delays.

    Args:
        credit: it does; else delayed taps are constants.
    """

    def __init__(self, credit: bool = True):
        self.credit = credit
        self.delays: dict[Layer, _Waiting] = {}  # with trained layers before them, in the order in which they ran
        self._readers: dict[Layer, set[Layer | None]] = {}  # the delays behind each, or None for the loss
        self._ran = 0  # time steps
        self._nodes: dict[Layer, Any] = {}  # of the first graph, of what each delay gave

    @property
    def waits(self) -> bool:
        return bool(self.delays)

    def handler(self, layer: Layer, folds: bool) -> Any:
        return self.delay if isinstance(layer.module, Delay) and layer.advance else super().handler(layer, folds)

    def delay(self, layer: Layer, x: Tensor) -> Tensor:
        """Run a delay."""
        run = self.run
        run.take_turn(layer, KEEPER)
        if not self.credit or not (x.requires_grad or layer in self.delays):
            return layer.module.advance(x, run.fold, run.cut)
        if layer not in self.delays:
            if is_sharded(run.model):
                raise ValueError(f"the error through {layer} comes when sharded weights have moved: use credit='none'")
            self.delays[layer] = _Waiting(layer, self._ran)
        y = self.delays[layer].read(x, layer.module.advance(x.detach(), run.fold, cut=True), run.fold, self.trained)
        if not self._readers:
            self._nodes[layer] = y.grad_fn
        return y

    def backward(self, value: Tensor | None, backward: Callable[[Tensor], Any], ran: int, steps: int) -> None:
        if value is not None:
            if self.delays and not self._readers:
                self._find_readers(value)
            if len(self._readers) < len(self.delays):
                raise RuntimeError(f"{[*self.delays][-1]} {CHANGED}")
            backward(value)
        self._ran = ran
        done: dict[Layer | None, int] = {None: ran}  # time steps whose backward has run, behind each delay
        for layer, waiting in reversed(self.delays.items() if self._readers else ()):
            before = min((done[reader] for reader in self._readers[layer]), default=ran)
            # the last steps of the sequence wait for no further ones
            done[layer] = waiting.send(before if ran == steps else before - layer.module.depth, ran, backward)

    def _find_readers(self, value: Tensor) -> None:
        """Find what reads each delay, in the graph of a call."""
        nodes = {layer: graph_nodes([waiting.queue[-1][1].grad_fn]) for layer, waiting in self.delays.items()}
        nodes = {**nodes, None: graph_nodes([value.grad_fn])}
        for layer, node in self._nodes.items():
            for other, reached in nodes.items():
                if other is not layer and operations(nodes[layer] & reached).difference(self._nodes.values()):
                    raise ValueError(
                        f"{other or 'the loss'} reads what is before {layer} not only through it, and the error "
                        "through a delay comes later than that around it: take a shortcut from tap 0 of the delay, "
                        "join delays of the same input, or use credit='none' or BPTT"
                    )
            self._readers[layer] = {other for other, reached in nodes.items() if node in reached}
        self._nodes.clear()


class _Waiting:
    """Holds what waits before a delay.

    Attributes:
        queue: steps of a call, and a scalar that sends their error through the graph before the delay.
        leaves: of each step, a tensor without memory that collects its error.
    """

    def __init__(self, layer: Layer, ran: int):
        self.layer, self.taps, self.ran = layer, layer.module.taps, ran
        self.queue: deque[tuple[range, Tensor]] = deque()
        self.leaves: dict[int, Tensor] = {}

    def read(self, x: Tensor, y: Tensor, steps: int, trained: Container[int]) -> Tensor:
        """Return y, the taps of n time steps, in a graph to the leaves of these taps; `trained` steps have a leaf."""
        call = range(self.ran, self.ran + steps)
        self.ran = call.stop
        if not torch.is_grad_enabled():
            return y
        if x.requires_grad:
            zeros = x.new_zeros(()).expand(len(x) // steps, *x.shape[1:])
            leaves = {t: zeros.detach().requires_grad_(t in trained) for t in call}
            self.leaves |= leaves
            self.queue.append((call, _Send.apply(x, [*leaves.values()])))  # type: ignore[arg-type]
        anchor = x.new_zeros(()).requires_grad_()  # the graph shows who reads the delay where no leaf is tapped yet
        tapped = [t - n for t in call for n in self.taps]
        return _Read.apply(y, self, tapped, anchor, *map(self.leaves.get, tapped))  # type: ignore[return-value]

    def send(self, complete: int, ran: int, backward: Callable[[Tensor], Any]) -> int:
        """Send the errors of steps up to `complete`; return up to which step none is left to send."""
        while self.queue and self.queue[0][0].stop <= complete:
            call, gate = self.queue.popleft()
            if not all(error is None for error in [self.leaves.pop(t).grad for t in call]):
                backward(gate)
        return self.queue[0][0].start if self.queue else ran


class _Read(torch.autograd.Function):
    """Gives what a delay gave; the gradient goes to the leaves of the steps that were tapped."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, waiting: _Waiting, tapped: list[int], anchor: Tensor, *leaves: Any) -> Tensor:  # type: ignore[override]
        ctx.waiting, ctx.tapped = waiting, tapped
        return y.view_as(y)

    @staticmethod
    @kernels.differentiable_once
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        taps, needs = len(ctx.waiting.taps), ctx.needs_input_grad[4:]
        if any(need and t not in ctx.waiting.leaves for t, need in zip(ctx.tapped, needs, strict=True)):
            raise RuntimeError(f"{ctx.waiting.layer} {CHANGED}")
        parts = [part for of_step in grad.chunk(len(needs) // taps) for part in of_step.chunk(taps, 1)]
        return None, None, None, None, *(part if need else None for part, need in zip(parts, needs, strict=True))


class _Send(torch.autograd.Function):
    """A scalar 0, whose backward gives x the error that its leaves collected; it holds the graph behind x, not x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, leaves: list[Tensor]) -> Tensor:  # type: ignore[override]
        ctx.leaves = leaves
        return x.new_zeros(())

    @staticmethod
    @kernels.differentiable_once
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return torch.cat([leaf if leaf.grad is None else leaf.grad for leaf in ctx.leaves]).detach(), None
