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


def test_cases_take_turns_after_one_that_is_not_counted():
    turns, asked = load("turns"), []

    def case(name):
        return lambda: asked.append(name) or float(len(asked))

    assert turns.in_turns([case("a"), case("b")], 2) == [[3, 5], [4, 6]]
    assert asked == ["a", "b"] * 3
    assert turns.timed(lambda: None, clock=iter(range(9)).__next__, least=3)() == 1  # three calls in three seconds


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


def test_a_table_of_sequences_has_the_fastest_form():
    times = {"SLTT": [1.0, 1.0], "JAX SLTT, a": [4.0, 5.0], "JAX SLTT, b": [2.0, 2.5]}
    assert load("tables").over_fastest(times, "SLTT", "JAX SLTT") == "0.45 (0.40 – 0.50), b"


def test_floors_and_peers_are_cases():
    cases = load("peer_cases").CASES
    assert {case.floor for case in cases.values()} <= set(cases)
    assert {case.peer for case in cases.values()} <= {*cases, None}


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


def test_processor_time_is_of_one_thread(monkeypatch):
    monkeypatch.setattr("sys.argv", ["peers.py", "--clock", "process", "--threads", "2"])
    with pytest.raises(SystemExit, match="add --threads 1"):
        load("peers").main()


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


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import time; time.sleep(60)", "more than 0.5 s"),
        ("import sys; sys.exit(3)", "ended with code 3"),
        ("import os; os.kill(os.getpid(), 9)", "killed, out of memory"),
    ],
)
def test_a_worker_that_gives_no_answer_says_why(code, why):
    turns = load("turns")
    worker = turns.Worker([sys.executable, "-c", code], 0.5 if "sleep" in code else 60)
    with pytest.raises(turns.EndedError, match=why):
        worker.ask("time")
    worker.close()


def test_a_worker_answers_each_question():
    code = "import sys\nfor line in sys.stdin: print(len(line), flush=True)"
    worker = load("turns").Worker([sys.executable, "-c", code], 60)
    assert [worker.ask(what) for what in ("time", "memory")] == [5, 7]
    worker.close()


def test_the_figure_of_recall_is_drawn_from_the_recorded_trainings(tmp_path):
    rows = json.loads((BENCHMARKS.parent / "docs" / "results" / "recall-memory.json").read_text())
    figure = load("recall_figure")
    assert {row["rule"] for row in rows} == set(figure.RULES)
    figure.draw(rows, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_the_tables_of_the_documentation_are_those_of_the_results():
    tables, names = load("tables"), set()
    for path in tables.PAGES:
        page = path.read_text()
        assert tables.filled(page) == page
        names |= {block[2] for block in tables.BLOCK.finditer(page)}
    assert {"resnet18-t6", "resnet18-over-t"} <= names
    assert set(tables.TABLES) <= names


def test_a_log_is_stale_where_its_sources_have_changed_or_a_part_of_it_is_older(tmp_path):
    logs, log, source = (
        load("logs"),
        tmp_path / "docs" / "results" / "layers.json",
        tmp_path / "sltt" / "kernels" / "a.py",
    )
    for file in (log, source, log.parent / "paper" / "k-digits.json"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("1")
    logs.mark(log, tmp_path)  # goes on with a log of unknown code
    assert list(logs.stale(tmp_path)) == ["layers.json", "paper/k-digits.json"]
    log.unlink()
    for _ in range(2):  # in parts, of one version
        logs.mark(log, tmp_path)
        log.write_text("2")
    assert list(logs.stale(tmp_path)) == ["paper/k-digits.json"]
    assert "PyTorch" in logs.marks(tmp_path)["layers"]["hardware"]
    source.write_text("2")
    assert "python benchmarks/sparse.py" in logs.stale(tmp_path)["layers.json"]
    assert all((sltt_ / one).exists() for _, sources in logs.LOGS.values() for one in sources for sltt_ in [logs.ROOT])


def test_a_table_is_made_for_each_setting_of_a_file(run, tmp_path):
    run([4], {}, cases="relu;SLTT", only="times")
    _, rows, _ = run([4], {("SLTT", 4): "time"}, cases="relu;SLTT", batch=8)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    page = "before\n<!-- table rows -->\nold\n<!-- end -->\nafter <!-- table none -->\n<!-- end -->\n"
    lines = load("tables").filled(page, tmp_path).splitlines()
    assert [line.split(", ")[1] for line in lines if "DigitsNet" in line] == ["batch 128 × 1×8×8", "batch 8 × 1×8×8"]
    assert lines.count("| SLTT | 2 s | 1 |") == 1  # with another batch it failed
    assert lines.count("| ReLU | 2 s | 1 | 200 MB | 200 MB |") == 1
    assert "old" not in lines
    assert "Not measured yet." in lines


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


def test_new_rows_replace_those_of_the_same_task_and_rule(tmp_path):
    tasks = load("tasks")
    rows = json.loads((tasks.RESULTS / "tasks.json").read_text())
    traces = next(row for row in rows if (row["task"], row["rule"]) == ("recall", "OTTT"))
    new = {**traces, "accuracies": [0.5, 0.7]}
    assert tasks.merged(rows, [new]) == [new if row is traces else row for row in rows]
    (tmp_path / "tasks.json").write_text(json.dumps([new]))
    filled = load("tables").filled("<!-- table tasks -->\n<!-- end -->\n<!-- table k -->\n<!-- end -->\n", tmp_path)
    assert "| OTTT | 60.0% ± 14.1% |" in filled
    assert "Not measured yet." in filled


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


def test_a_step_that_fails_is_tried_again_and_the_others_are_not(monkeypatch, tmp_path):
    gpu, ran = load("gpu"), []
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "PAGE", tmp_path / "gpu.md")
    monkeypatch.setattr("sys.argv", ["gpu.py", "--device", "cpu"])
    gpu.PAGE.write_text("<!-- table gpu-steps -->\n<!-- end -->\n")
    code = "import sys; print('ran'); sys.exit({})"
    for fails in (True, False, False):
        steps = {"a": code.format(0), "b": code.format(int(fails))}
        command = {
            name: [sys.executable, "-c", f"open({name!r}, 'a').write('x'); {one}"] for name, one in steps.items()
        }
        monkeypatch.setattr(gpu, "commands", lambda *given, command=command: command.items())
        assert gpu.main() == int(fails)
        ran.append([(tmp_path / name).read_text() for name in steps])
        page = (tmp_path / "runs" / "gpu-trial" / "gpu.md").read_text()
        assert ("| `b` | failed: ran |" in page) is fails
    assert ran == [["x", "x"], ["x", "xx"], ["x", "xx"]]
