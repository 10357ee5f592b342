"""Train every rule with every seed, in all phases, for the recipe's epochs.

With --vary, train every value of other options too. Print the metric on the test samples (mean ± standard deviation),
seconds per epoch, peak memory of a batch, and the rule to take; without --vary also multiplications and the gradient's
cosine with BPTT's. Run the command again to continue. Other options are those of sltt train.
"""

import hashlib
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sltt.analysis import agreement, count_operations, measure_energy
from sltt.analysis.advice import count_of
from sltt.analysis.energy import as_text
from sltt.commands.failures import cause
from sltt.commands.parsing import RULES, CommandOptions, Recipe, count, refuse_seed
from sltt.commands.prepared import Prepared
from sltt.commands.results import Gathered, give, rule_of, scores_cell
from sltt.commands.tables import Cell, Row, Table, numeral
from sltt.commands.vary import grid, label_row, to_options, values
from sltt.commands.verdict import answers
from sltt.data import Classes, Splits
from sltt.data.own import find_labels
from sltt.metrics import Accuracy, MeanAbsoluteError, MeanSquaredError, higher_is_better, name_of
from sltt.sequence.modes import evaluation_mode
from sltt.sequence.padding import lengths_of
from sltt.training.console import Console, megabytes
from sltt.training.evaluation import measure_split
from sltt.training.fit import train
from sltt.training.runs import list_changes, read_config
from sltt.training.session import Session, session
from sltt.training.settings import Settings


def options() -> CommandOptions:
    parser = CommandOptions("sltt compare [RECIPE]", __doc__)
    parser.add_rules()
    parser.set_defaults(rules=None)  # those of `add_rules`, or with --vary that of the recipe
    text = "values to try, with the recipe's rule or --rules: model.neuron.tau=1.1,2,4; several make a grid"
    parser.add_argument("--vary", type=values, action="append", default=[], metavar="OPTION=A,B", help=text)
    parser.add_argument("--seeds", type=count, default=1, help="number of seeds; default: 1")
    parser.add_output("default: runs/compare-RECIPE, and a short hash of the options")
    return parser


def run(words: Sequence[str]) -> None:
    args, recipe = options().parse_recipe(words)
    refuse_seed(recipe.overrides)
    varied = grid(args.vary)
    args.save = args.save or default_folder("compare", recipe, *(option for option, _ in args.vary))
    rules = args.rules or ([None] if args.vary else RULES)
    combinations = [(rule, chosen) for rule in rules for chosen in varied]
    for rule, chosen in combinations:  # what is wrong with an option or a rule ends this before a training begins
        recipe.build(*to_options(chosen), rule=rule).stages()
    report = Console(quiet=args.json)
    rows = [compare(rule, chosen, args.seeds, args.save, recipe, report) for rule, chosen in combinations]
    result = compared_json(recipe, rows)
    give(result, args, "compare.json", lambda report: print_compared(result, report))
    tell_died(result["rows"])


def default_folder(command: str, recipe: Recipe, *more: str) -> Path:
    """Return the folder of trainings without --save: other options are another folder."""
    words = [*recipe.overrides, *more]
    mark = f"-{hashlib.sha256(repr(words).encode()).hexdigest()[:6]}" if words else ""
    return Path("runs") / f"{command}-{recipe.name}{mark}"


