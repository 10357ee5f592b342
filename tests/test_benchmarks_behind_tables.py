"""The benchmarks behind the advice of `sltt agreement`, and behind tables of accuracy, energy, memory and cosines."""

import csv
import json
import os
from functools import partial
from pathlib import Path
from statistics import mean

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import sltt
from sltt.commands import main as command
from sltt.commands.parsing import Recipe
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
    assert rows["worst cosine ≥ 0.95, as it is"] == ["2", "2", "0"]
    assert rows["worst cosine ≥ 0.5"] == ["3", "0", "1"]
    assert rows["share in the trial ≥ 0.9, as it is"] == ["4", "0", "0"]
    assert rows["share in the trial ≥ 0.3"] == ["3", "0", "1"]
    assert [one.share for one in cases] == ["95%", "40%", "10% (solved)", "too short"]


@pytest.mark.slow
def test_a_penalty_on_spikes_is_measured_on_its_trained_networks(tmp_path, monkeypatch):
    sparsity = load("sparsity")
    monkeypatch.setattr(sparsity, "ROWS", tmp_path / "sparsity.json")
    monkeypatch.setattr(sparsity, "WEIGHTS", "0,100")
    monkeypatch.setattr(sparsity, "TURNS", 1)
    monkeypatch.setattr(sparsity, "fill", lambda: None)
    words = ["sequential-digits", "--rule", "SLTT", "--model.features", "[8,16,10]", "--epochs", "1"]
    monkeypatch.setattr(sparsity, "TASKS", {"tiny": (words, 1), "other": (["nmnist", "--data.root", "{data}"], 1)})
    monkeypatch.setattr("sys.argv", ["sparsity.py", "--runs", str(tmp_path)])
    sparsity.main()
    (rows,) = json.loads((tmp_path / "sparsity.json").read_text()).values()  # without --data, no N-MNIST
    free, sparse = rows
    assert (free["weight"], sparse["weight"]) == (0, 100)
    assert sparse["firing_rate"] < 0.7 * free["firing_rate"]
    assert sparse["picojoules"] == pytest.approx(0.9 * sparse["synaptic_operations"])
    assert sparse["synaptic_operations"] < free["synaptic_operations"]
    assert sparse["picojoules_of_data"] == free["picojoules_of_data"] == pytest.approx(4.6 * 8 * 8 * 16)
    assert all(row["training"] > 0 < row["inference"] for row in rows)
    table = load("doc_tables").sparsity(tmp_path)
    assert "| `tiny` | 0 |" in table
    assert "| 1.00 | 1.00 |" in table


def test_the_steps_from_an_analog_network_to_spikes_are_trainings_that_sltt_takes():
    ladder = load("ladder")
    neurons = {"gelu": nn.GELU, "relu": nn.ReLU, "clipped": nn.Hardtanh, "rates": sltt.IF, "slttk": sltt.IF}
    for case, options in ladder.CASES.items():
        words = f"{ladder.SETTINGS} {options}".format(images="nowhere", runs="runs").split()
        built = Recipe("sltt train", "cifar10-small", words).build()
        assert type(built.model.stages[0]) is neurons[case]
        assert built.epochs == (2 if case == "slttk" else 6)
        assert built.phases is None
    assert ladder.CASES.keys() == ladder.MEASURES.keys()


def test_the_accuracy_of_a_run_is_that_of_its_validation_samples(tmp_path, monkeypatch, capsys):
    ladder, run = load("ladder"), str(tmp_path / "run")
    words = ["--model.width", "4", "--steps", "2", "--epochs", "1", "--device", "cpu", "--run", run]
    assert command(["train", "digits", *words, "--data.augment", "false"]) == 0
    found = ladder.accuracies(Path(run), {"spikes": lambda model, x: sltt.unroll(model, x, steps=2).mean(0)})
    with (tmp_path / "run" / "metrics.csv").open() as file:
        (epoch,) = csv.DictReader(file)
    assert found["spikes"] == pytest.approx(float(epoch["validation_accuracy"]), abs=0.05)  # in bfloat16
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["rates_to_spikes.py", run, "--steps", "2"])
    load("rates_to_spikes").main()
    names, (_, _, spikes) = zip(*(line.split("\t", 1) for line in capsys.readouterr().out.splitlines()), strict=True)
    assert names == ("rates, 65 levels", "rates, 3 levels", "spikes, T = 2")
    assert spikes.split("\t")[0] == f"{found['spikes']:.2%}"
    assert spikes.split("\t")[1].endswith("%")


