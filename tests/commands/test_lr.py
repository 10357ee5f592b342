import json

from tests.commands.tiny import TINY, run


def test_a_rate_is_found(here, capsys):
    code, out, _ = run(capsys, "lr", "digits", *TINY, "--batches", "14")
    assert code == 0
    lines = out.splitlines()
    assert all(len(line) <= 120 for line in lines)
    assert lines[0].split() == ["learning", "rate", "loss"]
    assert (lines[1].split()[0], len(lines)) == ("1e-05", 9)
    assert "--optimizer.lr" in lines[-1] or "falls by less than 2%" in lines[-1]


def test_the_rule_and_t_are_those_of_the_phase_that_takes_the_rate(here, capsys):
    phases = "[{epochs: 1, steps: 1, rule: {class_path: sltt.RateBased}}, {epochs: 1, lr: 0.001}]"
    code, out, _ = run(capsys, "lr", "digits", *TINY, "--phases", phases, "--batches", "10", "--json")
    assert code == 0
    found = json.loads(out)
    assert (found["rule"], found["steps"]) == ("RateBased()", 1)