def compare(
    rule: str | None, varied: Mapping[str, str], seeds: int, folder: Path, recipe: Recipe, report: Console
) -> dict[str, Any]:
    """Train a rule, or that of the recipe, and values of what varies with every seed: a row of `compare.json`.

    What `folder` has of a run before is not run again.
    """
    row: dict[str, Any] = {
        "rule": rule or rule_of(recipe.resolve()),
        "varied": dict(varied),
        "steps": None,
        "runs": [],  # folder of each seed
        "scores": [],  # the metric on the test samples, of each seed
        "validation": [],  # the same on the validation samples, if there are any
        "seconds": math.nan,  # of a training epoch, median over epochs and seeds
        "seconds_of_seeds": [],  # the median over the epochs of each seed
        # see `_measure`
        **{"peak_memory": 0, "fold": 1, "operations": None, "cosine": math.nan, "energy": None},
        "errors": [],  # of the seeds that died
    }
    name, seconds = label_row(row["rule"], varied), []
    first = recipe.build(*to_options(varied), rule=rule)
    with session(first) as here:
        if here.splits(first.dataset, first.steps).test is None:
            raise ValueError(f"{first.data} has no test samples, on which rules are compared: choose other data")
        for seed in range(seeds):
            built, settings = settings_of(rule, varied, seed, folder, recipe, report)
            try:
                result = train(here, settings)
                built = replace(built, steps=result.steps)  # of phases, that of the weights
                measured = measure_split(here, built, "test")
                row["scores"].append(measured.score)
                row["runs"].append(result.run.name)
                row["validation"].append(result.history[result.epoch - 1][f"validation_{name_of(built.metric)}"])
                seconds += (of_seed := [epoch["seconds"] for epoch in result.history])
                row["seconds_of_seeds"].append(statistics.median(of_seed))
                row["steps"] = built.steps
                if row["operations"] is None:
                    _measure(row, name, here, built, report)
            except Exception as error:  # the others still run
                report.warn(f"{name}, seed {seed} died: {cause(error)}")
                row["errors"].append(f"seed {seed}: {cause(error)}")
    if seconds:
        row["seconds"] = statistics.median(seconds)
    return row


def settings_of(
    rule: str | None,
    varied: Mapping[str, str],
    seed: int,
    folder: Path,
    recipe: Recipe,
    report: Console,
    classes: list[int] | None = None,
) -> tuple[Settings, Settings]:
    """Return what the recipe builds, and of it a training with one seed, which goes on where its run has stopped.

    The training is on `classes` only, if given. Raises ValueError for a run with other settings.
    """
    name = label_row(rule or rule_of(recipe.resolve()), varied)
    run = folder / f"{_file_name(name)}-seed{seed}"
    report.line(f"{name}, seed {seed}: {run}")
    words = [*to_options(varied), "--seed", str(seed)]
    built = recipe.build(*words, rule=rule)
    data, config = built.dataset, built.config or {}
    if classes is not None:
        data = Classes(data, classes)
        whole = {"data": config["data"], "classes": classes}
        config = {**config, "data": {"class_path": "sltt.data.Classes", "init_args": whole}}
    if resume := run.exists():
        saved = read_config(run)  # empty where the checkpoint has the copy
        other = list_changes(saved, config) + ["epochs"] * (saved.get("epochs", config["epochs"]) != config["epochs"])
        if other:
            raise ValueError(f"{run} was trained with other settings ({'; '.join(other)}): choose another --save")
    return built, replace(built, data=data, run=run, resume=resume, config=config, report=report)


def _file_name(label: str) -> str:
    """Return a row's name in letters, digits, dots and dashes; a sign is a word, so that -0.5 and 0.5 differ."""
    label = re.sub(r"(?<![A-Za-z0-9.])-(?=[\d.])", "minus", label.replace("+", "plus"))
    return re.sub("[^A-Za-z0-9.]+", "-", label).strip("-")


def tell_died(rows: Sequence[Mapping[str, Any]]) -> None:
    """Raise RuntimeError if runs died, with the `rule` and the `errors` of each row."""
    if died := [f"{row['rule']}, {error}" for row in rows for error in row["errors"]]:
        raise RuntimeError(f"{count_of(len(died), 'run')} died; the same command tries them again: {'; '.join(died)}")