def test_each_ingredient_is_one_change_of_the_recipe():
    module, built = load("ingredients"), {}
    for case in module.CASES:
        built[case] = Recipe("sltt train", "cifar10-hour", module.options("nowhere", case)).build()
        assert sum(phase.epochs for phase in built[case].phases) == built[case].epochs == 5
    base = built.pop("recipe")
    assert [phase.epochs for phase in base.phases] == [4, 1]
    lengths = [[phase.epochs for phase in one.phases] for one in built.values()]
    assert (lengths.count([5]), lengths.count([3, 1, 1]), lengths.count([4, 1])) == (1, 2, 8)
    muon = built["Muon for convolutions, rate 0.08"].optimizer([nn.Parameter(torch.ones(1))])
    sgd = base.optimizer([nn.Parameter(torch.ones(1))])
    assert muon.defaults == sgd.defaults
    assert muon.share * muon.defaults["lr"] == pytest.approx(0.08)
    assert base.model.contrasts[0].weight.shape == (24, 3, 2, 2)
    for name, value in {"cutout": 0, "mixup": 0.2, "randaugment": 1, "alternate_flip": True}.items():
        assert [getattr(one.data, name) == value for one in built.values()].count(True) == 1
        assert getattr(base.data, name) != value
    assert [one.ema for one in built.values()].count(None) == 1
    first = [one.phases[0] for one in built.values()]
    assert [phase.steps for phase in first if phase.steps] == [4]
    assert sorted(phase.crop for phase in first if phase.crop) == [24]
    slow = [
        m.momentum for m in built["momentum 0.1 of BatchNorm, not 0.4"].model.modules() if isinstance(m, nn.BatchNorm2d)
    ]
    assert slow == [0.1] * 7
    learned = built["first convolution learned"].model
    assert learned.contrasts[0].weight.requires_grad
    assert [p.shape for p in learned.parameters()] == [p.shape for p in base.model.parameters()]


def test_a_case_is_measured_once_beside_the_base(tmp_path, monkeypatch):
    trainings, made = load("trainings"), []
    monkeypatch.setattr(trainings, "fill", lambda: None)
    log, cases = tmp_path / "log.json", ["base", "T = 4", "T = 8"]
    measure = lambda images, case, seed, run: made.append((str(images), case, run.name)) or {"six": seed}  # noqa: E731
    for more in (["T = 8"], ["T = 4", "T = 8"]):
        monkeypatch.setattr("sys.argv", ["script.py", "images", "--seed", "3", "--cases", *more])
        trainings.measure_cases("", log, cases, measure, base=["base"])
    assert made == [("images", "base", "base-3"), ("images", "T = 8", "t-8-3"), ("images", "T = 4", "t-4-3")]
    assert json.loads(log.read_text())[1] == {"case": "T = 8", "seed": 3, "six": 3}


def test_muon_turns_convolutions_along_orthogonal_updates_and_sgd_the_rest():
    ingredients = load("ingredients")
    torch.manual_seed(0)
    conv, linear = nn.Conv2d(3, 8, 3, bias=False), nn.Linear(4, 2)
    before, others = conv.weight.detach().clone(), linear.weight.detach().clone()
    optim = ingredients.MuonSGD([conv.weight, linear.weight], lr=0.5, conv_lr=0.1, momentum=0.9)
    conv.weight.grad, linear.weight.grad = torch.randn(8, 3, 3, 3), torch.ones(2, 4)
    u, _, v = torch.linalg.svd(conv.weight.grad.flatten(1), full_matrices=False)
    optim.step()
    torch.testing.assert_close(linear.weight, others - 0.5)
    update = (before * (8**0.5 / before.norm()) - conv.weight.detach()).flatten(1)
    assert torch.nn.functional.cosine_similarity(update.flatten(), (u @ v).flatten(), 0) > 0.95
    assert torch.linalg.svdvals(update).min() > 0.06
    assert torch.linalg.svdvals(update).max() < 0.13
    torch.testing.assert_close(ingredients.orthogonal(update.T).T, ingredients.orthogonal(update))


