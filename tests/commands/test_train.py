import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

from sltt.commands.parsing import Recipe
from sltt.training.checkpoints import load_checkpoint
from tests.commands.tiny import TINY, run


def test_train_then_eval(here, capsys):
    generator = torch.get_rng_state()
    code, out, _ = run(capsys, "train", *TINY)
    assert code == 0
    assert torch.equal(torch.get_rng_state(), generator)
    (folder,) = (here / "runs").iterdir()
    assert folder.name.startswith("digits-sltt-")
    assert "samples: 1295 train, 143 validation, 359 test (split 5012bf79b0e0)" in out
    assert "epoch     loss  train acc  val acc  firing rate  seconds  peak memory" in out
    assert max(map(len, out.splitlines())) <= 110
    assert f"written to runs/{folder.name}" in out
    result = json.loads((folder / "result.json").read_text())
    assert f"test accuracy {result['test_accuracy']:.2%}" in out

    code, out, _ = run(capsys, "eval", folder, "--json")
    assert code == 0
    measured = json.loads(out)
    assert measured["accuracy"] == result["test_accuracy"]
    assert set(measured["layers"]) == {"features.2", "features.5", "features.9"}
    code, out, _ = run(capsys, "eval", folder, "--checkpoint", "last", "--steps", "3", "--split", "validation")
    assert code == 0
    assert "last.ckpt, T = 3, validation samples" in out
    code, out, _ = run(capsys, "eval", folder, "--mirror", "--shift", "1")
    assert code == 0
    assert "test samples, also moved by 1 and their mirror images" in out
    code, out, _ = run(capsys, "eval", folder, "--mirror", "--json")
    assert code == 0
    mirrored = json.loads(out)
    assert mirrored["mirror"]
    assert not measured["mirror"]
    assert mirrored["firing_rate"] != measured["firing_rate"]  # the logits of this network are constant


@pytest.mark.slow
def test_the_weights_of_the_best_and_of_the_last_epoch_are_both_tested(here, capsys):
    # the second epoch undoes the first
    spoiling = ["--optimizer.lr", "0.05", "--schedule", "sltt.schedules.Constant", "--schedule.warmup", "0"]
    spoiling += ["--phases", "[{epochs: 1}, {epochs: 1, lr: 3.0}]"]
    words = ["--model.width", "4", "--epochs", "2", "--steps", "2", "--batch_size", "128", "--device", "cpu", *spoiling]
    assert run(capsys, "train", "digits", *words, "--run", "a")[0] == 0
    result = json.loads(Path("a/result.json").read_text())
    assert result["epoch"] == 1
    assert result["test_accuracy"] != result["last_epoch_test_accuracy"]
    for checkpoint, name in [("best", "test_accuracy"), ("last", "last_epoch_test_accuracy")]:
        code, out, _ = run(capsys, "eval", "a", "--checkpoint", checkpoint, "--json")
        assert code == 0
        assert json.loads(out)["accuracy"] == result[name]


def test_any_value_can_be_overridden_and_is_kept(here, capsys):
    words = ["--rule", "SLTT", "--rule.k", "2", "--optimizer.lr", "0.05", "--model.neuron.tau", "1.5"]
    words += ["--data.validation", "0"]
    assert run(capsys, "train", "digits", *TINY, "--epochs", "1", *words, "--run", "a")[0] == 0
    config = yaml.safe_load(Path("a/config.yaml").read_text())
    assert config["rule"]["class_path"] == "sltt.SLTT"
    assert config["rule"]["init_args"]["k"] == 2
    assert config["optimizer"]["init_args"]["lr"] == 0.05
    assert config["model"]["init_args"]["neuron"]["init_args"]["tau"] == 1.5
    assert load_checkpoint(Path("a/last.ckpt"))["config"] == config
    code, out, _ = run(capsys, "eval", "a")
    assert code == 0
    assert "last.ckpt" in out


def test_resume_takes_the_runs_configuration(here, capsys):
    assert run(capsys, "train", *TINY, "--epochs", "1", "--run", "a")[0] == 0
    code, out, _ = run(capsys, "train", "--resume", "a", "--epochs", "2")
    assert code == 0
    assert "continuing a: 1 of 2 epochs are done" in out
    code, _, err = run(capsys, "train", "--resume", "a", "--optimizer.lr", "3")
    assert code == 2
    assert "sltt train --resume does not take --optimizer.lr: a run continues with its own settings" in err
    assert len(Path("a/metrics.csv").read_text().splitlines()) == 3
    assert yaml.safe_load(Path("a/config.yaml").read_text())["epochs"] == 2
    # an evaluation refuses options that would do nothing, and damaged checkpoints
    code, _, err = run(capsys, "eval", "a", "--epochs", "3")
    assert code == 2
    assert "sltt eval does not take --epochs" in err
    Path("a/best.ckpt").write_bytes(Path("a/best.ckpt").read_bytes()[:5000])
    code, _, err = run(capsys, "eval", "a")
    assert code == 1
    assert "a/best.ckpt is damaged" in err
    assert "take the other one of the run by --checkpoint" in err
    Path("a/best.ckpt").unlink()
    code, _, err = run(capsys, "eval", "a")
    assert code == 1
    assert "a/best.ckpt is gone" in err


def test_a_module_in_the_working_directory_is_found(here, monkeypatch):
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(here))])
    Path("beside.py").write_text("import sltt\n\nclass Net(sltt.models.DigitsNet):\n    pass\n")
    recipe = Recipe("sltt train", "digits", ["--model", "beside.Net"])
    assert type(recipe.build().model).__name__ == "Net"
