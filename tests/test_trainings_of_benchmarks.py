"""What the benchmarks that train share, and those that no table needs."""

import io
import json
import shutil
from argparse import Namespace
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console

from tests.scripts import BENCHMARKS, benchmarks_on_the_path, load  # noqa: F401

RESULTS = BENCHMARKS.parent / "docs" / "results"


@pytest.mark.parametrize("name", ["deeper", "twin", "twin-digits", "short-stabilised", "short-transformer"])
def test_a_log_is_written_as_it_was_recorded(tmp_path, name):
    recorded, path = RESULTS / f"{name}.json", tmp_path / "log.json"
    shutil.copy(recorded, path)
    log = load("trainings").Log(path)
    assert log.find(dict(list(log.rows[1].items())[:4])) is log.rows[1]
    assert log.find({"network": "none"}) is None
    log.write()
    assert path.read_bytes() == recorded.read_bytes()


@pytest.fixture
def commands(monkeypatch):
    """The commands that a script gives to `sltt`: it saves a row, and fails where it is asked for what is bad."""
    given = []

    def command(words):
        given.append(words)
        if "--save" in words:
            save = Path(words[words.index("--save") + 1])
            save.mkdir(parents=True)
            row = {"rule": "SLTT", "accuracies": [0.5], "seconds": 2.0, "peak_memory": 8, "cosine": 1.0, "more": 1}
            (save / f"{words[0]}.json").write_text(json.dumps({"rows": [row]}))
        return 2 * ("bad" in words)

    monkeypatch.setattr(load("trainings"), "command", command)
    return given


def test_a_task_is_compared_in_its_folder(commands, tmp_path):
    asked = Namespace(rules="SLTT,Mixed", seeds=2, runs=tmp_path, data=None)
    (row,) = load("tasks").compare("recall, detach_reset: false", asked)
    options = "--model.neuron.detach_reset false --rules", "--seeds 2 --device cpu --save"
    words = " ".join(commands[0])
    assert all(one in words for one in options)
    assert "SLTT,Mixed:windows={hidden.1: all}" in commands[0]
    assert commands[0][-1] == str(tmp_path / "recall-detach_reset-false")
    assert list(row) == ["task", "rule", "accuracies", "seconds", "peak_memory", "cosine"]


def test_a_task_with_data_is_compared_where_they_are(commands, tmp_path, monkeypatch):
    tasks = load("tasks")
    monkeypatch.setattr(tasks, "RESULTS", tmp_path)
    monkeypatch.setattr(tasks, "fill", lambda: None)
    words = ["tasks.py", "--tasks", "nmnist", "--runs", str(tmp_path)]
    monkeypatch.setattr("sys.argv", words)
    tasks.main()
    assert commands == []  # without --data it is left out
    monkeypatch.setattr("sys.argv", [*words, "--data", "there"])
    tasks.main()
    assert commands[0][:4] == ["compare", "nmnist", "--data.root", "there/nmnist"]
    assert [row["task"] for row in json.loads((tmp_path / "tasks.json").read_text())] == ["nmnist"]


def test_a_training_goes_on_where_it_has_begun(commands, tmp_path):
    train = load("trainings").train
    train(["digits"], tmp_path)
    (tmp_path / "config.yaml").touch()
    train(["digits"], tmp_path)
    new, again = commands
    assert new == ["train", "digits", "--device", "cpu", "--run", str(tmp_path)]
    assert again == ["train", "--resume", str(tmp_path)]
    with pytest.raises(SystemExit, match="2"):
        load("trainings").call(["train", "bad"])


def test_deeper_networks_are_trained_once_under_each_rule(tmp_path, monkeypatch, capsys):
    deeper = load("deeper")
    data = partial(deeper.marked, samples=256)
    monkeypatch.setattr(deeper, "TASKS", {"tiny": deeper.TASKS["recall-marked"]._replace(data=data, epochs=1)})
    monkeypatch.setattr(deeper, "RULES", {name: deeper.RULES[name] for name in ("BPTT", "traces")})
    monkeypatch.setattr(deeper, "PATH", tmp_path / "deeper.json")
    monkeypatch.setattr(deeper, "fill", lambda: None)
    monkeypatch.setattr("sys.argv", ["deeper.py", "--seeds", "1"])
    for printed in (9, 0):  # a row for each depth, and for each depth and rule
        deeper.main()
        assert len(capsys.readouterr().out.splitlines()) == printed
    rows = json.loads((tmp_path / "deeper.json").read_text())
    assert [sorted(row) for row in rows[:1] + rows[-1:]] == [
        ["after an epoch", "cosines", "layers", "task", "untrained"],
        ["layers", "rule", "seed", "task", "test"],
    ]
    tables = load("doc_tables")
    assert "| 4 | `tiny` | " in tables.deeper_cosines(tmp_path)
    assert f"| 4 | `tiny` | {rows[-2]['test']:.1%} | {rows[-1]['test']:.1%} |" in tables.deeper_accuracies(tmp_path)


def test_a_dot_in_the_figure_of_recall_is_a_training(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    row = load("recall_figure").train("SLTT", 16, seed=0, epochs=1, samples=256)
    assert (row["rule"], row["steps"]) == ("SLTT", 16)
    assert 0 <= row["accuracy"] <= 1
    assert row["memory"] > 0
    assert capsys.readouterr().out == ""
    assert not list(tmp_path.iterdir())  # the run is not kept


def test_what_several_processes_take_is_shown_beside_one():
    scaling, console = load("scaling"), Console(file=io.StringIO(), width=100)
    shared = {"reduction_seconds": 0.01, "seconds": 0.1, "memory": 2e8}
    rows = {"SLTT": [{"processes": n, "samples_per_second": 30.0 * n, **shared} for n in (1, 2)]}
    scaling.show_measured(rows, Namespace(network="digits", steps=4, batch=8), console)
    options = Namespace(tflops=150.0, nvlink=300.0, nic=25.0)
    scaling.show_modelled("resnet18", scaling.model_rows("resnet18", options), console)
    lines = [line.split() for line in console.file.getvalue().splitlines()]
    assert ["SLTT", "2", "60.0", "2.00", "10.0", "ms", "10.0%", "200", "MB"] in lines
    assert ["SLTT", "512", "17", "ms", "3.22", "ms", "15.9%", "7.2%", "53.1%"] in lines  # as in docs/several.md
