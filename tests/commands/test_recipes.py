from pathlib import Path

import pytest
import torch
import yaml

import sltt
from sltt.commands.parsing import Recipe, shipped_recipes
from tests.commands.tiny import run

PAPER = {  # T, K, batch, epochs, learning rate, weight decay, α
    "cifar10": (6, None, 128, 200, 0.1, 5e-5, 0.05),
    "cifar100": (6, None, 128, 200, 0.1, 5e-4, 0.05),
    "dvs-cifar10": (10, 2, 128, 300, 0.05, 5e-4, 0.05),
    "dvs-gesture": (20, 4, 16, 300, 0.1, 5e-4, 0.05),
    "imagenet-stage1": (1, None, 256, 100, 0.1, 1e-5, 0.0),
    "imagenet-stage2": (6, 1, 256, 30, 0.001, 0.0, 0.0),
}


@pytest.mark.parametrize("name", PAPER)
def test_recipes_have_the_values_of_the_paper(name):
    recipe = yaml.safe_load(shipped_recipes()[name].read_text())
    optimizer, k = recipe["optimizer"]["init_args"], recipe["rule"].get("init_args", {}).get("k")
    assert (
        *(recipe["steps"], k, recipe["batch_size"], recipe["epochs"], optimizer["lr"], optimizer["weight_decay"]),
        recipe["loss"]["init_args"]["alpha"],
    ) == PAPER[name]
    assert optimizer["momentum"] == 0.9
    assert recipe["model"]["init_args"]["neuron"]["init_args"]["tau"] == 1.1


