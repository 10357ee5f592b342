import copy
import json

import pytest
import torch
from torch import nn

import sltt
from sltt.analysis import agreement
from sltt.analysis.agreement import cheaper_rules, windows
from sltt.commands import main
from tests.conftest import LOSS, batch, each_kind, gradients, small_network


@each_kind
def test_with_one_step_every_rule_agrees(rule):
    x, y = batch(steps=1)
    model = small_network(sltt.PLIF, dropout=0.3)
    (found,) = agreement(model, x, y, LOSS, [rule])
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


def losses():
    """A loss of each step, of the whole sequence and with a penalty, and their targets."""
    _, y = batch(steps=6, size=8)
    return {
        "each step": (sltt.losses.PerStep(LOSS), y.expand(6, 8)),
        "last step": (sltt.losses.OfLast(LOSS), y),
        "penalty": (sltt.losses.Activity(LOSS, weight=10.0), y),
        "weights": (torch.nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5])), y),
        "numbers": (torch.nn.MSELoss(), torch.rand(8, 3)),
    }


@pytest.mark.parametrize("name", losses())
def test_losses_of_every_kind_are_compared_as_they_are_trained(name):
    (loss, y), (x, _), model = losses()[name], batch(steps=6, size=8), small_network(lambda: sltt.LIF(tau=4.0))
    loss, y = loss.double(), y.double() if y.is_floating_point() else y
    (found,) = agreement(model, x, y, loss, [sltt.TBPTT(2)])
    a, b = (gradients(model, rule, x, y, loss=loss)[0] for rule in (sltt.TBPTT(2), sltt.BPTT()))
    assert found.cosine == pytest.approx(torch.cosine_similarity(a, b, dim=0).item())
    assert found.norm_ratio == pytest.approx((a.norm() / b.norm()).item())
    assert found.cosine < 1


def test_longer_windows_agree_more():
    x, y = batch(steps=9, size=32)
    found = agreement(small_network(lambda: sltt.LIF(tau=4.0)), x, y, LOSS, windows(9))
    assert [a.rule for a in found] == ["SLTT()", "TBPTT(window=2)", "TBPTT(window=4)", "TBPTT(window=8)"]
    dropped = [a.dropped for a in found]
    assert dropped == sorted(dropped, reverse=True)
    assert [repr(rule) for rule in windows(2)] == ["SLTT()"]


def test_the_model_is_left_as_it_was():
    model = small_network(norm=True)
    before = copy.deepcopy(model.state_dict())
    x, y = batch()
    (found,) = agreement(model, x, y, LOSS, [sltt.BPTT()])
    assert found.cosine == pytest.approx(1, abs=1e-12)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.slow
def test_the_command(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["agreement", "digits", "--steps", "3", "--samples", "32", "--model.width", "4", "--device", "cpu"]
    assert main([*words, "--taus", "1.1,4", "--save", "kept"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("SLTT by layer" in line for line in lines)
    assert lines[-2].startswith("τ = 4, T = 3, after 0 epochs: Take ")
    assert all(len(line) <= 80 for line in lines if not line.startswith("τ"))
    first, second = json.loads((tmp_path / "kept" / "agreement.json").read_text())["rows"]
    assert (first["tau"], second["tau"]) == (1.1, 4.0)
    assert first["agreement"][0]["cosine"] > second["agreement"][0]["cosine"]
    trial = ["--trial", "1", "--seeds", "1", "--at-epochs", "0,1", "--data.validation", "0.9", "--rule.fold", "1"]
    assert main([*words, *trial, "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)["rows"]
    assert (first["epochs"], second["epochs"]) == (0, 1)
    assert first["trial"] == second["trial"]  # one, whatever agrees later
    assert [*first["trial"]["losses"]] == ["SLTT()", "OTTT()", "BPTT()"]  # in the order of memory
    assert first["memory"]["SLTT()"] < first["memory"]["BPTT()"]
    for row in (first, second):
        assert row["advice"].startswith(f"Take {row['rule'].removesuffix('()')}. Not sure")
    assert not list(tmp_path.glob("runs/*"))


def test_ottt_is_measured_where_it_knows_the_network():
    soft, hard = (small_network(lambda reset=reset: sltt.LIF(v_reset=reset)) for reset in (None, 0.0))
    assert [repr(rule) for rule in cheaper_rules(soft, 4)] == ["SLTT()", "OTTT()", "TBPTT(window=2)"]
    assert [repr(rule) for rule in cheaper_rules(hard, 4)] == ["SLTT()", "TBPTT(window=2)"]


def test_the_worst_layer_tells_what_all_parameters_hide():
    model = small_network(lambda: sltt.LIF(tau=20.0, detach_reset=True))
    x, y = batch(steps=8)
    (found,) = agreement(model, x, y, LOSS)
    assert found.least == min(found.cosine, *(found.layers[name][0] for name in ("0", "4", "6")))
    assert found.layers["6"][0] == pytest.approx(1)  # the readout
    model[4].requires_grad_(False)
    assert agreement(model, x, y, LOSS)[0].least == pytest.approx(found.layers["0"][0])


def test_the_surrogate_of_resets_does_not_hide_what_neurons_remember():
    model = nn.Sequential(nn.Linear(6, 8), sltt.LIF(tau=20.0), nn.Linear(8, 3)).double()
    x, y = batch(steps=8)
    found = agreement(model, 3 * x, y, LOSS, [sltt.SLTT(), sltt.OTTT()])
    assert found[1].cosine < 0.99
    assert found[1].least == pytest.approx(1)
    assert not model[1].detach_reset
    model[1].detach_reset = True
    assert agreement(model, 3 * x, y, LOSS)[0].least == pytest.approx(found[0].least)


class Half(nn.Module):
    """Its gradient is float16, as that of a layer under autocast."""

    def forward(self, x):
        if x.requires_grad:
            x.register_hook(lambda grad: grad.half().float())
        return 1 * x


@pytest.mark.parametrize("size", [1e-5, 1, 1e4])
def test_gradients_that_float16_would_round_to_zero_or_infinity_are_compared(size):
    """The loss is scaled, as in a training with 16-mixed."""
    x, y = torch.randn(4, 16, 6), torch.randint(3, (16,))
    model = nn.Sequential(nn.Linear(6, 8), Half(), sltt.LIF(tau=2.0), nn.Linear(8, 3))
    exact = nn.Sequential(model[0], nn.Identity(), *model[2:])

    def loss(logits, target):
        return size * nn.functional.cross_entropy(logits, target)

    for rule in (sltt.SLTT(), sltt.TBPTT(2)):
        (found,), (expected,) = (agreement(network, x, y, loss, [rule]) for network in (model, exact))
        assert found.cosine == pytest.approx(expected.cosine, abs=1e-3)
        assert found.layers["0"] == pytest.approx(expected.layers["0"], abs=1e-3)
