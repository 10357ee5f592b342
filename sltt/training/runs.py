"""Run folders: one for each training run, never overwritten, trained by one process at a time."""

import errno
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from sltt.training.describe import NETWORK
from sltt.training.files import part_of, write_atomically
from sltt.training.settings import RESUMABLE

CONFIG, METRICS, LAST, BEST, LOCK = "config.yaml", "metrics.csv", "last.ckpt", "best.ckpt", ".lock"


def new_run(folder: str | Path | None, name: str, config: dict[str, Any] | None, network: bytes | None) -> Path:
    """Make the folder of a new run: `folder`, or else `runs/NAME-DATE-TIME`, with a number added if that exists.

    It is there with its configuration and the file of its network, or not at all. An empty folder is taken.

    Raises FileExistsError if `folder` exists, OSError if it cannot be made.
    """
    if folder is not None:
        try:
            return _make(Path(folder), config, network)
        except FileExistsError:
            raise FileExistsError(
                f"{folder} exists: a run never overwrites another. Continue it with --resume {folder}, "
                "in Python with resume=True, or choose another folder."
            ) from None
    stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in range(1, 1000):
        with suppress(FileExistsError):
            return _make(Path("runs") / (stem if number == 1 else f"{stem}-{number}"), config, network)
    raise FileExistsError(f"runs/{stem} and 998 more like it exist")


def old_run(folder: str | Path | None) -> Path:
    """The folder of a run to resume; raises ValueError where it is none."""
    if folder is None:
        raise ValueError("resume=True needs the folder of the run to continue: run=...")
    run = Path(folder)
    if not any((run / name).exists() for name in (CONFIG, LAST, LOCK)):
        raise ValueError(f"resume=True continues a run, and {run} is not the folder of one: leave it out for a new run")
    return run


@contextmanager
def held(run: Path) -> Iterator[None]:
    """Inside this block no other process or thread trains the run; raises ValueError that says which one does.

    The system releases what a killed process held. Parts of files that such a process left are removed.
    """
    path = run / LOCK
    path.touch()
    # before the file is opened: the system's lock does not tell threads apart, and would go as a second one closes it
    if (here := path.stat().st_ino) in _held:
        raise ValueError(f"{run} is being trained by this process, in another thread: wait for it to end")
    _held.add(here)
    try:
        with path.open("r+", encoding="utf-8") as file:
            if not _lock(file.fileno()):
                raise ValueError(f"{run} is being trained by {file.read()}: wait for it to end, or end it")
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}")
            file.flush()
            for part in run.glob(".*.part"):
                part.unlink()
            yield
    finally:
        _held.remove(here)


_held: set[int] = set()  # files of locks, by their number, that this process has


def _lock(descriptor: int) -> bool:
    """Take the system's lock of a file, which a data worker does not inherit; False where another process has it."""
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(descriptor, 2**30, os.SEEK_SET)  # a byte beyond the text, which others may then still read
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            os.lseek(descriptor, 0, os.SEEK_SET)
        else:
            import fcntl

            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)  # some network file systems have no locks
    return True


