"""Accuracy of the recipe `cifar10-hour` on test images, over minutes of training, with Muon, and of the analog network.

    python benchmarks/hour.py IMAGES [--runs runs/hour] [--seed 0] [--cases recipe "narrow: 36 + 1 epochs" …]

IMAGES is a folder train/CLASS/*, test/CLASS/*, as of `sltt.data.ImageFolder`: all training images train. Two processes.
Narrow networks have the record's widths. Earlier ones begin the last epoch from the last weights, at 0.003 and T = 16.
Each case is a row of docs/results/hour.json, and a run that is resumed. It ends with the table of docs/results.md.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from cells import Row
from ingredients import SLTTK, STEADY, muon
from tables import DOCS
from trainings import measure_cases, views

from sltt.training import manifest
from sltt.training.checkpoints import load_checkpoint

PATH = DOCS / "results" / "hour.json"
SETTINGS = (
    "--data sltt.data.ImageFolder --data.root {images} --data.size 32 --data.crop_padding 4 --data.validation 0 "
    "--data.cutout 8 --data.reflect true"
)


NARROW = ["--model.widths", "[64,256,256]"]
LAST = "{epochs: 1, lr: 0.001, freeze_norm: true}"


def lasting(steady: int, last: str = SLTTK, steps: int = 16) -> list[str]:
    """A narrow network: so many epochs of steady currents at T = 16, and a last one.

    The learning rate rises over a quarter of the first.
    """
    phases = f"[{{epochs: {steady}, steps: 16, {STEADY}}}, {last}]"
    epochs = ["--epochs", str(steady + 1), "--schedule.warmup", str(steady / 4)]
    return [*NARROW, "--steps", str(steps), "--phases", phases, *epochs]


CASES: dict[str, list[str]] = {  # options that change the recipe
    "recipe": [],
    "narrow: 24 + 1 epochs": lasting(24, LAST, 32),
    "narrow: 36 + 1 epochs": lasting(36, LAST, 32),
    "earlier: 4 + 1 epochs": lasting(4),
    "earlier: 10 + 1 epochs": lasting(10),
    "earlier: 24 + 1 epochs": lasting(24),
    "earlier: 48 + 1 epochs": lasting(48),
    "earlier, Muon: 22 + 1 epochs": [*lasting(22), "--schedule.warmup", "5", *muon("0.08")],
    "narrow, analog: GELU": [
        *NARROW,
        *("--phases", "null", "--rule", "SLTT", "--steps", "1"),
        *("--model.neuron", "torch.nn.GELU", "--model.scale", "0.1111"),
    ],
}


def options(images: Path, case: str, seed: int = 0) -> list[str]:
    """Of `sltt train cifar10-hour`, for a case."""
    return [*SETTINGS.format(images=images).split(), "--seed", str(seed), *CASES[case]]


def train(words: list[str], run: Path) -> None:
    """`sltt train` in a folder, where it goes on if it has begun: a command of its own, since it starts processes."""
    begun = (run / "config.yaml").exists()
    fresh = ["cifar10-hour", *words, "--device", "cpu", "--devices", "2", "--run", str(run)]
    how = ["--resume", str(run)] if begun else fresh
    # that command imports ingredients.MuonSGD too
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    subprocess.run([sys.executable, "-m", "sltt", "train", *how], check=True, env=os.environ | {"PYTHONPATH": paths})


def measured(run: Path) -> Row:
    """Accuracies of the test images, and for each epoch that of the training and its seconds."""
    epochs = load_checkpoint(run / manifest.LAST)["progress"]["history"]
    alone = json.loads((run / "result.json").read_text())["last_epoch_test_accuracy"]
    columns = {name: [round(row[name], 4) for row in epochs] for name in ("train_accuracy", "seconds")}
    return {"alone": alone, "six": views(run, "test", ["six"])["six"], **columns}


def measure(images: Path, case: str, seed: int, run: Path) -> Row:
    train(options(images, case, seed), run)
    return measured(run)


if __name__ == "__main__":
    measure_cases(__doc__, PATH, list(CASES), measure)
