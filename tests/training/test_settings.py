import inspect

import pytest

import sltt
import sltt.training.session
from sltt.commands import main
from sltt.parallel.devices import make_fabric
from sltt.training.settings import Settings


def defaults(function, *without):
    return {name: p.default for name, p in inspect.signature(function).parameters.items() if name not in without}


def test_evaluate_has_the_defaults_of_fit_which_are_those_of_settings():
    fit, settings = defaults(sltt.fit), vars(Settings())
    assert {**settings, "batch_size": None} == {name: fit[name] for name in settings}
    measured = defaults(sltt.evaluate, "model", "data", "split", "mirror", "shift", "steps")  # T may be the training's
    assert all(one == fit[name] or type(one) is type(fit[name]) for name, one in measured.items())


def test_settings_do_not_change():
    with pytest.raises(AttributeError, match="a Settings is a value and never changes"):
        Settings().device = "cpu"


def test_a_command_builds_fabric_once(tmp_path, monkeypatch, capsys):
    built = []

    def counted(*execution):
        built.append(execution)
        return make_fabric(*execution)

    monkeypatch.setattr(sltt.training.session, "make_fabric", counted)
    monkeypatch.chdir(tmp_path)
    words = ["--model.width", "2", "--epochs", "1", "--steps", "1", "--batch_size", "512", "--device", "cpu"]
    assert main(["train", "digits", *words, "--run", "a"]) == 0
    assert built == [("cpu", None, "ddp", 32)]
    assert "run a\n" in capsys.readouterr().out
