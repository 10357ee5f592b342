"""What to write instead of an optimizer that was made, or of a scheduler of PyTorch."""

import inspect
from functools import partial
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR, StepLR


def check_optimizer(given: Any) -> None:
    """Raise ValueError, with the line to write, for an optimizer in place of a function that makes one."""
    if isinstance(given, Optimizer):
        raise ValueError(
            f"optimizer must be a function of the parameters, got an instance of {type(given).__name__}, which a "
            f"resumed run could not make again: optimizer={_factory(given)}"
        )
    if not callable(given):
        raise ValueError(
            "optimizer must be a function of the parameters, such as functools.partial(torch.optim.SGD, lr=0.1), "
            f"got {given!r}"
        )


def _factory(made: Optimizer) -> str:
    """What makes such an optimizer: functools.partial(torch.optim.AdamW, lr=0.002)."""
    taken = inspect.signature(type(made)).parameters
    options = {key: value for key, value in made.defaults.items() if key in taken and taken[key].default != value}
    named = "".join(f", {key}={value!r}" for key, value in options.items())
    module = "torch.optim." if type(made).__module__.startswith("torch.optim") else ""
    text = f"functools.partial({module}{type(made).__name__}{named})"
    own = [group for group in made.param_groups if any(group[key] != value for key, value in made.defaults.items())]
    return f"{text}; its {len(made.param_groups)} groups need a function that makes them" if own else text


def check_schedule(given: Any) -> None:
    """Raise ValueError, with the line to write, for a scheduler of PyTorch."""
    kind = given.func if isinstance(given, partial) else given if isinstance(given, type) else type(given)
    if isinstance(kind, type) and issubclass(kind, LRScheduler):
        raise ValueError(
            f"schedule must be a Schedule, got PyTorch's {kind.__name__}, whose count a resumed run would have to "
            f"keep: {_nearest(given, kind)}"
        )


def _nearest(given: Any, kind: type) -> str:
    if "Cosine" in kind.__name__ or kind.__name__ == "OneCycleLR":
        return "schedule=sltt.schedules.Cosine(), with warmup=EPOCHS for a rise before"
    if isinstance(given, MultiStepLR):
        return f"schedule=sltt.schedules.Step({sorted(given.milestones)}, gamma={given.gamma:g})"
    if isinstance(given, StepLR):
        every = given.step_size
        return f"schedule=sltt.schedules.Step(range({every}, EPOCHS, {every}), gamma={given.gamma:g})"
    if kind in (StepLR, MultiStepLR):
        return "schedule=sltt.schedules.Step([EPOCH, EPOCH], gamma=0.1)"
    return "derive from sltt.schedules.Schedule and define decay(epoch, epochs), the factor on the learning rate"
