from sltt.training.console import Console


def test_escape_sequences_in_names_are_shown_escaped(capsys):
    Console().line("run a\x1b[31m/µ – b")
    Console().warn("a\udcff\nb")
    assert capsys.readouterr().out == "run a\\x1b[31m/µ – b\nwarning: a\\udcff\nb\n"


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


def test_the_bar_of_a_notebook_is_that_of_its_widgets(monkeypatch, capsys):
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr("sltt.training.console.find_spec", lambda name: None)
    monkeypatch.setenv("FORCE_COLOR", "1")  # as in a notebook
    with Console().bar("epoch 1/1", 2) as advance:
        advance()
    Console().line("run runs/one")  # as plain text
    assert capsys.readouterr().out == "run runs/one\n"
