"""Run folders: one for each training run, never overwritten, trained by one process at a time."""

import ast
import csv
import hashlib
import inspect
import io
import os
import re
import shutil
import socket
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from shlex import quote
from sys import stdlib_module_names
from typing import Any

import yaml
from torch import nn

from sltt.frozen import arguments_of
from sltt.sequence.layout import spiking_layers
from sltt.surrogates import Surrogate
from sltt.system import lock_file
from sltt.training.description import describe
from sltt.training.files import BEST, CONFIG, LAST, METRICS, write_atomically
from sltt.training.settings import RESUMABLE

LOCK = ".lock"
MADE_IN = "made_in"  # a key of the settings of a run that sltt.fit made: they name no class


def new_run(folder: str | Path | None, name: str, config: dict[str, Any]) -> Path:
    """Make the folder of a new run: `folder`, or else `runs/NAME-DATE-TIME`, with a number added if that exists.

    An empty folder is taken.

    Raises FileExistsError if `folder` exists, OSError if it cannot be made.
    """
    if folder is not None:
        there = os.listdir(folder) if os.path.isdir(folder) else [""] * os.path.exists(folder)
        if not all(name.endswith(".part") for name in there):  # which a killed process left of its settings
            go_on = f"--resume {quote(str(folder))}, in Python by resume=True"
            raise FileExistsError(f"{folder} exists: continue it by {go_on}, or choose another folder")
        return _make(Path(folder), config, exist_ok=os.path.isdir(folder))
    stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in range(1, 1000):
        with suppress(FileExistsError):
            return _make(Path("runs") / (stem if number == 1 else f"{stem}-{number}"), config)
    raise FileExistsError(f"runs/{stem} and 998 more like it exist")


def old_run(folder: str | Path | None) -> Path:
    """Return the folder of a run to resume, empty if it was killed at once; raise ValueError where it is none."""
    if folder is None:
        raise ValueError("resume=True needs the folder of the run to continue: run=...")
    run = Path(folder)
    if not is_run(run) and (not run.is_dir() or any(run.glob("[!.]*"))):
        raise ValueError(f"resume=True continues a run, and {run} is not the folder of one: leave it out for a new run")
    return run


@contextmanager
def lock_run(run: Path, new: bool = False) -> Iterator[None]:
    """Keep other processes and threads from training the run inside this block; raise ValueError that names them.

    The system releases what a killed process held. Parts of files that it left go, and so does a failed new run.
    """
    refuse_links(run)
    path = run / LOCK
    path.touch()
    # before the file is opened: the system's lock does not tell threads apart, and would go as a second one closes it
    if (here := path.stat().st_ino) in _held:
        raise ValueError(f"{run} is being trained by this process, in another thread: wait for it to end")
    _held.add(here)
    try:
        with path.open("r+", encoding="utf-8") as file:
            if not lock_file(file.fileno()):
                raise ValueError(f"{run} is being trained by {file.read()}: wait for it to end, or end it")
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}")
            file.flush()
            for part in run.glob(".*.part"):
                part.unlink()
            try:
                yield
            except Exception:
                if new and {path.name for path in run.iterdir()} <= {CONFIG, LOCK, "tensorboard"}:
                    shutil.rmtree(run)
                raise
    finally:
        _held.remove(here)


_held: set[int] = set()  # files of locks, by their number, that this process has


def find_last(run: Path) -> Path | None:
    """Return the last checkpoint of a run; None where it stopped before the first. Raises ValueError if it is lost."""
    refuse_links(run)
    if (run / LAST).is_file():
        return run / LAST
    if (run / METRICS).exists():
        raise ValueError(f"{run / LAST} is gone: restore it, or start anew with --weights {quote(str(run / BEST))}")
    return None


def is_run(folder: Path) -> bool:
    """Return whether a folder is that of a run."""
    return any((folder / name).exists() for name in (CONFIG, LAST))


def refuse_links(run: Path) -> None:
    """Raise ValueError for a link in the folder of a run, through which a command would write somewhere else."""
    if link := next((path for path in run.iterdir() if path.is_symlink()), None):
        raise ValueError(f"{link} is a link: put in its place what it leads to, or remove it")


def load_call(run: Path, config: dict[str, Any]) -> str:
    """Return the Python call that loads a run's network; one that was made in Python takes it as `model`."""
    return f"sltt.load({str(run)!r}{'' if 'model' in config and MADE_IN not in config else ', model'})"


def read_config(run: Path, checkpoint: dict[str, Any] | None = None) -> dict[str, Any]:
    """Read the configuration of a run: its file, or the copy in a checkpoint where the file is gone.

    Raises ValueError for a damaged file, and where the checkpoint was trained with other settings.
    """
    saved = checkpoint["config"] if checkpoint else {}
    if not (run / CONFIG).exists():
        return saved
    why, config = "no settings", None
    try:
        config = yaml.safe_load((run / CONFIG).read_bytes())
    except yaml.YAMLError as error:
        why = getattr(error, "problem", None) or error
    if not isinstance(config, dict):
        raise ValueError(f"{run / CONFIG} is damaged: {why}. Restore it, or delete it: the last checkpoint has a copy.")
    if checkpoint:
        check_config(run, saved, config)
    return saved | config  # a default would replace what the file leaves out


