import json
import statistics

import pytest
import torch
from torch.utils.data import Subset, TensorDataset

import sltt
from sltt.commands import fscil, main
from sltt.training import fit
from tests.commands.tiny import TINY, run

pytestmark = pytest.mark.slow
SMALL = [*TINY, "--model.width", "8", "--epochs", "3", "--batch_size", "64"]
WORDS = ["fscil", "fscil-digits", *SMALL, "--base", "6", "--way", "2", "--shot", "3", "--seeds", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the command kept two rules with two seeds."""
    folder = tmp_path_factory.mktemp("few") / "shots"
    assert main([*WORDS, "--rules", "BPTT,SLTT:k=1", "--save", str(folder)]) == 0
    return folder


def kept(folder):
    return json.loads((folder / "fscil.json").read_text())


def test_accuracy_after_each_session_of_each_rule_and_of_the_baselines(folder, capsys):
    found = kept(folder)
    code, out, _ = run(capsys, *WORDS, "--rules", "BPTT,SLTT:k=1", "--save", folder)  # goes on where it stopped
    assert code == 0
    assert kept(folder) == found
    assert (found["sizes"], found["shot"], found["order"]) == ([6, 2, 2], 3, list(range(10)))
    rows = {row["rule"]: row for row in found["rows"]}
    assert list(rows) == ["BPTT", "SLTT:k=1", "pixels", "chance"]
    for rule in ("BPTT", "SLTT:k=1", "pixels"):
        assert [len(one) for one in rows[rule]["accuracies"]] == [3, 3]
        assert statistics.mean(rows[rule]["average"]) > 0.3  # far above a guess
    assert rows["chance"]["accuracies"] == [pytest.approx([1 / 6, 1 / 8, 1 / 10])]
    assert rows["pixels"]["last"][0] > 0.7  # the digits are alike
    assert rows["pixels"]["accuracies"][0] != rows["pixels"]["accuracies"][1]  # other shots
    table = out[out.index("6 base classes") :].splitlines()
    assert table[0] == "6 base classes, 2 × 2 new ones of 3 samples"
    assert max(map(len, table[:-1])) <= 80
    assert [line.split()[0] for line in table[3:7]] == list(rows)
    assert table[7].split() == ["classes", "seen", "6", "8", "10"]


def test_the_base_training_sees_base_classes_only(folder, capsys, monkeypatch):
    assert run(capsys, "eval", folder / "BPTT-seed0", "--split", "train", "--json")[0] == 0  # the run knows its classes
    seen = []

    def train(session, training):
        if training.resume:
            return fit.train(session, training)
        seen.append(training.dataset.splits(training.steps))
        raise RuntimeError("far enough")

    monkeypatch.setattr(fscil, "train", train)
    code, out, err = run(capsys, *WORDS, "--json", "--rules", "BPTT,SLTT", "--save", folder)
    assert code == 1
    assert "2 runs died; the same command tries them again: SLTT, seed 0: far enough" in err
    assert {splits.classes for splits in seen} == {6}
    assert {label for splits in seen for label in splits.train.targets} == set(range(6))
    rows = json.loads(out)["rows"]
    assert [(row["rule"], len(row["last"])) for row in rows] == [("BPTT", 2), ("SLTT", 0), ("pixels", 2), ("chance", 1)]


def test_the_report_has_a_section_of_it(folder, capsys):
    pytest.importorskip("matplotlib", reason="the report needs matplotlib")
    assert run(capsys, "report", folder)[0] == 0
    page = (folder / "report" / "report.html").read_text()
    assert "<h2>Few-shot classes: fscil-digits</h2>" in page
    (table,) = (folder / "report" / "data").glob("*-fscil.csv")
    lines = table.read_text().splitlines()
    assert lines[0] == "rule,A_base,A_new,A_h,A_last,A_avg"
    assert float(lines[1].split(",")[4]) == pytest.approx(statistics.mean(kept(folder)["rows"][0]["last"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pad": True, "static": False}, "pads its sequences, and embeddings are of T steps: leave pad=True out"),
        ({"left_out": 8}, "class 8 has no test samples: leave it out, by --order"),
    ],
    ids=["padded", "no test samples"],
)
def test_data_that_cannot_be_is_refused_before_a_training(here, capsys, monkeypatch, change, message):
    def load(self, steps):
        left_out, labels = change.get("left_out"), torch.arange(60) % 10
        shape = (60, 1, 8, 8) if left_out else (60, 2, 1, 8, 8)
        samples = TensorDataset(torch.randn(shape), labels)
        test = Subset(samples, [i for i in range(60) if labels[i] != left_out])
        how = {"static": True, "classes": 10} | {k: v for k, v in change.items() if k != "left_out"}
        return sltt.data.from_datasets(samples, test=test, **how).splits(steps)

    monkeypatch.setattr(sltt.data.Digits, "load", load)
    code, _, err = run(capsys, "fscil", "fscil-digits", *SMALL, "--base", "6", "--way", "1")
    assert code == 1
    assert message in err
    assert not list(here.iterdir())


def test_an_order_chooses_the_classes(here, capsys):
    words = ["--base", "2", "--way", "1", "--order", "9,1,4", "--model.classes", "2", "--rules", "SLTT", "--seeds", "1"]
    code, out, _ = run(capsys, "fscil", "fscil-digits", *SMALL, *words, "--json")
    assert code == 0
    found = json.loads(out)
    assert (found["sizes"], found["order"]) == ([2, 1], [9, 1, 4])
    assert found["samples"] == 108  # test images of three digits
