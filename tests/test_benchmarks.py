import json
import sys
from importlib.util import find_spec

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper

import sltt
from tests.kernels.exact import NATIVE
from tests.scripts import BENCHMARKS, benchmarks_on_the_path, load  # noqa: F401


@NATIVE
def test_sparse_and_dense_runs_of_a_layer_are_of_one_result(monkeypatch):
    sparse = load("sparse")
    del sys.modules["sparse"]  # SciPy takes it for the package of this name
    _, passes = sparse.runs_of("256→512, 8×8, 1×1, stride 2", 1, torch.float32)
    columns = {name: list(sparse.milliseconds(runs, 1)) for name, runs in passes.items()}
    at = [f"at {d}" for d in sparse.DENSITIES]
    assert columns["forward"] == ["dense", *at]
    assert columns["input gradient"] == ["dense", "dense, ours"]
    assert set(columns["weight gradient"]) == set(sparse.COLUMNS)
    monkeypatch.setattr(sparse, "convolution_gradients", lambda *asked: [torch.zeros(1)] * 3)
    with pytest.raises(AssertionError, match="dense, ours"):
        sparse.runs_of("256→512, 8×8, 1×1, stride 2", 1, torch.float32)


def test_the_benchmark_of_peers_builds_the_same_network_for_every_case():
    cases = load("peer_cases")
    expected, x, _ = cases.build("digits", "SLTT", 2)
    for name, case in cases.CASES.items():
        if case.neuron in (nn.ReLU, sltt.LIF) and "graph" not in name:  # which a CPU has not
            model, same, y = cases.build("digits", name, 2)
            assert torch.equal(model.head.weight, expected.head.weight)
            assert torch.equal(same, x)
            assert len(y) == 2
            assert model.training is not case.evaluates
            case.run(model, same, y, 2)
    assert cases.build("vgg11-max", "relu")[1].shape == cases.NETWORKS["vgg11-max"][1]


@pytest.mark.parametrize("case", ["SLTT", "BPTT", "SLTT, fold = 1", "SpikingJelly BPTT"])
def test_a_case_on_sequences_has_the_gradient_of_its_rule(case):
    pytest.importorskip("spikingjelly" if "Jelly" in case else "torch")
    sequences = load("open_neuromorphic")
    for work in ("mlp", "linear-256", "recurrent-256"):
        sequences.check(case, work, "cpu")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("jax") is None, reason="needs JAX")
@pytest.mark.parametrize("work", ["tiny", "tiny-linear", "tiny-recurrent", "tiny-static"])
def test_jax_has_the_gradient_of_its_rule(work):
    """Each case compares itself in a process of its own: no other may fork once JAX is imported."""
    sequences = load("open_neuromorphic")
    forms = [f"JAX {rule}, {form}" for form in sequences.JAX_FORMS for rule in ("SLTT", "BPTT")]
    rows = sequences.measure(work, forms, 1, "cpu")
    assert [row["case"] for row in rows] == forms
    assert all(row["seconds"][0] > 0 for row in rows)


def test_the_checkpoints_of_spikingjelly_give_the_gradient_of_bptt():
    pytest.importorskip("spikingjelly")
    cases = load("peer_cases")
    model, _, _ = cases.build("digits", "SpikingJelly memopt, units", 2)
    assert sum(isinstance(m, CheckpointWrapper) for m in model.modules()) == 3  # one for each convolution
    assert cases.cosine("digits", "SpikingJelly memopt, units", 3) == pytest.approx(1, abs=1e-9)


def test_a_network_that_evaluates_spikes_as_after_a_training():
    cases = load("peer_cases")
    model, x, _ = cases.build("vgg11", "evaluation", 4)
    with sltt.analysis.firing_rates(model) as rates:
        sltt.unroll(model, x, steps=2)
    assert len(rates.by_layer()) == 8
    assert all(0.08 < rate < 0.25 for rate in rates.by_layer().values()), rates.by_layer()


def test_ratios_are_taken_within_a_turn():
    tables = load("peer_tables")
    rows = [{"case": "relu", "times": [1.0, 2.0, 4.0]}, {"case": "SLTT", "times": [0.5, 1.5, 2.4]}]
    assert tables.ratio(rows, rows[1], "relu") == (0.6, 0.5, 0.75)
    assert tables.ratio(rows, rows[1], "SpikingJelly SLTT") is None
    rows[0]["began"] = "on another day"
    assert tables.ratio(rows, rows[1], "relu") is None


