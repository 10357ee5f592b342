"""From a recipe's settings to a network that is measured: on the device and in the precision of its training."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sltt.data import Splits
from sltt.devices import make_fabric
from sltt.kernels import using
from sltt.loading import EpochSampler, train_loader
from sltt.loop import _on
from sltt.rules import Rule
from sltt.train import evaluate

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class Prepared:
    """A recipe's network, optimizer and data as its training has them; `prepared` makes it.

    Attributes:
        model: on the device, in training mode. Each call runs in the recipe's precision.
        optimizer: of its parameters.
        loss: on the device.
        rule: of the recipe.
        splits: of the data at T.
        repeat: T for static data, else None: the argument `steps` of rules and measurements.
        device: where it runs.
    """

    def __init__(self, built: Any, steps: int):
        self._fabric = make_fabric(built.device, built.precision)
        self._channels_last, self._seed, self._workers = built.channels_last, built.seed, built.workers
        self.device = self._fabric.device
        self.model: nn.Module = built.model.to(self.device).train()
        if built.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
        self.optimizer = built.optimizer(self.model.parameters())
        self.loss = built.loss.to(self.device) if isinstance(built.loss, nn.Module) else built.loss
        self.rule: Rule = built.rule
        self.splits: Splits = built.data.splits(steps)
        self.repeat = steps if self.splits.static else None

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """A training batch of `size` samples; where the data has fewer, they come again."""
        count = min(size, len(self.splits.train))  # type: ignore[arg-type]
        x, y = next(iter(self._loader(count, workers=0)))
        again = torch.arange(size) % count
        return self._placed(x.index_select(0 if self.splits.static else 1, again), y[again])

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Training batches without an end, loaded as in a training."""
        while True:
            for x, y in self._loader(size, self._workers):
                yield self._placed(x, y)

    def _placed(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return _on(self._fabric, x, self._channels_last), self._fabric.to_device(y)

    def _loader(self, size: int, workers: int) -> Any:
        return train_loader(self.splits, size, EpochSampler(len(self.splits.train), self._seed), workers)  # type: ignore[arg-type]


@contextmanager
def prepared(built: Any, steps: int) -> Iterator[Prepared]:
    """Put on the device what a recipe built, for measurements at T = `steps` inside the block."""
    found = Prepared(built, steps)
    hooks = _run_in_precision(found.model, found._fabric) if built.precision != 32 else ()
    try:
        with using(compile=built.compile):
            yield found
    finally:
        for hook in hooks:
            hook.remove()


def test_accuracy(built: Any) -> float:
    """Of a trained network, measured as its training is set up."""
    names = set(inspect.signature(evaluate).parameters) - {"model", "data"}
    settings = {name: value for name, value in vars(built).items() if name in names}
    return evaluate(built.model, built.data, **settings).accuracy


def _run_in_precision(model: nn.Module, fabric: "Fabric") -> tuple[Any, Any]:
    """Have each call of the model run under autocast, and give float32.

    By hooks, not Fabric's wrapper: a copy keeps them, layers keep their names, and a backward needs no Fabric.
    """
    entered: list[Any] = []

    def enter(module: nn.Module, inputs: Any) -> None:
        entered.append(fabric.autocast())
        entered[-1].__enter__()

    def leave(module: nn.Module, inputs: Any, logits: Any) -> Any:
        entered.pop().__exit__(None, None, None)
        return logits.float() if isinstance(logits, Tensor) else None

    return model.register_forward_pre_hook(enter), model.register_forward_hook(leave, always_call=True)
