import json
import re
import shlex
from pathlib import Path
from statistics import mean, median

import pytest

import sltt
from sltt.commands import main
from sltt.training.console import megabytes

README = Path(sltt.__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.slow
def test_the_python_runs_as_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = "\n".join(text for kind, text in BLOCKS if kind == "python")
    assert "sltt.fit" in code
    exec(compile(code, "README.md", "exec"), {})
    accuracy = float(capsys.readouterr().out.split()[-1])
    assert accuracy > 0.5


TINY = ["--model.width", "2", "--device", "cpu", "--batch_size"]
SHORT = {
    "train": [*TINY, "256", "--epochs", "1"],
    "compare": [*TINY, "256", "--epochs", "1"],
    "profile": [*TINY, "16", "--repeats", "1"],
    "agreement": [*TINY, "16"],
    "lr": [*TINY, "256", "--batches", "10"],
}
COMMANDS = [line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines() if line.startswith("sltt ")]


@pytest.mark.slow
def test_the_commands_run_as_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert len(COMMANDS) >= 6
    for command in COMMANDS:
        words = shlex.split(command, comments=True)[1:]
        if "--resume" not in words:
            words += SHORT.get(words[0], [])
        run = next(iter(Path("runs").glob("digits*")), None)
        assert main([word.replace("runs/RUN", str(run)) for word in words]) == 0, command


def test_the_table_is_that_of_the_results():
    rows = json.loads((README.parent / "docs/results/resnet18-over-t.json").read_text())
    found = {row["case"]: row for row in rows if row["steps"] == 64}
    lines = README.read_text().replace("**", "").splitlines()
    for method, case in {
        "SLTT, this library": "SLTT",
        "BPTT, this library": "BPTT",
        "SLTT, SpikingJelly 2.0 (`SLTTLIFNode`)": "SpikingJelly SLTT",
        "BPTT, SpikingJelly 2.0 (`LIFNode`, layer by layer)": "SpikingJelly BPTT",
    }.items():
        row = found[case]
        assert f"| {method} | {megabytes(row['memory'])} | {row['seconds']:.0f} s |" in lines


def ratios(case, other):
    rows = json.loads((README.parent / "docs/results/resnet18-t6.json").read_text())
    times = {row["case"]: row["times"] for row in rows}
    found = [a / b for a, b in zip(times[case], times[other], strict=True)]
    return [f"{of(found):.2f}" for of in (median, min, max)]


def test_the_ratios_are_those_of_the_results():
    text = README.read_text().replace("\n", " ")
    interval = r"(\S+) \((\S+) – (\S+)\) of "
    for said, case, other in (
        ("SLTT takes " + interval + "the time of the ReLU network", "SLTT", "relu"),
        ("and " + interval + "the time of SpikingJelly's SLTT", "SLTT", "SpikingJelly SLTT"),
        ("K = 1 takes " + interval + "SLTT's time on ResNet-18", "SLTT, k = 1", "SLTT"),
    ):
        assert list(re.search(said, text).groups()) == ratios(case, other)


def test_the_accuracies_are_those_of_the_results():
    rows = json.loads((README.parent / "docs/results/tasks.json").read_text())
    reached = {(row["task"], row["rule"]): 100 * mean(row["accuracies"]) for row in rows}
    said = re.search(
        r"BPTT reaches (\S+)% and SLTT (\S+)% \(chance: 25%\).*?`sltt.OTTT\(\)` reaches (\S+)% there.*?"
        r"OTTT reaches (\S+)% and BPTT (\S+)%",
        README.read_text().replace("\n", " "),
    )
    recall = [f"{reached['recall', rule]:.1f}" for rule in ("BPTT", "SLTT", "OTTT")]
    assert [*recall, *(f"{reached['recall-marked', rule]:.0f}" for rule in ("OTTT", "BPTT"))] == list(said.groups())


def test_every_link_leads_to_a_file():
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README.read_text())
    # the badge: relative to the page that GitHub shows the README on
    links = [re.sub(r"^\.\./\.\./actions/workflows/([\w.]+).*", r".github/workflows/\1", link) for link in links]
    assert links
    assert [link for link in links if not (README.parent / link).exists()] == []


def test_the_make_targets_exist():
    makefile = (README.parent / "Makefile").read_text()
    targets = {line.split()[1] for kind, text in BLOCKS for line in text.splitlines() if line.startswith("make ")}
    assert targets == {"demo", "test"}
    assert all(f"\n{target}:" in makefile for target in targets)
