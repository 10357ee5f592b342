import json
import math
import types

import pytest
from torch import nn

import sltt
from sltt.analysis import Agreement, Trial, advice
from sltt.commands import agreement, main
from sltt.training.console import Console


def measured(**least):
    """The agreement of rules, by their smallest cosine."""
    return [Agreement(f"{rule}()", 0.99, 1.0, 0.3, {}, cosine) for rule, cosine in least.items()]


@pytest.mark.parametrize(
    ("cosines", "rule"),
    [
        ({"SLTT": 0.97, "OTTT": 0.99}, "SLTT. Not sure"),
        ({"SLTT": 0.80, "OTTT": 0.96}, "OTTT. Not sure of SLTT, which would save memory"),
        ({"SLTT": 0.30, "OTTT": 0.60}, "BPTT. Not sure"),
        ({"SLTT": float("nan"), "OTTT": 0.60}, "BPTT. Not sure"),
    ],
)
def test_without_a_trial_the_first_rule_that_agrees_is_advised(cosines, rule):
    said = advice(measured(**cosines))
    assert said.startswith(
        f"Take {rule}: this rests on the gradients of one batch of an untrained network (worst cosine: "
    )
    assert "OTTT 0.9" in said or "OTTT 0.600; 0.95 needed). --trial trains" in said
    assert "one batch after 3 epochs" in advice(measured(**cosines), epochs=3)


@pytest.mark.parametrize(
    ("losses", "rule", "rests"),
    [
        ({"SLTT()": [1.03, 1.05], "OTTT()": [1.0, 1.0]}, "SLTT. Not sure", "SLTT 95% to 97%; OTTT 100%"),
        ({"SLTT()": [1.9, 1.9], "OTTT()": [1.02, 0.97]}, "OTTT. Not sure of SLTT, which", "SLTT 10%; OTTT 98% to 103%"),
        ({"SLTT()": [1.9, 1.9], "OTTT()": [1.3, 1.3]}, "BPTT. Not sure", "SLTT 10%; OTTT 70%"),
        ({"SLTT()": [1.9, 1.9], "OTTT()": [1.3, 1.0]}, "BPTT. Not sure", "70% to 100%"),
    ],
)
def test_a_trial_decides_whatever_the_cosines_are(losses, rule, rests):
    losses = {**losses, "BPTT()": [1.0, 1.0]}
    trial = Trial(4, [2.0, 2.0], losses, {name: [0.8, 0.8] for name in losses})
    said = advice(measured(SLTT=0.99, OTTT=0.99), trial)
    assert said.startswith(f"Take {rule}")
    assert "this rests on training losses of 2 seeds after 4 epochs (of BPTT's decrease: SLTT " in said
    assert f"{rests}; 90% needed)." in said
    assert ("Seeds disagree about OTTT." in said) == ("70% to 100%" in said)
    assert trial.shares("BPTT()") == [1.0, 1.0]


@pytest.mark.parametrize("start", [2.0, 0.0, -1.0])
def test_a_trial_in_which_bptt_learned_nothing_tells_nothing(start):
    losses = {"SLTT()": [start - 0.1], "BPTT()": [start]}
    trial = Trial(4, [start], losses, {name: [0.0] for name in losses})
    assert all(map(math.isnan, trial.shares("SLTT()")))
    assert "Not sure: BPTT learned little" in advice(measured(SLTT=0.99), trial)


def test_a_rule_that_died_in_the_trial_is_not_advised():
    losses = {"SLTT()": [float("inf"), 0.9], "BPTT()": [1.0, 1.0]}
    trial = Trial(4, [2.0, 2.0], losses, {name: [0.0, 0.8] for name in losses})
    said = advice(measured(SLTT=0.99), trial)
    assert said.startswith("Take BPTT.")
    assert "try SLTT with delays" in said
    assert "SLTT died; 90% needed)" in said
    exact = Trial(4, [2.0], {"SLTT()": [1.0], "BPTT()": [float("inf")]}, {"SLTT()": [0.8], "BPTT()": [0.0]})
    assert "Not sure: BPTT learned little" in advice(measured(SLTT=0.99), exact)


def test_a_training_that_dies_leaves_the_others_in_the_trial(monkeypatch, capsys):
    def train(here, built, steps, epochs, rule, report):
        if isinstance(rule, sltt.BPTT):
            raise FloatingPointError("the loss is inf")
        return types.SimpleNamespace(history=[{"train_loss": 0.5, "train_accuracy": 0.9}])

    monkeypatch.setattr(agreement, "measure_split", lambda *args, **kwargs: types.SimpleNamespace(loss=2.0))
    monkeypatch.setattr(agreement, "_train", train)
    rules, built = [sltt.SLTT(), sltt.BPTT()], sltt.training.settings.Settings(nn.Linear(2, 2), sltt.data.Digits())
    found = agreement._run_trial(None, lambda *words: built, rules, 2, 1, 2, Console())
    assert found.losses == {"SLTT()": [0.5, 0.5], "BPTT()": [float("inf")] * 2}
    assert "trial: BPTT(), seed 1 died: the loss is inf" in " ".join("".join(capsys.readouterr()).split())


