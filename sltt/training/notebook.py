"""The progress bar of a run in a notebook: plain HTML, which needs no widgets."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SECONDS = 0.2  # between two updates: each is a message to the browser


class NotebookBar:
    """One bar for all epochs, in the place where the first began, so that the text below it stays in one piece."""

    def __init__(self) -> None:
        self._place: Any = None

    @contextmanager
    def __call__(self, title: str, total: int, done: int = 0) -> Iterator[Callable[[], None]]:
        """Show the bar, and give a function that moves it on by one; it vanishes at the end."""
        shown = -SECONDS

        def advance(by: int = 1) -> None:
            nonlocal done, shown
            done += by
            if time.monotonic() - shown >= SECONDS:
                shown = time.monotonic()
                text = f"{title} {done}/{total}"
                self._show(f'<progress max="{total}" value="{done}"></progress> <code>{text}</code>', text)

        advance(0)
        try:
            yield advance
        finally:
            self._show("", "")

    def _show(self, html: str, text: str) -> None:
        content = {"text/html": html, "text/plain": text}
        if self._place is None:
            from IPython.display import display  # pyright: ignore[reportMissingImports]  # there is one in a notebook

            self._place = display(content, raw=True, display_id=True)
        else:
            self._place.update(content, raw=True)