def write_config(run: Path, config: dict[str, Any]) -> None:
    """Write the configuration of a run into its folder."""
    try:
        text = yaml.safe_dump(config, sort_keys=False)
    except yaml.YAMLError as error:
        raise ValueError(f"config must hold numbers, texts, lists and dictionaries of these alone: {error}") from error
    write_atomically(run / CONFIG, lambda file: file.write(text.encode()))


def write_table(run: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the metrics of each epoch as CSV, once there is one."""
    if not rows:
        return
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(run / METRICS, lambda file: file.write(text.getvalue().encode()))


def check_config(run: Path, saved: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raise ValueError where settings are others than those in a checkpoint of the run; some may change."""
    if changes := list_changes(saved, settings):
        raise ValueError(
            f"the settings of {run} are not those that it was trained with: {'; '.join(changes)}. Restore them, or "
            f"start a new run with --weights {quote(str(run))}."
        )


def list_changes(saved: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """List changed settings, beyond those that a resumed run may change. None saved means none to compare."""
    both = ({**config, "data": describe(config.get("data"), [], "data")} for config in (saved, saved | settings))
    before, now = (yaml.safe_load(yaml.safe_dump(config)) for config in both)  # as files give them back
    return list(_differences(before, now)) if saved else []


def describe_layers(model: nn.Module) -> dict[str, str]:
    """Return the layers of a network by name with constants that no weights tell; not what neurons may learn."""
    neurons, texts = {*spiking_layers(model).values()}, dict[str, str]()
    for name, module in model.named_modules():
        if module in neurons or not any(True for _ in module.children()):
            kind, text = type(module), re.sub(" at 0x[0-9a-f]+", "", repr(module))
            if module in neurons and any(True for _ in module.parameters()):
                names = [k for k in arguments_of(kind) if not isinstance(getattr(kind, k, None), property)]
                told = [(k, v) for k in names if isinstance(v := getattr(module, k, None), int | float | Surrogate)]
                text = f"{kind.__name__}({', '.join(f'{k}={v}' for k, v in told)})"
            texts[name] = text
    return texts


def describe_code(model: nn.Module) -> dict[str, str]:
    """Return a digest of each class that the user wrote, without comments and layout."""
    classes, others = {cls for m in model.modules() for cls in type(m).__mro__}, {"sltt", "torch"} | stdlib_module_names
    own = [cls for cls in classes if cls.__module__.partition(".")[0] not in others]
    return {f"the code of {cls.__qualname__}": _digest(cls) for cls in own}


@cache
def _digest(cls: type) -> str:
    """Return a digest of the source of a class; nothing where it is unknown, as in a notebook."""
    try:
        text = ast.unparse(ast.parse(textwrap.dedent(inspect.getsource(cls))))
    except (OSError, TypeError, SyntaxError):
        return ""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def compare_layers(model: nn.Module, before: dict[str, str]) -> str:
    """Return which layers and classes of a network are others than `before`."""
    layers = describe_layers(model) | describe_code(model)
    changed = {k: was for k, was in before.items() if was and layers.get(k) not in (was, "")}
    return "; ".join(f"{k} was {was}, and is {layers.get(k)}" for k, was in changed.items())


def _differences(saved: Mapping[Any, Any], settings: Mapping[Any, Any], path: str = "") -> Iterator[str]:
    other_class = "class" in saved and saved["class"] != settings.get("class")  # whose other arguments say nothing
    for key in ["class"] if other_class else [*saved, *(key for key in settings if key not in saved)]:
        name = f"{path}{key}"
        if name in RESUMABLE and name != "data":
            continue
        before, now = (dict(enumerate(v)) if isinstance(v := part.get(key), list) else v for part in (saved, settings))
        if key not in settings:
            yield f"{name} is missing"
        elif key not in saved:
            yield f"{name} is new"
        elif isinstance(before, dict) and isinstance(now, dict):
            yield from _differences(before, now, f"{name}.")
        elif before != now:
            yield f"{name} was {saved[key]!r} and is {settings[key]!r}"


def _make(path: Path, config: dict[str, Any], exist_ok: bool = False) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=exist_ok)
        write_config(path, config)
    except FileExistsError:
        raise
    except BaseException as error:
        with suppress(OSError):
            path.rmdir()
        if not isinstance(error, OSError):
            raise
        why: Any = error
        while isinstance(why.__cause__, OSError):  # the system's, behind that of `write_atomically`
            why = why.__cause__
        raise OSError(f"cannot make the run folder {path}: {why.strerror}. Choose another with --run.") from error
    return path
