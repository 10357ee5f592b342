import re
import subprocess

import pytest

import sltt
from sltt.commands import COMMANDS, main
from sltt.commands.fit_parser import MATTER_FIRST
from sltt.commands.hints import fit_arguments
from tests.conftest import LINUX


def test_the_help_of_train_fits_a_terminal_and_begins_with_what_matters(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["train", "digits", "--help"])
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert shown.startswith("usage: sltt train digits [OPTION ...]\n\nOptions override")
    assert "OwnData" not in shown  # it is made in Python only


def test_the_options_that_matter_are_options():
    named = re.findall(r"^  --(\w+)", MATTER_FIRST, re.MULTILINE)
    assert 20 <= len(named) <= 22
    assert set(named) <= set(fit_arguments())
    assert "report" not in fit_arguments()  # of Python only


def test_the_list_of_commands_fits_a_terminal(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert set(re.findall(r"^  sltt (\w+)", shown, re.MULTILINE)) == set(COMMANDS)


def test_the_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"sltt {sltt.__version__}\n"


@LINUX
def test_the_shell_completes(capsys, tmp_path):
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    words = "COMP_WORDS=(sltt {}); COMP_CWORD={}; _sltt; echo ${{COMPREPLY[@]}}"
    asked = ("ev", 1), ("train nmn", 2), ("train nmnist --batch_", 3), ("compare --var", 2), ("agreement --ta", 2)
    asked = "\n".join(words.format(*one) for one in asked)
    done = subprocess.run(["bash", "-c", f"complete() {{ :; }}\n{script}\n{asked}"], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["eval", "nmnist", "--batch_size", "--vary", "--taus"]
    for run in ("runs/mine-1", "runs/mine-2", "elsewhere/mine-3"):
        (tmp_path / run).mkdir(parents=True)
    asked = ("eval ''", 2), ("eval mine-2", 2), ("report elsewhere/m", 2), ("train --resume ''", 3)
    asked = "\n".join(words.format(*one) for one in asked)
    said = {"capture_output": True, "text": True, "cwd": tmp_path}
    done = subprocess.run(["bash", "-c", f"complete() {{ :; }}\n{script}\n{asked}"], **said)
    both = {"runs/mine-1", "runs/mine-2"}
    assert [set(line.split()) for line in done.stdout.splitlines()] == [
        both,
        {"runs/mine-2"},
        {"elsewhere/mine-3"},
        both,
    ]
    assert main(["completion", "zsh"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == script.splitlines()
    assert main(["completion", "fish"]) == 2