def compared_json(recipe: Recipe, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the rows, for scripts, with T and the number of test samples."""
    built = recipe.build()
    splits, steps = built.dataset.splits(built.steps), next((r["steps"] for r in rows if r["steps"]), built.steps)
    if name_of(built.metric) == "accuracy":  # by this name too, as scripts know it
        rows = [{**row, "accuracies": row["scores"]} for row in rows]
    about = {"metric": name_of(built.metric), "higher_is_better": higher_is_better(built.metric)}
    about |= {"recipe": recipe.name, "model": recipe.resolve()["model"], "batch": built.size, "steps": steps}
    about |= {"epochs": built.epochs, "samples": splits.sizes["test"] or None, "classes": splits.classes}
    held_out, chance = splits.sizes["validation"] or None, _chance(splits, built.metric)
    return {**about, "validation_samples": held_out, "chance": chance, "rows": rows}


def _chance(splits: Splits, metric: Any) -> float | None:
    """Return the score of one answer for all test samples, the most frequent class or the mean; None if not known."""
    test: Any = splits.test
    targets = (torch.as_tensor(test[i][1]) for i in range(len(test)))
    if isinstance(metric, Accuracy) and splits.classes:
        counts = torch.zeros(splits.classes, dtype=torch.long)
        for label in map(torch.as_tensor, find_labels(test, None) or targets):
            counts += label[(label >= 0) & (label < splits.classes)].bincount(minlength=splits.classes)
        return counts.max().item() / max(int(counts.sum()), 1)
    if isinstance(metric, MeanAbsoluteError | MeanSquaredError):
        listed = [target.double() for target in targets]
        if len({target.shape for target in listed}) == 1:  # not of sequences of several lengths
            numbers = torch.stack(listed)
            return float(metric(numbers.mean(0).expand_as(numbers), numbers))
    return None


def comparison_table(rows: Sequence[Mapping[str, Any]], metric: str) -> Table:
    """Return a table with a row for each; where options vary, with the score on the validation samples too."""
    varied, table_rows = any(row.get("varied") for row in rows), []
    for row in rows:
        if not row["scores"]:
            table_rows.append({metric if varied else "rule": row["rule"], "validation" if varied else metric: "died"})
            continue
        test, operations = scores_cell(row["scores"], metric), row["operations"] or {}
        if varied:
            cells = {metric: row["rule"], "validation": scores_cell(row["validation"], metric), "test": test}
        else:
            cells = {"rule": row["rule"], metric: test}
        cells["s/epoch"] = numeral(row["seconds"], ".2f")
        # none where the training went well, and measuring it did not
        cells["memory"] = Cell(megabytes(row["peak_memory"]), row["peak_memory"]) if operations else numeral(None)
        if not varied:
            cells["mult. fwd"] = numeral(operations.get("forward"), ".2e")
            cells["mult. bwd"] = numeral(operations.get("backward"), ".2e")
            cells["cosine"] = numeral(row["cosine"], ".3f")
        table_rows.append(cells)
    return Table(table_rows, "comparison")


def ratio_tables(rows: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Return a table of the energies of ANNs over that of the network that each rule trained, if they are known."""
    table_rows: list[Row] = []
    for row in (row for row in rows if row.get("energy")):
        ratios = row["energy"]["ratios"]
        matched = zip(("matched", "+ neurons", "+ chip", "+ DRAM"), ratios, strict=True)
        cells = {"32 bits": ratios[0]["32 bits"], **{name: ratio["matched bits"] for name, ratio in matched}}
        cells["equal at rate"] = ratios[2]["equal at a firing rate of"]
        table_rows.append({"rule": row["rule"], **{name: Cell(as_text(value), value) for name, value in cells.items()}})
    title = "energy, ANN / SNN: operations in 32 and in matched bits, + neurons, + memory"
    return [Table(table_rows, "ratios", title)] if table_rows else []


def print_compared(comparison: Mapping[str, Any], report: Console) -> None:
    """Print the table, and the best values or what each rule loses."""
    rows = [{**row, "rule": label_row(row["rule"], row["varied"])} for row in comparison["rows"]]
    for table in (comparison_table(rows, comparison["metric"]), *ratio_tables(rows)):
        table.show(report)
    for sentence in answers(Gathered(comparisons=[{**comparison, "rows": rows}])):
        report.line(sentence)


def _measure(row: dict[str, Any], name: str, here: Session, built: Settings, report: Console) -> None:
    """Measure one training batch, on the trained weights, as far as it goes."""
    try:
        ready = Prepared(here, built, built.steps)
        x, y = ready.batch(built.size)
        arguments = ready.model, x, y, ready.loss
        row["peak_memory"] = ready.memory(built.size).batch
        row["fold"] = ready.fold.trained
        row["operations"] = count_operations(*arguments, built.rule, steps=ready.repeat)._asdict()
        with evaluation_mode(ready.model):
            row["energy"] = measure_energy(ready.model, x, steps=ready.repeat, lengths=lengths_of(y)).tables()
        row["cosine"] = agreement(*arguments, [built.rule], steps=ready.repeat)[0].cosine
    except Exception as error:  # BPTT, for the cosine, may need more memory than there is; the training is done
        report.warn(f"{name}: not all is measured: {cause(error)}")
