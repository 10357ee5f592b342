"""A run of the command line that takes a second."""

import os

from sltt.commands import main
from sltt.metrics import Metric

TINY = ["--model.width", "2", "--epochs", "2", "--steps", "2", "--batch_size", "256", "--device", "cpu"]


class Wrong(Metric):
    """The share of wrong predictions."""

    higher_is_better = False

    def __call__(self, prediction, target):
        return (prediction.argmax(-1) != target).double().mean()


def run(capsys, *words):
    code = main([str(w) for w in words])
    out, err = capsys.readouterr()
    return code, out, err


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1"}
