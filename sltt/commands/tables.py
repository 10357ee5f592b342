"""A table of what a command found: for the terminal, for the page of `sltt report`, and as CSV."""

import csv
import io
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import rich.table

from sltt.training.console import Console, megabytes


class Cell(NamedTuple):
    """A cell of a table: its text, and the value to write to the CSV."""

    text: str
    value: Any


Row = Mapping[str, Cell | str]


def numeral(value: float | None, form: str = "", none: str = "–") -> Cell:
    """Return a number in a format; another text where there is none."""
    return Cell(none if value is None else format(value, form), value)


def bytes_cell(nbytes: int) -> Cell:
    """Return a number of bytes."""
    return Cell(f"{nbytes / 1e6:.3g} MB" if nbytes < 999.5e6 else megabytes(nbytes), nbytes)


class Table:
    """Rows of cells by their headings, with the name of its file and its caption; a cell that is not there is empty."""

    def __init__(self, rows: Sequence[Row], name: str = "", title: str = ""):
        self.name, self.title = name, title
        self.headings = list(dict.fromkeys(itertools.chain(*rows)))
        texts = [[row.get(heading, "") for heading in self.headings] for row in rows]
        self.rows = [[Cell(cell, cell) if isinstance(cell, str) else cell for cell in row] for row in texts]

    def kind(self, column: int) -> str:
        """Return how a column's cells are aligned: text, or number."""
        return "text" if all(isinstance(row[column].value, str) for row in self.rows) else "number"

    def show(self, report: Console) -> None:
        """Print the title, and the texts of the cells."""
        if self.title:
            report.line(self.title)
        shown = rich.table.Table(box=None, pad_edge=False)
        for column, heading in enumerate(self.headings):
            side = "left" if self.kind(column) == "text" else "right"
            shown.add_column(heading, justify=side, overflow="fold")
        for row in self.rows:
            shown.add_row(*(cell.text for cell in row))
        report.console.print(shown)

    def csv(self) -> str:
        """Return the values of the cells, with the headings above."""
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(self.headings)
        writer.writerows([cell.value for cell in row] for row in self.rows)
        return text.getvalue()
