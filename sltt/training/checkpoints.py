"""Checkpoints: written whole or not at all, read without running code from them.

A checkpoint is a file of `torch.save` and, behind it, MARK and the SHA-256 of what is before.
"""

import hashlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from sltt.callbacks import Callback
from sltt.parallel.processes import Processes, as_sharded, whole
from sltt.rules import Rule
from sltt.training.average import Average, chosen
from sltt.training.files import write_atomically
from sltt.training.progress import Progress
from sltt.training.runs import LAST, find_checkpoint
from sltt.training.safeguards import check_weights
from sltt.training.session import Session

FORMAT = "sltt-checkpoint-1"
MARK = b"sltt-sha256:"
TRAILER = len(MARK) + 64
KEYS = {"model", "optimizer", "scaler", "rules", "progress", "fingerprint", "config"}


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, with the reason."""


@dataclass(kw_only=True)
class Checkpoints:
    """The checkpoints of a run: what a training needs to go on as if it had never stopped.

    Args:
        folder: of the run.
        session: whose first process writes.
        model: the network.
        optim: its optimizer.
        average: of the weights, if the training has one.
        rules: of all stages.
        callbacks: whose state is kept.
        fingerprint: of the split of the data.
        task: what a prediction needs to know: `steps`, `static` and `classes`.
        config: settings of the run, to keep.
    """

    folder: Path
    session: Session
    model: nn.Module
    optim: Any
    average: Average | None
    rules: list[Rule]
    callbacks: Sequence[Callback]
    fingerprint: str
    task: dict[str, Any]
    config: dict[str, Any]
    saved: float = field(init=False, default_factory=time.monotonic)

    def age(self) -> float:
        """Seconds since the last was saved."""
        return time.monotonic() - self.saved

    def save(self, progress: Progress, *names: str) -> None:
        """Save under these names, in the first process; weights that are not finite raise FloatingPointError."""
        processes = self.session.processes
        check_weights(self.model)
        processes.average_statistics(self.model)
        if self.average:
            processes.average_statistics(self.average.model)
        content = {
            "model": whole(self.model.state_dict()),
            "averaged": self.average and self.average.model.state_dict(),
            "optimizer": whole(self.optim.state_dict()),
            "scaler": self.session.fabric.strategy.precision.state_dict(),
            "rules": [rule.state_dict() for rule in self.rules],
            "callbacks": [[type(one).__name__, one.state_dict()] for one in self.callbacks],
            "progress": vars(progress.summed(processes)),
            "fingerprint": self.fingerprint,
            "task": self.task,
            "config": self.config,
        }
        for name in names if processes.rank == 0 else ():
            save_checkpoint(self.folder / name, content)
        processes.wait()  # a process that went on might end, and its launcher the first one while it writes
        self.saved = time.monotonic()

    def restore(self, checkpoint: dict[str, Any]) -> Progress:
        """Take over all that a checkpoint holds; returns how far the training was."""
        path = self.folder / LAST
        if checkpoint["fingerprint"] != self.fingerprint:
            raise CheckpointError(
                f"the run {self.folder} was trained on the split {checkpoint['fingerprint']}, but the data now gives "
                f"{self.fingerprint}: restore its samples and settings, or start a new run with --weights"
            )
        self._check_callbacks(checkpoint.get("callbacks", []))
        load_weights(self.model, checkpoint["model"], path)
        if self.average:
            load_weights(self.average.model, chosen(checkpoint), path)
        load_optimizer(self.optim, checkpoint["optimizer"], path)
        self.session.fabric.strategy.precision.load_state_dict(checkpoint["scaler"])
        for rule, state in zip(self.rules, checkpoint["rules"], strict=False):
            rule.load_state_dict(state)
        for callback, (_, state) in zip(self.callbacks, checkpoint.get("callbacks", []), strict=True):
            callback.load_state_dict(state)
        saved = checkpoint["progress"]
        terms = {"terms": saved["samples"]}  # of checkpoints that were written before there were others
        return Progress(**{**terms, **saved}).of_process(self.session.processes.rank)

    def _check_callbacks(self, saved: list[Any]) -> None:
        before, now = [name for name, _ in saved], [type(one).__name__ for one in self.callbacks]
        if before != now:
            names = [", ".join(names) or "none" for names in (before, now)]
            raise CheckpointError(
                f"the run {self.folder} was trained with callbacks {names[0]}, and is to go on with {names[1]}: give "
                "the same ones, in Python by sltt.fit(…, callbacks=[…], resume=True)"
            )


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Save a dictionary of tensors and plain values, with a checksum behind it."""

    def write(file: IO[bytes]) -> None:
        hashed = _Hashed(file)
        torch.save({"format": FORMAT, **content}, hashed)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        file.write(MARK + hashed.digest.hexdigest().encode())

    write_atomically(path, write)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load what `save_checkpoint` wrote, on the CPU, with `weights_only=True`: nothing in the file is executed.

    A checkpoint of an earlier version, without a checksum, loads too.

    Raises FileNotFoundError, or CheckpointError for a file that is damaged or not a checkpoint of sltt.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"no checkpoint at {path}: name the folder of a run, or a file such as best.ckpt in one"
        )
    with path.open("rb") as file:
        if not _intact(file):
            raise CheckpointError(f"{path} is damaged, since its checksum does not match. {REMEDY}")
        file.seek(0)
        return _load(path, file)


