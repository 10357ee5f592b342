import copy
import json
import shlex

import pytest
import torch
from torch import nn

import sltt
from sltt.analysis import Agreement, agreement, memory_parts, propose
from sltt.analysis.agreement import AGREES, SAVES, cheaper_rules, windows
from sltt.commands import main
from sltt.commands.parsing import Recipe
from sltt.commands.results import gather
from sltt.commands.rule_texts import mixed_options
from tests.conftest import LOSS, batch, gradients, small_network


def test_with_one_step_every_rule_agrees(rule):
    x, y = batch(steps=1)
    model = small_network(sltt.PLIF, dropout=0.3)
    if getattr(rule, "k", None) == 2:
        with pytest.raises(ValueError, match=r"trains 2 steps, but the sequence has T = 1; use k ≤ T"):
            agreement(model, x, y, LOSS, [rule])
        return
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
    if name not in ("weights", "numbers"):
        (found,) = agreement(model, x, y, loss, [sltt.TBPTT(2)])
    else:  # in float32
        (found,) = agreement(model.float(), x.float(), y, loss, [sltt.TBPTT(2)], dtype=torch.float64)
        model, loss, y = model.double(), loss.double(), y.double() if y.is_floating_point() else y
    a, b = (gradients(model, rule, x, y, loss=loss)[0] for rule in (sltt.TBPTT(2), sltt.BPTT()))
    assert found.cosine == pytest.approx(torch.cosine_similarity(a, b, dim=0).item())
    assert found.norm_ratio == pytest.approx((a.norm() / b.norm()).item())
    assert found.cosine < 1
    if name == "each step":
        propose(model, x, y, loss, [found])


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


