"""Compare the gradient of each rule with that of BPTT: cosine and norm.

The output ends with the rule to take, for each τ, T and epoch. With --trial, short trainings decide. Other options are
those of sltt train: --model.…, --data.…
"""

import argparse
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

from sltt import kernels
from sltt.analysis.advice import LESS, Trial, advice, choose_rule
from sltt.analysis.agreement import AGREES, Agreement, agreement, cheaper_rules
from sltt.commands.failures import cause
from sltt.commands.parsing import CommandOptions, Recipe, count, numbers
from sltt.commands.prepared import Prepared
from sltt.commands.results import Gathered, gather, give
from sltt.commands.tables import Table, numeral
from sltt.commands.verdict import advice_on
from sltt.data import Data
from sltt.metrics import finite_scores, name_of
from sltt.neurons import LIF
from sltt.rules import BPTT, TBPTT, Rule
from sltt.training.console import Console
from sltt.training.evaluation import measure_split
from sltt.training.fit import Fit, train
from sltt.training.session import Session, session


def options() -> CommandOptions:
    parser = CommandOptions("sltt agreement [RECIPE]", __doc__)
    parser.add_argument("--taus", type=numbers(float), help="time constants of the LIF neurons; default: the recipe's")
    parser.add_argument("--steps", type=numbers(int), help="several T; default: the recipe's")
    epochs = "epochs of training before gradients are compared, such as 0,1,3; default: 0"
    parser.add_argument("--at-epochs", type=numbers(int), default=[0], help=epochs)
    trial = "train each rule for this many epochs; advised: a quarter of the recipe's; default: none"
    parser.add_argument("--trial", type=count, help=trial)
    parser.add_argument("--seeds", type=count, default=2, help="trainings with each rule in a trial; default: 2")
    parser.add_argument("--samples", type=count, default=128, help="training samples in the batch; default: 128")
    parser.add_output()
    return parser


def run(words: Sequence[str]) -> None:
    args, recipe = options().parse_recipe(words)
    if args.trial and (metric := name_of(recipe.build().metric)) != "accuracy":
        raise ValueError(f"--trial needs accuracies, and the metric here is {metric}: leave --metric or --trial out")
    rows = measure_agreement(recipe, args, Console(quiet=args.json))
    result = {"recipe": recipe.name, "rows": rows}
    gathered = gather([args.save]) if args.save and (args.save / "compare.json").exists() else Gathered()
    advised_rows = [{**row, "advice": advice_on(row, recipe.name, gathered)} for row in rows]
    give(result, args, "agreement.json", lambda report: print_agreement(advised_rows, report))


def measure_agreement(recipe: Recipe, args: argparse.Namespace, report: Console) -> list[dict[str, Any]]:
    """Return rows of `agreement.json` over τ, T and training epochs: rules beside BPTT, and the advice."""
    rows, own, trials = [], recipe.build(), {}
    taus: list[float | None] = args.taus or [None]
    steps: list[int] = args.steps or [own.steps]
    at_epochs: list[int] = args.at_epochs
    one_step = {"fold_memory": 0} if own.rule.fold == 1 else {}  # all rules take the recipe's fold
    with session(own) as here, kernels.using(**one_step):
        for tau, T, epochs in itertools.product(taus, steps, at_epochs):
            build = partial(_build, recipe, own.dataset, tau)  # the data is read once
            built = build()
            if epochs:
                _train(here, built, T, epochs, built.rule, report)
            ready = Prepared(here, built, T)
            batch = ready.model, *ready.batch(args.samples), ready.loss
            rules = cheaper_rules(ready.model, T)
            agreements = agreement(*batch, rules, steps=ready.repeat)
            memory = functools.cache(lambda rule, ready=ready: ready.memory(own.size, rule).batch)
            # to try: SLTT, OTTT if possible, BPTT; and, if neither agrees, the shortest window that does
            agrees = next((r for r, a in zip(rules, agreements, strict=True) if a.least >= AGREES), None)
            rivals = [*(r for r in rules if not isinstance(r, TBPTT) or r is agrees), BPTT()]
            rivals.sort(key=lambda r, of=memory: of(r) / (LESS if repr(r) == "BPTT()" else 1))
            if args.trial and (tau, T) not in trials:
                trials[tau, T] = rivals, _run_trial(here, build, rivals, T, args.trial, args.seeds, report)
            # after more epochs, other windows may agree than those that were tried
            rivals, tried = trials.get((tau, T), (rivals, None))
            compared = {a.rule: a for a in agreements}
            ranked = [compared.get(repr(r), EXACT) for r in rivals]
            rule = choose_rule(ranked, tried)
            costs = {repr(r): memory(r) for r in rivals if repr(r) in (rule, "SLTT()", "BPTT()")}
            how = {"fold": ready.fold.trained, "epochs": epochs, "samples": own.size, "training": own.epochs}
            learned = {"learned": {name: tried.shares(name) for name in tried.losses}} if tried else {}
            found = {"agreement": [vars(one) for one in agreements], "trial": tried and vars(tried) | learned}
            chosen = {"memory": costs, "rule": rule, "advice": advice(ranked, tried, costs, **how)}
            rows.append({"tau": tau, "steps": T, "epochs": epochs, **found, **chosen})
    return rows


