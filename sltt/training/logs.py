"""Where the metrics of a training go, beside its table: TensorBoard, and loggers of the user's."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from lightning_fabric.loggers.logger import Logger


class Logs:
    """The logs of a run, which its first process writes; they are ended with this block.

    Args:
        run: folder of the run; TensorBoard's files are in it.
        loggers: of Fabric or Lightning.
        config: settings of the run.
        first: this process is the first.
    """

    def __init__(self, run: Path, loggers: Sequence["Logger"], config: dict[str, Any], first: bool):
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
            logger.log_metrics(values, step=row["epoch"])
            logger.save()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._writer is not None:
            self._writer.close()
        for logger in self._loggers:
            logger.finalize("failed" if error else "success")
