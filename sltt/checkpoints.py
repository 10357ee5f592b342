"""Checkpoints and other files of a run: written whole or not at all, read without running code from them."""

import csv
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import torch
import yaml
from torch import nn

from sltt.distributed import as_sharded
from sltt.runs import CONFIG, find_checkpoint

FORMAT = "sltt-checkpoint-1"
KEYS = {"model", "optimizer", "scaler", "rules", "progress", "fingerprint", "config"}


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, with the reason."""


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a file by `write(file)` such that `path` holds either the old content or the whole new one.

    Raises OSError, with the path and the state of the old file, when the disk is full or the folder not writable.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError when a write fails
        part.unlink(missing_ok=True)
        kept = "the one written before is intact" if path.exists() else "nothing was written"
        raise OSError(f"could not write {path}: {error}; {kept}. Free some space or choose another folder.") from error


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Save a dictionary of tensors and plain values."""
    write_atomically(path, lambda file: torch.save({"format": FORMAT, **content}, file))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load what `save_checkpoint` wrote, on the CPU, with `weights_only=True`: nothing in the file is executed.

    Raises FileNotFoundError, or CheckpointError for a file that is truncated or not a checkpoint of sltt.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler and the zip reader raise almost anything on a damaged file
        raise CheckpointError(f"{path} is truncated or not a checkpoint: {_first_line(error)}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} was not written by this version of sltt: expected the format {FORMAT}")
    if missing := KEYS - content.keys():
        raise CheckpointError(f"{path} is not whole: it lacks {', '.join(sorted(missing))}")
    return content


def load_weights(model: nn.Module, checkpoint: dict[str, Any], path: Path) -> None:
    """Load a checkpoint's weights into a model; raises CheckpointError where they do not fit it."""
    held = model.state_dict(keep_vars=True)
    try:
        model.load_state_dict({k: as_sharded(v, held[k]) if k in held else v for k, v in checkpoint["model"].items()})
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"the weights in {path} do not fit the model: {error}") from error


def load_optimizer(optim: Any, state: dict[str, Any]) -> None:
    """Load an optimizer's state that was saved whole, also where this process has a part of the parameters."""
    parameters = [p for group in optim.param_groups for p in group["params"]]
    parts = {
        i: {key: as_sharded(value, parameters[i]) for key, value in values.items()}
        for i, values in state["state"].items()
    }
    optim.load_state_dict({**state, "state": parts})


def start_from(model: nn.Module, weights: str | None) -> None:
    """Load the weights of a run's folder, or of a checkpoint, into the model; None leaves it as it is."""
    if weights is not None:
        path = find_checkpoint(Path(weights)) if Path(weights).is_dir() else Path(weights)
        load_weights(model, load_checkpoint(path), path)


def write_config(run: Path, config: dict[str, Any]) -> None:
    """Write the configuration of a run into its folder."""
    write_atomically(run / CONFIG, lambda file: file.write(yaml.safe_dump(config, sort_keys=False).encode()))


def write_table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows of equal keys as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def read_table(path: Path) -> list[dict[str, Any]]:
    """Rows that `write_table` wrote, with numbers, and None where a cell is empty."""
    with path.open(newline="") as file:
        return [{key: float(value) if value else None for key, value in row.items()} for row in csv.DictReader(file)]


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
