"""Train on the first --base classes, freeze the network, then add classes from a few samples.

A session adds --way classes, from --shot samples of each. A class is the mean embedding of its samples, and a test
sample belongs to the nearest by cosine. Print the accuracy of all classes seen after each session, of several rules, of
a guess (chance) and of the mean pixels of a class (pixels). Run it again to continue. Other options are of sltt train.
"""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sltt.analysis.fewshot import FewShot, chance, draw_shots, embeddings, incremental, prototypes, session_sizes
from sltt.commands.compare import default_folder, settings_of, tell_died
from sltt.commands.failures import cause
from sltt.commands.parsing import CommandOptions, Recipe, count, numbers, refuse_seed
from sltt.commands.results import give, scores_text
from sltt.commands.tables import Cell, Row, Table, numeral
from sltt.data import Classes, Splits
from sltt.data.classes import class_labels
from sltt.metrics import name_of
from sltt.sequence.padding import Padded
from sltt.training.batches import finish_loaders
from sltt.training.console import Console
from sltt.training.fit import train
from sltt.training.session import Session, session

SCORES = {"base": "A_base", "new": "A_new", "harmonic": "A_h", "last": "A_last", "average": "A_avg"}
CHANCE, PIXELS = "chance", "pixels"


def options() -> CommandOptions:
    parser = CommandOptions("sltt fscil [RECIPE]", __doc__)
    parser.add_argument("--base", type=count, required=True, help="classes of the base training")
    parser.add_argument("--way", type=count, default=5, help="new classes in a session; default: 5")
    parser.add_argument("--shot", type=count, default=5, help="samples of a new class; default: 5")
    parser.add_argument("--order", type=numbers(int), help="classes in the order in which they come; default: 0,1,…")
    parser.add_rules()
    parser.add_argument("--seeds", type=count, default=3, help="number of seeds, of trainings and shots; default: 3")
    parser.add_output("default: runs/fscil-RECIPE, and a short hash of the options")
    return parser


def run(words: Sequence[str]) -> None:
    args, recipe = options().parse_recipe(words, "fscil-digits")
    refuse_seed(recipe.overrides)
    args.save = args.save or default_folder("fscil", recipe, f"base {args.base}", f"order {args.order}")
    for rule in args.rules:  # what is wrong with an option or a rule ends this before a training begins
        if (name := name_of(recipe.build(rule=rule).metric)) != "accuracy":
            raise ValueError(f"sltt fscil compares accuracies, and the metric here is {name}: leave --metric out")
    task = Task(recipe, args.base, args.way, args.shot, args.order)
    rows = few_shots(task, args.rules, args.seeds, args.save, Console(quiet=args.json))
    about = {"recipe": recipe.name, "sizes": task.sizes, "shot": task.shot, "order": task.order}
    result = {**about, "samples": task.data.sizes["test"], "rows": rows}
    give(result, args, "fscil.json", lambda report: print_few_shots(result, report))
    tell_died(rows)


class Task:
    """Data and sessions; raises ValueError for too few classes or samples, or for a class that comes twice."""

    def __init__(self, recipe: Recipe, base: int, way: int, shot: int, order: list[int] | None):
        built = recipe.build()
        splits = built.dataset.splits(built.steps)
        if splits.test is None:
            raise ValueError(f"{built.dataset} has no test samples, on which accuracy is measured: choose other data")
        listed = list(range(splits.classes or 0)) if order is None else order
        self.recipe, self.shot = recipe, shot
        self.sizes = session_sizes(len(listed), base, way)  # how many classes come at once
        self.order = listed  # in which classes come, and are numbered in the data
        self.data: Splits = Classes(built.dataset, self.order).splits(built.steps)
        if isinstance(self.data.collate([self.data.unaugmented_train[0]])[1], Padded):  # pyright: ignore[reportIndexIssue]
            raise ValueError(f"{built.dataset} pads its sequences, and embeddings are of T steps: leave pad=True out")
        if untested := sorted({*range(len(self.order))} - {*class_labels(self.data.test)}):
            raise ValueError(f"class {self.order[untested[0]]} has no test samples: leave it out, by --order")
        self.shots(0)

    def shots(self, seed: int) -> list[int]:
        """Return the indices of training samples that are seen: those of base classes, and a few of each new class."""
        labels, base = class_labels(self.data.unaugmented_train), self.sizes[0]
        seen = [i for i, label in enumerate(labels) if label < base]
        return seen + draw_shots(labels, range(base, len(self.order)), self.shot, seed)


