"""Loggers of a training's metrics, beside its table: TensorBoard, and those of the user."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Logger(Protocol):
    """Protocol of a logger of each epoch's metrics: one of Fabric or Lightning, or any class with these methods.

    `lightning` and `lightning_fabric` each have a class of this name, and neither knows the other's.
    """

    def log_hyperparams(self, params, /):
        """Settings of the run, a dictionary."""

    def log_metrics(self, metrics, step, /):
        """Metrics of an epoch by name."""

    def save(self):
        """Write what was logged."""

    def finalize(self, status, /):
        """Note how the training has ended: "success" or "failed"."""


@contextmanager
def logs(
    run: Path, loggers: Sequence[Logger], config: dict[str, Any], first: bool
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yield what logs the metrics of an epoch in the folder of a run; its `first` process writes."""
    if not first:
        yield lambda row: None
        return
    from torch.utils.tensorboard import SummaryWriter

    def log(row: dict[str, Any]) -> None:
        values = {key: value for key, value in row.items() if value is not None}
        for key, value in values.items():
            writer.add_scalar(key, value, row["epoch"])
        writer.flush()
        for logger in loggers:
            logger.log_metrics(values, row["epoch"])
            logger.save()

    writer = SummaryWriter(str(run / "tensorboard"), purge_step=0)
    for logger in loggers:
        with suppress(NotImplementedError):  # Fabric's CSVLogger has none
            logger.log_hyperparams(config)
    status = "failed"
    try:
        yield log
        status = "success"
    finally:
        writer.close()
        for logger in loggers:
            logger.finalize(status)
