"""Each kind of failure ends in one line of cause, and one of a remedy that helps."""

import os

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import sltt
from sltt.commands.failures import UsageError, cause, remedy


class Killed:
    """A data set whose worker is killed."""

    def __len__(self):
        return 4

    def __getitem__(self, i):
        os.kill(os.getpid(), 9)


class Faulty(Killed):
    def __getitem__(self, i):
        return {}["x"]


def fails(run):
    with pytest.raises(Exception) as caught:  # noqa: PT011 of many kinds
        run()
    return caught.value


def misused():
    raise UsageError("unknown option")


def own_fault():
    raise ValueError("of the user's own code")


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (lambda: torch.empty(10**15), "use a smaller --batch_size"),
        (lambda: bytearray(10**17), "use a smaller --batch_size"),
        (lambda: list(DataLoader(Killed(), num_workers=1)), "use fewer --workers"),
        (lambda: list(DataLoader(Faulty(), num_workers=1)), "correct {here}/test_remedies.py, line 26, in __getitem__"),
        (lambda: nn.Linear(3, 2)(torch.zeros(2, 4)), "the network does not fit the data"),
        (lambda: nn.Conv2d(3, 2, 1)(torch.zeros(2, 4, 5, 5)), "the network does not fit the data"),
        (misused, "`sltt train --help` explains the options"),
        (lambda: open("/none"), "correct the path"),  # noqa: SIM115
        (own_fault, "in own_fault; SLTT_TRACEBACK=1 shows what called it"),
    ],
)
def test_each_kind_of_failure_has_a_remedy(run, said):
    assert said.format(here=os.path.dirname(__file__)) in remedy(fails(run), "train")


def test_a_message_of_sltt_says_what_to_do_by_itself(monkeypatch):
    monkeypatch.setattr("sltt.commands.failures.OUTSIDE", ("",))  # no code is the user's own
    error = fails(lambda: sltt.LIF(tau=0.5))
    assert cause(error).startswith("tau must be greater than 1")
    assert remedy(error, "train").startswith("`sltt train --help` explains the options; the page")
