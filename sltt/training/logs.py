"""Where the metrics of a training go, beside its table: TensorBoard, and loggers of the user's."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable


@runtime_checkable
class Logger(Protocol):
    """What takes the metrics of each epoch: a logger of Fabric or Lightning, or any class with these methods.

    `lightning` and `lightning_fabric` each have a class of this name, and neither knows the other's.
    """

    def log_hyperparams(self, params, /):
        """Settings of the run, a dictionary."""

    def log_metrics(self, metrics, step, /):
        """Metrics of an epoch by name."""

    def save(self):
        """Write what was logged."""

    def finalize(self, status, /):
        """The training has ended: "success" or "failed"."""


class Logs:
    """The logs of a run, which its first process writes; they are ended with this block.

    Args:
        run: folder of the run; TensorBoard's files are in it.
        loggers: each gets the metrics of every epoch.
        config: settings of the run.
        first: this process is the first.
    """

    def __init__(self, run: Path, loggers: Sequence[Logger], config: dict[str, Any], first: bool):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=0) if first else None
        self._loggers = loggers if first else ()
        for logger in self._loggers:
            with suppress(NotImplementedError):  # Fabric's CSVLogger has none
                logger.log_hyperparams(config)

    def __call__(self, row: dict[str, Any]) -> None:
        """Log the metrics of an epoch."""
        if self._writer is None:
            return
        values = {key: value for key, value in row.items() if value is not None}
        for key, value in values.items():
            self._writer.add_scalar(key, value, row["epoch"])
        self._writer.flush()
        for logger in self._loggers:
            logger.log_metrics(values, row["epoch"])
            logger.save()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._writer is not None:
            self._writer.close()
        for logger in self._loggers:
            logger.finalize("failed" if error else "success")
