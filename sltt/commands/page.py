"""The page of `sltt report`: one file, which opens offline, from the parts that `sltt.commands.sections` makes."""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment
from matplotlib.figure import Figure

from sltt import __version__
from sltt.commands import figures
from sltt.commands.results import Gathered
from sltt.commands.tables import Table
from sltt.training.files import write_atomically


@dataclass
class Chart:
    """A figure with the name of its files and its caption."""

    name: str
    title: str
    figure: Figure

    @property
    def svg(self) -> str:
        """Return the figure as SVG for the page."""
        return figures.svg(self.figure, escape(self.title, quote=True))


@dataclass
class Section:
    """A part of the page: text, then figures, and tables."""

    title: str
    text: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)


def write(parts: Sequence[Section], found: Gathered, folder: Path) -> Path:
    """Write `report.html`, and beside it figures as PNG and SVG and tables as CSV; return the path of the page."""
    for name in ("figures", "data"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        if (folder / name).is_symlink():
            raise ValueError(f"{folder / name} is a link: remove it, or choose another folder by --out")
    for section in parts:
        for chart in section.charts:
            figures.save_figure(chart.figure, folder / "figures", _file_name(chart.name))
        for table in section.tables:
            path, text = folder / "data" / f"{_file_name(table.name)}.csv", table.csv()
            write_atomically(path, lambda file, text=text: file.write(text.encode()))
    results = [*found.comparisons, *found.profiles, *found.agreements, *found.fewshots]
    recipes = {result["recipe"] for result in results}
    title = f"Report: {', '.join(sorted(recipes) or [run.name for run in found.runs])}"
    environment = Environment(autoescape=True, trim_blocks=True)
    template = environment.from_string((files("sltt.commands") / "page.html").read_text(encoding="utf-8"))
    date = time.strftime("%Y-%m-%d %H:%M")
    page = template.render(title=title, version=__version__, date=date, notes=found.notes, sections=parts)
    write_atomically(folder / "report.html", lambda file: file.write(page.encode()))
    return folder / "report.html"


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]", "-", name)  # a run may call its metric ../../name
