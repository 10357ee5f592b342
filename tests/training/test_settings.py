import inspect
from dataclasses import MISSING, FrozenInstanceError, fields

import pytest

import sltt
import sltt.training.session
from sltt.commands import main
from sltt.parallel.devices import make_fabric
from sltt.training.settings import Execution, Training


def parameters(function):
    return {name: p.default for name, p in inspect.signature(function).parameters.items()}


def settings(*kinds):
    return {field.name: field.default for kind in kinds for field in fields(kind)}


def test_the_arguments_of_fit_are_the_settings_with_their_defaults():
    given, expected = parameters(sltt.fit), settings(Training, Execution)
    for name in ("model", "data", "run", "resume", "config", "report"):
        given.pop(name)
    assert given.keys() == expected.keys()
    assert all(default in (MISSING, given[name]) for name, default in expected.items())


def test_the_arguments_of_evaluate_are_settings_with_their_defaults():
    given, expected = parameters(sltt.evaluate), settings(Training, Execution)
    assert given["steps"] is None  # those of the training, which the network may know
    for name in ("model", "data", "split", "mirror", "shift", "steps"):
        given.pop(name)
    assert all(expected[name] in (MISSING, default) for name, default in given.items())
    assert settings(Execution).keys() - given.keys() == {"sync_batchnorm", "graph"}  # of training


def test_settings_do_not_change():
    with pytest.raises(FrozenInstanceError):
        Execution().device = "cpu"  # type: ignore[misc]


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
