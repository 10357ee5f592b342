import json

import pytest
import torch
from torch import nn

import sltt
from sltt.analysis import agreement, fit_peak, iteration_seconds, memory_parts, peak_memory
from sltt.commands import main, profile
from sltt.commands.parsing import Recipe
from sltt.commands.prepared import Prepared
from sltt.memory import trace_memory
from sltt.training.session import session
from tests.conftest import KINDS, LOSS, RULES, batch, small_network

MB = 1_000_000


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 512), sltt.LIF(), nn.Linear(512, 512), sltt.LIF(), nn.Linear(512, 10))


def test_a_trace_has_the_peak_and_the_level_at_each_mark():
    kept = []

    def call(mark):
        mark()
        kept.append(torch.empty(MB, dtype=torch.uint8))
        mark()
        torch.empty(3 * MB, dtype=torch.uint8)
        kept.clear()
        mark()

    peak, levels = trace_memory(call, "cpu")
    assert peak == 4 * MB
    assert levels == [0, MB, 0]


def test_the_parts_of_the_memory_are_what_they_are_called():
    model, (x, y) = network(), (torch.randn(4, 32, 64), torch.randint(10, (32,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    rule = sltt.SLTT(fold=1)
    memory_parts(model, x, y, LOSS, rule)
    optimizer.step()
    found = memory_parts(model, x, y, LOSS, rule, optimizer)
    assert memory_parts(model, x, y, LOSS, sltt.BPTT()).gradients == 0
    weights = sum(4 * p.numel() for p in model.parameters())
    assert found.parameters == found.gradients == found.optimizer == weights
    assert found.input == 4 * x.numel()
    assert found.states == 2 * 4 * 32 * 512
    assert found.saved > 0
    assert found.rest >= 0
    assert found.total == sum(vars(found).values())
    assert memory_parts(model, x, y, LOSS, rule, optimizer) == found


def test_what_is_saved_grows_with_t_under_bptt_and_not_under_sltt():
    model, y = network(), torch.randint(10, (32,))
    saved = {
        (rule, steps): memory_parts(model, torch.randn(steps, 32, 64), y, LOSS, rule).saved
        for rule in (sltt.BPTT(), sltt.SLTT(fold=1))
        for steps in (4, 16)
    }
    (bptt_4, bptt_16, sltt_4, sltt_16) = saved.values()
    assert bptt_16 > 3 * bptt_4
    assert sltt_16 == sltt_4  # the logits too are their mean alone


@pytest.mark.parametrize("name", KINDS)
def test_the_peak_is_that_of_peak_memory(name):
    rule, model, (x, y) = RULES[name], small_network().float(), batch(steps=4)
    x = x.float()
    extra = {"update": lambda: None} if rule.online else {}
    found = memory_parts(model, x, y, LOSS, rule)
    model.zero_grad()
    torch.manual_seed(0)
    peak = peak_memory(lambda: rule(model, x, y, LOSS, **extra))
    assert found.batch == pytest.approx(peak, abs=4096)


def test_a_view_counts_for_itself():
    model, x = network(), torch.randn(4, 100, 64)
    y = torch.randint(10, (8,))
    rule = sltt.SLTT()
    found = memory_parts(model, x[:, :8], y, LOSS, rule)
    assert found.input == 4 * 8 * 64 * 4
    assert found.saved > 0
    assert peak_memory(lambda: rule(model, x[:, :8], y, LOSS)) > 0


def test_seconds_are_split_and_the_optimizer_steps(monkeypatch):
    now = [0.0]

    class Slow(nn.Linear):
        def forward(self, x):
            now[0] += 1
            return super().forward(x)

    class Late(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
            now[0] += 10
            return grad

    def loss(logits, target):
        return LOSS(Late.apply(logits), target)

    def batches():
        for _ in range(3):
            now[0] += 100
            yield torch.randn(2, 5, 4), torch.randint(3, (5,))

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    model = nn.Sequential(Slow(4, 3), sltt.LIF(), nn.Linear(3, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model[0].weight.clone()
    found = iteration_seconds(model, batches(), loss, sltt.SLTT(fold=1), optimizer, warmup=1)
    assert (found.data, found.forward, found.backward, found.step) == (100, 2, 20, 0)
    assert not torch.equal(model[0].weight, before)

    class Slowly(torch.optim.SGD):
        def step(self, closure=None):
            now[0] += 1000

    online = iteration_seconds(model, batches(), loss, sltt.OTTT(online=True, fold=1), Slowly(model.parameters()))
    assert (online.forward, online.step) == (2, 2000)
    with pytest.raises(ValueError, match="expected more than 3 batches"):
        iteration_seconds(model, batches(), loss, sltt.SLTT(), optimizer, warmup=3)


def test_the_peak_model_is_exact_where_the_peak_is_linear():
    peak = fit_peak(lambda batch, steps: 1000 + 7 * batch + 11 * steps + 3 * batch * steps, (4, 8), (2, 6))
    assert peak.peak(100, 50) == 1000 + 700 + 550 + 15000
    assert peak.largest_batch(17250, 50) == 100
    assert peak.largest_steps(17250, 100) == 50
    assert peak.largest_batch(900, 1) == 0
    flat = fit_peak(lambda batch, steps: 1000 + 7 * batch, (4, 8), (2, 6))
    assert flat.largest_steps(1100, 10) is None
    assert flat.largest_batch(1100, 1000) == 14


WORDS = ["profile", "digits", "--steps", "2,4", "--repeats", "1", "--model.width", "4", "--device", "cpu"]


@pytest.mark.slow
def test_the_command(capsys, here):
    assert main([*WORDS, "--rules", "BPTT,SLTT:k=1,OTTT", "--budget", "10MB", "--save", "a"]) == 0
    out = capsys.readouterr().out
    assert "E_memory from DRAM, nJ" in out
    assert all(len(line) <= 80 for line in out[out.index("memory of a batch") :].splitlines())
    found = json.loads((here / "a" / "profile.json").read_text())
    bptt, sltt_1 = (next(c for c in found["costs"] if c["rule"] == r and c["steps"] == 4) for r in ("BPTT", "SLTT:k=1"))
    assert bptt["operations"]["backward"] == 4 * sltt_1["operations"]["backward"]
    parts = bptt["memory"]
    shown = [parts[name] / 1e6 for name in ("batch", "gradients", "states", "saved")]
    rows = [line.split() for line in out[out.index("memory of a batch") :].splitlines()]
    row = next(cells for cells in rows if cells[:2] == ["BPTT", "4"])
    assert [float(cell) for cell in row[2:6]] == pytest.approx(shown, abs=0.006)
    assert float(row[-1]) == pytest.approx(parts["total"] / 1e6, abs=0.006)
    assert bptt["memory"]["saved"] > 2 * sltt_1["memory"]["saved"]
    assert [layer["name"] for layer in found["layers"]][:3] == ["features.0", "features.2", "features.3"]
    assert [row["32 bits"] > row["matched bits"] for row in found["energy"]["ratios"]] == [True] * 4
    assert [path["name"] for path in found["paths"]] == ["features.0", "features.3", "features.7", "head"]
    for fits in found["fits"]:
        assert fits["measured"] == pytest.approx(fits["predicted"], rel=0.03)
        assert fits["measured"] <= 1.03 * 10 * MB
    most = [fits["steps"] or 10_000 for fits in found["fits"]]  # only the logits of SLTT's steps take memory
    assert 5 * most[0] < min(most[1:])
    assert [cost["fold"]["trained"] for cost in found["costs"]] == [1] * len(found["costs"])


@pytest.mark.slow
def test_segments_of_exact_gradients_fit_a_budget():
    recipe = Recipe("test", "digits", ["--steps", "16", "--model.width", "4", "--device", "cpu"])
    with session(recipe.build()) as here:

        def most(rule):
            return profile._memory(profile.Prepared(here, recipe.build(rule=rule), 16), 8).total

        whole = most("BPTT")
        exact = profile._exact_within(here, recipe, 16, 8, whole // 2)
        assert "segment" in exact
        assert most(exact) <= whole // 2
        assert profile._exact_within(here, recipe, 16, 8, 2 * whole) == "BPTT"
        assert profile._exact_within(here, recipe, 16, 8, whole // 100) is None


def test_a_network_is_measured_as_it_trains():
    recipe = Recipe("test", "digits", ["--precision", "bf16-mixed", "--channels_last", "true", "--device", "cpu"])
    built = recipe.build()
    with session(built) as started:
        here = Prepared(started, built, 3)
        x, y = here.batch(8)
        here.memory(8)
        assert here.fold.forward > 1  # time steps share a call, as in a training
        seen = []
        here.model.features[2].register_forward_hook(lambda module, args, out: seen.append(args[0].dtype))
        logits = here.rule(here.model, x, y, here.loss, steps=here.repeat).logits
        (single,) = agreement(here.model, x, y, here.loss, steps=here.repeat)
    assert here.model.features[3].weight.is_contiguous(memory_format=torch.channels_last)
    assert logits.dtype == torch.float32
    assert set(seen) == {torch.bfloat16}
    assert "features.0" in single.layers


@pytest.mark.parametrize(
    ("rule", "steps"),
    [
        (sltt.BPTT(), 2),
        (sltt.SLTT(k=3), 3),
        (sltt.TBPTT(5), 5),
        (sltt.BPTT(segment=4), 4),
        (sltt.SLTT(fold=6), 6),
        (sltt.SLTT(fold="auto"), 2),
        (sltt.Mixed({"a": "all", "b": 7}), 7),
        (sltt.OTTT(), 2),
    ],
)
def test_the_memory_over_steps_is_fitted_beyond_the_windows(rule, steps):
    """Within its first window, a rule's memory grows as that of BPTT."""
    assert profile._until_regular(rule) == steps


@pytest.mark.parametrize(
    ("bytes_of", "batch", "measured"),
    [
        (lambda batch: 100 * batch, 10, 1000),
        (lambda batch: 103 * batch, 9, 927),
        (lambda batch: 100 * batch + 40, 9, 940),
        (lambda batch: 1001, 0, None),
    ],
)
def test_a_batch_that_is_said_to_fit_was_run_and_fits(bytes_of, batch, measured):
    model = fit_peak(lambda samples, steps: 100 * samples, (1, 2), (1, 2))
    found = profile._run_largest(model, 4, lambda samples, steps: bytes_of(samples), budget=1000, free=2000)
    assert found == {"batch": batch, "measured": measured, "predicted": 100 * batch or None}


@pytest.mark.parametrize("error", [ValueError("no other T"), torch.OutOfMemoryError("out of memory")])
def test_costs_are_shown_where_what_fits_cannot_be_measured(error, monkeypatch, capsys, tmp_path):
    def fails(*_):
        raise error

    monkeypatch.setattr(profile, "_fits", fails)
    small = ["--rules", "SLTT", "--steps", "2", "--batch_size", "16"]
    assert main([*WORDS, *small, "--budget", "10MB", "--save", str(tmp_path)]) == 0
    assert f"SLTT: what fits cannot be measured: {error}" in " ".join(capsys.readouterr().out.split())
    assert {one["rule"] for one in json.loads((tmp_path / "profile.json").read_text())["costs"]} == {"SLTT"}
