"""Short trainings of a recipe with several rules, from the same weights and on the same batches."""

import math
from collections.abc import Sequence
from tempfile import TemporaryDirectory
from typing import Any

from sltt.analysis.advice import Trial
from sltt.analysis.agreement import AGREES, Agreement, Proposal
from sltt.commands.failures import cause
from sltt.commands.parsing import Recipe
from sltt.data import Data
from sltt.neurons import LIF
from sltt.rules import BPTT, TBPTT, Mixed, Rule
from sltt.training.console import Console
from sltt.training.evaluation import measure_settings, measure_split
from sltt.training.fit import Fit, start_run
from sltt.training.session import Session
from sltt.training.settings import Training


def build(recipe: Recipe, data: Data, tau: float | None, *options: str) -> Any:
    """Build a recipe with data that was read before, and with another time constant if one is given."""
    built = recipe.build(*options)
    built.data = data
    if tau is not None:
        neurons = [m for m in built.model.modules() if isinstance(m, LIF)]
        if not neurons:
            raise ValueError("--taus changes LIF neurons, and the model has none: leave --taus out")
        for neuron in neurons:
            neuron.tau = LIF(tau=tau).tau  # checked
    return built


def train(here: Session, built: Any, steps: int, epochs: int, rule: Rule, report: Console) -> Fit:
    """Train what was built for some epochs with a rule, in a folder that is not kept."""
    settings = {**vars(built), "epochs": epochs, "steps": steps, "rule": rule, "phases": None, "weights": None}
    with TemporaryDirectory() as folder:
        return start_run(
            here, built.model, built.data, Training.of(settings), f"{folder}/run", config={}, report=report
        )


def contestants(rules: Sequence[Rule], found: Sequence[Agreement], proposal: Proposal | None) -> list[Rule]:
    """List the rules to try: SLTT, OTTT where it knows the network, a window and a `Mixed` that agree, and BPTT."""
    agrees = next((r for r, a in zip(rules, found, strict=True) if a.least >= AGREES), None)
    mixed = [Mixed(proposal.windows)] if proposal else []
    return [*(r for r in rules if not isinstance(r, TBPTT) or r is agrees), *mixed, BPTT()]


def run_trial(
    here: Session,
    recipe: Recipe,
    data: Data,
    rules: Sequence[Rule],
    tau: float | None,
    steps: int,
    epochs: int,
    seeds: int,
    report: Console,
) -> Trial:
    """Train the recipe's network for some epochs with each rule and each seed from 0."""
    trial = Trial(epochs, [], {repr(rule): [] for rule in rules}, {repr(rule): [] for rule in rules})
    for seed in map(str, range(seeds)):
        built = build(recipe, data, tau, "--seed", seed)
        sizes = {**measure_settings(built), "steps": steps}
        trial.start.append(measure_split(here, built.model, data, "train", **sizes).loss)
        for rule in rules:
            report.line(f"trial: {rule}, seed {seed}")
            try:
                last = train(here, build(recipe, data, tau, "--seed", seed), steps, epochs, rule, report).history[-1]
            except Exception as error:  # the others still run
                report.warn(f"trial: {rule}, seed {seed} died: {cause(error)}")
                last = {"train_loss": math.inf, "train_accuracy": 0.0}
            trial.losses[repr(rule)].append(last["train_loss"])
            trial.accuracies[repr(rule)].append(last["train_accuracy"])
    return trial
