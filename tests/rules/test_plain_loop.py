"""Every rule gives what the plain loop of docs gives, or refuses, whatever a forward, a hook or a loss does."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sltt
from sltt import kernels
from tests.conftest import LOSS
from tests.quirks import BETWEEN, HOOKS, LOSSES, QUIRKS, case, drawn

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")
SEEDS = range(40)  # `python tests/quirks.py --count 2000` runs more
RULES = ["SLTT", "BPTT", "SLTT(fold=3)", "unroll"]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("quirk", QUIRKS)
def test_a_forward_that_does_more_than_layers_do(quirk, rule):
    kind = {"state damped": "recurrent", "recurrent weights change": "recurrent"}.get(quirk, "plain")
    assert case([quirk], rule=rule, kind=kind) in ("equal", "refused" if "fold" in rule else "equal")


@pytest.mark.parametrize("at", ["b", "n1", "norm"])
@pytest.mark.parametrize("hook", HOOKS)
def test_hooks(hook, at):
    for kind in ("norm", "recurrent"):
        assert case(hook=hook, at=at, kind=kind) == case(hook=hook, at="n2", kind=kind, rule="BPTT") == "equal"


@pytest.mark.parametrize("loss", LOSSES)
def test_losses(loss):
    rules = ("SLTT", "BPTT", "BPTT(segment=2)", "TBPTT(2)", "Mixed")
    assert [case(loss=loss, rule=rule) for rule in rules] == ["equal"] * len(rules)


@pytest.mark.parametrize("between", BETWEEN)
def test_what_changes_between_batches(between):
    quirk = {"a flag": ["mixes by a flag"], "a value in a list": ["mixes by a list"]}.get(between, [])
    assert [case(quirk, between=between, rule=rule) for rule in ("SLTT", "unroll")] == ["equal", "equal"]


@pytest.mark.parametrize("seed", SEEDS)
def test_at_random(seed):
    assert case(**drawn(seed)) != "different"


def test_the_comparison_sees_a_fold_that_nobody_tried(monkeypatch):
    monkeypatch.setattr("sltt.rules.folding.find_difference", lambda *_: None)
    assert case(["mixes samples"]) == "different"


@pytest.mark.parametrize("how", [{"fold": 1}, {}], ids=str)
@pytest.mark.parametrize("layer", ["first", "middle"])
def test_a_weight_that_is_nan_makes_the_loss_nan_also_where_its_input_is_silent(layer, how):
    model = nn.Sequential(nn.Linear(64, 512), sltt.LIF(), nn.Linear(512, 512), sltt.LIF(), nn.Linear(512, 3))
    x = (torch.rand(6, 64, 64) < 0.05).float()
    x[..., 0] = 0
    with torch.no_grad():
        model[0].weight[0] = -1.0  # never fires
        model[0 if layer == "first" else 2].weight[3, 0] = torch.nan
    with kernels.using(sparse="on", compile="off"):
        out = sltt.SLTT(**how)(model, x, torch.randint(3, (64,)), LOSS)
        assert out.loss.isnan()
        assert out.logits.isnan().any()
        assert sltt.unroll(model, x, **how).isnan().any()


def test_a_weight_with_operations_of_its_own_runs_as_it_says():
    class Doubled(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            out = super().__torch_function__(func, types, args, kwargs or {})
            return 2 * out if func is F.linear else out

    model, x = nn.Sequential(nn.Linear(64, 512), sltt.LIF(), nn.Linear(512, 3)), (torch.rand(4, 64, 64) < 0.1).float()
    twice = nn.Sequential(model[0], sltt.LIF(), nn.Linear(512, 3))
    twice[2].load_state_dict({name: 2 * value for name, value in model[2].state_dict().items()})
    expected = sltt.unroll(twice, x)
    model[2].weight = nn.Parameter(model[2].weight.detach().as_subclass(Doubled))
    with kernels.using(sparse="on", compile="off"):
        torch.testing.assert_close(sltt.unroll(model, x).as_subclass(torch.Tensor), expected)
