"""A training that is killed at random moments, again and again, ends as if it had never been."""

import copy
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
from torch import nn

import sltt
from sltt.training.checkpoints import load_checkpoint
from sltt.training.files import BEST, CONFIG, LAST
from tests.conftest import LINUX
from tests.training.blobs import Blobs, equal, train

SETTINGS = {"epochs": 5}


def training(run: Path) -> None:
    """Start a run, or go on with it: 30 batches, and a checkpoint after each."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), sltt.LIF(), sltt.Dropout(0.2), nn.Linear(8, 3))
    settings = {"epochs": 5, "batch_size": 10, "checkpoint_minutes": 0.0, "steps": 2, "config": SETTINGS}
    train(run, model, Blobs(), rule=sltt.SLTT(k=1), resume=run.exists(), **settings)


def forked(run: Path) -> int:
    """The training in a process of its own, which has imported PyTorch already."""
    if child := os.fork():
        return child
    code = 1
    try:
        training(run)
        code = 0
    except BaseException:
        traceback.print_exc(file=sys.stderr)
    finally:
        os._exit(code)


def killed(run: Path, seconds: float) -> bool:
    """Kill the training after so many seconds; false if it had ended before, as it should."""
    child = forked(run)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), f"the training failed with {code}"
    return code != 0


def kill_at_random(folder: Path, kills: int) -> None:
    """Kill trainings `kills` times and resume them; all end with the weights and rows of one that was left alone."""
    chance = random.SystemRandom()
    training(folder / "first")  # imports what the others then have
    began = time.monotonic()
    training(folder / "whole")
    longest = time.monotonic() - began
    expected = {name: load_checkpoint(folder / "whole" / name) for name in (BEST, LAST)}
    done = number = 0
    while done < kills:
        run = folder / f"run{number}"
        if killed(run, chance.uniform(0, longest / 2)):
            done += 1
            assert not any(run.glob("[!.]*")) or (run / CONFIG).read_text() == "epochs: 5\n"
            for path in run.glob("*.ckpt"):
                load_checkpoint(path)  # whole
        else:
            number += 1
            assert_same(run, expected)
    _, status = os.waitpid(forked(folder / f"run{number}"), 0)
    assert status == 0
    assert_same(folder / f"run{number}", expected)


def assert_same(run: Path, expected: dict) -> None:
    for name, checkpoint in expected.items():
        found = load_checkpoint(run / name)
        assert equal(found["model"], checkpoint["model"])
        rows = (copy.deepcopy(one["progress"]["history"]) for one in (found, checkpoint))
        for there, here in zip(*rows, strict=True):
            for measured in ("seconds", "peak_memory"):  # which depend on where in a run they are measured
                del there[measured], here[measured]
            assert there == here
    assert not list(run.glob(".*.part"))


@LINUX
@pytest.mark.slow
def test_twenty_kills_change_nothing(tmp_path):
    kill_at_random(tmp_path, 20)
