"""`sltt compare --vary`: options that take several values in turn."""

import itertools
import re
from collections.abc import Mapping, Sequence

OWN = {"rule": "--rules BPTT,SLTT", "seed": "--seeds 3", "run": "--save FOLDER"}


def values(text: str) -> tuple[str, list[str]]:
    """Return an option and its values: model.neuron.tau=1.1,2,4."""
    option, _, listed = text.partition("=")
    option = option.removeprefix("--")
    texts = re.split(r",(?![^{\[]*[}\]])", listed)
    if not re.fullmatch(r"[\w.]+", option) or "" in texts or len(set(texts)) < len(texts):
        raise ValueError(f"expected an option and different values, such as model.neuron.tau=1.1,2,4, got {text!r}")
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