def few_shots(task: Task, rules: Sequence[str], seeds: int, folder: Path, report: Console) -> list[dict[str, Any]]:
    """Train every rule with every seed on the base classes, and classify; then the baselines: rows of `fscil.json`."""
    recipe, rows = task.recipe, []
    with session(recipe.build()) as here:
        for rule in rules:
            scored: list[FewShot] = []
            errors: list[str] = []
            for seed in range(seeds):
                classes = task.order[: task.sizes[0]]
                built, settings = settings_of(rule, {}, seed, folder, recipe, report, classes)
                try:
                    steps = train(here, settings).steps  # of phases, that of the weights
                    scored.append(_classify(here, task, seed, replace(built, steps=steps)))
                except Exception as error:  # the others still run
                    report.warn(f"{rule}, seed {seed} died: {cause(error)}")
                    errors.append(f"seed {seed}: {cause(error)}")
            rows.append(_row(rule, scored, errors))
        pixels = [_classify(here, task, seed, recipe.build(), pixels=True) for seed in range(seeds)]
    return [*rows, _row(PIXELS, pixels), _row(CHANCE, [chance(task.sizes)])]


def _row(rule: str, runs: Sequence[FewShot], errors: Sequence[str] = ()) -> dict[str, Any]:
    """Return lists over seeds of the accuracies after each session, and of each score; errors are of failed seeds."""
    scores = {name: [getattr(scored, name) for scored in runs] for name in SCORES}
    return {"rule": rule, "accuracies": [scored.accuracies for scored in runs], **scores, "errors": list(errors)}


def _classify(here: Session, task: Task, seed: int, built: Any, pixels: bool = False) -> FewShot:
    """Classify the test samples by prototypes, of a network's embeddings or of pixels."""
    net = here.set_up(built.model)
    net.eval()

    def read(samples: Any) -> tuple[Tensor, Tensor]:
        loader, batches = here.eval_loader(samples, task.data, built.batch_size), []
        with finish_loaders(loader):
            for x, y in loader:
                x, y = here.batch(x, y)
                if pixels:
                    batches.append(((x if task.data.static else x.mean(0)).flatten(1), y))
                else:
                    batches.append((embeddings(net, x, steps=built.steps if task.data.static else None), y))
        vectors, labels = zip(*batches, strict=True)
        return torch.cat(vectors), torch.cat(labels)

    classes = prototypes(*read(torch.utils.data.Subset(task.data.unaugmented_train, task.shots(seed))), len(task.order))
    return incremental(classes, *read(task.data.test), task.sizes)


def score_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the scores of each rule over its seeds."""
    table_rows: list[Row] = []
    for row in rows:
        reached = SCORES if row["accuracies"] else {}
        cells = {
            heading: Cell(scores_text(row[name]).replace("%", ""), statistics.mean(row[name]))
            for name, heading in reached.items()
        }
        table_rows.append({"rule": row["rule"], **(cells or {SCORES["base"]: Cell("died", "")})})
    return Table(table_rows, "fscil", "accuracy in %, mean ± standard deviation over seeds")


def print_few_shots(result: Mapping[str, Any], report: Console) -> None:
    """Print the scores of each rule, and its accuracy after each session."""
    base, *sessions = result["sizes"]
    report.line(f"{base} base classes, {len(sessions)} × {sessions[0]} new ones of {result['shot']} samples")
    score_table(result["rows"]).show(report)
    seen = list(map(str, itertools.accumulate(result["sizes"])))
    rows = []
    for row in result["rows"]:
        if row["accuracies"]:
            means = (numeral(100 * statistics.mean(several), ".1f") for several in zip(*row["accuracies"], strict=True))
            rows.append({"classes seen": row["rule"], **dict(zip(seen, means, strict=True))})
    Table(rows).show(report)