def test_the_command(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["agreement", "digits", "--steps", "3", "--samples", "32", "--model.width", "4", "--taus"]
    assert main([*words, "4", "--at-epochs", "0,1", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "SLTT by layer" in out
    assert out.splitlines()[-1].startswith("τ = 4, T = 3, after 1 epoch: Take ")
    assert all(len(line) <= 80 for line in out.splitlines() if not line.startswith("τ"))
    assert main([*words, "1.1,4", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["tau"], row["steps"], row["epochs"]) for row in rows] == [(1.1, 3, 0), (4.0, 3, 0)]
    assert rows[0]["agreement"][0]["cosine"] > rows[1]["agreement"][0]["cosine"]
    assert all(row["advice"].startswith(f"Take {row['rule'].removesuffix('()')}. Not sure") for row in rows)
    assert not list(tmp_path.glob("runs/*"))


FAST = 1.01  # forgets within a step


def layered(taus, inputs=6, width=16, outputs=3):
    """Linear and LIF for each τ; the neurons are called 1, 3, 5, …. The first weights alone are trained."""
    layers = []
    for before, tau in zip([inputs, *[width] * len(taus)], taus, strict=False):
        layers += [nn.Linear(before, width), sltt.LIF(tau=tau, detach_reset=True)]
        layers[-2].weight.data.mul_(2)
    model = nn.Sequential(*layers, nn.Linear(width, outputs))
    model[1:].requires_grad_(False)
    return model


def proposed(model, steps=8):
    """What is proposed for a batch, and the batch, in float64."""
    x, y = batch(steps, size=32)
    found = agreement(model.double(), x, y, LOSS, windows(steps))
    with sltt.kernels.using(fold_memory=0):  # rules differ in memory on small networks
        return propose(model, x, y, LOSS, found), found, (x, y)


def in_memory(rule, model, x, y):
    """Bytes of a batch with one time step in a call."""
    with sltt.kernels.using(fold_memory=0):
        return memory_parts(model, x, y, LOSS, rule).batch


@pytest.mark.parametrize("slow", [0, 2])
def test_the_one_layer_that_needs_time_is_proposed_and_agrees_as_it_says(slow):
    model = layered([20.0 if i == slow else FAST for i in range(4)])
    proposal, found, (x, y) = proposed(model)
    assert found[0].cosine < AGREES
    assert proposal.windows == {str(2 * slow + 1): "all"}
    assert proposal.agreement.cosine > 0.99
    words = shlex.split(mixed_options(proposal.windows))
    rule = Recipe("sltt train", "digits", words).build().rule
    with sltt.kernels.using(fold_memory=0):
        assert agreement(model, x, y, LOSS, [rule]) == [proposal.agreement]
    assert in_memory(sltt.SLTT(), model, x, y) < proposal.memory < SAVES * in_memory(sltt.BPTT(), model, x, y)


def test_layers_below_have_a_window_where_that_changes_the_cosine():
    assert proposed(layered([20.0, 20.0, FAST, FAST]))[0].windows == {"1": "all", "3": "all"}


def test_the_window_is_the_shortest_that_agrees():
    proposal, found, (x, y) = proposed(model := layered([2.0, FAST, FAST, FAST]))
    shortest = next(a.rule for a in found if a.cosine >= AGREES)
    assert shortest == f"TBPTT(window={proposal.windows['1']})"
    assert proposal.memory < SAVES * in_memory(sltt.TBPTT(proposal.windows["1"]), model, x, y)


@pytest.mark.parametrize("taus", [[20.0], [FAST, FAST, 20.0]], ids=str)
def test_nothing_is_proposed_where_the_last_layer_needs_time(taus):
    proposal, found, _ = proposed(layered(taus))
    assert found[0].cosine < AGREES
    assert proposal is None


def test_nothing_is_run_where_sltt_agrees():
    x, y = batch()
    agreed = [Agreement("SLTT()", AGREES, 1.0, 0.3, {}, AGREES)]
    assert propose(layered([20.0] * 3).double(), x, y, None, agreed) is None


def test_deep_networks_take_few_measurements():
    calls, (x, y) = [], batch(steps=4)

    def loss(logits, target):
        calls.append(target)
        return LOSS(logits, target)

    unknown = [Agreement("SLTT()", 0.1, 1.0, 0.3, {}, 0.1)]
    assert propose(layered([20.0, *[FAST] * 16]).double(), x, y, loss, unknown) is not None
    assert len(calls) / 4 <= 1 + 5 + 1 + 2 * 4  # BPTT, the bisection of 16 layers, the last of them alone, memory


def test_the_model_and_the_random_numbers_are_left_as_they_were():
    model = layered([20.0, FAST, FAST])
    model.insert(2, sltt.Dropout(0.3))
    before = copy.deepcopy(model.double().state_dict())
    x, y = batch(steps=8, size=32)
    state = torch.get_rng_state()
    propose(model, x, y, LOSS, agreement(model, x, y, LOSS))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert model[1].v is None


@pytest.mark.parametrize("name", ["2", "on", "a b", "features.2", "it's", "x: {y}", "1e3.5"])
def test_names_of_layers_reach_the_rule_as_they_are(name):
    windows = {name: "all", "features.5": 4}
    rule = Recipe("sltt train", "digits", shlex.split(mixed_options(windows))).build().rule
    assert rule.windows == windows


class Remembers(nn.Module):
    """A network for the recipe `recall` that has to remember in its first layer only, and that OTTT does not know."""

    def __init__(self):
        super().__init__()
        self.net = layered([20.0, FAST, FAST], inputs=20, width=64, outputs=4)
        for neuron in self.net[1::2]:
            neuron.v_reset = 0.0  # which OTTT does not follow

    def forward(self, x):
        return self.net(x)


def test_the_command_proposes_it_and_the_report_reads_it(capsys, tmp_path):
    words = ["agreement", "recall", "--model", "tests.analysis.test_agreement.Remembers", "--data.channels", "20"]
    words += ["--data.samples", "500", "--samples", "64"]
    assert main([*words, "--rule.fold", "1", "--device", "cpu", "--save", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    (row,) = json.loads((tmp_path / "agreement.json").read_text())["rows"]
    proposal = row["proposal"]
    assert lines[-2].endswith(row["advice"])
    assert list(proposal["windows"]) == ["net.1"]
    mixed = row["agreement"][-1]
    assert mixed == proposal["agreement"]
    assert mixed["least"] >= AGREES
    assert row["rule"] == mixed["rule"] == "Mixed(windows={'net.1': 'all'})"
    assert row["advice"].startswith(f"Take {mixed['rule']}. Not sure of SLTT, which would save memory: this rests on ")
    assert row["advice"].endswith(f" On the command line: {proposal['options']}")
    assert proposal["memory"] < row["memory"]["BPTT()"]
    made = pytest.importorskip("sltt.commands.sections", reason="the report needs matplotlib")
    _, section = made.sections(gather([tmp_path]))
    assert row["advice"] in section.text[0]


def test_a_trial_trains_the_proposal_in_the_order_of_memory_and_it_is_measured_after_other_epochs_too(
    monkeypatch, capsys
):
    proposals = [lambda *a, **k: propose(*a, **k), lambda *a, **k: None]
    monkeypatch.setattr("sltt.commands.agreement.propose", lambda *a, **k: proposals.pop(0)(*a, **k))
    words = ["agreement", "recall", "--model", "tests.analysis.test_agreement.Remembers", "--data.channels", "20"]
    words += ["--data.samples", "500", "--samples", "64", "--trial", "1", "--seeds", "1", "--at-epochs", "0,1"]
    assert main([*words, "--rule.fold", "1", "--device", "cpu", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    mixed = rows[0]["proposal"]["agreement"]["rule"]
    assert mixed == "Mixed(windows={'net.1': 'all'})"
    assert list(rows[0]["trial"]["losses"]) == ["SLTT()", mixed, "BPTT()"]
    memory = rows[0]["memory"]
    assert memory["SLTT()"] < rows[0]["proposal"]["memory"] < memory["BPTT()"]
    assert mixed in [a["rule"] for a in rows[1]["agreement"]]
    assert [a["rule"] for a in rows[0]["agreement"]] == [a["rule"] for a in rows[1]["agreement"]]
    assert "No Mixed" not in rows[1]["advice"]


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