def saved_config(path: Path) -> dict[str, Any]:
    """The settings in a checkpoint; its weights are not read, and its checksum is not verified."""
    return _load(path, path, mmap=True)["config"]


def _load(path: Path, source: Path | IO[bytes], **how: Any) -> dict[str, Any]:
    try:
        content = torch.load(source, map_location="cpu", weights_only=True, **how)
    except Exception as error:  # the unpickler and the zip reader raise almost anything on a damaged file
        raise CheckpointError(f"{path} is truncated or not a checkpoint of sltt. {REMEDY}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} was not written by this version of sltt: expected the format {FORMAT}. {REMEDY}")
    if missing := KEYS - content.keys():
        raise CheckpointError(f"{path} is not whole: it lacks {', '.join(sorted(missing))}. {REMEDY}")
    return content


REMEDY = "Restore it from a copy, or start a new run, with --weights from another checkpoint."


class _Hashed:
    """A file to write to, and the hash of what was written."""

    def __init__(self, file: IO[bytes]):
        self.file = file
        self.digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def _intact(file: IO[bytes]) -> bool:
    """Whether the checksum at the end of a file is right, or there is none."""
    left = file.seek(0, os.SEEK_END) - TRAILER
    file.seek(max(left, 0))
    mark, _, expected = file.read().partition(MARK)
    if mark or not expected:
        return True
    file.seek(0)
    digest = hashlib.sha256()
    while left > 0:
        digest.update(block := file.read(min(left, 2**20)))
        left -= len(block)
    return digest.hexdigest().encode() == expected


def load_weights(model: nn.Module, weights: dict[str, Any], path: Path) -> None:
    """Load the weights of a checkpoint into a model; raises CheckpointError where they do not fit it."""
    held = model.state_dict(keep_vars=True)
    try:
        model.load_state_dict({k: as_sharded(v, held[k]) if k in held else v for k, v in weights.items()})
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"the weights in {path} do not fit the model: {error}") from error


def load_optimizer(optim: Any, state: dict[str, Any], path: Path) -> None:
    """Load an optimizer's state that was saved whole, also where this process has a part of the parameters.

    Raises CheckpointError where it is of another optimizer, or of other parameters.
    """
    parameters = [p for group in optim.param_groups for p in group["params"]]
    options = [set(group) for group in optim.param_groups]
    try:
        parts = {
            i: {key: as_sharded(value, parameters[i]) for key, value in values.items()}
            for i, values in state["state"].items()
        }
        optim.load_state_dict({**state, "state": parts})
        lost = {key for known, group in zip(options, optim.param_groups, strict=True) for key in known - set(group)}
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(
            f"the optimizer's state in {path} is of other parameters, or of another norm_weight_decay or norm_bias_lr: "
            f"{error}"
        ) from error
    if lost:  # it would end in a KeyError at the first step
        raise CheckpointError(
            f"the optimizer's state in {path} is of another optimizer, without {', '.join(sorted(lost))}. Resume with "
            "the run's own optimizer, or start a new run with --weights."
        )


def load_selected(model: nn.Module, run: Path, which: str | None = None, processes: Processes | None = None) -> Path:
    """Load the weights of a run's checkpoint, `best` or `last`; returns its path.

    None is the best, or the last where nothing was held out. The first of several processes reads it.
    """

    def read() -> tuple[Path, dict[str, Any]]:
        path = find_checkpoint(run, which)
        return path, chosen(load_checkpoint(path))

    path, weights = processes.first(read) if processes else read()
    load_weights(model, weights, path)
    return path


def start_from(model: nn.Module, weights: str | None) -> None:
    """Load the weights of a run's folder, or of a checkpoint, into the model; None leaves it as it is."""
    if weights is not None:
        path = find_checkpoint(Path(weights)) if Path(weights).is_dir() else Path(weights)
        load_weights(model, chosen(load_checkpoint(path)), path)
