"""From a recipe's settings to a network that is measured: on the device and in the precision of its training."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sltt.analysis import Memory, firing_rates, memory_parts
from sltt.checks import whole_number
from sltt.data import Splits
from sltt.rules import Rule
from sltt.rules.batch import Fold
from sltt.sequence.layout import last_fold
from sltt.sequence.padding import Padded, pad_batch
from sltt.training.batches import EpochSampler, finish_loaders, train_loader
from sltt.training.parameters import parameter_groups
from sltt.training.session import Session

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class Prepared:
    """A network of a recipe, on the device and with data of T = `steps`, as its training has it; for measurements."""

    def __init__(self, session: Session, built: Any, steps: int):
        self.splits: Splits = session.splits(built.data, steps)
        splits = self.splits
        session = session.choose_format(built.model, lambda: splits.collate([splits.train[0]])[0], splits.static)
        self._session, self._seed = session, built.seed
        session.set_up(built.model)
        self.model: nn.Module = built.model.train()
        groups = parameter_groups(self.model, built.norm_weight_decay, built.norm_bias_lr)
        self.optimizer = built.optimizer(groups)
        self.loss = session.set_up_loss(built.loss)
        self.rule: Rule = built.rule
        self.repeat = steps if self.splits.static else None  # the argument `steps` of rules and measurements
        self._steps = steps
        if session.settings.precision != 32:
            _run_in_precision(self.model, session.fabric)

    def batch(self, size: int) -> tuple[Tensor, Any]:
        """Return a training batch of `size` samples and T time steps; where the data has fewer, they come again."""
        samples: Any = self.splits.train
        order = EpochSampler(len(samples), self._seed)
        count = min(size, len(samples))
        x, y = next(iter(train_loader(self.splits, count, order, workers=0)))
        again, per_step = torch.arange(whole_number("batch_size", size, least=1)) % count, self.splits.per_step
        x = x.index_select(0 if self.splits.static else 1, again)
        if isinstance(y, Padded):
            return self._session.batch(*pad_batch(x, y.rows(again.tolist(), per_step), self._steps, per_step))
        return self._session.batch(x, y.index_select(1 if per_step else 0, again))

    def memory(self, size: int, rule: Rule | None = None) -> Memory:
        """Return the memory of a training batch, firing rates counted, with the recipe's rule or another."""
        batch = self.model, *self.batch(size), self.loss, rule or self.rule, self.optimizer
        with firing_rates(self.model), torch.autocast(self._session.fabric.device.type, enabled=False):  # keeps casts
            return memory_parts(*batch, steps=self.repeat)

    @property
    def fold(self) -> Fold:
        """Return how many time steps of the last batch shared a call."""
        return (last_fold(self.model) if self.rule.fold == "auto" else Fold(self.rule.fold)) or Fold()

    def batches(self, size: int) -> Iterator[tuple[Tensor, Any]]:
        """Yield training batches without an end, loaded as in a training."""
        order = EpochSampler.of(self.splits, self._seed, size)
        loader = train_loader(self.splits, size, order, self._session.settings.workers)
        with finish_loaders(loader):
            while True:
                for x, y in loader:
                    yield self._session.batch(x, y, self.splits.per_step)


def _run_in_precision(model: nn.Module, fabric: "Fabric") -> None:
    """Have each call of the model run under autocast, and give float32."""
    entered: list[Any] = []

    def enter(module: nn.Module, inputs: Any) -> None:
        entered.append(fabric.autocast())
        entered[-1].__enter__()

    def leave(module: nn.Module, inputs: Any, logits: Any) -> Any:
        entered.pop().__exit__(None, None, None)
        return logits.float() if isinstance(logits, Tensor) else None

    enter.sees_folds = leave.sees_folds = True  # pyright: ignore[reportFunctionMemberAccess]  # they take several steps
    model.register_forward_pre_hook(enter)
    model.register_forward_hook(leave, always_call=True)
