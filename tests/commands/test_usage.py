from pathlib import Path

import pytest
import torch
import yaml

import sltt
from sltt.commands import main
from sltt.commands.doctor import findings
from sltt.commands.failures import cause
from sltt.commands.parsing import shipped_recipes
from sltt.kernels import native
from tests.commands.tiny import run


def test_an_unknown_key_in_a_file_is_explained(here, capsys):
    recipe = yaml.safe_load(shipped_recipes()["digits"].read_text())
    Path("a.yaml").write_text(yaml.safe_dump({**recipe, "epohcs": 3}))
    assert "unknown key 'epohcs'; did you mean epochs?" in run(capsys, "train", "a.yaml")[2]
    Path("a.yaml").write_text(yaml.safe_dump({**recipe, "data": {"class_path": "Digits", "init_arg": {}}}))
    expected = "a.yaml cannot be read: a class has the keys class_path and init_args, got 'init_arg'"
    assert expected in run(capsys, "train", "a.yaml")[2]
    recipe["data"]["init_args"]["validaton"] = 0.5
    Path("a.yaml").write_text(yaml.safe_dump(recipe))
    assert "unknown key 'validaton' of sltt.data.Digits; did you mean validation?" in run(capsys, "train", "a.yaml")[2]


def test_a_recipe_is_utf8_under_every_locale(here, capsys, monkeypatch):
    ascii_only = lambda path: Path(path.absolute).read_text(encoding="ascii")  # noqa: E731
    monkeypatch.setattr("jsonargparse.Path.read_text", ascii_only)
    text = shipped_recipes()["digits"].read_text(encoding="utf-8")
    Path("a.yaml").write_text(f"# µ\n{text}", encoding="utf-8")
    assert "unknown option --epohcs" in run(capsys, "train", "a.yaml", "--epohcs", "3")[2]


def test_doctor_tells_versions_device_compiler_and_threads(capsys):
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    for word in (sltt.__version__, torch.__version__, "device", "C++ compiler", "threads", "bf16-mixed"):
        assert word in out
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert "sltt report" in lines["matplotlib"]
    assert "pip install 'sltt[gpu]'" in " ".join(out.split())


def test_doctor_tells_where_the_kernels_are_from():
    (row,) = (row for row in findings() if row[0] == "spike-sparse layers")
    assert row[1] == ("dense" if native.problem() else "compiled here")


def test_a_second_ctrl_c_has_a_line_too(capsys, monkeypatch):
    def interrupted(words):
        raise KeyboardInterrupt

    monkeypatch.setattr("sltt.commands.doctor.run", interrupted)
    assert run(capsys, "doctor") == (130, "", "sltt: stopped by Ctrl-C\n")


def test_the_traceback_is_shown_when_it_is_asked_for(monkeypatch):
    monkeypatch.setenv("SLTT_TRACEBACK", "1")
    with pytest.raises(ValueError, match="there is no folder nowhere"):
        main(["report", "nowhere"])


def test_a_failed_worker_of_the_data_loader_is_told_in_a_line():
    trace = 'Original Traceback (most recent call last):\n  File "mine.py", line 3\nKeyError: 7\n'
    error = RuntimeError(f"Caught KeyError in DataLoader worker process 0.\n{trace}")
    assert cause(error) == "Caught KeyError in DataLoader worker process 0: KeyError: 7"
