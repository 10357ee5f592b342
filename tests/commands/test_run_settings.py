"""The file of settings in a run's folder, after something happened to it."""

import pytest
import yaml

from sltt.commands import main

TINY = ["--model.width", "2", "--steps", "2", "--batch_size", "512", "--device", "cpu", "--run", "run"]


@pytest.fixture
def text(tmp_path, monkeypatch):
    """The settings of a run of one epoch in the folder `run`."""
    monkeypatch.chdir(tmp_path)
    assert main(["train", "digits", "--epochs", "1", *TINY]) == 0
    return (tmp_path / "run/config.yaml").read_text()


def test_settings_that_changed_are_named_whatever_the_parser_makes_of_them(tmp_path, capsys, text):
    half = text[: text.index("  init_args", text.index("rule:"))]
    changes = {
        half: "batch_size is missing",
        text.replace("hoist: false", "hoist: null"): "rule.init_args.hoist was False and is None",
        text.replace("sltt.models.DigitsNet", "sltt.models.Foo"): "model.class_path was 'sltt.models.DigitsNet' and is",
        text + "\n- x": "config.yaml is damaged",
        "": "config.yaml is damaged",
        yaml.safe_dump({**yaml.safe_load(text), "seed": 3}): "seed was 0 and is 3",
    }
    file = tmp_path / "run/config.yaml"
    for changed, message in changes.items():
        assert changed != text
        file.write_text(changed)
        for command in (["train", "--resume", "run"], ["eval", "run"]):
            capsys.readouterr()
            assert main(command) == 1
            said = capsys.readouterr().err
            assert "the settings of run are not those that it was trained with" in said
            assert message in said
            assert "delete run/config.yaml" in said


def test_settings_that_are_gone_are_taken_from_the_checkpoint(tmp_path, text):
    file = tmp_path / "run/config.yaml"
    file.unlink()
    assert main(["eval", "run"]) == 0
    assert yaml.safe_load(file.read_text()) == yaml.safe_load(text)
    file.unlink()
    assert main(["train", "--resume", "run", "--epochs", "2"]) == 0
    assert yaml.safe_load(file.read_text()) == {**yaml.safe_load(text), "epochs": 2}
