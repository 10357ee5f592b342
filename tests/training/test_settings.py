import inspect
import re
from dataclasses import fields

import pytest
from torch import nn

import sltt
import sltt.training.session
from sltt.commands import main
from sltt.parallel.devices import make_fabric
from sltt.training.settings import Settings, texts_of


def test_fit_takes_the_settings_and_says_what_each_does():
    arguments = inspect.signature(sltt.fit).parameters
    assert [*arguments][:4] == ["model", "data", "rule", "loss"]
    assert {*texts_of(Settings)} == {*arguments} == {one.name for one in fields(Settings)}
    assert "\n        epochs: passes over the training samples." in sltt.fit.__doc__
    assert all(len(line) <= 120 for line in sltt.fit.__doc__.splitlines())


NEAR = [("epoch", "did you mean epochs?"), ("xyz", "help(sltt.fit) lists"), ("lr", "optimizer=functools.partial(")]


@pytest.mark.parametrize(("name", "hint"), NEAR)
def test_an_unknown_argument_is_told_with_the_nearest(name, hint):
    with pytest.raises(TypeError, match=re.escape(f"fit has no argument '{name}'; {hint}")):
        sltt.fit(nn.Identity(), sltt.data.Digits(), **{name: 1})


def test_settings_do_not_change():
    with pytest.raises(AttributeError, match="cannot assign to field 'device'"):
        Settings(nn.Identity(), sltt.data.Digits()).device = "cpu"


def test_a_command_builds_fabric_once(tmp_path, monkeypatch, capsys):
    built = []

    def counted(*execution):
        built.append(execution)
        return make_fabric(*execution)

    monkeypatch.setattr(sltt.training.session, "make_fabric", counted)
    monkeypatch.chdir(tmp_path)
    words = ["--model.width", "2", "--epochs", "1", "--steps", "1", "--batch_size", "512", "--device", "cpu"]
    assert main(["train", "digits", *words, "--run", "a"]) == 0
    assert built == [("cpu", None, 32)]
    assert "run a\n" in capsys.readouterr().out
