import re
import shlex
from pathlib import Path

import pytest

import sltt
from sltt.commands import main

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


def test_every_link_leads_to_a_file():
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README.read_text())
    # the badge: relative to the page that GitHub shows the README on
    links = [re.sub(r"^\.\./\.\./actions/workflows/([\w.]+).*", r".github/workflows/\1", link) for link in links]
    assert links
    assert [link for link in links if not (README.parent / link).exists()] == []