def find_checkpoint(run: Path, which: str | None = None) -> Path:
    """The `best` or `last` checkpoint of a run; by default the best, or the last where nothing was held out.

    Raises FileNotFoundError where there is none.
    """
    names = [BEST, LAST] if which is None else [f"{which}.ckpt"]
    found = next((run / name for name in names if (run / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"no checkpoint in {run}: looked for {' and '.join(names)}; has it trained an epoch?")
    return found


def load_call(run: Path) -> str:
    """What to write in Python for the network of a run; one that cannot make it again takes it as `model`."""
    kept = (run / NETWORK).exists() or read_config(run).get("model")
    return f"sltt.load({str(run)!r}{'' if kept else ', model'})"


def read_config(run: Path) -> dict[str, Any]:
    """The configuration in the folder of a run; nothing where the file is gone."""
    return yaml.safe_load((run / CONFIG).read_text(encoding="utf-8")) if (run / CONFIG).exists() else {}


def write_config(run: Path, config: dict[str, Any]) -> None:
    """Write the configuration of a run into its folder."""
    write_atomically(run / CONFIG, lambda file: file.write(yaml.safe_dump(config, sort_keys=False).encode()))


def check_config(run: Path, saved: dict[str, Any], given: dict[str, Any] | None = None) -> None:
    """Raise ValueError where a run would continue with other settings than those in its checkpoint.

    Args:
        run: whose file of settings is compared, if it is there.
        saved: the settings in the checkpoint.
        given: those of this call; None and settings that one of them does not know are not compared.
    """
    if not saved:
        return
    saved, path = _plain(saved), run / CONFIG
    found = list(_differences(saved, as_continued(saved, given)))
    if path.exists():
        try:
            kept = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError):
            kept = None
        kept = with_names_of_today(kept)
        found += _differences(saved, kept) if isinstance(kept, dict) else [f"{CONFIG} is damaged"]
    if found:
        raise ValueError(
            f"the settings of {run} are not those that it was trained with: {'; '.join(dict.fromkeys(found))}. "
            f"Restore them: delete {path}, and the copy in the checkpoint is taken. Or start a new run with "
            f"--weights {run}."
        )


def changed(run: Path, given: dict[str, Any]) -> list[str]:
    """What the settings given change in those of a run's file, beyond what a run that goes on may change."""
    saved = read_config(run)
    return list(_differences(_plain(saved), as_continued(saved, given))) if saved else []


def as_continued(saved: dict[str, Any], given: dict[str, Any] | None) -> dict[str, Any]:
    """The settings of a run that goes on with those given.

    A run of an earlier version stays without options that came later: its file says what its checkpoint says.
    """
    if not saved:
        return given or {}
    saved, given = _plain(saved), _plain(given or {})
    return _known(saved, given) | {name: given[name] for name in RESUMABLE if name in given}


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration as its file gives it back, with the names of today."""
    return with_names_of_today(yaml.safe_load(yaml.safe_dump(config)))


_BPTT = {"BPTT", "sltt.BPTT", "sltt.rules.BPTT", "sltt.rules.truncated.BPTT"}


def with_names_of_today(config: Any) -> Any:
    """A configuration that may be of an earlier version: `BPTT(recompute=n)` is `BPTT(segment=n)`."""
    if isinstance(config, list):
        return [with_names_of_today(value) for value in config]
    if not isinstance(config, dict):
        return config
    config = {key: with_names_of_today(value) for key, value in config.items()}
    arguments = config.get("init_args")
    if config.get("class_path") in _BPTT and isinstance(arguments, dict):
        steps = arguments.get("recompute")
        if isinstance(steps, int) and not isinstance(steps, bool):
            config["init_args"] = {**arguments, "recompute": False, "segment": steps}
    return config


def _known(saved: Any, given: Any) -> Any:
    """What is given, without keys that are not saved: options of another version; with the saved ones that it lacks."""
    if not isinstance(saved, dict) or not isinstance(given, dict):
        return given
    return {key: _known(value, given[key]) if key in given else value for key, value in saved.items()}


def _differences(saved: dict[str, Any], found: dict[str, Any], path: str = "") -> Iterator[str]:
    for key in [*saved, *(key for key in found if key not in saved)]:
        name = f"{path}{key}"
        if name in RESUMABLE:
            continue
        if key not in found:
            yield f"{name} is missing"
        elif key not in saved:
            yield f"{name} is new"
        elif isinstance(saved[key], dict) and isinstance(found[key], dict):
            yield from _differences(saved[key], found[key], f"{name}.")
        elif saved[key] != found[key]:
            yield f"{name} was {saved[key]!r} and is {found[key]!r}"


def _make(path: Path, config: dict[str, Any] | None, network: bytes | None) -> Path:
    part = part_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.mkdir()
        (part / LOCK).touch()  # so that it is not empty, and no other run takes it
        if config is not None:
            write_config(part, config)
        if network is not None:
            (part / NETWORK).write_bytes(network)
        os.rename(part, path)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        if os.path.exists(path):  # False for a name that is too long, where that of Path raises
            raise FileExistsError(f"{path} exists") from None
        raise OSError(f"cannot make the run folder {path}: {error.strerror}. Choose another with --run.") from error
    return path
