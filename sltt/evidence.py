"""What the commands that measure do: `sltt agreement` and `sltt compare`."""

import itertools
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.table import Table
from torch import nn

from sltt.analysis import Operations, count_operations, peak_memory
from sltt.analysis.agreement import AGREES, SAVES, Agreement, Proposal, advice, agreement, cheaper, propose
from sltt.checkpoints import start_from
from sltt.failures import cause
from sltt.neurons import LIF
from sltt.options import Recipe, mixed_options
from sltt.prepared import prepared, test_accuracy
from sltt.progress import Report, megabytes
from sltt.train import fit


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
    report: Report,
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
    rows, data = [], recipe.build().data
    for tau, time_steps, epochs in itertools.product(taus, steps or [recipe.build().steps], at_epochs):
        built = recipe.build()
        built.data = data  # read once
        start_from(built.model, built.weights)
        if tau is not None:
            set_tau(built.model, tau)
        if epochs:
            settings = {**vars(built), "epochs": epochs, "steps": time_steps, "phases": None, "weights": None}
            with TemporaryDirectory() as folder:
                fit(**settings, run=f"{folder}/run", report=report)
        if dtype is not None:
            built.precision = 32
        with prepared(built, time_steps) as here:
            arguments = here.model, *here.batch(samples), here.loss
            found = agreement(*arguments, cheaper(here.model, time_steps), steps=here.repeat, dtype=dtype)
            proposal = propose(*arguments, found, steps=here.repeat, dtype=dtype)
        rows.append({"tau": tau, "steps": time_steps, "epochs": epochs, "agreement": found, "proposal": proposal})
    return rows


def print_agreement(rows: Sequence[dict[str, Any]], report: Report) -> None:
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


def compare(rules: Sequence[str], seeds: int, folder: Path, recipe: Recipe, report: Report) -> list[Compared]:
    """Train every rule with every seed, in all phases, and measure; what `folder` has of a run before is not run again.

    Args:
        rules: as for `rule_options`.
        seeds: number of seeds, from 0.
        folder: of all runs.
        recipe: what is trained.
        report: shows the progress.
    """
    found = []
    for text in rules:
        compared, seconds, measured = Compared(text), [], False
        for seed in range(seeds):
            run = folder / f"{re.sub('[^A-Za-z0-9.]+', '-', text).strip('-')}-seed{seed}"
            report.line(f"{text}, seed {seed}: {run}")
            try:
                built = recipe.build("--seed", str(seed), rule=text)
                config = recipe.resolved("--seed", str(seed), rule=text)
                result = fit(**vars(built), run=run, resume=run.exists(), config=config, report=report)
                accuracy = test_accuracy(built)
                if not measured:
                    _measure(compared, built)
                    measured = True
            except Exception as error:  # the others still run
                report.warn(f"{text}, seed {seed} died: {cause(error)}")
                compared.errors.append(f"seed {seed}: {cause(error)}")
                continue
            compared.accuracies.append(accuracy)
            seconds += [row["seconds"] for row in result.history]
        if seconds:
            compared.seconds = statistics.median(seconds)
        found.append(compared)
    return found


def print_compared(found: Sequence[Compared], report: Report) -> None:
    """A table with a row for each rule."""
    table = Table(box=None, pad_edge=False)
    for heading in ("rule", "accuracy", "s/epoch", "memory", "mult. fwd", "mult. bwd", "cosine"):
        table.add_column(heading, justify="left" if heading == "rule" else "right")
    for one in found:
        if not one.accuracies:
            table.add_row(one.rule, "died")
            continue
        assert one.operations is not None
        spread = f" ± {statistics.stdev(one.accuracies):.1%}" if len(one.accuracies) > 1 else ""
        table.add_row(
            one.rule,
            f"{statistics.mean(one.accuracies):.1%}{spread}",
            f"{one.seconds:.2f}",
            megabytes(one.peak_memory),
            f"{one.operations.forward:.2e}",
            f"{one.operations.backward:.2e}",
            f"{one.cosine:.3f}",
        )
    report.table(table)


def compared_json(recipe: str, found: Sequence[Compared]) -> dict[str, Any]:
    """The rows, for scripts."""
    rows = [{**vars(one), "operations": one.operations and one.operations._asdict()} for one in found]
    return {"recipe": recipe, "rows": rows}


def _measure(compared: Compared, built: Any) -> None:
    """Memory, multiplications and agreement of one training batch, on the trained weights."""
    with prepared(built, built.steps) as here:
        arguments = here.model, *here.batch(built.batch_size), here.loss

        def iteration() -> None:
            built.rule(*arguments, steps=here.repeat)

        iteration()  # makes the gradients, which all rules have
        compared.peak_memory = peak_memory(iteration, here.device)
        compared.operations = count_operations(*arguments, built.rule, steps=here.repeat)
        compared.cosine = agreement(*arguments, [built.rule], steps=here.repeat)[0].cosine
