"""From an analog network to spikes on CIFAR-10: what each step loses, on the validation images.

    python benchmarks/ladder.py IMAGES [--runs runs/ladder] [--cases gelu relu …]

The network and the optimizer of the recipe `cifar10-small`, six epochs on whole images, one seed. IMAGES is a folder
train/CLASS/*, test/CLASS/*, as of `sltt.data.ImageFolder`. A tenth of the training images validates; no test image is
looked at. One thread, about a quarter of an hour a case. Each case is a line of docs/results/ladder.json, and a run
that is resumed. It ends with the table of docs/results.md.
"""

import argparse
import json
import statistics
from functools import partial
from pathlib import Path

import torch
from rates_to_spikes import Logits, pooled_over_time, rates, spikes, validation
from tables import DOCS, fill
from trainings import train

PATH = DOCS / "results" / "ladder.json"
STEPS = 8
SETTINGS = (
    "--data sltt.data.ImageFolder --data.root {images} --data.size 32 --data.crop_padding 4 "
    "--data.validation 0.1 --data.cutout 0 --phases null --epochs 6"
)
ANALOG = "--rule SLTT --steps 1 --model.neuron"
CASES = {
    "gelu": f"{ANALOG} torch.nn.GELU",
    "relu": f"{ANALOG} torch.nn.ReLU",
    "clipped": f"{ANALOG} torch.nn.Hardtanh --model.neuron.min_val 0 --model.neuron.max_val 2.5",
    "rates": f"--rule RateBased --rule.steady true --steps {STEPS}",
    "slttk": "--rule SLTT --rule.k 1 --rule.rescale true --rule.hoist true --steps 4 --epochs 2 --optimizer.lr 0.01 "
    "--schedule.warmup 0 --weights {runs}/rates/last.ckpt",
}
# how the logits of a case are made: the network's own, of rates, of spikes
MEASURES: dict[str, dict[str, Logits]] = {
    **{name: {"activations": lambda model, x: model(x)} for name in ("gelu", "relu", "clipped")},
    "rates": {
        "rates of 9 levels": partial(rates, steps=STEPS),
        "spikes, T = 8": partial(spikes, steps=STEPS),
        "pooled over time": partial(pooled_over_time, steps=STEPS),
    },
    "slttk": {"spikes, T = 8": partial(spikes, steps=STEPS), "spikes, T = 4": partial(spikes, steps=4)},
}


def accuracies(run: Path, measures: dict[str, Logits]) -> dict[str, float]:
    """The share of the validation images that each kind of logits gets right, in bfloat16."""
    model, batches = validation(run)
    right: dict[str, list[float]] = {name: [] for name in measures}
    for x, y in batches:
        for name, logits in measures.items():
            with torch.autocast("cpu", torch.bfloat16):
                found = logits(model, x)
            right[name] += (found.argmax(1) == y).tolist()
    return {name: statistics.mean(hits) for name, hits in right.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs/ladder"))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    given = parser.parse_args()
    for case in given.cases:
        run = given.runs / case
        train(f"cifar10-small {SETTINGS} {CASES[case]}".format(images=given.images, runs=given.runs).split(), run)
        found = json.loads(PATH.read_text()) if PATH.exists() else {}
        found[case] = accuracies(run, MEASURES[case])
        PATH.write_text(json.dumps({name: found[name] for name in CASES if name in found}, indent=1) + "\n")
        fill()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
