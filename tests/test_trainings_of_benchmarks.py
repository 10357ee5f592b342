"""The benchmarks that train."""

import json
from argparse import Namespace
from pathlib import Path

import pytest

from tests.scripts import benchmarks_on_the_path, load  # noqa: F401


@pytest.fixture
def commands(monkeypatch):
    """The commands that a script gives to `sltt`, which saves a row."""
    given = []

    def command(words):
        given.append(words)
        save = Path(words[words.index("--save") + 1])
        save.mkdir(parents=True)
        row = {"rule": "SLTT", "accuracies": [0.5], "seconds": 2.0, "needed_memory": 8, "cosine": 1.0, "more": 1}
        (save / f"{words[0]}.json").write_text(json.dumps({"rows": [row]}))
        return 0

    monkeypatch.setattr(load("turns"), "command", command)
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


def test_two_tasks_at_a_time_keep_the_rows_of_both(tmp_path, monkeypatch):
    tasks, path = load("tasks"), tmp_path / "tasks.json"

    def compare(task, asked):
        path.write_text(json.dumps([{"task": "digits", "rule": "SLTT"}]))  # as another process does meanwhile
        return [{"task": task, "rule": "SLTT"}]

    for name, value in {"RESULTS": tmp_path, "fill": lambda: None, "compare": compare}.items():
        monkeypatch.setattr(tasks, name, value)
    monkeypatch.setattr("sys.argv", ["tasks.py", "--tasks", "recall"])
    tasks.main()
    assert [row["task"] for row in json.loads(path.read_text())] == ["digits", "recall"]


def test_rate_based_is_left_out_where_lengths_differ(commands, tmp_path):
    asked = Namespace(rules="SLTT,RateBased", seeds=2, runs=tmp_path, data=None)
    for task in ("japanese-vowels", "basic-motions"):
        load("tasks").compare(task, asked)
    assert [words[words.index("--rules") + 1] for words in commands] == ["SLTT", "SLTT,RateBased"]


def test_a_dot_in_the_figure_of_recall_is_a_training(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    row = load("recall_figure").train("SLTT", 16, seed=0, epochs=1, samples=256)
    assert (row["rule"], row["steps"]) == ("SLTT", 16)
    assert 0 <= row["accuracy"] <= 1
    assert row["memory"] > 0
    assert capsys.readouterr().out == ""
    assert not list(tmp_path.iterdir())  # the run is not kept
