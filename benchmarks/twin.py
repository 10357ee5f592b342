"""The spiking twin of an ANN on CIFAR-10: accuracy before and after one epoch of SLTT-1, at T = 4.

    python benchmarks/twin.py IMAGES [--runs runs/twin]

IMAGES is a folder train/CLASS/*, test/CLASS/*, as of `sltt.data.ImageFolder`. A tenth of the training images validates:
it selects the percentile of the thresholds, and then the learning rate. The test images measure the network, the twin
and the trained twin once. One thread. Each result is a row of docs/results/twin.json, with its minutes of processor
time. Run the command again to continue. It ends with the table of docs/interop.md.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tables import DOCS, fill
from torch import nn
from trainings import Log, Row

import sltt
from sltt.interop import spiking
from sltt.training.console import Console
from sltt.training.phases import Phase

RESULTS = DOCS / "results" / "twin.json"
STEPS, SEED = 4, 0
PERCENTILES = (90.0, 95.0, 97.0, 99.0, 99.9, 100.0)
RATES = (0.01, 0.02, 0.05, 0.1)
HOW: dict[str, Any] = {"precision": "bf16-mixed", "channels_last": True, "device": "cpu"}
LOSS = sltt.losses.CrossEntropyMSE(alpha=0.0, label_smoothing=0.1)
NETWORK = partial(sltt.models.ShallowResNet, (64, 256, 256), stem=32, neuron=nn.ReLU)


def once(log: Log, case: Row, measure: Callable[[], Row]) -> Row:
    """The row of a case; `measure` gives what it lacks, and its minutes are added."""
    found = log.find(case)
    if found is None:
        start = time.process_time()
        found = case | measure()
        found["minutes"] = round((time.process_time() - start) / 60, 2)
        log.add(found)
    return found


def add_test(log: Log, row: Row, test: Callable[[], Row]) -> None:
    """Add the test accuracy to a row, once."""
    if "test" not in row:
        row |= test()
        log.write()


def sgd(lr: float) -> Any:
    return partial(torch.optim.SGD, lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4)


def train(model: nn.Module, data: sltt.data.Data, weights: Path, **settings: Any) -> Row:
    """Train a network, keep its weights in a file, and give its validation accuracy."""
    run = weights.with_suffix("")
    settings |= {"norm_weight_decay": 0.0, "seed": SEED, "resume": run.exists()}
    fitted = sltt.fit(model, data, loss=LOSS, run=run, report=Console(), **settings, **HOW)
    torch.save(model.state_dict(), weights)
    best = next(row for row in fitted.history if row["epoch"] == fitted.epoch)
    return {"validation": best["validation_accuracy"]}


def accuracy(model: nn.Module, data: sltt.data.Data, split: str, steps: int = STEPS) -> Row:
    return {split: sltt.evaluate(model, data, split, loss=LOSS, steps=steps, **HOW).accuracy}  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs/twin"))
    given = parser.parse_args()
    data = sltt.data.ImageFolder(str(given.images), size=32, crop_padding=4)
    given.runs.mkdir(parents=True, exist_ok=True)
    log = Log(RESULTS)

    torch.manual_seed(SEED)
    ann, file = NETWORK(), given.runs / "ann.pt"
    phases = [Phase(4, crop=24), Phase(2)]  # on crops an epoch takes 0.6 of the time
    fitting: Row = {"steps": 1, "epochs": 6, "phases": phases, "optimizer": sgd(0.2)}
    fitting["schedule"] = sltt.schedules.Cosine(warmup=1)
    of_ann = once(log, {"network": "ANN"}, lambda: train(ann, data, file, **fitting))
    ann.load_state_dict(torch.load(file, weights_only=True))
    add_test(log, of_ann, lambda: accuracy(ann, data, "test", steps=1))

    def twin(percentile: float, weights: Path | None = None) -> nn.Module:
        made = spiking(ann, data=data, percentile=percentile)
        if weights:
            made.load_state_dict(torch.load(weights, weights_only=True))
        return made

    balanced = [
        once(log, {"network": "twin", "percentile": p}, lambda p=p: accuracy(twin(p), data, "validation"))
        for p in PERCENTILES
    ]
    best = max(balanced, key=lambda row: row["validation"])
    chosen = best["percentile"]
    add_test(log, best, lambda: accuracy(twin(chosen), data, "test"))

    shared: Row = {"steps": STEPS, "epochs": 1, "phases": [Phase(1, freeze_norm=True)]}
    shared["rule"] = sltt.SLTT(k=1, rescale=True)
    files = {lr: given.runs / f"lr-{lr}.pt" for lr in RATES}
    trained = [
        once(
            log,
            {"network": "twin, one epoch of SLTT-1", "percentile": chosen, "lr": lr},
            lambda lr=lr: train(twin(chosen), data, files[lr], optimizer=sgd(lr), **shared),
        )
        for lr in RATES
    ]
    best = max(trained, key=lambda row: row["validation"])
    add_test(log, best, lambda: accuracy(twin(chosen, files[best["lr"]]), data, "test"))
    fill()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
