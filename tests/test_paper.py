"""The benchmark of the paper's claims."""

import json
import re
import shlex
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import sltt
from sltt.commands.parsing import Recipe
from tests.scripts import BENCHMARKS, benchmarks_on_the_path, load  # noqa: F401

DOCS = BENCHMARKS.parent / "docs"


@pytest.fixture
def paper(tmp_path, monkeypatch):
    """The benchmark of the paper's claims, which writes to folders of its own."""
    paper = load("paper")
    monkeypatch.setattr(paper, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(paper, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(paper, "fill", lambda: None)
    monkeypatch.setattr(paper, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    return paper


def test_a_step_of_the_paper_is_run_once_and_kept(paper, tmp_path, monkeypatch):
    asked = []

    def command(words):
        asked.append(words)
        save = Path(words[words.index("--save") + 1])
        save.mkdir(parents=True)
        rows = [
            {"rule": rule, "accuracies": [0.8, 0.9], "cosine": 1.0, "seconds": 3.0, "agreement": []}
            for rule in ("BPTT", "SLTT")
        ]
        if words[0] == "agreement":
            agreement = [{"rule": "SLTT()", "least": 0.5, "cosine": 0.9, "layers": {}}]
            rows = [{"rule": "OTTT()", "agreement": agreement, "trial": {"epochs": 4}}]
        (save / f"{words[0]}.json").write_text(json.dumps({"steps": 2, "rows": rows}))
        return 0

    monkeypatch.setattr(load("turns"), "command", command)
    monkeypatch.setattr("sys.argv", ["paper.py", "stage", "map-T2", "advice-T2"])
    for _ in range(2):
        paper.main()
    assert len(asked) == 4 + 2 * len(paper.TAUS)  # each once
    assert "[{epochs: 6, steps: 1}, {epochs: 2, steps: 6, lr: 0.0005}]" in asked[2]
    found = json.loads((tmp_path / "results" / "stages.json").read_text())
    assert [sorted(row) for row in found["rows"]] == [["accuracies", "agreement", "cosine", "rule", "seconds"]] * 2
    cells = json.loads((tmp_path / "results" / "map.json").read_text())
    assert [(cell["T"], cell["tau"]) for cell in cells.values()] == [(2, tau) for tau in paper.TAUS]
    advice = json.loads((tmp_path / "results" / "advice.json").read_text())
    assert list(advice) == [f"advice-T2-tau{tau}" for tau in paper.TAUS]
    assert advice["advice-T2-tau2"] == {"advice": "OTTT()", "trial": {"epochs": 4}, "worst_cosine": {"SLTT()": 0.5}}


def test_the_map_in_the_documentation_is_that_of_its_results(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    figure = load("draw_map")
    figure.draw(tmp_path / "map.svg")
    shown = [re.sub(r"<(?!text)[^>]*>", "", path.read_text()).split() for path in (tmp_path / "map.svg", figure.FIGURE)]
    assert shown[0] == shown[1]  # the numbers; how they are drawn depends on the version of matplotlib


def test_every_command_of_the_paper_is_one_that_sltt_takes(paper):
    every = {**paper.COMMANDS, **paper.MAP, **paper.ADVICE}.values()
    for text in {re.sub(r"[\d.]+", "", text): text for text in every}.values():  # one of those alike but for numbers
        kind, recipe, *words = [word.format(data="nowhere") for word in shlex.split(text)]
        own = {"--rules", "--seeds", "--base", "--way", "--shot", "--taus", "--at-epochs", "--samples", "--trial"}
        own |= {"--steps"} if kind == "agreement" else set()
        pairs = zip(words[::2], words[1::2], strict=True)
        options = [word for pair in pairs if pair[0] not in own for word in pair]
        Recipe(f"sltt {kind}", recipe, options).resolve()


def test_counted_multiplications_of_the_paper(paper, monkeypatch):
    monkeypatch.setattr(paper.sltt.models, "resnet18", lambda: sltt.models.DigitsNet(in_channels=3, width=2))
    rows = {(row["rule"], row["steps"]): row for row in paper.operations(None)}
    assert rows["SLTT-1", 6]["backward"] == rows["SLTT-1", 12]["backward"] == rows["BPTT", 6]["backward"] // 6
    monkeypatch.setattr(paper, "NETWORKS", {"tiny": (lambda: sltt.models.DigitsNet(width=2), (1, 8, 8), 6, 8, 2)})
    bptt, slt = paper.memory(None)
    assert bptt["peak"] > slt["peak"] > 0
    assert bptt["state"] == slt["state"] == 12 * sum(p.numel() for p in sltt.models.DigitsNet(width=2).parameters())
    monkeypatch.setattr(paper, "TURNS", 2)
    times = paper.seconds(None)["rows"]
    assert [(row["rule"], len(row["seconds"])) for row in times] == [(rule, paper.TURNS) for rule in paper.RULES]
