"""Trainings that a script makes once: run again, it goes on where it stopped."""

import argparse
import json
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cells import Row
from jsonargparse import Namespace
from tables import fill
from torch import nn

import sltt
from sltt.commands import main as command
from sltt.commands.fit_parser import make_parser
from sltt.commands.parsing import ANY_PROCESSES, build_run
from sltt.training.console import Console
from sltt.training.evaluation import Split
from sltt.training.fit import Fit
from sltt.training.settings import OF_TRAINING

Measure = Callable[[Path, str, int, Path], Row]


class Log:
    """Rows of a JSON file, each in a line.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path):
        self.path = path
        self.rows: list[Row] = json.loads(path.read_text()) if path.exists() else []

    def find(self, case: Row) -> Row | None:
        """The row of a case, if it is there."""
        return next((row for row in self.rows if case.items() <= row.items()), None)

    def add(self, row: Row) -> Row:
        self.rows.append(row)
        self.write()
        return row

    def write(self) -> None:
        lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in self.rows)
        self.path.write_text(f"[\n{lines}\n]\n")


def call(words: Sequence[str]) -> None:
    """A command of `sltt`; where it fails, the script ends."""
    if code := command(list(words)):
        raise SystemExit(code)


def saved(words: Sequence[str], folder: Path) -> Any:
    """What a command saves in a folder."""
    call([*words, "--device", "cpu", "--save", str(folder)])
    return json.loads((folder / f"{words[0]}.json").read_text())


def train(words: Sequence[str], run: Path) -> None:
    """`sltt train` in a folder, where it goes on if it has begun."""
    begun = (run / "config.yaml").exists()
    call(["train", *(["--resume", str(run)] if begun else [*words, "--device", "cpu", "--run", str(run)])])


def built_run(run: Path) -> Namespace:
    """Make what the settings of a run name."""
    return build_run(make_parser("benchmark", OF_TRAINING), run, ANY_PROCESSES, None, None)[0]


def views(run: Path, split: Split, names: Sequence[str] = ("alone", "six")) -> dict[str, float]:
    """The accuracy of a run's last weights: by one view of each image, `alone`, and by the mean of six."""
    built = built_run(run)
    how = {"steps": built.steps, "precision": built.precision, "channels_last": built.channels_last, "device": "cpu"}
    kinds = {"alone": {}, "six": {"mirror": True, "shift": 1}}
    model = sltt.load(run, checkpoint="last")
    return {name: sltt.evaluate(model, built.data, split, **how, **kinds[name]).score for name in names}


def measure_cases(
    doc: str | None, path: Path, cases: Sequence[str], measure: Measure, base: Sequence[str] = ()
) -> None:
    """The command of a script that trains cases: each is a row of a log, and a folder.

    Args:
        doc: of the script.
        path: of the log.
        cases: all there are.
        measure: of the images, the case, the seed and the folder, what the row has beside case and seed.
        base: cases that are always measured, first.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs") / path.stem)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", nargs="+", choices=cases, default=list(cases))
    given = parser.parse_args()
    for case in dict.fromkeys([*base, *given.cases]):
        row = {"case": case, "seed": given.seed}
        if not Log(path).find(row):
            run = given.runs / f"{re.sub(r'[^a-z0-9.]+', '-', case.lower())}-{given.seed}"
            Log(path).add(row | measure(given.images, case, given.seed, run))
            fill()


def fit(model: nn.Module, data: sltt.data.Data, rule: sltt.Rule, *, quiet: bool = True, **settings: Any) -> Fit:
    """`sltt.fit` on the CPU, in a folder that is not kept."""
    with tempfile.TemporaryDirectory() as folder:
        how = {"device": "cpu", "run": Path(folder) / "run", "report": Console(quiet=quiet)}
        return sltt.fit(model, data, rule, **how, **settings)