def _build(recipe: Recipe, data: Data, tau: float | None, *options: str) -> Any:
    """Build a recipe with data that was read before, and with another time constant if one is given."""
    built = recipe.build(*options)
    built = replace(built, data=data)
    if tau is not None:
        neurons = [m for m in built.model.modules() if isinstance(m, LIF)]
        if not neurons:
            raise ValueError("--taus changes LIF neurons, and the model has none: leave --taus out")
        for neuron in neurons:
            neuron.tau = LIF(tau=tau).tau  # checked
    return built


def _train(here: Session, built: Any, steps: int, epochs: int, rule: Rule, report: Console) -> Fit:
    """Train what was built for some epochs with a rule, in a folder that is not kept."""
    with TemporaryDirectory() as folder:
        run = {"run": f"{folder}/run", "phases": None, "weights": None, "config": {}, "report": report}
        return train(here, replace(built, epochs=epochs, steps=steps, rule=rule, **run))


def _run_trial(
    here: Session,
    build: Callable[..., Any],
    rules: Sequence[Rule],
    steps: int,
    epochs: int,
    seeds: int,
    report: Console,
) -> Trial:
    """Train the recipe's network for some epochs with each rule and each seed from 0."""
    trial = Trial(epochs, [], {repr(rule): [] for rule in rules}, {repr(rule): [] for rule in rules})
    for seed in map(str, range(seeds)):
        built = build("--seed", seed)
        trial.start.append(measure_split(here, replace(built, steps=steps), "train").loss)
        for rule in rules:
            report.line(f"trial: {rule}, seed {seed}")
            try:
                last = _train(here, build("--seed", seed), steps, epochs, rule, report).history[-1]
            except Exception as error:  # the others still run
                report.warn(f"trial: {rule}, seed {seed} died: {cause(error)}")
                last = {"train_loss": math.inf, "train_accuracy": 0.0}
            trial.losses[repr(rule)].append(last["train_loss"])
            trial.accuracies[repr(rule)].append(last["train_accuracy"])
    return trial


EXACT = Agreement("BPTT()", 1.0, 1.0, 0.0, {}, 1.0)  # beside itself


def agreement_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return how the gradient of each rule is beside that of BPTT."""
    cells = [
        {
            "τ": numeral(row["tau"], "g", none="recipe's"),
            "T": numeral(row["steps"]),
            "epochs": numeral(row["epochs"]),
            "rule": rule["rule"],
            "cosine": numeral(rule["cosine"], ".4f"),
            "worst": numeral(rule["least"], ".4f"),
            "norm / BPTT": numeral(rule["norm_ratio"], ".3f"),
            "dropped": numeral(rule["dropped"], ".1%"),
        }
        for row in rows
        for rule in row["agreement"]
    ]
    return Table(cells, "agreement", "gradients beside that of exact BPTT")


def gradient_table(row: Mapping[str, Any]) -> Table:
    """Return the gradient of SLTT beside that of BPTT in each layer that has one."""
    layers = [
        {"layer": name or "(model)", "cosine": numeral(cosine, ".4f"), "norm / BPTT": numeral(ratio, ".3f")}
        for name, (cosine, ratio) in row["agreement"][0]["layers"].items()
        if finite_scores([cosine])
    ]
    return Table(layers, "layers", f"SLTT by layer, {where(row)}")


def where(row: Mapping[str, Any]) -> str:
    """Return at which τ, T and epoch the gradients of a row are."""
    tau = "" if row["tau"] is None else f"τ = {row['tau']:g}, "
    return f"{tau}T = {row['steps']}, after {row['epochs']} epoch{'s' * (row['epochs'] != 1)}"


def print_agreement(rows: Sequence[Mapping[str, Any]], report: Console) -> None:
    """Print a table of all rows, one of the layers of the last, and the advice for each."""
    agreement_table(rows).show(report)
    gradient_table(rows[-1]).show(report)
    for row in rows:
        report.line(f"{where(row)}: {row['advice']}")
