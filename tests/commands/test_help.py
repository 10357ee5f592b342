import re

import pytest

import sltt
from sltt.commands import COMMANDS, main
from sltt.commands.fit_parser import MATTER_FIRST
from sltt.commands.hints import fit_arguments


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
