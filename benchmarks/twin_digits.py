"""Spiking twins of two ANNs on the digits: test accuracy before and after an epoch of SLTT-1 and of SLTT, at T = 4.

    python benchmarks/twin_digits.py [--seeds 3]

`DigitsNet` with ReLU and with QCFS of four levels, ten epochs. No choice is made here: all training images train. A few
minutes with one thread. Each network and seed is a row of docs/results/twin-digits.json. Run the command again to
continue. It ends with the table of docs/interop.md.
"""

import argparse
import copy
from functools import partial
from itertools import product
from typing import Any

import torch
from tables import DOCS, fill
from torch import nn
from trainings import Log, fit

import sltt
from sltt.interop import QCFS, spiking
from sltt.training.phases import Phase

RESULTS = DOCS / "results" / "twin-digits.json"
ACTIVATIONS = {"ReLU": nn.ReLU, "QCFS, four levels": partial(QCFS, 4)}
DATA = sltt.data.Digits(validation=0)


def train(model: nn.Module, seed: int, lr: float, rule: sltt.Rule = sltt.SLTT(), **settings: Any) -> nn.Module:
    """The model, trained."""
    fit(model, DATA, rule, optimizer=partial(torch.optim.AdamW, lr=lr), seed=seed, **settings)
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
    log = Log(RESULTS)
    for activation, seed in product(ACTIVATIONS, range(given.seeds)):
        case = {"activation": activation, "seed": seed}
        if not log.find(case):
            log.add(case | measure(activation, seed))
    fill()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
