"""`sltt compare --vary`: options that take several values in turn, and which of these is best."""

import itertools
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from sltt.metrics import finite_scores, score_text

VARY_HELP = "values to try, with the recipe's rule or --rules: model.neuron.tau=1.1,2,4; several make a grid"
OWN = {"rule": "--rules BPTT,SLTT", "seed": "--seeds 3", "run": "--save FOLDER"}


def values(text: str) -> tuple[str, list[str]]:
    """Return an option and its values: model.neuron.tau=1.1,2,4."""
    option, _, listed = text.partition("=")
    option = option.removeprefix("--")
    found = re.split(r",(?![^{\[]*[}\]])", listed)
    if not re.fullmatch(r"[\w.]+", option) or "" in found:
        raise ValueError(f"expected an option and its values, such as model.neuron.tau=1.1,2,4, got {text!r}")
    if option in OWN:
        raise ValueError(f"--vary does not take {option}: use {OWN[option]}")
    if twice := {one for one in found if found.count(one) > 1}:
        raise ValueError(f"{min(twice)} stands twice in {text}: name each value once")
    return option, found


def grid(given: Sequence[tuple[str, list[str]]]) -> list[dict[str, str]]:
    """Return all combinations of the values; one without any where nothing is varied."""
    names = [option for option, _ in given]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"--vary {min(twice)} is given twice: write all its values in one, separated by commas")
    return [dict(zip(names, several, strict=True)) for several in itertools.product(*(found for _, found in given))]


def to_options(varied: Mapping[str, str]) -> list[str]:
    """Return the options of `sltt train`."""
    return [word for option, value in varied.items() for word in (f"--{option}", value)]


def label_row(rule: str, varied: Mapping[str, str]) -> str:
    """Return the name of a row: SLTT, model.neuron.tau=2."""
    return ", ".join([rule, *(f"{option}={value}" for option, value in varied.items())])


def best_of(rows: Sequence[Mapping[str, Any]], metric: str, higher_is_better: bool) -> str:
    """Return the row of the best metric on the validation samples, and whether the next one is told from it."""
    trained = [(row, reached) for row in rows if row["scores"] and (reached := finite_scores(row["validation"]))]
    if not trained:
        return "Nothing was held out, so that there is no best value: set --data.validation 0.1."
    trained.sort(key=lambda pair: _mean(pair[1]), reverse=higher_is_better)  # of those that tie, in the table's order
    ranked, several = zip(*trained, strict=True)
    first, means = ranked[0], [_mean(reached) for reached in several]
    name = metric.replace("_", " ")
    text = (
        f"{first['rule']} has the best validation {name}: {score_text(metric, means[0])}; "
        f"on the test samples {score_text(metric, statistics.mean(finite_scores(first['scores']) or [math.nan]))}."
    )
    if died := len(first.get("errors", ())):
        text += f" {died} of its seeds died."
    if len(ranked) == 1:
        return text
    one_seed = " One seed: repeat with --seeds 3." if any(len(one) < 2 for one in several[:2]) else ""
    if tied := [row["rule"] for row, mean in zip(ranked[1:], means[1:], strict=True) if mean == means[0]]:
        return f"{text} It ties with {' and '.join(tied)}, and is the first of them in the table.{one_seed}"
    if one_seed:
        return f"{text} The next is {ranked[1]['rule']}: {score_text(metric, means[1])}.{one_seed}"
    noise = 2 * sum(statistics.variance(one) / len(one) for one in several[:2]) ** 0.5
    told = "" if abs(means[0] - means[1]) > noise else ", no clear difference"
    return f"{text} The next is {ranked[1]['rule']}: {score_text(metric, means[1])}{told}."


def _mean(scores: Sequence[float]) -> float:
    """Return the mean, without the last digits, in which equal means may differ."""
    return float(f"{statistics.mean(scores):.12g}")
