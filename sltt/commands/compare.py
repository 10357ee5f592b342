"""`sltt compare`: train several rules under the same budget, and print one table."""

import hashlib
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from sltt.analysis import Operations, agreement, count_operations, memory_parts
from sltt.commands.failures import cause
from sltt.commands.parsing import CommandOptions, Recipe, begin, count
from sltt.commands.prepared import prepared, test_accuracy
from sltt.commands.results import accuracy_text, give
from sltt.data import Classes
from sltt.metrics import name_of
from sltt.training.console import Console, megabytes
from sltt.training.fit import Fit, resume_run, start_run
from sltt.training.session import Session, session
from sltt.training.settings import Execution, Training

HELP = (
    "Train every rule with every seed, in all phases, under the recipe's budget. Print test accuracy (mean ± standard "
    "deviation), seconds for an epoch, and of one batch peak memory, multiplications and the gradient's cosine with "
    "BPTT's. Run again, it continues where it stopped. Other options are those of sltt train."
)


def run(words: Sequence[str]) -> None:
    """`sltt compare [RECIPE] [OPTION ...]`: train every rule with every seed, and print one table."""
    name, words = begin(words, "digits")
    options = CommandOptions("sltt compare [RECIPE]", HELP)
    options.add_rules()
    options.add_argument("--seeds", type=count, default=1, help="number of seeds; default: 1")
    options.add_output("default: runs/compare-RECIPE, and a mark of the options")
    known, overrides = options.parse_known_args(words)
    recipe = Recipe("sltt compare", name, overrides)
    known.save = known.save or default_folder("compare", recipe)
    for rule in known.rules:  # what is wrong with an option or a rule ends this before a training begins
        check_metric(recipe.build(rule=rule).metric, "sltt compare")
    found = compare(known.rules, known.seeds, known.save, recipe, Console(quiet=known.json))
    give(compared_json(recipe, found), known, "compare.json", lambda report: print_compared(found, report))
    tell_died(found)


def default_folder(command: str, recipe: Recipe, *more: str) -> Path:
    """Where trainings are kept without --save: other options are another folder."""
    words = [*recipe.overrides, *more]
    mark = f"-{hashlib.sha256(repr(words).encode()).hexdigest()[:6]}" if words else ""
    return Path("runs") / f"{command}-{recipe.name}{mark}"


def check_metric(metric: Any, command: str) -> None:
    """Raise ValueError for another metric than accuracy."""
    if name_of(metric) != "accuracy":
        raise ValueError(
            f"{command} compares accuracies, and the metric here is {name_of(metric)}: train each rule by "
            "sltt train --rule RULE, and give the folders of the runs to sltt report"
        )


@dataclass
class Compared:
    """One rule over its seeds.

    Attributes:
        rule: as it was asked for.
        accuracies: test accuracy of each seed.
        seconds: of a training epoch, median over epochs and seeds.
        peak_memory: bytes of one batch above what is allocated before.
        operations: multiplications of one batch.
        cosine: of the rule's gradient with BPTT's, on the first seed's trained weights.
        errors: of the seeds that died.
    """

    rule: str
    accuracies: list[float] = field(default_factory=list)
    seconds: float = math.nan
    peak_memory: int = 0
    operations: Operations | None = None
    cosine: float = math.nan
    errors: list[str] = field(default_factory=list)


def compare(rules: Sequence[str], seeds: int, folder: Path, recipe: Recipe, report: Console) -> list[Compared]:
    """Train every rule with every seed, in all phases, and measure; what `folder` has of a run before is not run again.

    Args:
        rules: as for `rule_options`.
        seeds: number of seeds, from 0.
        folder: of all runs.
        recipe: what is trained.
        report: shows the progress.
    """
    with session(Execution.of(vars(recipe.build()))) as here:
        return [_compared(here, text, seeds, folder, recipe, report) for text in rules]


