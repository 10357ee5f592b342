"""The tables of the advice of `sltt agreement`."""

import json

import pytest

from tests.scripts import benchmarks_on_the_path, load  # noqa: F401


def found(advice, worst, losses, *, start=2.0, exact=1.0, right=0.5):
    """What `sltt agreement` finds with a trial."""
    rules = {"SLTT()": losses, "BPTT()": [exact] * len(losses)}
    accuracies = dict.fromkeys(rules, [right] * len(losses))
    trial = {"epochs": 4, "start": [start] * len(losses), "losses": rules, "accuracies": accuracies}
    return {"advice": advice, "worst_cosine": {"SLTT()": worst}, "trial": trial}


def judged(what, sltt_scores):
    return load("advice_tables").case(what, "SLTT", {"BPTT": [0.9, 0.91, 0.89], "SLTT": sltt_scores})


@pytest.mark.parametrize(
    ("advised", "scores", "word"),
    [
        ("SLTT()", [0.9, 0.91, 0.88], "right"),
        ("SLTT()", [0.7, 0.71, 0.7], "**wrong**"),
        ("OTTT()", [0.7, 0.71, 0.7], "right"),
        ("BPTT()", [0.9, 0.9, 0.9], "not needed"),
        ("SLTT()", [0.8, 0.9, 0.94], "open"),  # 2 points, within the noise of the seeds
    ],
)
def test_advice_is_judged_by_full_trainings(advised, scores, word):
    one = judged(found(advised, 0.5, [1.0, 1.0]), scores)
    assert load("advice_tables").verdict(advised, [one]) == word


def test_advice_is_judged_by_all_rules_of_a_task(tmp_path):
    row = {"task": "digits", **found("BPTT()", 0.5, [1.5, 1.5])}
    for of in (row["worst_cosine"], row["trial"]["losses"], row["trial"]["accuracies"]):
        of["OTTT()"] = of["SLTT()"]
    (tmp_path / "advice.json").write_text(json.dumps([row]))
    scores = {"BPTT": [0.9, 0.91, 0.9], "SLTT": [0.5, 0.51, 0.5], "OTTT": [0.9, 0.91, 0.9]}
    reached = [{"task": "digits", "rule": rule, "accuracies": several} for rule, several in scores.items()]
    (tmp_path / "tasks.json").write_text(json.dumps(reached))
    assert "| +0.0 ± 0.9 | BPTT | not needed |" in load("advice_tables").advice(tmp_path)  # OTTT is enough


def test_thresholds_are_tried_on_all_cases():
    tables = load("advice_tables")
    safe, unsafe = [0.9, 0.91, 0.9], [0.5, 0.51, 0.5]
    cases = [
        judged(found("SLTT()", 0.6, [1.05, 1.02]), safe),  # learns 95%, with a low cosine
        judged(found("OTTT()", 0.85, [1.6, 1.6]), unsafe),  # learns 40%, with a high one
        judged(found("SLTT()", 0.6, [1.9, 1.9], right=0.99), safe),  # learns 10%, and solves the task
        judged(found("SLTT()", 0.97, [1.99], exact=1.99), safe),  # BPTT learns too little: the cosine tells
    ]
    rows = {name: counts for name, *counts in tables.calibration(cases)}
    assert rows["worst cosine ≥ 0.95 (the command's threshold)"] == ["2", "2", "0"]
    assert rows["worst cosine ≥ 0.5"] == ["3", "0", "1"]
    assert rows["share in the trial ≥ 0.9 (the command's threshold)"] == ["4", "0", "0"]
    assert rows["share in the trial ≥ 0.3"] == ["3", "0", "1"]
    assert [one.share for one in cases] == ["95%", "40%", "10% (solved)", "too short"]