def test_a_trial_in_which_bptt_learns_little_decides_nothing():
    trial = Trial(1, [2.0], {"SLTT()": [1.99], "BPTT()": [1.985]}, {"SLTT()": [0.3], "BPTT()": [0.3]})
    assert advice(measured(SLTT=0.5), trial).startswith("Take BPTT.")
    said = advice(measured(SLTT=0.99), trial)
    assert said.startswith("Take SLTT. Not sure: BPTT learned little in 1 epoch, so the gradients of one batch decide.")


@pytest.mark.parametrize(("training", "later"), [(20, False), (21, True)])
def test_rules_may_part_after_a_short_trial(training, later):
    trial = Trial(4, [2.0] * 2, {"SLTT()": [1.0] * 2, "BPTT()": [1.0] * 2}, {"SLTT()": [0.8] * 2, "BPTT()": [0.8] * 2})
    said = advice(measured(SLTT=0.9), trial, training=training)
    assert f" after 4 of {training} epochs (" in said
    assert ("Rules may part later: give a longer --trial." in said) == later


def test_a_rule_that_solves_the_task_is_enough_whatever_its_loss_is():
    losses = {"SLTT()": [1.9, 1.9], "OTTT()": [1.3, 1.3], "BPTT()": [1.0, 1.0]}
    accuracies = {"SLTT()": [0.99, 0.5], "OTTT()": [0.99, 1.0], "BPTT()": [1.0, 1.0]}
    said = advice(measured(SLTT=0.5, OTTT=0.9), Trial(4, [2.0, 2.0], losses, accuracies))
    assert said.startswith("Take OTTT.")
    assert "OTTT 70%; 90% needed). OTTT got 98% of the training samples right, which is enough too." in said


def test_costs_are_those_measured():
    trial = Trial(4, [2.0], {"SLTT()": [1.0], "BPTT()": [1.0]}, {"SLTT()": [0.9], "BPTT()": [0.9]})
    said = advice(measured(SLTT=0.9), trial, {"SLTT()": 345_372, "BPTT()": 12_958_020})
    assert said.startswith("Take SLTT. Not sure: this rests on training losses of 1 seed after 4 epochs (")
    assert said.endswith(" A batch takes 0.345 MB (13 MB with BPTT).")
    exact = Trial(4, [2.0], {rule: trial.losses[rule] for rule in ("BPTT()", "SLTT()")}, trial.accuracies)
    both = {"SLTT()": 1_000_000, "BPTT()": 1_000_000}
    said = advice(measured(BPTT=1.0, SLTT=0.9), exact, both, fold=4, samples=32)
    assert said.startswith("Take BPTT. Not sure: ")
    assert (
        " A batch of 32 takes 1 MB (1 MB with SLTT). Time steps share a call, so most rules save no memory: "
        "try --rule.fold 1. Before BPTT, where the input changes over time, try SLTT with delays"
    ) in said


@pytest.mark.slow
def test_the_command_trains_each_rule_and_says_what_it_learned(capsys):
    words = ["agreement", "recall", "--data.channels", "10", "--data.noise", "0.5", "--model.features", "[10,32,4]"]
    words += ["--data.samples", "600", "--batch_size", "32", "--optimizer.lr", "0.01", "--device", "cpu"]
    assert (
        main([*words, "--data.delay", "2", "--steps", "6", "--trial", "3", "--epochs", "100", "--seeds", "1", "--json"])
        == 0
    )
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    trial = row["trial"]
    assert next(iter(trial["losses"])) == row["rule"] == "BPTT()"  # all take as much: time steps share a call
    assert trial["losses"]["OTTT()"] == pytest.approx(trial["losses"]["BPTT()"], rel=1e-3)  # one layer of neurons
    assert trial["learned"]["OTTT()"][0] > trial["learned"]["SLTT()"][0]
    assert row["advice"].startswith(f"Take {row['rule'].removesuffix('()')}")
    assert "1 seed after 3 of 100 epochs (" in row["advice"]
    assert row["memory"]["SLTT()"] >= row["memory"]["BPTT()"]
    assert " Time steps share a call, so most rules save no memory: try --rule.fold 1." in row["advice"]