def test_the_trainings_of_an_hour_differ_in_width_and_epochs_and_in_the_activation():
    hour = load("hour")
    built = {case: Recipe("sltt train", "cifar10-hour", hour.options("nowhere", case)).build() for case in hour.CASES}
    size = {case: sum(p.numel() for p in one.model.parameters()) for case, one in built.items()}
    assert size.pop("recipe") == 3_151_440
    assert {*size.values()} == {1_972_816}
    analog, recipe = built.pop("narrow, analog: GELU"), built["recipe"]
    assert nn.GELU in map(type, analog.model.modules())
    assert not any(isinstance(m, sltt.IF) for m in analog.model.modules())
    assert (analog.epochs, analog.phases, analog.steps) == (recipe.epochs, None, 1)
    muon = built.pop("earlier, Muon: 22 + 1 epochs")
    assert (muon.epochs, [phase.epochs for phase in muon.phases], muon.schedule.warmup) == (23, [22, 1], 5)
    assert muon.optimizer([nn.Parameter(torch.ones(1))]).share == pytest.approx(0.08 / 0.3025)
    for case, one in built.items():
        steady = one.epochs - 1
        assert [phase.epochs for phase in one.phases] == [steady, 1]
        assert one.schedule.warmup == steady / 4
        assert case == "recipe" or case.partition(": ")[2] == f"{steady} + 1 epochs"
        assert one.steps == (16 if case.startswith("earlier") else 32)
        assert [one.phases[0].rule.steady, one.phases[0].steps] == [True, 16]
    assert [built[f"{name}: 24 + 1 epochs"].phases[1].lr for name in ("earlier", "narrow")] == [0.003, 0.001]
    assert [one.phases[1].batches for one in built.values()] == [100, *[None] * 6]
    assert sorted(one.epochs for one in built.values()) == [5, 11, 25, 25, 25, 37, 49]


def test_a_training_of_an_hour_finds_the_benchmarks_optimizer_and_goes_on(tmp_path, monkeypatch):
    hour, called = load("hour"), []
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    monkeypatch.setattr(hour.subprocess, "run", lambda words, check, env: called.append((words[4:], env["PYTHONPATH"])))
    for _ in range(2):
        hour.train(["--seed", "0"], tmp_path)
        (tmp_path / "config.yaml").touch()
    run, paths = str(tmp_path), [str(Path(hour.__file__).parent), "elsewhere"]
    fresh = ["cifar10-hour", "--seed", "0", "--device", "cpu", "--devices", "2", "--run", run]
    assert called == [(how, os.pathsep.join(paths)) for how in (fresh, ["--resume", run])]


def test_minutes_of_a_training_are_those_of_its_epochs(tmp_path, capsys):
    hour, run = load("hour"), tmp_path / "run"
    words = ["--model.width", "4", "--steps", "2", "--epochs", "2", "--device", "cpu", "--run", str(run)]
    assert command(["train", "digits", *words]) == 0
    row = hour.measured(run)
    assert row["alone"] == json.loads((run / "result.json").read_text())["last_epoch_test_accuracy"]
    capsys.readouterr()
    views = ["--mirror", "--shift", "1", "--checkpoint", "last", "--device", "cpu"]
    assert command(["eval", str(run), *views, "--json"]) == 0
    assert row["six"] == json.loads(capsys.readouterr().out)["accuracy"] != row["alone"]
    assert len(row["train_accuracy"]) == len(row["seconds"]) == 2
    rows = [{"case": "A", "seed": seed, **row, "seconds": [50, 70 + 120 * seed]} for seed in (0, 1)]
    (tmp_path / "hour.json").write_text(json.dumps(rows))
    assert "| A | 2 | 3 | " in load("doc_tables").hour(tmp_path)


