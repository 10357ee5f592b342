"""Checkpoints: files of `torch.save`, written whole or not at all, read without running code from them."""

import logging
import zipfile
from io import BufferedRandom
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sltt.checks import to_python
from sltt.models.base import SHIPPED
from sltt.parallel.processes import Processes
from sltt.training.average import select_weights
from sltt.training.files import BEST, LAST, write_atomically
from sltt.training.runs import compare_layers, refuse_links

log = logging.getLogger("sltt")
FORMAT = "sltt-checkpoint-1"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, with the reason."""


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Save a dictionary of tensors and plain values, in a file with a checksum of each."""

    def write(file: BufferedRandom) -> None:
        torch.save({"format": FORMAT, **to_python(content)}, file)
        file.seek(0)
        if unsafe := torch.serialization.get_unsafe_globals_in_checkpoint(file):
            raise ValueError(
                f"a checkpoint holds tensors, numbers, text and lists of them, and the state_dict() of a callback, a "
                f"metric, a rule or a module gives others, made by {', '.join(sorted(unsafe))}: give tensors, as "
                "torch.from_numpy(array), or array.tolist()"
            )

    write_atomically(path, write)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load what `save_checkpoint` wrote, on the CPU, with `weights_only=True`: nothing in the file is executed.

    Raises FileNotFoundError, or ValueError for a file that is damaged or not a checkpoint of sltt.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: name the folder of a run, or a file such as best.ckpt")
    with path.open("rb") as file:
        try:
            if part := zipfile.ZipFile(file).testzip():  # PyTorch writes checksums, and does not compare them
                raise zipfile.BadZipFile(f"{part} has another checksum")
            file.seek(0)
            content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # the unpickler raises almost anything on what torch.save did not write
            raise CheckpointError(f"{path} is damaged, or not a checkpoint of sltt. {REMEDY}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} was not written by this version of sltt: expected the format {FORMAT}. {REMEDY}")
    return content


REMEDY = (
    "Restore it from a copy, take the other one of the run by --checkpoint, in Python checkpoint=, or start a new run, "
    "with --weights from another checkpoint."
)


def load_weights(model: nn.Module, weights: dict[str, Any], path: Path, strict: bool = True) -> None:
    """Load the weights of a checkpoint into a model, or those that fit; raises CheckpointError where one does not."""
    held = model.state_dict(keep_vars=True)
    if not strict:
        fits = {k: v for k, v in weights.items() if k in held and held[k].shape == v.shape}
        if not fits:
            raise CheckpointError(f"no weights in {path} have the name and shape of weights of the model")
        if left := sorted({*held, *weights} - {*fits}):
            log.warning("%s: no weights of the same name and shape for %s", path, ", ".join(left))
        weights = {**held, **fits}
    try:
        model.load_state_dict(weights)
    except (KeyError, RuntimeError) as error:
        reason = f"{error}".rstrip(". ")
        remedy = "with strict=False, sltt.load and sltt.fit take those that do"
        raise CheckpointError(f"the weights in {path} do not fit the model: {reason}; {remedy}") from error


def load_optimizer(optim: Any, state: dict[str, Any], path: Path) -> None:
    """Load an optimizer's state; raise CheckpointError where it is of another optimizer, or of other parameters."""
    options = [set(group) for group in optim.param_groups]
    try:
        optim.load_state_dict(state)
        lost = {key for keys, group in zip(options, optim.param_groups, strict=True) for key in keys - set(group)}
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(f"the optimizer's state in {path} is of other parameter groups: {error}") from error
    if lost:  # it would end in a KeyError at the first step
        raise CheckpointError(
            f"the optimizer in {path} was another, without {', '.join(sorted(lost))}: resume with it, or use --weights"
        )


def load_best(run: Path, which: str | None = None) -> tuple[Path, dict[str, Any]]:
    """Load the checkpoint `best` or `last` of a run; None is the best, or the last if nothing was held out; or a file.

    Raises FileNotFoundError where there is none yet, CheckpointError where the best is lost.
    """
    run = run if run.exists() else SHIPPED.get(str(run), run)  # a network of the package
    if not run.is_dir():
        return run, load_checkpoint(run)
    refuse_links(run)
    names = [BEST, LAST] if which is None else [f"{which}.ckpt"]
    path = next((run / name for name in names if (run / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"no checkpoint in {run}: looked for {' and '.join(names)}; has it trained an epoch?")
    content = load_checkpoint(path)
    if which is None and path.name == LAST and content["progress"]["best_epoch"]:
        raise CheckpointError(f"{run / BEST} is gone. {REMEDY}")
    return path, content


def load_selected(model: nn.Module, run: Path, processes: Processes, which: str | None = None) -> None:
    """Load the weights of `load_best`, which the first of several processes reads."""

    def read() -> tuple[Path, dict[str, Any], dict[str, str]]:
        path, content = load_best(run, which)
        return path, select_weights(content), content.get("layers", {}) | content.get("code", {})

    path, weights, layers = processes.first(read)
    load_weights(model, weights, path)
    if other := compare_layers(model, layers):
        log.warning("%s is of other layers than the network: %s", path, other)


def start_from(model: nn.Module, weights: str | None, strict: bool) -> None:
    """Load the weights of a run's folder, or of a checkpoint, into the model; None leaves it as it is."""
    if weights is not None:
        path, content = load_best(Path(weights).expanduser())
        load_weights(model, select_weights(content), path, strict)
