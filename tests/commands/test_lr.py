import json

from sltt.analysis.rates import RateTest
from sltt.commands.lr import _print
from sltt.training.console import Console
from tests.commands.tiny import TINY, run


def test_a_rate_is_found_kept_and_reported(here, capsys):
    words = ["lr", "digits", *TINY, "--batches", "14", "--save", "found"]
    code, out, _ = run(capsys, *words)
    assert code == 0
    assert all(len(line) <= 120 for line in out.splitlines())
    assert out.splitlines()[0].split() == ["learning", "rate", "loss"]
    assert out.splitlines()[1].split()[::2] == ["1e-05", "█" * 30]  # the loss falls from there
    found = json.loads((here / "found" / "lr.json").read_text())
    assert (found["recipe"], found["optimizer"], len(found["rates"])) == ("digits", "AdamW", 14)
    assert "--optimizer.lr" in out or "falls by less than 2%" in out
    code, out, _ = run(capsys, "report", "found")
    assert code == 0
    page = (here / "found" / "report" / "report.html").read_text()
    assert "Learning rate: digits" in page
    assert (here / "found" / "report" / "figures" / "1-rates.svg").exists()
    assert len((here / "found" / "report" / "data" / "1-rates.csv").read_text().splitlines()) == 15


def test_the_bars_of_losses_below_zero_have_lengths(capsys):
    _print(RateTest([1e-3, 1e-2, 1e-1], [-1.0, -5.0, 3.0], 1e-2, 1e-2), Console())
    assert [line.count("█") for line in capsys.readouterr().out.splitlines()[1:4]] == [15, 0, 30]


def test_the_rule_and_t_are_those_of_the_phase_that_takes_the_rate(here, capsys):
    phases = "[{epochs: 1, steps: 1, rule: {class_path: sltt.RateBased}}, {epochs: 1, lr: 0.001}]"
    code, out, _ = run(capsys, "lr", "digits", *TINY, "--phases", phases, "--batches", "10", "--json")
    assert code == 0
    found = json.loads(out)
    assert (found["rule"], found["steps"]) == ("RateBased()", 1)