def test_the_last_epoch_begins_from_either_weights(tmp_path, monkeypatch):
    last, run = load("last_epoch"), tmp_path / "run"
    words = ["--model.width", "4", "--steps", "2", "--epochs", "2", "--ema", "0.9", "--device", "cpu"]
    assert command(["train", "digits", *words, "--run", str(run)]) == 0
    data = sltt.data.Digits()
    monkeypatch.setattr(last, "IMAGES", data.splits(2).sizes["train"])
    monkeypatch.setattr(last, "BATCH", 16)
    case = {"start": "the average", "rate": 0.0, "batches": 0, "steps": 2}
    found = last.row(run, case)
    model = sltt.load(run, checkpoint="last")
    expected = sltt.evaluate(model, data, "train", steps=2, precision="bf16-mixed", device="cpu")
    assert found["right"] == pytest.approx(expected.score, abs=0.01)
    others = [{"start": "the last weights"}, {"batches": 3}, {"batches": 3, "rate": 0.1}]
    unmoved, still, moved = (last.row(run, case | other)["loss"] for other in others)
    assert still == pytest.approx(found["loss"], abs=1e-3)  # at a rate of 0
    assert len({found["loss"], unmoved, moved}) == 3


def test_the_pages_say_of_the_hour_what_its_log_says():
    root = Path(sltt.__file__).parents[1]
    rows = [row for row in json.loads((root / "docs/results/hour.json").read_text()) if row["case"] == "recipe"]
    minutes = sorted(sum(row["seconds"]) / 60 for row in rows)
    took = f"{minutes[0]:.0f} to {minutes[-1]:.0f} minutes"
    for page in ("docs/results.md", "docs/recipes.md", "CHANGELOG.md", "sltt/recipes/cifar10-hour.yaml"):
        assert took in (root / page).read_text().replace("\n", " ").replace("  ", " ")
    alone, six = (f"{mean(row[views] for row in rows):.1%}" for views in ("alone", "six"))
    assert f"{alone} of the test images; {six} by the mean of six views" in (root / "docs/results.md").read_text()
    assert alone in (root / "CHANGELOG.md").read_text()
    assert f"{alone} of the test images" in (root / "sltt/recipes/cifar10-hour.yaml").read_text()


def test_batches_of_the_hours_recipe_take_turns(tmp_path, monkeypatch):
    module, run = load("hour_seconds"), tmp_path / "run"
    words = ["--model.width", "4", "--steps", "2", "--epochs", "1", "--device", "cpu", "--run", str(run)]
    assert command(["train", "digits", *words]) == 0
    monkeypatch.setattr(module, "PATH", tmp_path / "hour-seconds.json")
    monkeypatch.setattr(module, "fill", lambda: None)
    monkeypatch.setattr("sys.argv", ["hour_seconds.py", str(run), "--repeats", "2"])
    threads = torch.get_num_threads()
    module.main()
    torch.set_num_threads(threads)
    rows = json.loads(module.PATH.read_text())["rows"]
    assert [len(row["seconds"]) for row in rows] == [2] * 7
    lines = load("doc_tables").hour_seconds(tmp_path).splitlines()
    assert [line.endswith("| 1 |") for line in lines[4:]] == [True, *[False] * 3, True, *[False] * 2]


def test_twins_of_the_digits_are_measured_in_each_form(monkeypatch):
    digits = load("twin_digits")
    trained = []
    monkeypatch.setattr(digits, "train", lambda model, seed, lr, **how: (trained.append(how), model)[1])
    found = digits.measure("ReLU", 0)
    assert [str(how.get("rule")) for how in trained] == ["None", "SLTT(k=1)", "SLTT()"]
    assert found["balanced, T = 4"] == found["one epoch of SLTT"]  # nothing was trained
    assert len(set(found)) == 7


def test_transformers_are_measured_under_each_rule(monkeypatch):
    transformers = load("transformers")
    small = {"Spikformer": partial(sltt.models.spikformer, channels=16, depth=1, heads=2, neuron=transformers.NEURON)}
    monkeypatch.setattr(transformers, "NETWORKS", small)
    x, y = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    costs = {rule: transformers.cost("Spikformer", 4, rule, x, y) for rule in transformers.RULES}
    assert costs["SLTT"]["memory"] < costs["BPTT"]["memory"]
    monkeypatch.setattr(transformers, "TRAINED", 1)
    samples = TensorDataset(torch.randn(16, 3, 32, 32), torch.arange(16) % 10)
    before, after = transformers.agreements("Spikformer", samples, x, y)
    assert before["cosines"].keys() == {"SLTT()", "OTTT()", "TBPTT(window=2)"}
    assert before["cosines"] != after["cosines"]
