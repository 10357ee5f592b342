"""Run folders: one for each training run, never shared and never overwritten."""

import time
from pathlib import Path

CONFIG, METRICS, LAST, BEST = "config.yaml", "metrics.csv", "last.ckpt", "best.ckpt"


def new_run(folder: str | Path | None = None, name: str = "run") -> Path:
    """Make the folder of a new run: `folder`, or else `runs/NAME-DATE-TIME`, with a number added if that exists.

    Raises FileExistsError if `folder` exists, OSError if it cannot be made.
    """
    if folder is not None:
        try:
            return _make(Path(folder))
        except FileExistsError:
            raise FileExistsError(
                f"{folder} exists: a run never overwrites another. Continue it with --resume {folder}, "
                "or choose another folder."
            ) from None
    stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in range(1, 1000):
        try:
            return _make(Path("runs") / (stem if number == 1 else f"{stem}-{number}"))
        except FileExistsError:
            continue
    raise FileExistsError(f"runs/{stem} and 998 more like it exist")


def find_checkpoint(run: Path, which: str | None = None) -> Path:
    """The `best` or `last` checkpoint of a run; by default the best, or the last where nothing was held out.

    Raises FileNotFoundError where there is none.
    """
    names = [BEST, LAST] if which is None else [f"{which}.ckpt"]
    found = next((run / name for name in names if (run / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"no checkpoint in {run}: looked for {' and '.join(names)}; has it trained an epoch?")
    return found


def _make(path: Path) -> Path:
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        raise
    except OSError as error:
        raise OSError(f"cannot make the run folder {path}: {error.strerror}. Choose another with --run.") from error
    return path
