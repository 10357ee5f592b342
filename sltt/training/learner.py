"""The network of a training on its device, and what changes its weights."""

import copy
import logging
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from sltt._torch import without_compiler
from sltt.training.average import Average, select_weights
from sltt.training.checkpoints import load_optimizer, load_weights
from sltt.training.parameters import parameter_groups
from sltt.training.quantised import round_weights
from sltt.training.session import Session
from sltt.training.settings import Settings

log = logging.getLogger("sltt")


class Learner:
    """A network with its loss, its optimizer and the average of its weights.

    Attributes:
        net: the network for calls under the precision of the session.
        average: of the weights, where the training has one.
        averaged: the network with these, for such calls; else `net`.
        initial: learning rate and weight decay of each group of parameters.
        scaled: whether a scaler leaves out steps that are not finite.
    """

    def __init__(self, session: Session, settings: Settings):
        self.session, self.processes, self.settings = session, session.processes, settings
        self.model = model = settings.model
        self.net = session.set_up(model)
        self.average = None if settings.ema is None else Average(model, settings.ema)
        groups = parameter_groups(model, settings.norm_weight_decay, settings.norm_bias_lr)
        self.optimizing = partial(without_compiler, settings.optimizer)  # around calls of the optimizer
        with self.optimizing():
            self.optim: Any = session.fabric.setup_optimizers(settings.optimizer(groups))
        self.averaged = session.set_up(self.average.module) if self.average else self.net
        self.loss = session.set_up_loss(settings.loss)
        self.scaled = session.settings.precision == "16-mixed"
        self.initial = [(group["lr"], group.get("weight_decay", 0.0)) for group in self.optim.param_groups]
        for group in self.optim.param_groups:  # from which a callback's changes show
            group |= {"lr_written": group["lr"], "decay_written": group.get("weight_decay")}

    def round_weights(self) -> AbstractContextManager[None]:
        """Round the weights inside a block, in a training that is quantised."""
        return round_weights(self.model) if self.settings.quantised else nullcontext()

    def update(self, check: bool = False) -> None:
        """Change the weights by their gradients; `check` if clipping is to look whether they are finite, and wait."""
        if (most := self.settings.clip_norm) is not None:
            check &= not self.scaled
            self.session.fabric.clip_gradients(self.net, self.optim, max_norm=most, error_if_nonfinite=check)
        with self.optimizing():
            self.optim.step()
            self.optim.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        weights = self.model.state_dict()
        with self.round_weights():
            rounded = copy.deepcopy(weights) if self.settings.quantised else None
        with self.optimizing():
            return {
                "model": weights,
                "frozen": [name for name, p in self.model.named_parameters() if not p.requires_grad],
                "averaged": self.average.module.state_dict() if self.average else rounded,
                "average_steps": self.average.step if self.average else 0,
                "optimizer": self.optim.state_dict(),
                "scaler": self.session.fabric.strategy.precision.state_dict(),
                "loss": getattr(self.loss, "state_dict", dict)(),
            }

    def freeze(self, frozen: Collection[str]) -> None:
        """Freeze these parameters, and no others, as when they were saved; say which were otherwise."""
        if other := [k for k, p in self.model.named_parameters() if p.requires_grad == (k in frozen)]:
            more = f" and {len(other) - 3} more" * (len(other) > 3)
            log.warning("frozen or trained as when it was saved: %s%s", ", ".join(other[:3]), more)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name not in frozen)

    def load(self, checkpoint: dict[str, Any], path: Path) -> None:
        """Take over the state in a checkpoint that lies at `path`."""
        load_weights(self.model, checkpoint["model"], path)
        if self.average:
            load_weights(self.average.module, select_weights(checkpoint), path)
            self.average.step = checkpoint["average_steps"]
        with self.optimizing():
            load_optimizer(self.optim, checkpoint["optimizer"], path)
        self.session.fabric.strategy.precision.load_state_dict(checkpoint["scaler"])
        if checkpoint["loss"]:
            self.loss.load_state_dict(checkpoint["loss"])
