import io
import json
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from rich.console import Console
from torch import nn

import sltt
from tests.kernels.exact import NATIVE
from tests.scripts import BENCHMARKS, benchmarks_on_the_path, load  # noqa: F401


def test_the_benchmark_of_the_rules_measures_each():
    rows = load("rules").measure("digits", steps=2, repeats=1, device=torch.device("cpu"))
    assert [row["rule"] for row in rows] == [
        "BPTT()",
        "SLTT()",
        "SLTT(k=1)",
        "OTTT()",
        "RateBased()",
        "Mixed(windows={'features.2': 'all'})",
    ]
    memory = [row["peak_memory"] for row in rows]
    assert memory[0] > memory[1] > 0


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
    expected, x, _ = cases.build("shd", "SLTT", 2)
    for name, case in cases.CASES.items():
        if case.neuron in (nn.ReLU, sltt.LIF):
            model, same, y = cases.build("shd", name, 2)
            assert torch.equal(model.head.weight, expected.head.weight)
            assert torch.equal(same, x)
            assert len(y) == 2
            assert model.training is not case.evaluates
            case.run(model, same, y, 2)
    assert cases.build("vgg11-max", "relu")[1].shape == cases.NETWORKS["vgg11-max"][1]


def test_floors_and_peers_are_cases():
    cases = load("peer_cases").CASES
    assert {case.floor for case in cases.values()} <= set(cases)
    assert {case.peer for case in cases.values()} <= {*cases, None}


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


def test_ratios_are_taken_within_a_turn(peers):
    rows = [{"case": "relu", "times": [1.0, 2.0, 4.0]}, {"case": "SLTT", "times": [0.5, 1.5, 2.4]}]
    assert peers.ratio(rows, rows[1], "relu") == (0.6, 0.5, 0.75)
    assert peers.ratio(rows, rows[1], "SpikingJelly SLTT") is None
    rows[0]["began"] = "on another day"
    assert peers.ratio(rows, rows[1], "relu") is None


@pytest.fixture
def peers():
    return load("peers")


class Answers:
    """A worker that answers at once; `ends` are the cases that end, by what they are asked."""

    ends: dict

    def __init__(self, setting, case, peers):
        self.setting, self.case, self.peers = setting, case, peers

    def ask(self, what):
        if self.ends.get((self.case, self.setting.steps)) == what:
            raise self.peers.EndedError("killed, out of memory")
        return {"memory": 2e8, "resident": 2e8, "cosine": 1.0, "time": 0.5 * self.setting.steps}[what]

    def close(self):
        pass


@pytest.fixture
def run(peers, monkeypatch, tmp_path):
    """Runs the benchmark of peers on workers that answer at once; gives what it printed, and the rows in its file."""
    started = []

    def start(setting, case, limit, **environment):
        started.append((case, setting.steps))
        return Answers(setting, case, peers)

    def run(steps, ends, cases="SLTT;BPTT;SpikingJelly BPTT", times=False, **settings):
        monkeypatch.setattr(Answers, "ends", ends, raising=False)
        monkeypatch.setattr(peers, "start", start)
        started.clear()
        console, file = Console(file=io.StringIO(), width=200), tmp_path / "rows.json"
        monkeypatch.setattr(peers, "CONSOLE", console)
        setting = peers.Setting("digits", steps[0], **settings)
        rows = peers.sweep(setting, steps, cases.split(";"), 3, 60, times, file)
        assert json.loads(file.read_text()) == json.loads(json.dumps(rows))
        return console.file.getvalue(), rows, set(started)

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
    out, again, started = run([4, 16], {})
    assert again[: len(rows)] == json.loads(json.dumps(rows))
    assert {steps for _, steps in started} == {16}
    assert "T = 4 is in" in out
    _, rows, started = run([4], {}, cases="SLTT;BPTT;relu")  # a case more: this T is run again, for the ratios
    assert started == {("SLTT", 4), ("BPTT", 4), ("relu", 4)}
    assert len(rows) == 2 + 3 + 2  # SpikingJelly stays
    _, rows, started = run([4], {}, batch=8, avx2=True, threads=1, clock="process")
    assert len(started) == 3  # in another setting nothing was measured
    assert len(rows) == 2 + 3 + 2 + 3
    assert "AVX2" in rows[-1]["hardware"]


def test_times_alone_are_a_table_too(run):
    out, rows, _ = run([4], {}, cases="relu;SLTT", times=True)
    assert "1.00 (1.00 – 1.00)" in out
    assert all("memory" not in row for row in rows)


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import time; time.sleep(60)", "more than 0.5 s"),
        ("import sys; sys.exit(3)", "ended with code 3"),
        ("import os; os.kill(os.getpid(), 9)", "killed, out of memory"),
    ],
)
def test_a_worker_that_gives_no_answer_says_why(peers, code, why):
    worker = load("peer_workers").Worker([sys.executable, "-c", code], 0.5 if "sleep" in code else 60)
    with pytest.raises(peers.EndedError, match=why):
        worker.ask("time")
    worker.close()


