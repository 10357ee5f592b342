import re
import shlex
import subprocess

import pytest

import sltt
from sltt.commands import COMMANDS, main
from sltt.commands.fit_parser import MATTER_FIRST
from sltt.commands.hints import fit_arguments
from tests.conftest import LINUX


def test_the_help_of_train_fits_a_terminal_and_begins_with_what_matters(capsys, monkeypatch):
    import lightning_fabric.loggers  # noqa: F401  # some of its classes fit --loggers

    class Mine(sltt.SLTT):
        """A class of the user's own, which no help lists either."""

    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["train", "digits", "--help"])
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert shown.startswith("usage: sltt train digits [OPTION ...]\n\nOptions override")
    assert "T, the number of time steps. (type: int, default: 4)" in " ".join(shown.split())
    assert len(shown.splitlines()) < 220
    for hidden in ("OwnData", "lightning_fabric.loggers", Mine.__name__):  # the first is made in Python only
        assert hidden not in shown


def test_the_options_that_matter_are_options():
    named = re.findall(r"^  --(\w+)", MATTER_FIRST, re.MULTILINE)
    assert 20 <= len(named) <= 22
    assert set(named) <= set(fit_arguments())
    assert "report" not in fit_arguments()  # of Python only


def test_the_list_of_commands_fits_a_terminal(capsys):
    assert main([]) == 2
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert set(re.findall(r"^  sltt (\w+)", shown, re.MULTILINE)) == set(COMMANDS)


def test_the_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"sltt {sltt.__version__}\n"


COMPLETED = {  # in a folder with recipes, events and runs
    ("ev",): ["eval"],
    ("train", "nmn"): ["nmnist"],
    ("train", "nmnist", "--batch_"): ["--batch_size"],
    ("train", "nmnist", "--rule", ""): ["elsewhere", "my recipe.yaml", "runs"],
    ("train", "my"): ["my recipe.yaml"],
    ("train", "--resume", "runs/mi"): ["runs/mine 2", "runs/mine-1"],
    ("train", "--weights", "runs/mine-1/be"): ["runs/mine-1/best.ckpt"],
    ("compare", "--var"): ["--vary"],
    ("agreement", "--ta"): ["--taus"],
    ("eval", ""): ["elsewhere", "my recipe.yaml", "runs"],
    ("eval", "runs/"): ["runs/its '$(touch ran)'", "runs/mine 2", "runs/mine-1"],
    ("train", "elsewhere/"): ["elsewhere/mine-3"],
    ("export", "runs/mine-1", "--to", "el"): ["elsewhere"],
}


@LINUX
def test_the_shell_completes(capsys, tmp_path):
    for run in ("runs/mine-1", "runs/mine 2", "runs/its '$(touch ran)'", "elsewhere/mine-3"):
        (tmp_path / run).mkdir(parents=True)
    for file in ("my recipe.yaml", "runs/mine-1/best.ckpt"):
        (tmp_path / file).touch()
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    ask = 'COMP_WORDS=(sltt {}); COMP_CWORD={}; _sltt; (IFS=,; echo "${{COMPREPLY[*]}}")'
    asked = "\n".join(ask.format(" ".join(map(shlex.quote, words)), len(words)) for words in COMPLETED)
    done = subprocess.run(
        ["bash", "-c", f"complete() {{ :; }}\n{script}\n{asked}"], capture_output=True, text=True, cwd=tmp_path
    )
    assert [sorted(line.split(",")) for line in done.stdout.splitlines()] == list(COMPLETED.values())
    assert not done.stderr
    assert not (tmp_path / "ran").exists()
    assert main(["completion", "zsh"]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert "|| compinit; bashcompinit" in first
    assert rest == script.splitlines()
    assert main(["completion", "fish"]) == 2
