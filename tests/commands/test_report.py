import csv
import json
import re
import shutil
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

import sltt
from sltt.commands import main
from sltt.commands.results import gather
from sltt.training.checkpoints import load_checkpoint, save_checkpoint
from tests.commands.tiny import edit
from tests.training.blobs import train

pytestmark = pytest.mark.slow
sections = pytest.importorskip("sltt.commands.sections", reason="the report needs matplotlib").sections
SMALL = ["--model.width", "2", "--device", "cpu"]


def write(path, text):
    """Write a file of results as a command does."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)


def history(checkpoint):
    return checkpoint["progress"]["history"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A folder with all that a report can show, of the digits."""
    folder = tmp_path_factory.mktemp("measured") / "all"
    commands = (
        "compare digits --epochs 2 --rules BPTT,SLTT:k=1 --seeds 2 --batch_size 256",
        "profile digits --steps 2,4 --rules BPTT,SLTT --repeats 1 --budget 1MB --batch_size 8",
        "agreement digits --taus 1.1,4 --steps 3 --samples 32",
    )
    for words in commands:
        assert main([*words.split(), *SMALL, "--save", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def page(measured):
    assert main(["report", str(measured)]) == 0
    return measured / "report" / "report.html"


def test_the_page_has_every_part_and_needs_no_network(page):
    text = page.read_text()
    for title in (
        "In short",
        "Rules compared on digits",
        "Training",
        "What a rule costs",
        "Spikes and energy",
        "What each rule drops of the gradient: digits",
        "Spikes of a trained network",
    ):
        assert f"<h2>{title}</h2>" in text
    # the names of XML's own vocabularies are no addresses that a browser opens
    links = re.findall(r'(?:href|src)="([^"#][^"]*)"', re.sub(r'xmlns(:\w+)?="[^"]*"', "", text))
    assert links
    assert all(link.startswith("data:") for link in links)
    assert text.count("<svg") == 8
    assert "#010203" not in text


def test_figures_and_tables_are_files_too(page):
    figures = {path.name for path in (page.parent / "figures").iterdir()}
    assert {name.removesuffix(".png") for name in figures if name.endswith(".png")} == {
        name.removesuffix(".svg") for name in figures if name.endswith(".svg")
    }
    assert len(figures) == 16
    with (page.parent / "data" / "2-comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    saved = json.loads((page.parents[1] / "compare.json").read_text())["rows"]
    assert [row["rule"] for row in rows] == ["BPTT", "SLTT:k=1"]
    assert [float(row["memory"]) for row in rows] == [row["peak_memory"] for row in saved]


def test_a_run_by_itself_and_what_is_left_out(measured, tmp_path, capsys):
    run = shutil.copytree(measured / "BPTT-seed0", tmp_path / "run")
    assert main(["report", str(run), "--out", str(tmp_path / "out")]) == 0
    assert " ".join(capsys.readouterr().out.split()) == f"report: {tmp_path}/out/report.html"
    (run / "sample.npz").write_bytes(b"")
    assert main(["report", str(run)]) == 0
    assert "The spikes of" in capsys.readouterr().out
    assert "No data left in file" in (run / "report" / "report.html").read_text()


def test_runs_of_two_metrics_have_two_charts_and_each_has_a_name(measured, tmp_path, monkeypatch):
    run, other = (shutil.copytree(measured / "BPTT-seed0", tmp_path / name) for name in ("run", "other"))
    content = load_checkpoint(other / "last.ckpt")
    renamed = [{k.replace("_accuracy", "_mean_squared_error"): v for k, v in row.items()} for row in history(content)]
    save_checkpoint(other / "last.ckpt", {**content, "progress": {**content["progress"], "history": renamed}})
    monkeypatch.chdir(run)
    (section, *_) = sections(gather([Path("."), other]))
    assert [chart.name for chart in section.charts] == ["1-accuracy", "1-mean-squared-error", "1-loss"]
    assert [row[0].text for row in section.tables[0].rows] == ["run", "other"]
    assert [bool(cell.text) for cell in section.tables[0].rows[1]] == [True, True, True, False, True, True, True, True]


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        (None, "own rule"),
        ({"class_path": "no_such.Mine", "init_args": {"k": 2, "rescale": None}}, "Mine:k=2"),
        ({"class_path": "sltt.SLTT", "init_args": {"k": 1, "hoist": False}}, "SLTT:k=1"),
        ({"class": "Own", "k": 2, "windows": {"a": 1, "b": 2}}, "Own:k=2:windows={&#39;a&#39;: 1, &#39;b&#39;: 2}"),
    ],
)
def test_a_rule_has_a_name_whether_it_is_here_or_not(rule, name, measured, tmp_path, capsys):
    run = shutil.copytree(measured / "BPTT-seed0", tmp_path / "run")
    edit(run, rule=rule)
    assert main(["report", str(run)]) == 0
    assert name in (run / "report" / "report.html").read_text()


def test_the_spikes_are_those_of_the_next_run_where_one_has_none(measured, tmp_path):
    for name in ("BPTT-seed0", "SLTT-k-1-seed0"):
        shutil.copytree(measured / name, tmp_path / "all" / name)
    (tmp_path / "all" / "SLTT-k-1-seed0" / "sample.npz").unlink()
    found = gather([tmp_path / "all"])
    spikes = sections(found)[-1]
    assert spikes.text == ["One sample in the network of BPTT-seed0: a validation sample, if there is one."]
    assert len(spikes.charts) == 2
    assert [note for note in found.notes if "SLTT-k-1-seed0 are left out: " in note and "sample.npz" in note]


@pytest.mark.parametrize("name", ["compare", "profile", "agreement"])
def test_a_damaged_result_is_named_and_the_others_are_shown(name, measured, tmp_path):
    folder = shutil.copytree(measured, tmp_path / "all", ignore=shutil.ignore_patterns("*-seed*", "report"))
    path = folder / f"{name}.json"
    for damaged in ("{", "[]", "7", "null", 2000 * "["):
        write(path, damaged)
        assert len(sections(found_there := gather([folder]))) > 1
        assert found_there.notes[0].startswith(f"{path} is left out: ")


def test_dollars_in_a_name_are_no_formula(tmp_path):
    net = torch.nn.Sequential(OrderedDict(fc=torch.nn.Linear(4, 8), **{"$x^$": sltt.LIF()}, out=torch.nn.Linear(8, 3)))
    train(tmp_path / "$y^$ run", net, epochs=1)
    assert main(["report", str(tmp_path / "$y^$ run")]) == 0
    assert "$x^$" in (tmp_path / "$y^$ run" / "report" / "report.html").read_text()


def test_a_damaged_checkpoint_is_named(measured, tmp_path):
    for name in ("BPTT-seed0", "SLTT-k-1-seed0", "BPTT-seed1"):
        shutil.copytree(measured / name, tmp_path / "all" / name)
    (tmp_path / "all" / "SLTT-k-1-seed0" / "last.ckpt").write_bytes(b"")
    found = gather([tmp_path / "all"])
    assert [run.name for run in found.runs] == ["BPTT-seed0", "BPTT-seed1"]
    assert "SLTT-k-1-seed0 is left out: " in found.notes[0]
    assert "last.ckpt is damaged" in found.notes[0]


def test_a_result_names_no_function_that_is_called(measured, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = json.loads((measured / "compare.json").read_text())
    found["rows"][0]["rule"] = "os.system:command=touch mark"
    write(tmp_path / "a" / "compare.json", json.dumps(found))
    sections(gather([tmp_path / "a"]))
    assert not Path("mark").exists()


def test_a_comparison_with_a_rule_that_died(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["compare", "digits", "--epochs", "1", "--rules", "SLTT", "--optimizer.lr", "1e30", *SMALL, "--save", "a"]
    assert main(words) == 1
    assert main(["report", "a"]) == 0
    text = Path("a/report/report.html").read_text()
    assert ">died<" in text
    assert not Path("a/SLTT-seed0").exists()  # nothing came of it


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no folder a"),
        ({}, "a has nothing to report"),
        ({"compare.json": "{"}, "a/compare.json is left out: "),
    ],
)
def test_a_folder_that_cannot_be_read_is_named(content, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("a").mkdir()
        for name, text in content.items():
            Path("a", name).write_text(text)
    assert main(["report", "a"]) == 1
    assert message in capsys.readouterr().err
