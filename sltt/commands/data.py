"""`sltt data check`: whether a recipe's data is whole."""

from collections.abc import Sequence

from sltt.commands.failures import UsageError
from sltt.commands.parsing import Recipe, allow_only
from sltt.training.console import Console

USAGE = "usage: sltt data check RECIPE [--data.root DIR] [--steps T]"


def run(words: Sequence[str]) -> None:
    if list(words) in (["-h"], ["--help"]):
        print(USAGE)
        return
    if list(words[:1]) != ["check"] or len(words) < 2 or words[1].startswith("-"):
        raise UsageError(USAGE)
    allow_only(words[2:], ("data", "steps"), "sltt data check", "the others do not change the data")
    built = Recipe(f"sltt data check {words[1]}", words[1], words[2:]).build()
    splits = built.data.splits(built.steps)
    report = Console()
    for name, size in splits.sizes.items():
        report.line(f"{name:12} {size:8,} samples")
    if splits.classes is not None:
        report.line(f"{'classes':12} {splits.classes:8,}")
    report.line(f"{'split':12} {splits.fingerprint}")
    if missing := built.data.missing():
        lost = " and ".join(f"{count:,} {name} recordings" for name, count in missing.items())
        raise ValueError(f"the data set is partial: {lost} are not there: add them, or train on what is there")
    report.line("nothing is missing")