def _compared(here: Session, rule: str, seeds: int, folder: Path, recipe: Recipe, report: Console) -> Compared:
    """One of the rules."""
    compared, seconds = Compared(rule), []
    for seed in range(seeds):
        try:
            built, result = train_one(here, rule, seed, folder, recipe, report)
            accuracy = test_accuracy(here, built)
            if compared.operations is None:
                _measure(compared, here, built)
        except Exception as error:  # the others still run
            report.warn(f"{rule}, seed {seed} died: {cause(error)}")
            compared.errors.append(f"seed {seed}: {cause(error)}")
            continue
        compared.accuracies.append(accuracy)
        seconds += [row["seconds"] for row in result.history]
    if seconds:
        compared.seconds = statistics.median(seconds)
    return compared


def train_one(
    here: Session,
    rule: str,
    seed: int,
    folder: Path,
    recipe: Recipe,
    report: Console,
    classes: list[int] | None = None,
) -> tuple[Any, Fit]:
    """Train one rule with one seed, or go on where its run in `folder` stopped; on the data's `classes` only, if given.

    Returns what the recipe builds, with the trained weights and its whole data, and the training.
    """
    run = folder / f"{re.sub('[^A-Za-z0-9.]+', '-', rule).strip('-')}-seed{seed}"
    report.line(f"{rule}, seed {seed}: {run}")
    built = recipe.build("--seed", str(seed), rule=rule)
    config, data = recipe.resolved("--seed", str(seed), rule=rule), built.data
    if classes is not None:
        data = Classes(data, classes)
        config["data"] = {
            "class_path": "sltt.data.Classes",
            "init_args": {"data": config["data"], "classes": classes},
        }
    train, training = resume_run if run.exists() else start_run, Training.of(vars(built))
    return built, train(here, built.model, data, training, run, config=config, report=report)


def tell_died(found: Sequence[Any]) -> None:
    """Raise RuntimeError if runs died, with the `rule` and the `errors` of each row."""
    if died := [f"{one.rule}, {error}" for one in found for error in one.errors]:
        raise RuntimeError(f"{len(died)} runs died; the same command tries them again: {'; '.join(died)}")


def print_compared(found: Sequence[Compared], report: Console) -> None:
    """A table with a row for each rule."""
    table = Table(box=None, pad_edge=False)
    for heading in ("rule", "accuracy", "s/epoch", "memory", "mult. fwd", "mult. bwd", "cosine"):
        table.add_column(heading, justify="left" if heading == "rule" else "right")
    for one in found:
        if not one.accuracies:
            table.add_row(one.rule, "died")
            continue
        assert one.operations is not None
        table.add_row(
            one.rule,
            accuracy_text(one.accuracies),
            f"{one.seconds:.2f}",
            megabytes(one.peak_memory),
            f"{one.operations.forward:.2e}",
            f"{one.operations.backward:.2e}",
            f"{one.cosine:.3f}",
        )
    report.table(table)


def compared_json(recipe: Recipe, found: Sequence[Compared]) -> dict[str, Any]:
    """The rows, for scripts, with T and the number of test samples."""
    built = recipe.build()
    test: Any = built.data.splits(built.steps).test
    samples = None if test is None else len(test)
    rows = [{**vars(one), "operations": one.operations and one.operations._asdict()} for one in found]
    return {"recipe": recipe.name, "steps": built.steps, "samples": samples, "rows": rows}


def _measure(compared: Compared, session: Session, built: Any) -> None:
    """Memory, multiplications and agreement of one training batch, on the trained weights."""
    with prepared(session, built, built.steps) as here:
        arguments = here.model, *here.batch(built.batch_size), here.loss
        compared.peak_memory = memory_parts(*arguments, built.rule, steps=here.repeat).batch
        compared.operations = count_operations(*arguments, built.rule, steps=here.repeat)
        compared.cosine = agreement(*arguments, [built.rule], steps=here.repeat)[0].cosine
