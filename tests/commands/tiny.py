"""A run of the command line that takes a second."""

import os
from pathlib import Path

from sltt.commands import main
from sltt.metrics import Metric
from sltt.training.checkpoints import load_checkpoint, save_checkpoint
from sltt.training.runs import write_config

TINY = ["--model.width", "2", "--epochs", "2", "--steps", "2", "--batch_size", "256", "--device", "cpu"]


class Wrong(Metric):
    """The share of wrong predictions."""

    higher_is_better = False

    def __call__(self, prediction, target):
        return (prediction.argmax(-1) != target).double().mean()


def edit(run, **settings):
    """Change the settings of a run in all of its files, as somebody who hands it on can."""
    for path in Path(run).glob("*.ckpt"):
        content = load_checkpoint(path)
        content["config"].update(settings)
        save_checkpoint(path, content)
    write_config(Path(run), content["config"])


def run(capsys, *words):
    code = main([str(w) for w in words])
    out, err = capsys.readouterr()
    return code, out, err


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1"}
