"""`sltt agreement`: the gradients of SLTT and truncated BPTT beside that of exact BPTT."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from rich.table import Table

from sltt.analysis.advice import Trial, advice, chosen
from sltt.analysis.agreement import AGREES, SAVES, Agreement, Proposal, agreement, batch_memory, cheaper, propose
from sltt.commands.parsing import CommandOptions, Recipe, begin, count, mixed_options, numbers, time_steps
from sltt.commands.prepared import prepared
from sltt.commands.results import give
from sltt.commands.trial import build, contestants, run_trial, train
from sltt.metrics import name_of
from sltt.rules import Mixed
from sltt.training.console import Console
from sltt.training.session import session
from sltt.training.settings import Execution

HELP = (
    "Compare the gradient of each rule with that of BPTT: cosine and norm. The last line says which rule to take. "
    "With --trial, short trainings decide it. Other options are those of sltt train: --model.…, --data.…"
)


def options() -> CommandOptions:
    """What `sltt agreement` takes."""
    parser = CommandOptions("sltt agreement [RECIPE]", HELP)
    parser.add_argument("--taus", type=numbers(float), help="time constants of the LIF neurons; default: the recipe's")
    parser.add_argument("--steps", type=numbers(time_steps), help="several T; default: the recipe's")
    parser.add_argument("--at-epochs", type=numbers(int), default=[0], help="after so many epochs of training each")
    parser.add_argument("--trial", type=count, help="compare trainings of so many epochs with each rule; default: none")
    parser.add_argument("--seeds", type=count, default=2, help="trainings with each rule in a trial; default: 2")
    parser.add_argument("--samples", type=count, default=128, help="training samples in the batch that is measured")
    parser.add_argument("--float64", action="store_true", help="compute in float64, where no spike flips by rounding")
    parser.add_output()
    return parser


def run(words: Sequence[str]) -> None:
    """`sltt agreement [RECIPE] [OPTION ...]`: the gradients of SLTT and truncated BPTT beside that of exact BPTT."""
    name, words = begin(words, "digits")
    known, overrides = options().parse_known_args(words)
    recipe = Recipe("sltt agreement", name, overrides)
    if known.trial and (metric := name_of(recipe.build().metric)) != "accuracy":
        raise ValueError(f"--trial compares accuracies, and the metric here is {metric}: leave --metric or --trial out")
    rows = measure_agreement(
        recipe,
        known.taus or [None],
        known.steps,
        known.at_epochs,
        known.samples,
        torch.float64 if known.float64 else None,
        Console(quiet=known.json),
        known.trial,
        known.seeds,
    )
    give(agreement_json(recipe.name, rows), known, "agreement.json", lambda report: print_agreement(rows, report))


def measure_agreement(
    recipe: Recipe,
    taus: Sequence[float | None],
    steps: Sequence[int] | None,
    at_epochs: Sequence[int],
    samples: int,
    dtype: torch.dtype | None,
    report: Console,
    trial: int | None = None,
    seeds: int = 2,
) -> list[dict[str, Any]]:
    """Rows of agreement over τ, T and training epochs, and over the windows of truncated BPTT, each with a proposal.

    Args:
        recipe: what is measured.
        taus: time constants; None is the recipe's.
        steps: numbers of time steps; None is the recipe's.
        at_epochs: measure after so many epochs of training with the recipe's rule.
        samples: size of the batch that is measured.
        dtype: for the gradients; None is the recipe's precision.
        report: shows the progress of trainings.
        trial: epochs of a short training with each rule; None makes none.
        seeds: number of these trainings with a rule.
    """
    rows, own, trials = [], recipe.build(), {}
    with session(Execution.of(vars(own))) as here:
        for tau, T, epochs in itertools.product(taus, steps or [own.steps], at_epochs):
            built = build(recipe, own.data, tau)  # the data is read once
            if epochs:
                train(here, built, T, epochs, built.rule, report)
            with prepared(here, built, T, full_precision=dtype is not None) as ready:
                arguments = ready.model, *ready.batch(samples), ready.loss
                rules = cheaper(ready.model, T)
                found = agreement(*arguments, rules, steps=ready.repeat, dtype=dtype)
                proposal = propose(*arguments, found, steps=ready.repeat, dtype=dtype)
                memory = batch_memory(*arguments, steps=ready.repeat)
                rivals = sorted(contestants(rules, found, proposal), key=memory)
                if trial and (tau, T) not in trials:
                    settings = {"tau": tau, "steps": T, "epochs": trial, "seeds": seeds, "report": report}
                    trials[tau, T] = rivals, run_trial(here, recipe, own.data, rivals, **settings)
                # after more epochs the gradients may propose others than those that were tried
                rivals, tried = trials.get((tau, T), (rivals, None))
                mixed = [r for r in rivals if isinstance(r, Mixed)]
                found += agreement(*arguments, mixed, steps=ready.repeat, dtype=dtype)
                compared = {a.rule: a for a in found}
                ranked = [compared[repr(r)] for r in rivals if repr(r) in compared]
                rule = chosen(ranked, tried)
                costs = {repr(r): memory(r) for r in rivals if repr(r) in (rule, "SLTT()", "BPTT()")}
            row = {"tau": tau, "steps": T, "epochs": epochs, "agreement": found, "trial": tried, "memory": costs}
            said = f"{advice(ranked, tried, costs, epochs=epochs, samples=samples)}{_of_mixed(rule, mixed)}"
            row |= {"rule": rule, "proposal": proposal, "advice": said}
            rows.append(row)
    return rows


def print_agreement(rows: Sequence[dict[str, Any]], report: Console) -> None:
    """A table of all rows, one of the layers of the last, and the advice for each."""
    table = Table(box=None, pad_edge=False)
    for heading in ("τ", "T", "epochs", "rule", "cosine", "worst", "norm / BPTT", "dropped"):
        table.add_column(heading, justify="left" if heading == "rule" else "right", overflow="fold")
    for row in rows:
        for a in row["agreement"]:
            tau = "recipe's" if row["tau"] is None else f"{row['tau']:g}"
            values = f"{a.cosine:.4f}", f"{a.least:.4f}", f"{a.norm_ratio:.3f}", f"{a.dropped:.1%}"
            table.add_row(tau, str(row["steps"]), str(row["epochs"]), a.rule, *values)
    report.table(table)
    last: Agreement = rows[-1]["agreement"][0]
    layers = Table(box=None, pad_edge=False, title="SLTT by layer, last row", title_justify="left")
    for heading in ("layer", "cosine", "norm / BPTT"):
        layers.add_column(heading, justify="left" if heading == "layer" else "right")
    for name, (cosine, ratio) in last.layers.items():
        if not math.isnan(cosine):
            layers.add_row(name or "(model)", f"{cosine:.4f}", f"{ratio:.3f}")
    report.table(layers)
    for row in rows:
        tau = "" if row["tau"] is None else f"τ = {row['tau']:g}, "
        report.line(f"{tau}T = {row['steps']}, after {row['epochs']} epochs: {row['advice']}")


def agreement_json(recipe: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The rows and their advice, for scripts."""
    found = [
        {
            **row,
            "agreement": [vars(a) for a in row["agreement"]],
            "trial": row["trial"] and _trial_json(row["trial"]),
            "proposal": row["proposal"] and _proposal_json(row["proposal"]),
        }
        for row in rows
    ]
    return {"recipe": recipe, "rows": found}


def _trial_json(trial: Trial) -> dict[str, Any]:
    return {**vars(trial), "learned": {rule: trial.learned(rule) for rule in trial.losses}}


def _proposal_json(proposal: Proposal) -> dict[str, Any]:
    return {**vars(proposal), "agreement": vars(proposal.agreement), "options": mixed_options(proposal.windows)}


def _of_mixed(rule: str, mixed: Sequence[Mixed]) -> str:
    """How to say a `Mixed` that is advised, or that there is none in place of a rule of more memory."""
    if advised := [r for r in mixed if repr(r) == rule]:
        return f" On the command line: {mixed_options(advised[0].windows)}"
    if mixed or rule in ("SLTT()", "OTTT()"):  # memory enough
        return ""
    return f" No Mixed with a cosine of {AGREES} takes {1 - SAVES:.0%} less memory."