TRANSFORMERS = {  # batch, epochs, learning rate, weight decay, warm-up
    "cifar10-spikformer": (128, 300, 5e-4, 0.06, 20),
    "cifar10-qkformer": (64, 400, 1e-3, 0.06, 20),
    "imagenet-qkformer": (512, 200, 1.2e-3, 0.05, 5),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_recipes_of_transformers_have_the_published_values(name):
    recipe = yaml.safe_load(shipped_recipes()[name].read_text())
    optimizer, warmup = recipe["optimizer"], recipe["schedule"]["init_args"]["warmup"]
    values = optimizer["init_args"]["lr"], optimizer["init_args"]["weight_decay"], warmup
    assert (recipe["batch_size"], recipe["epochs"], *values) == TRANSFORMERS[name]
    assert optimizer["class_path"] == "torch.optim.AdamW"
    assert recipe["loss"]["init_args"]["label_smoothing"] == 0.1
    assert recipe["steps"] == 4
    assert recipe["model"]["init_args"]["neuron"]["init_args"]["tau"] == 2.0


def test_a_null_on_the_command_line_reaches_the_neuron():
    """The soft reset that OTTT needs, as the recipe says; and one whose default is a number."""
    leaky = ["--model.neuron", "sltt.CubaLIF"]  # Norse has one of this name too
    for name, words, key, own in (("cifar10-spikformer", [], "v_reset", 0.0), ("digits", leaky, "tau", 1.1)):
        for options, expected in ((words, own), ([*words, f"--model.neuron.{key}", "null"], None)):
            config = Recipe("sltt train", name, options).resolve()
            assert config["model"]["init_args"]["neuron"]["init_args"][key] == expected


def test_imagenet_is_its_two_stages():
    whole, *stages = (
        yaml.safe_load(shipped_recipes()[f"imagenet{end}"].read_text()) for end in ("", "-stage1", "-stage2")
    )
    assert [phase["epochs"] for phase in whole["phases"]] == [stage["epochs"] for stage in stages]
    assert [phase["steps"] for phase in whole["phases"]] == [stage["steps"] for stage in stages]
    rates = [phase.get("lr") or whole["optimizer"]["init_args"]["lr"] for phase in whole["phases"]]
    assert rates == [stage["optimizer"]["init_args"]["lr"] for stage in stages]
    assert whole["model"] == stages[0]["model"] == stages[1]["model"]


def test_recipes_lists_each_with_a_line_and_prints_one(capsys):
    code, out, _ = run(capsys, "recipes")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == list(shipped_recipes())
    assert run(capsys, "recipes", "digits")[1] == shipped_recipes()["digits"].read_text()


FRAMES = {  # small where the network takes any size
    "basic-motions": (6,),
    "digits": (1, 8, 8),
    "digits-events": (2, 16, 16),
    "cifar10": (3, 16, 16),
    "cifar10-hour": (3, 24, 24),
    "cifar10-qkformer": (3, 16, 16),
    "cifar10-small": (3, 24, 24),
    "cifar10-spikformer": (3, 16, 16),
    "cifar100": (3, 16, 16),
    "dvs-cifar10": (2, 32, 32),
    "dvs-gesture": (2, 32, 32),
    "fscil-cifar100": (3, 16, 16),
    "fscil-digits": (1, 8, 8),
    "fscil-dvs-cifar10": (2, 32, 32),
    "fscil-dvs-gesture": (2, 32, 32),
    "fscil-mini-imagenet": (3, 32, 32),
    "imagenet": (3, 32, 32),
    "imagenet-qkformer": (3, 32, 32),
    "imagenet-stage1": (3, 32, 32),
    "imagenet-stage2": (3, 32, 32),
    "japanese-vowels": (12,),
    "nmnist": (2, 34, 34),
    "recall": (200,),
    "recall-delays": (200,),
    "recall-far": (21,),
    "recall-marked": (21,),
    "sequential-digits": (8,),
    "shd": (700,),
    "shd-recurrent": (700,),
    "shd-delays": (700,),
    "speech": (40,),
}
CLASSES = {"basic-motions": 4, "cifar100": 100, "dvs-gesture": 11}
CLASSES |= {**{f"fscil-{name}": 6 for name in ("digits", "dvs-cifar10", "dvs-gesture")}}
CLASSES |= {**{f"fscil-{name}": 60 for name in ("cifar100", "mini-imagenet")}, "japanese-vowels": 9, "recall": 4}
CLASSES |= {"recall-delays": 4, "recall-far": 2, "recall-marked": 2, "shd": 20, "shd-recurrent": 20, "shd-delays": 20}
CLASSES |= {**{f"imagenet{end}": 1000 for end in ("", "-qkformer", "-stage1", "-stage2")}}


# networks of many weights, which other recipes run too
LARGE = ["cifar100", "dvs-gesture", *(f"fscil-{name}" for name in ("cifar100", "dvs-cifar10", "dvs-gesture"))]
LARGE += ["fscil-mini-imagenet", "imagenet", "imagenet-qkformer", "imagenet-stage1", "imagenet-stage2"]


@pytest.mark.parametrize("name", LARGE)
def test_recipes_of_large_networks_are_parsed(name):
    assert Recipe("sltt train", name, []).resolve()["model"]["class_path"].startswith("sltt.models.")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LARGE)) for name in shipped_recipes()]
)
def test_every_recipe_runs_a_batch_of_its_shape(name):
    built = Recipe("sltt train", name, []).build()
    assert isinstance(built.data, sltt.data.Data)
    x, steps = 3 * torch.rand(2, *FRAMES[name]), min((getattr(built.rule, "k", None) or 1) + 1, built.steps)
    for phase in built.phases or [sltt.Phase(1)]:
        rule, crop = phase.rule or built.rule, phase.crop
        built.model.zero_grad()
        out = rule(built.model, x[..., :crop, :crop] if crop else x, torch.tensor([0, 1]), built.loss, steps=steps)
        assert out.loss.isfinite()
        assert out.logits.shape == (steps, 2, CLASSES.get(name, 10))
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in built.model.parameters())
    assert built.optimizer(built.model.parameters()).param_groups[0]["lr"] > 0


@pytest.mark.parametrize(
    "words",
    [
        ["--phases", "[{epochs: 4}, {epochs: 1}]"],
        ["--phases= [{epochs: 4}, {epochs: 1}]"],
        ["--phases", "- epochs: 4\n- epochs: 1"],
        ["--config", "own.yaml"],
        ["--config=~/own.yaml"],
        ["--config", f"{{seed: 3, phases: [{{epochs: 4}}, {{epochs: 1}}], run: {'x' * 300}}}"],
    ],
)
def test_phases_that_are_given_take_nothing_from_the_recipes(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("own.yaml").write_text("phases: [{epochs: 4}, {epochs: 1}]", encoding="utf-8")
    words = ["--model.widths", "[2, 2, 2]", *words]
    assert Recipe("sltt train", "cifar10-hour", words).build().phases == [sltt.Phase(4), sltt.Phase(1)]


def test_phases_that_are_not_given_are_the_recipes():
    assert Recipe("sltt train", "cifar10-hour", ["--seed", "1"]).build().phases[1].freeze_norm
