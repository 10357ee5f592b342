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
    assert [row["rule"] for row in rows] == ["BPTT()", "SLTT()", "SLTT(k=1)", "OTTT()"]
    memory = [row["peak_memory"] for row in rows]
    assert memory[0] > memory[1] > 0


def test_the_benchmark_of_peers_builds_the_same_network_for_every_case():
    peers = load("peers")
    for case in ("relu", "SLTT", "BPTT"):
        model, x, y = peers.build("vgg11", case)
        assert torch.equal(model.head.weight, peers.build("vgg11", "SLTT")[0].head.weight)
        assert x.shape == (16, 2, 48, 48)
        assert len(y) == 16
