import importlib.util
from pathlib import Path

import torch

import sltt


def load(name):
    path = Path(sltt.__file__).parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


def test_the_benchmark_of_peers_builds_the_same_network_for_every_case():
    peers = load("peers")
    for case in ("relu", "SLTT", "BPTT"):
        model, x, y = peers.build("vgg11", case)
        assert torch.equal(model.head.weight, peers.build("vgg11", "SLTT")[0].head.weight)
        assert x.shape == (16, 2, 48, 48)
        assert len(y) == 16


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
