"""`sltt fscil`: few-shot class-incremental learning, for several rules and seeds."""

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from sltt.analysis.fewshot import FewShot, chance, draw_shots, embeddings, incremental, prototypes, session_sizes
from sltt.commands.compare import Contestant, default_folder, tell_died, train_one
from sltt.commands.failures import cause
from sltt.commands.parsing import CommandOptions, Recipe, begin, count, numbers, refuse_seed
from sltt.commands.results import give
from sltt.data import Classes, Splits
from sltt.data.classes import class_labels
from sltt.metrics import name_of
from sltt.training.batches import ending
from sltt.training.console import Console
from sltt.training.session import Session, session
from sltt.training.settings import Execution

SCORES = {"base": "A_base", "new": "A_new", "harmonic": "A_h", "last": "A_last", "average": "A_avg"}
CHANCE, PIXELS = "chance", "pixels"
HELP = (
    "Train on the first --base classes, freeze the network, then add --way classes in each session from --shot samples "
    "of each. A class is the mean embedding of its samples, and a test sample belongs to the nearest by cosine. Print "
    "the accuracy of all classes seen after each session, of several rules, of a guess (chance) and of the mean pixels "
    "of a class (pixels). Run again, it continues where it stopped. Other options are those of sltt train."
)


def options() -> CommandOptions:
    """What `sltt fscil` takes."""
    parser = CommandOptions("sltt fscil [RECIPE]", HELP)
    parser.add_argument("--base", type=count, required=True, help="classes of the base training")
    parser.add_argument("--way", type=count, default=5, help="new classes in a session; default: 5")
    parser.add_argument("--shot", type=count, default=5, help="samples of a new class; default: 5")
    parser.add_argument("--sessions", type=count, help="how many; default: until all classes have come")
    parser.add_argument("--order", type=numbers(int), help="classes in the order in which they come; default: 0,1,…")
    parser.add_rules()
    parser.add_argument("--seeds", type=count, default=3, help="number of seeds, of trainings and shots; default: 3")
    parser.add_output("default: runs/fscil-RECIPE, and a mark of the options")
    return parser


def run(words: Sequence[str]) -> None:
    """`sltt fscil RECIPE --base N [OPTION ...]`: train every rule with every seed, and print accuracy by session."""
    name, words = begin(words, "fscil-digits")
    known, overrides = options().parse_known_args(words)
    refuse_seed(overrides)
    recipe = Recipe("sltt fscil", name, overrides)
    known.save = known.save or default_folder("fscil", recipe, f"base {known.base}", f"order {known.order}")
    for rule in known.rules:  # what is wrong with an option or a rule ends this before a training begins
        if (name := name_of(recipe.build(rule=rule).metric)) != "accuracy":
            raise ValueError(f"sltt fscil compares accuracies, and the metric here is {name}: leave --metric out")
    task = Task.of(recipe, known.base, known.way, known.shot, known.sessions, known.order)
    found = few_shots(task, known.rules, known.seeds, known.save, Console(quiet=known.json))
    give(fewshot_json(task, found), known, "fscil.json", lambda report: print_few_shots(task, found, report))
    tell_died(found)


@dataclass
class Task:
    """Which classes come when.

    Attributes:
        recipe: what is trained.
        order: all classes, in the order in which they come.
        sizes: how many come at once, those of the base training first.
        shot: samples of a new class.
        data: the samples of these classes, numbered in this order.
    """

    recipe: Recipe
    order: list[int]
    sizes: list[int]
    shot: int
    data: Splits

    @classmethod
    def of(
        cls, recipe: Recipe, base: int, way: int, shot: int, sessions: int | None, order: list[int] | None
    ) -> "Task":
        """Read the data; raises ValueError where there are too few classes or samples, or a class comes twice."""
        built = recipe.build()
        splits = built.data.splits(built.steps)
        if splits.test is None:
            raise ValueError(f"{built.data} has no test samples, on which accuracy is measured: choose other data")
        if order and (twice := [one for one in order if order.count(one) > 1]):
            raise ValueError(f"class {twice[0]} stands twice in --order: sessions overlap, name each class once")
        listed = list(range(splits.classes or 0)) if order is None else order
        sizes = session_sizes(len(listed), base, way, sessions)
        listed = listed[: sum(sizes)]
        data = Classes(built.data, listed).splits(built.steps)
        task = cls(recipe, listed, sizes, shot, data)
        task.shots(0)
        return task

    @property
    def plain(self) -> Any:
        """Training samples without augmentation."""
        return self.data.train if self.data.plain is None else self.data.plain

    def shots(self, seed: int) -> list[int]:
        """Indices of the training samples that are seen: those of base classes, and a few of each new class."""
        labels, base = class_labels(self.plain), self.sizes[0]
        seen = [i for i, label in enumerate(labels) if label < base]
        return seen + draw_shots(labels, range(base, len(self.order)), self.shot, seed)


