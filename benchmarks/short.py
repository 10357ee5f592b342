"""Short trainings on a part of CIFAR-10: normalisations and thresholds, and a small spiking transformer.

    python benchmarks/short.py stabilised IMAGES [--seeds 3]
    python benchmarks/short.py transformer IMAGES [--seeds 1]

IMAGES is a folder train/CLASS/*, test/CLASS/*, as of `sltt.data.ImageFolder`. The first 600 training and 500 test
images of each class are read. Of the 600, 540 train and 60 select the epoch. Each training adds a line to
docs/results/short-EXPERIMENT.json. Run the command again to continue. It ends with the table of
docs/results.md.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from doc_tables import short
from tables import DOCS, fill
from torch import nn
from torch.utils.data import TensorDataset
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2
from trainings import Log, fit

import sltt
from sltt.memory import peak_memory

RESULTS = DOCS / "results"
TRAIN, TEST = 600, 500  # images of each class
NEURON = partial(sltt.LIF, tau=2.0, decay_input=True, detach_reset=True, surrogate=sltt.surrogates.Sigmoid(4.0))
Case = tuple[dict[str, Any], Callable[[], nn.Module], sltt.Rule, dict[str, Any]]


def images(folder: Path, count: int, side: int) -> TensorDataset:
    """The first images of each class, [N, 3, side, side], with a mean of 0 and a deviation of 1."""
    found = [sorted(path.iterdir())[:count] for path in sorted(folder.iterdir())]
    files = [file for of_class in found for file in of_class]
    x = torch.stack([decode_image(str(file), ImageReadMode.RGB) for file in files])
    x = v2.functional.resize(x, [side, side], antialias=True).float() / 255
    y = torch.arange(len(found)).repeat_interleave(torch.tensor([len(of_class) for of_class in found]))
    return TensorDataset((x - 0.473) / 0.25, y)


def stabilised(seeds: int) -> Iterator[Case]:
    """BatchNorm per step beside OnlineRenorm, a constant threshold beside one that follows; SLTT, T = 4 and 8."""
    norms = {"BatchNorm": nn.BatchNorm2d, "OnlineRenorm": sltt.OnlineRenorm}
    neurons = {"LIF": partial(sltt.LIF, tau=2.0), "StableLIF": partial(sltt.StableLIF, tau=2.0)}
    sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    settings = {"epochs": 8, "batch_size": 64, "optimizer": sgd, "norm_weight_decay": 0.0}
    for seed in range(seeds):
        for steps in (4, 8):
            for norm, neuron in (("BatchNorm", "LIF"), ("OnlineRenorm", "LIF"), ("OnlineRenorm", "StableLIF")):
                model = partial(sltt.models.ShallowResNet, (16, 32), norm=norms[norm], neuron=neurons[neuron])
                case = {"norm": norm, "neuron": neuron, "steps": steps, "seed": seed}
                yield case, model, sltt.SLTT(), settings | {"steps": steps, "side": 16}


def transformer(seeds: int) -> Iterator[Case]:
    """A Spikformer of one block and 64 channels under the rules, T = 4."""
    adam = partial(torch.optim.AdamW, lr=2e-3, weight_decay=0.06)
    settings = {"epochs": 5, "batch_size": 32, "optimizer": adam, "norm_weight_decay": 0.0, "steps": 4, "side": 32}
    for seed in range(seeds):
        for rule in (sltt.BPTT(), sltt.SLTT(), sltt.SLTT(k=1), sltt.OTTT()):
            model = partial(sltt.models.spikformer, channels=64, depth=1, heads=4, neuron=NEURON)
            yield {"rule": repr(rule), "seed": seed}, model, rule, settings


def train(case: Case, data: Callable[[int], Any]) -> dict[str, Any]:
    """Train a case, and its row."""
    row, make, rule, settings = case
    settings = dict(settings)
    samples = data(settings.pop("side"))
    torch.manual_seed(row["seed"])
    model = make()
    loss = sltt.losses.CrossEntropyMSE(alpha=0.0, label_smoothing=0.1)
    splits = samples.splits(1)
    x, y = splits.collate([splits.train[i] for i in range(settings["batch_size"])])
    peak = peak_memory(lambda: rule(model, x, y, loss, steps=settings["steps"]), x.device)
    model.zero_grad()
    how = {"loss": loss, "schedule": sltt.schedules.Cosine(warmup=1), "channels_last": True, "seed": row["seed"]}
    result = fit(model, samples, rule, quiet=False, **how, **settings)
    reached = sltt.evaluate(model, samples, steps=settings["steps"], loss=loss, device="cpu").accuracy
    best = next(epoch for epoch in result.history if epoch["epoch"] == result.epoch)
    return {**row, "test": reached, "validation": best["validation_accuracy"], "peak_memory": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=("stabilised", "transformer"))
    parser.add_argument("images", type=Path)
    parser.add_argument("--seeds", type=int, default=1)
    given = parser.parse_args()
    log = Log(RESULTS / f"short-{given.experiment}.json")

    @cache
    def data(side: int) -> Any:
        both = [images(given.images / part, n, side) for part, n in (("train", TRAIN), ("test", TEST))]
        return sltt.data.from_datasets(both[0], 0.1, both[1], static=True)

    for case in globals()[given.experiment](given.seeds):
        if not log.find(case[0]):
            log.add(train(case, data))
    print(short(RESULTS, given.experiment))
    fill()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