def test_a_worker_answers_each_question():
    code = "import sys\nfor line in sys.stdin: print(len(line), flush=True)"
    worker = load("peer_workers").Worker([sys.executable, "-c", code], 60)
    assert [worker.ask(what) for what in ("time", "memory")] == [5, 7]
    worker.close()


@pytest.mark.parametrize("steps", [[4], [4, 16]], ids=["bars", "lines"])
@pytest.mark.parametrize("ends", [{}, {("BPTT", 4): "memory"}], ids=["whole", "with a gap"])
def test_the_figure_of_peers_names_what_was_measured_on_what(run, tmp_path, steps, ends):
    _, rows, _ = run(steps, ends)
    figure = load("figure")
    first, hardware, *gaps = figure.title(rows).splitlines()
    assert first == "digits, batch 128 × 1×8×8, " + ("T = 4, " if steps == [4] else "") + "float32"
    assert "PyTorch" in hardware
    assert gaps[:1] == (["BPTT at T = 4: killed, out of memory"] if ends else [])
    figure.draw(rows, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", ["resnet18-t6", "resnet18-over-t"])
def test_results_in_the_documentation_can_be_drawn(tmp_path, name):
    rows = json.loads((Path(sltt.__file__).parents[1] / "docs" / "results" / f"{name}.json").read_text())
    load("figure").draw(rows, tmp_path / "figure.svg")


def test_the_figure_of_recall_is_drawn_from_the_recorded_trainings(tmp_path):
    rows = json.loads((BENCHMARKS.parent / "docs" / "results" / "recall-memory.json").read_text())
    figure = load("recall_figure")
    assert {row["rule"] for row in rows} == set(figure.RULES)
    figure.draw(rows, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_the_table_of_results_is_made_from_runs(tmp_path, monkeypatch, capsys):
    for seed, accuracy in ((1, 0.9), (2, 0.8)):
        run = tmp_path / f"run{seed}"
        run.mkdir()
        (run / "config.yaml").write_text(f"{{rule: {{class_path: sltt.SLTT, init_args: {{k: 2}}}}, seed: {seed}}}")
        (run / "metrics.csv").write_text("epoch,train_accuracy,seconds\n1,0.5,2.0\n2,0.7,3.0\n")
        (run / "result.json").write_text(f'{{"test_accuracy": {accuracy}, "last_epoch_test_accuracy": 0.7}}')
    runs = [str(tmp_path / f"run{seed}") for seed in (1, 2)]
    monkeypatch.setattr("sys.argv", ["results.py", *runs, "--csv", str(tmp_path / "all.csv")])
    load("results").main()
    assert capsys.readouterr().out.splitlines()[-1] == "| SLTT(k=2) | 2 | 85.0% ± 7.1% | 70.0% ± 0.0% | 2.5 |"
    assert len((tmp_path / "all.csv").read_text().splitlines()) == 5


def test_the_tables_of_the_documentation_are_those_of_the_results():
    tables, names = load("tables"), set()
    for path in tables.PAGES:
        page = path.read_text()
        assert tables.filled(page) == page
        names |= {block[2] for block in tables.BLOCK.finditer(page)}
    assert {"resnet18-t6", "resnet18-over-t", "tasks", "nmnist", "few-shots-digits", "accuracy"} <= names
    assert set(load("doc_tables").TABLES) <= names


def test_a_table_is_made_for_each_setting_of_a_file(run, tmp_path):
    run([4], {}, cases="relu;SLTT", times=True)
    _, rows, _ = run([4], {("SLTT", 4): "time"}, cases="relu;SLTT", batch=8)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    page = "before\n<!-- table rows -->\nold\n<!-- end -->\nafter <!-- table none -->\n<!-- end -->\n"
    lines = load("tables").filled(page, tmp_path).splitlines()
    assert [line.split(", ")[1] for line in lines if "DigitsNet" in line] == ["batch 128 × 1×8×8", "batch 8 × 1×8×8"]
    assert lines.count("| SLTT | 2 s | 1 |") == 1  # with another batch it failed
    assert lines.count("| ReLU | 2 s | 1 | 200 MB | 200 MB |") == 1
    assert "old" not in lines
    assert "Not measured yet." in lines


def test_the_table_of_tasks_is_that_of_its_results(tmp_path):
    tasks = load("tasks")
    rows = json.loads((tasks.RESULTS / "tasks.json").read_text())
    new = {**rows[-1], "accuracies": [0.5, 0.7]}
    assert tasks.merged(rows, [new]) == [*rows[:-1], new]
    (tmp_path / "tasks.json").write_text(json.dumps([new]))
    page = "<!-- table tasks -->\n<!-- end -->\n<!-- table k -->\n<!-- end -->\n"
    filled = load("tables").filled(page, tmp_path)
    assert "| 60.0% ± 14.1% | 2 |" in filled
    assert "Not measured yet." in filled
    (traces,) = (row["accuracies"] for row in rows if (row["task"], row["rule"]) == ("recall", "OTTT"))
    assert min(traces) >= 0.99
    assert len(traces) == 5


def test_two_rules_are_equal_where_two_one_sided_tests_say_so():
    stats = pytest.importorskip("scipy.stats")
    tables = load("paper_tables")
    first, second = [0.981, 0.984, 0.979, 0.983], [0.98, 0.982, 0.984, 0.979, 0.981]
    middle, spread = tables.difference(first, second)
    interval = stats.ttest_ind(second, first, equal_var=False).confidence_interval(0.9)
    assert (middle - spread, middle + spread) == pytest.approx((interval.low, interval.high))
    assert tables.verdict(middle, spread) == "equal"
    assert tables.verdict(*tables.difference(first, [x - 0.05 for x in second])) == "less"
    assert tables.verdict(*tables.difference(second, [x + 0.05 for x in first])) == "more"
    assert tables.verdict(*tables.difference(first, [0.9, 1.0])) == "open"
    assert tables.difference([0.5, 0.5], [0.5, 0.5]) == (0.0, 0.0)


def test_short_trainings_are_made_once_and_their_table_has_means(tmp_path, monkeypatch, capsys):
    short = load("short")
    picture = torch.randint(256, (3, 32, 32), dtype=torch.uint8)
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(10):
                torchvision.io.write_jpeg(picture, str(tmp_path / part / name / f"{i}.jpg"))
    layers = nn.Flatten(), nn.Linear(48, 4), sltt.LIF(), nn.Linear(4, 2)

    def tiny(seeds):
        for seed in range(seeds):
            yield {"rule": "SLTT", "seed": seed}, lambda: nn.Sequential(*layers), sltt.SLTT(), settings

    settings = {"epochs": 1, "batch_size": 6, "steps": 2, "side": 4}
    monkeypatch.setattr(short, "RESULTS", tmp_path)
    monkeypatch.setattr(short, "stabilised", tiny)
    for seeds in (1, 2, 2):
        monkeypatch.setattr(sys, "argv", ["short.py", "stabilised", str(tmp_path), "--seeds", str(seeds)])
        short.main()
    rows = json.loads((tmp_path / "short-stabilised.json").read_text())
    assert [row["seed"] for row in rows] == [0, 1]
    assert all(0 <= row["test"] <= 1 for row in rows)
    assert "| SLTT | 2 | " in capsys.readouterr().out


def test_the_cases_of_short_trainings_are_networks_that_their_rules_train():
    short = load("short")
    for cases, count in ((short.stabilised, 6), (short.transformer, 4)):
        found = list(cases(1))
        assert len(found) == count
        for _, make, rule, settings in found[:: count - 1]:
            x = torch.randn(2, 3, settings["side"], settings["side"])
            rule(make(), x, torch.tensor([0, 1]), nn.CrossEntropyLoss(), steps=2)


def test_recurrent_trainings_are_made_once_and_give_the_rows_of_the_table(tmp_path, monkeypatch, capsys):
    recurrent, recorded = load("recurrent"), json.loads((BENCHMARKS.parent / "docs/results/recurrent.json").read_text())
    recipe = recurrent.RECIPE
    monkeypatch.setattr(recurrent, "RECIPE", f"{recipe} --model.features [8,4,10] --epochs 1 --batch_size 512")
    monkeypatch.setattr(recurrent, "PATH", tmp_path / "recurrent.json")
    monkeypatch.setattr(recurrent, "fill", lambda: None)
    monkeypatch.setattr(sys, "argv", ["recurrent.py", "--runs", str(tmp_path / "runs")])
    for trainings in (9, 0):
        recurrent.main()
        assert capsys.readouterr().out.count("after the last") == trainings
    rows = json.loads((tmp_path / "recurrent.json").read_text())
    assert [row.pop("rule") for row in rows] == [row["rule"] for row in recorded]
    assert {recipe} == {row["recipe"] for row in recorded}
    for row, other in zip(rows, recorded, strict=True):
        assert row.keys() == other.keys() - {"rule"}
        assert len(row["accuracies"]) == len(other["accuracies"])
        assert all(0 <= one <= 1 for one in row["accuracies"])


def test_the_log_of_twins_has_each_case_once_and_its_test(tmp_path):
    path, measured, twin = tmp_path / "twin.json", [], load("twin")
    for _ in range(2):
        log, case = twin.Log(path), {"network": "twin", "percentile": 97.0}
        row = twin.once(log, case, lambda: (measured.append(1), {"validation": 0.5})[1])
        twin.add_test(log, row, lambda: (measured.append(2), {"test": 0.4})[1])
    assert measured == [1, 2]
    (row,) = twin.Log(path).rows
    assert (row["validation"], row["test"], row["minutes"]) == (0.5, 0.4, 0.0)
    assert "| twin | 97 |  | 50.0% | 40.0% | 0.0 |" in load("doc_tables").twin(tmp_path)