@dataclass
class FewShots:
    """One rule, or a baseline, over its seeds; `errors` are of the seeds that died."""

    rule: str
    found: list[FewShot] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def score(self, name: str) -> list[float]:
        """One of `SCORES`, for each seed."""
        return [getattr(one, name) for one in self.found]


def few_shots(task: Task, rules: Sequence[str], seeds: int, folder: Path, report: Console) -> list[FewShots]:
    """Train every rule with every seed on the base classes, and classify; then the baselines."""
    recipe, rows = task.recipe, []
    with session(Execution.of(vars(recipe.build()))) as here:
        for rule in rules:
            rows.append(row := FewShots(rule))
            for seed in range(seeds):
                try:
                    classes = task.order[: task.sizes[0]]
                    built, _ = train_one(here, Contestant(rule), seed, folder, recipe, report, classes)
                    row.found.append(_classified(here, task, seed, built))
                except Exception as error:  # the others still run
                    report.warn(f"{rule}, seed {seed} died: {cause(error)}")
                    row.errors.append(f"seed {seed}: {cause(error)}")
        pixels = [_classified(here, task, seed, recipe.build(), pixels=True) for seed in range(seeds)]
    return [*rows, FewShots(PIXELS, pixels), FewShots(CHANCE, [chance(task.sizes)])]


def _classified(here: Session, task: Task, seed: int, built: Any, pixels: bool = False) -> FewShot:
    """Classify the test samples by prototypes, of a network's embeddings or of pixels."""
    net = here.set_up(built.model)
    net.eval()

    def read(samples: Any) -> tuple[Tensor, Tensor]:
        loader, found = here.eval_loader(samples, task.data, built.batch_size), []
        with ending(loader):
            for x, y in loader:
                x, y = here.batch(x, y)
                if pixels:
                    found.append(((x if task.data.static else x.mean(0)).flatten(1), y))
                else:
                    found.append((embeddings(net, x, steps=built.steps if task.data.static else None), y))
        vectors, labels = zip(*found, strict=True)
        return torch.cat(vectors), torch.cat(labels)

    known = prototypes(*read(torch.utils.data.Subset(task.plain, task.shots(seed))), len(task.order))
    return incremental(known, *read(task.data.test), task.sizes)


def print_few_shots(task: Task, found: Sequence[FewShots], report: Console) -> None:
    """The scores of each rule, and its accuracy after each session."""
    sizes = task.sizes
    new = f"{len(sizes) - 1} × {sizes[1]} new ones of {task.shot} samples"
    report.line(f"{sizes[0]} base classes, {new}")
    report.line("accuracy in %, mean ± standard deviation over seeds")
    scores, sessions = Table(box=None, pad_edge=False), Table(box=None, pad_edge=False)
    for table, headings in ((scores, SCORES.values()), (sessions, map(str, itertools.accumulate(sizes)))):
        table.add_column("rule" if table is scores else "classes seen")
        for heading in headings:
            table.add_column(heading, justify="right")
    for row in found:
        if row.found:
            scores.add_row(row.rule, *(percent(row.score(name)) for name in SCORES))
            sessions.add_row(row.rule, *(f"{value:.1%}".rstrip("%") for value in row_means(row)))
        else:
            scores.add_row(row.rule, "died")
    report.table(scores)
    report.table(sessions)


def percent(values: Sequence[float]) -> str:
    """Mean ± standard deviation over seeds, in %."""
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"


def row_means(row: FewShots) -> list[float]:
    """The mean over seeds of the accuracy after each session."""
    return [statistics.mean(several) for several in zip(*(one.accuracies for one in row.found), strict=True)]


def fewshot_json(task: Task, found: Sequence[FewShots]) -> dict[str, Any]:
    """The rows, for scripts: a list over seeds of each score, and of the accuracies after each session."""
    rows = [
        {
            "rule": row.rule,
            "accuracies": [one.accuracies for one in row.found],
            **{name: row.score(name) for name in SCORES},
            "errors": row.errors,
        }
        for row in found
    ]
    given = {"sizes": task.sizes, "shot": task.shot, "order": task.order}
    return {"recipe": task.recipe.name, **given, "samples": task.data.sizes["test"], "rows": rows}
