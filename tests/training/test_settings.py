import inspect
from dataclasses import FrozenInstanceError, fields

import pytest

import sltt
import sltt.training.session
from sltt.commands import main
from sltt.parallel.devices import make_fabric
from sltt.training.settings import Execution, Training
from tests.training.blobs import execution


def defaults(function, *without):
    return {name: p.default for name, p in inspect.signature(function).parameters.items() if name not in without}


def test_settings_are_the_arguments_of_fit_and_evaluate_has_the_same_defaults():
    fit, settings = defaults(sltt.fit), {field.name for kind in (Training, Execution) for field in fields(kind)}
    assert settings == fit.keys() - {"model", "data", "run", "resume", "config", "report"}
    measured = defaults(sltt.evaluate, "split", "mirror", "shift", "steps")  # T may be that of the training
    assert all(one == fit[name] or type(one) is type(fit[name]) for name, one in measured.items())
    assert {field.name for field in fields(Execution)} - measured.keys() == {"sync_batchnorm", "graph"}  # of training


def test_settings_do_not_change():
    with pytest.raises(FrozenInstanceError):
        execution().device = "cpu"  # type: ignore[misc]


def test_a_command_builds_fabric_once(tmp_path, monkeypatch, capsys):
    built = []

    def counted(*execution):
        built.append(execution)
        return make_fabric(*execution)

    monkeypatch.setattr(sltt.training.session, "make_fabric", counted)
    monkeypatch.chdir(tmp_path)
    words = ["--model.width", "2", "--epochs", "1", "--steps", "1", "--batch_size", "512", "--device", "cpu"]
    assert main(["train", "digits", *words, "--run", "a"]) == 0
    assert built == [("cpu", None, None, "ddp", 32)]
    assert "run a\n" in capsys.readouterr().out
