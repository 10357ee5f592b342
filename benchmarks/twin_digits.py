"""Spiking twins of two ANNs on the digits: test accuracy before and after an epoch of SLTT-1 and of SLTT, at T = 4.

    python benchmarks/twin_digits.py [--seeds 3]

`DigitsNet` with ReLU and with QCFS of four levels, ten epochs. No choice is made here: all training images train. A few
minutes with one thread. Each network and seed is a row of docs/results/twin-digits.json. Run the command again to
continue. It ends with the table of docs/interop.md.
"""

import argparse
import copy
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tables import DOCS, fill
from torch import nn

import sltt
from sltt.interop import QCFS, spiking
from sltt.training.console import Console
from sltt.training.phases import Phase

RESULTS = DOCS / "results" / "twin-digits.json"
ACTIVATIONS = {"ReLU": nn.ReLU, "QCFS, four levels": partial(QCFS, 4)}
DATA = sltt.data.Digits(validation=0)


def train(model: nn.Module, seed: int, lr: float, **settings: Any) -> nn.Module:
    """The model, trained."""
    adam = partial(torch.optim.AdamW, lr=lr)
    with tempfile.TemporaryDirectory() as folder:
        how = {"optimizer": adam, "seed": seed, "device": "cpu", "run": Path(folder) / "run"}
        sltt.fit(model, DATA, report=Console(quiet=True), **how, **settings)
    return model


def accuracy(model: nn.Module, steps: int = 4) -> float:
    return sltt.evaluate(model, DATA, steps=steps, device="cpu").accuracy


def measure(activation: str, seed: int) -> dict[str, float]:
    """An ANN, its twins, and what an epoch brings."""
    torch.manual_seed(seed)
    ann = train(sltt.models.DigitsNet(neuron=ACTIVATIONS[activation]), seed, 0.005, steps=1, epochs=10)
    found = {"ANN": accuracy(ann, steps=1), "twin, θ = 1": accuracy(spiking(ann))}
    balanced = spiking(ann, data=DATA)
    found |= {f"balanced, T = {steps}": accuracy(balanced, steps) for steps in (2, 4, 8)}
    shared: dict[str, Any] = {"steps": 4, "epochs": 1, "phases": [Phase(1, freeze_norm=True)]}
    for name, rule in (("SLTT-1", sltt.SLTT(k=1)), ("SLTT", sltt.SLTT())):
        found[f"one epoch of {name}"] = accuracy(train(copy.deepcopy(balanced), seed, 0.001, rule=rule, **shared))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    rows: list[dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    for activation in ACTIVATIONS:
        for seed in range(given.seeds):
            case = {"activation": activation, "seed": seed}
            if not any(case.items() <= row.items() for row in rows):
                rows.append(case | measure(activation, seed))
                RESULTS.write_text("[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n")
    fill()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
