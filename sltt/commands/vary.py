"""`sltt compare --vary`: options that take several values in turn, and which of these is best."""

import itertools
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from sltt.metrics import finite_scores, score_text

OWN = {"rule": "--rules BPTT,SLTT", "seed": "--seeds 3", "run": "--save FOLDER"}


def values(text: str) -> tuple[str, list[str]]:
    """Return an option and its values: model.neuron.tau=1.1,2,4."""
    option, _, listed = text.partition("=")
    option = option.removeprefix("--")
    texts = re.split(r",(?![^{\[]*[}\]])", listed)
    if not re.fullmatch(r"[\w.]+", option) or "" in texts:
        raise ValueError(f"expected an option and its values, such as model.neuron.tau=1.1,2,4, got {text!r}")
    if option in OWN:
        raise ValueError(f"--vary does not take {option}: use {OWN[option]}")
    return option, texts


def grid(options: Sequence[tuple[str, list[str]]]) -> list[dict[str, str]]:
    """Return all combinations of the values; one without any where nothing is varied."""
    names = [option for option, _ in options]
    combinations = itertools.product(*(texts for _, texts in options))
    return [dict(zip(names, combination, strict=True)) for combination in combinations]


def to_options(varied: Mapping[str, str]) -> list[str]:
    """Return the options of `sltt train`."""
    return [word for option, value in varied.items() for word in (f"--{option}", value)]


def label_row(rule: str, varied: Mapping[str, str]) -> str:
    """Return the name of a row: SLTT, model.neuron.tau=2."""
    return ", ".join([rule, *(f"{option}={value}" for option, value in varied.items())])


def best_of(rows: Sequence[Mapping[str, Any]], metric: str, higher_is_better: bool) -> str:
    """Return a sentence on the row best by validation, and whether the next one differs clearly."""
    trained = [(row, reached) for row in rows if row["scores"] and (reached := finite_scores(row["validation"]))]
    if not trained:
        return "Nothing was held out, so that there is no best value: set --data.validation 0.1."
    trained.sort(key=lambda pair: statistics.mean(pair[1]), reverse=higher_is_better)
    ranked, scores_of_rows = zip(*trained, strict=True)
    first, means = ranked[0], [statistics.mean(reached) for reached in scores_of_rows]
    text = (
        f"{first['rule']} has the best validation {metric.replace('_', ' ')}: {score_text(metric, means[0])}; "
        f"on the test samples {score_text(metric, statistics.mean(finite_scores(first['scores']) or [math.nan]))}."
    )
    if died := len(first.get("errors", ())):
        text += f" {died} of its seeds died."
    if len(ranked) == 1:
        return text
    text += f" The next is {ranked[1]['rule']}: {score_text(metric, means[1])}"
    if any(len(scores) < 2 for scores in scores_of_rows[:2]):
        return f"{text}. One seed: repeat with --seeds 3."
    noise = 2 * sum(statistics.variance(scores) / len(scores) for scores in scores_of_rows[:2]) ** 0.5
    return f"{text}." if abs(means[0] - means[1]) > noise else f"{text}, no clear difference."
