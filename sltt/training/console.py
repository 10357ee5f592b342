"""Show a run in a terminal or a notebook: a bar while it works, a row for each epoch, warnings in between."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any

from rich.console import Console as Terminal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sltt.metrics import score_text
from sltt.system import escape


class Console:
    """Prints the progress of a run; the bar only in a terminal, or in a notebook with ipywidgets.

    Args:
        quiet: print nothing.
    """

    def __init__(self, quiet: bool = False):
        # In a notebook Rich makes a block of HTML for each line: plain text keeps the lines of a table together.
        self.console = Terminal(quiet=quiet, highlight=False, markup=False, force_jupyter=False)
        self._headed = False

    def line(self, text: str) -> None:
        """Print one line."""
        self.console.print(escape(text), soft_wrap=True)

    def warn(self, text: str) -> None:
        """Print a warning."""
        self.console.print(f"warning: {escape(text)}", style="yellow", soft_wrap=True)

    @contextmanager
    def bar(self, title: str, total: int, done: int = 0) -> Iterator[Callable[[], None]]:
        """Show a progress bar, and give a function that moves it on by one; it vanishes at the end."""
        console = Terminal() if Terminal().is_jupyter else self.console
        shown = find_spec("ipywidgets") is not None if console.is_jupyter else console.is_terminal
        columns = (TextColumn("{task.description}"), BarColumn(30), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True, disable=self.console.quiet or not shown) as bar:
            task = bar.add_task(title, total=total, completed=done)
            yield lambda: bar.advance(task)

    def row(self, metrics: dict[str, Any]) -> None:
        """Print the metrics of an epoch as a row of a table, with the headings above the first."""
        columns = _columns(metric_of(metrics))
        if not self._headed:
            self.line("  ".join(f"{heading:>7}" for _, heading, _ in columns))
            self._headed = True
        texts = [(head, "–" if (value := metrics.get(key)) is None else form(value)) for key, head, form in columns]
        self.line("  ".join(f"{text:>{max(7, len(head))}}" for head, text in texts))


def metric_of(row: dict[str, Any]) -> str:
    """Return the name of the metric in the metrics of an epoch."""
    prefix = "validation_"
    return next(key.removeprefix(prefix) for key in row if key.startswith(prefix) and key != f"{prefix}loss")


def megabytes(nbytes: int) -> str:
    """Return a number of bytes for people: 1.20 GB, 340 MB, 5.2 MB."""
    if nbytes >= 1e9:
        return f"{nbytes / 1e9:.2f} GB"
    return f"{nbytes / 1e6:.0f} MB" if nbytes >= 1e7 else f"{nbytes / 1e6:.2g} MB"


def as_json(value: Any) -> str:
    """JSON text; a number that is not finite is null, as JSON has none."""
    return json.dumps(_finite(value))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def _columns(metric: str) -> list[tuple[str, str, Callable[[Any], str]]]:
    """Columns of the table of epochs: key in the metrics, heading, format."""
    name = {"accuracy": "acc"}.get(metric, metric)
    return [
        ("epoch", "epoch", "{:d}".format),
        ("train_loss", "loss", "{:.4f}".format),
        (f"train_{metric}", f"train {name}", partial(score_text, metric)),
        (f"validation_{metric}", f"val {name}", partial(score_text, metric)),
        ("firing_rate", "firing rate", "{:.4f}".format),
        ("seconds", "seconds", "{:.1f}".format),
        ("peak_memory", "peak memory", megabytes),
    ]
