import sys
from types import ModuleType

import pytest

from sltt.training.console import Console


class Place:
    """What a notebook shows, by the interface of `IPython.display`."""

    def __init__(self):
        self.contents = []
        self.made = 0

    def display(self, content, raw, display_id):
        self.made += 1
        self.contents.append(content)
        return self

    def update(self, content, raw):
        self.contents.append(content)


@pytest.fixture
def notebook(monkeypatch):
    """The code believes to run in a notebook."""
    place = Place()
    module = ModuleType("IPython.display")
    module.display = place.display
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr("sltt.training.console.SECONDS", 0)
    return place


def test_escape_sequences_in_names_are_shown_escaped(capsys):
    Console().line("run a\x1b[31m/µ – b")
    Console().warn("a\udcff\nb")
    assert capsys.readouterr().out == "run a\\x1b[31m/µ – b\nwarning: a\\udcff\nb\n"


def test_a_notebook_shows_one_bar_for_all_epochs_that_vanishes(notebook, capsys):
    with Console(quiet=True).bar("epoch 1/1", 2) as advance:
        advance()
    console = Console()
    console.line("run runs/one")  # as plain text
    assert capsys.readouterr().out == "run runs/one\n"
    assert notebook.contents == []
    for epoch in (1, 2):
        with console.bar(f"epoch {epoch}/2", 3) as advance:
            advance()
    texts = [content["text/plain"] for content in notebook.contents]
    assert texts == ["epoch 1/2 1/3", "", "epoch 2/2 1/3", ""]
    assert '<progress max="3" value="1">' in notebook.contents[0]["text/html"]
    assert notebook.contents[-1]["text/html"] == ""
    assert notebook.made == 1


def test_a_bar_in_a_notebook_is_not_drawn_for_each_batch(notebook, monkeypatch):
    monkeypatch.setattr("sltt.training.console.SECONDS", 3600)
    with Console().bar("epoch 1/1", 1000) as advance:
        for _ in range(1000):
            advance()
    assert len(notebook.contents) == 2


def test_a_row_has_the_metrics_of_an_epoch_under_their_headings(capsys):
    row = {"epoch": 3, "train_loss": 0.5, "train_accuracy": 0.25, "validation_accuracy": 0.75, "firing_rate": 0.125}
    Console().row({**row, "seconds": 1.5, "peak_memory": None})
    headings, values = (line.split("  ") for line in capsys.readouterr().out.splitlines())
    found = [[word.strip() for word in line if word.strip()] for line in (headings, values)]
    assert dict(zip(*found, strict=True)) == {
        "epoch": "3",
        "loss": "0.5000",
        "train acc": "25.00%",
        "val acc": "75.00%",
        "firing rate": "0.1250",
        "seconds": "1.5",
        "peak memory": "–",
    }