class Answers:
    """A worker that answers at once; `ends` says at which question a case of a T ends."""

    def __init__(self, case, steps, ends):
        self.steps, self.end = steps, ends.get((case, steps))

    def ask(self, what):
        if self.end == what:
            raise load("turns").EndedError("killed, out of memory")
        return {"memory": 2e8, "resident": 2e8, "cosine": 1.0, "time": 0.5 * self.steps}[what]

    def close(self):
        pass


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs the benchmark of peers on workers that answer at once; gives what it printed, and the rows in its file."""
    peers, file = load("peers"), tmp_path / "rows.json"

    def run(steps, ends, cases="SLTT;BPTT;SpikingJelly BPTT", only="", **settings):
        started = set()

        def start(setting, case, **environment):
            started.add((case, setting.steps))
            return Answers(case, setting.steps, ends)

        monkeypatch.setattr(peers, "start", start)
        setting = peers.Setting("digits", steps[0], **{"batch": 128, **settings})
        rows = peers.sweep(setting, steps, cases.split(";"), 3, only, file)
        assert json.loads(file.read_text()) == json.loads(json.dumps(rows))
        return capsys.readouterr().out, rows, started

    return run


@pytest.mark.parametrize("what", ["memory", "time"])
def test_a_case_that_ends_leaves_the_others_and_is_not_run_at_a_larger_t(run, what):
    out, rows, started = run([4, 16], {("BPTT", 4): what})
    measured = {(row["case"], row["steps"]) for row in rows if "error" not in row}
    assert measured == {(case, steps) for case in ("SLTT", "SpikingJelly BPTT") for steps in (4, 16)}
    assert {row["seconds"] for row in rows if "error" not in row} == {2.0, 8.0}
    assert ("BPTT", 16) not in started
    errors = {row["steps"]: row["error"] for row in rows if "error" in row}
    assert errors == {4: "killed, out of memory", 16: "not run, since T = 4 failed"}
    assert "killed, out of memory" in out


def test_a_sweep_goes_on_where_it_stopped(run):
    _, rows, _ = run([4], {})
    _, again, started = run([4, 16], {})
    assert again[: len(rows)] == json.loads(json.dumps(rows))
    assert {steps for _, steps in started} == {16}
    _, rows, started = run([4], {}, cases="SLTT;BPTT;relu")  # a case more: this T is run again, for the ratios
    assert started == {("SLTT", 4), ("BPTT", 4), ("relu", 4)}
    assert len(rows) == 2 + 3 + 2  # SpikingJelly stays
    _, rows, started = run([4], {}, batch=8, threads=1, clock="process")
    assert len(started) == 3  # in another setting nothing was measured
    assert len(rows) == 2 + 3 + 2 + 3


def test_memory_and_times_are_measured_in_two_calls(run):
    out, rows, _ = run([4], {}, cases="relu;SLTT", only="memory")
    assert all("memory" in row and "times" not in row for row in rows)
    assert "200 MB" in out
    out, rows, started = run([4], {}, cases="relu;SLTT", only="times")
    assert all(row["cosine"] == 1 and row["times"] == [2.0] * 3 for row in rows)
    assert "| SLTT | 2 s | 1 |" in out
    out, again, started = run([4, 8], {}, cases="relu;SLTT")
    assert started == {("relu", 8), ("SLTT", 8)}
    assert all("cosine" not in row for row in again[2:])  # gradients are compared once


def test_the_tables_of_the_documentation_are_those_of_the_results():
    tables, names = load("tables"), set()
    for path in tables.PAGES:
        page = path.read_text()
        assert tables.filled(page) == page
        names |= {block[2] for block in tables.BLOCK.finditer(page)}
    assert {"resnet18-t6", "resnet18-over-t"} <= names
    assert set(tables.TABLES) <= names


def test_two_rules_are_equal_where_two_one_sided_tests_say_so():
    tables = load("tables")
    first, second = [0.981, 0.984, 0.979, 0.983], [0.98, 0.982, 0.984, 0.979, 0.981]
    middle, spread = tables.difference(first, second)
    assert (middle, spread) == pytest.approx((-0.00055, 0.00272), abs=1e-5)
    assert tables.within_margin(middle, spread) == "equal"
    assert tables.within_margin(*tables.difference(first, [x - 0.05 for x in second])) == "less"
    assert tables.within_margin(*tables.difference(second, [x + 0.05 for x in first])) == "more"
    assert tables.within_margin(*tables.difference(first, [0.9, 1.0])) == "open"
    assert tables.difference([0.5, 0.5], [0.5, 0.5]) == (0.0, 0.0)


def test_the_steps_on_a_gpu_measure_what_there_is(tmp_path):
    gpu, cases, works = load("gpu"), load("peer_cases"), load("open_neuromorphic")
    for device in ("cpu", "cuda"):
        found = dict(gpu.commands(device, tmp_path, tmp_path, "data"))
        for name, words in found.items():
            options = {one: words[words.index(one) + 1] for one in words if one.startswith("--")}
            if "benchmarks/peers.py" in words:
                assert name == options["--network"]
                assert name in cases.NETWORKS
                assert {*options["--cases"].split(";")} <= {*cases.CASES}
            if name == "sequences":
                assert {*words[words.index("--works") + 1 : words.index("--cases")]} <= {*works.WORKS}
    assert [row["steps"] for row in gpu.measure_kernels(torch.device("cpu"))] == [1, 6, 1, 6]
    (profiled,) = gpu.measure_profile(torch.device("cpu"))
    assert (profiled["busy"], profiled["launches"]) == (0, 0)
    assert profiled["seconds"] >= profiled["host"] > 0
