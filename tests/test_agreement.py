import copy
import json

import pytest
import torch

import sltt
from sltt.analysis import Agreement, advice, agreement
from sltt.analysis.agreement import windows
from sltt.cli import main
from tests.conftest import batch, gradients, small_network

LOSS = sltt.losses.CrossEntropyMSE()


def test_with_one_step_every_rule_agrees(rule, neuron):
    x, y = batch(steps=1)
    if getattr(rule, "k", None) != 2:
        (found,) = agreement(small_network(neuron, dropout=0.3), x, y, LOSS, [rule])
        assert found.cosine == pytest.approx(1)
        assert found.norm_ratio == pytest.approx(1)
        assert found.dropped == pytest.approx(0, abs=1e-6)


def test_agreement_is_that_of_the_gradients_and_falls_with_tau():
    x, y = batch(steps=6, size=32)
    cosines = []
    for tau in (1.1, 1.33, 2.0, 4.0):
        torch.manual_seed(3)
        model = small_network(lambda tau=tau: sltt.LIF(tau=tau))
        (found,) = agreement(model, x, y, LOSS)
        a, b = (gradients(model, rule, x, y)[0] for rule in (sltt.SLTT(), sltt.BPTT()))
        assert found.cosine == pytest.approx(torch.cosine_similarity(a, b, dim=0).item())
        assert found.norm_ratio == pytest.approx((a.norm() / b.norm()).item())
        assert found.dropped == pytest.approx(((a - b).norm() / b.norm()).item())
        cosines.append(found.cosine)
    assert cosines == sorted(cosines, reverse=True)
    assert found.layers["6"] == pytest.approx((1, 1))  # the last layer has no neurons behind it
    assert found.layers["0"][0] < found.layers["4"][0] < 1


def test_longer_windows_agree_more():
    x, y = batch(steps=9, size=32)
    found = agreement(small_network(lambda: sltt.LIF(tau=4.0)), x, y, LOSS, windows(9))
    assert [a.rule for a in found] == ["SLTT()", "TBPTT(window=2)", "TBPTT(window=4)", "TBPTT(window=8)"]
    dropped = [a.dropped for a in found]
    assert dropped == sorted(dropped, reverse=True)
    assert [repr(rule) for rule in windows(2)] == ["SLTT()"]


def test_the_model_is_left_as_it_was_and_the_type_can_be_wider():
    model = small_network(norm=True).float()
    before = copy.deepcopy(model.state_dict())
    x, y = batch()
    (found,) = agreement(model, x.float(), y, LOSS, [sltt.BPTT()], dtype=torch.float64)
    assert found.cosine == pytest.approx(1, abs=1e-12)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("cosines", "sentence"),
    [
        ([0.97, 0.99], "SLTT drops 30% of the gradient here (cosine 0.970): take SLTT."),
        ([0.80, 0.96], "take TBPTT(window=2), the shortest window with a cosine of 0.95 or more (0.960)."),
        ([0.30, 0.60], "no window below T reaches 0.95: take BPTT."),
        ([float("nan"), 0.60], "take BPTT."),
    ],
)
def test_advice(cosines, sentence):
    rules = ["SLTT()", "TBPTT(window=2)"]
    found = [Agreement(rule, cosine, 1.0, 0.3, {}) for rule, cosine in zip(rules, cosines, strict=True)]
    assert advice(found).endswith(sentence)


def test_the_command(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["agreement", "digits", "--taus", "1.1,4", "--steps", "3", "--samples", "32", "--model.width", "4"]
    assert main([*words, "--at-epochs", "0,1", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "SLTT by layer" in out
    assert out.splitlines()[-1].startswith("τ = 4, T = 3, after 1 epochs: SLTT drops")
    assert all(len(line) <= 80 for line in out.splitlines() if not line.startswith("τ"))
    assert main([*words, "--float64", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["tau"], row["steps"], row["epochs"]) for row in rows] == [(1.1, 3, 0), (4.0, 3, 0)]
    assert rows[0]["agreement"][0]["cosine"] > rows[1]["agreement"][0]["cosine"]
    assert all("SLTT drops" in row["advice"] for row in rows)
    assert not list(tmp_path.glob("runs/*"))
    assert main(["agreement", "digits", "--taus", "0.5"]) == 1
    assert "tau must be greater than 1" in capsys.readouterr().err
    assert main(["agreement", "digits", "--epohcs", "3"]) == 2
