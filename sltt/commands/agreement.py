"""`sltt agreement`: the gradients of SLTT and truncated BPTT beside that of exact BPTT."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.table import Table
from torch import nn

from sltt.analysis.agreement import AGREES, SAVES, Agreement, Proposal, advice, agreement, cheaper, propose
from sltt.commands.parsing import CommandOptions, Recipe, begin, count, mixed_options, numbers, time_steps
from sltt.commands.prepared import prepared
from sltt.commands.results import SAVE_HELP, give
from sltt.neurons import LIF
from sltt.training.checkpoints import start_from
from sltt.training.console import Console, megabytes
from sltt.training.fit import start_run
from sltt.training.session import session
from sltt.training.settings import Execution, Training

HELP = (
    "Cosine and norm of the gradients of SLTT and of truncated BPTT beside that of exact BPTT, and which rule to take; "
    "where it is not SLTT, a Mixed that takes less memory, if there is one. "
    "Other options are those of sltt train: --model.…, --data.…"
)


def run(words: Sequence[str]) -> None:
    """`sltt agreement [RECIPE] [OPTION ...]`: the gradients of SLTT and truncated BPTT beside that of exact BPTT."""
    name, words = begin(words, "digits")
    options = CommandOptions("sltt agreement [RECIPE]", HELP)
    options.add_argument("--taus", type=numbers(float), help="time constants of the LIF neurons; default: the recipe's")
    options.add_argument("--steps", type=numbers(time_steps), help="several T; default: the recipe's")
    options.add_argument("--at-epochs", type=numbers(int), default=[0], help="after so many epochs of training each")
    options.add_argument("--samples", type=count, default=128, help="training samples in the batch that is measured")
    options.add_argument("--float64", action="store_true", help="compute in float64, where no spike flips by rounding")
    options.add_argument("--json", action="store_true", help="print JSON")
    options.add_argument("--save", type=Path, metavar="FOLDER", help=SAVE_HELP)
    known, overrides = options.parse_known_args(words)
    recipe = Recipe("sltt agreement", name, overrides)
    rows = measure_agreement(
        recipe,
        known.taus or [None],
        known.steps,
        known.at_epochs,
        known.samples,
        torch.float64 if known.float64 else None,
        Console(quiet=known.json),
    )
    give(agreement_json(recipe.name, rows), known, "agreement.json", lambda report: print_agreement(rows, report))


def set_tau(model: nn.Module, tau: float) -> None:
    """Give every LIF neuron another time constant; raises ValueError if there is none."""
    neurons = [m for m in model.modules() if isinstance(m, LIF)]
    if not neurons:
        raise ValueError("--taus changes LIF neurons, and the model has none")
    for neuron in neurons:
        neuron.tau = LIF(tau=tau).tau  # checked


def measure_agreement(
    recipe: Recipe,
    taus: Sequence[float | None],
    steps: Sequence[int] | None,
    at_epochs: Sequence[int],
    samples: int,
    dtype: torch.dtype | None,
    report: Console,
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
    """
    rows, own = [], recipe.build()
    with session(Execution.of(vars(own))) as here:
        for tau, T, epochs in itertools.product(taus, steps or [own.steps], at_epochs):
            built = recipe.build()
            built.data = own.data  # read once
            start_from(built.model, built.weights)
            if tau is not None:
                set_tau(built.model, tau)
            if epochs:
                settings = {**vars(built), "epochs": epochs, "steps": T, "phases": None, "weights": None}
                with TemporaryDirectory() as folder:
                    start_run(here, built.model, own.data, Training.of(settings), f"{folder}/run", report=report)
            with prepared(here, built, T, full_precision=dtype is not None) as ready:
                arguments = ready.model, *ready.batch(samples), ready.loss
                found = agreement(*arguments, cheaper(ready.model, T), steps=ready.repeat, dtype=dtype)
                proposal = propose(*arguments, found, steps=ready.repeat, dtype=dtype)
            rows.append({"tau": tau, "steps": T, "epochs": epochs, "agreement": found, "proposal": proposal})
    return rows


def print_agreement(rows: Sequence[dict[str, Any]], report: Console) -> None:
    """A table of all rows, one of the layers of the last, and the advice for each."""
    table = Table(box=None, pad_edge=False)
    for heading in ("τ", "T", "epochs", "rule", "cosine", "worst", "norm / BPTT", "dropped"):
        table.add_column(heading, justify="left" if heading == "rule" else "right")
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
        report.line(f"{tau}T = {row['steps']}, after {row['epochs']} epochs: {_advice(row)}")


def agreement_json(recipe: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The rows and their advice, for scripts."""
    found = [
        {
            **row,
            "agreement": [vars(a) for a in row["agreement"]],
            "advice": _advice(row),
            "proposal": row["proposal"] and _proposal_json(row["proposal"]),
        }
        for row in rows
    ]
    return {"recipe": recipe, "rows": found}


def _proposal_json(proposal: Proposal) -> dict[str, Any]:
    return {**vars(proposal), "agreement": vars(proposal.agreement), "options": mixed_options(proposal.windows)}


def _advice(row: dict[str, Any]) -> str:
    """Which rule to take, and where it is not SLTT, the `Mixed` that takes less memory."""
    found: list[Agreement] = row["agreement"]
    proposal: Proposal | None = row["proposal"]
    untrained = " An untrained network says little: measure again with --at-epochs 1." * (row["epochs"] == 0)
    if any(a.least >= AGREES for a in found if a.rule in ("SLTT()", "OTTT()")):
        return advice(found) + untrained
    if proposal is None:
        return f"{advice(found)}{untrained} No Mixed with a cosine of {AGREES} takes {1 - SAVES:.0%} less memory."
    others = ", ".join(f"{rule} {megabytes(nbytes)}" for rule, nbytes in proposal.others.items())
    return (
        f"{advice(found)}{untrained} Or {mixed_options(proposal.windows)} (cosine {proposal.agreement.cosine:.3f}), "
        f"which takes {megabytes(proposal.memory)} for this batch; {others}."
    )
