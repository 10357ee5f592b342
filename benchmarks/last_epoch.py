"""What SLTT-1 makes of the weights that steady currents trained: the choices for the last epoch of `cifar10-hour`.

    python benchmarks/last_epoch.py IMAGES [--run runs/last-epoch] [--seed 1]

IMAGES is a folder train/CLASS/*, test/CLASS/*, as of `sltt.data.ImageFolder`. It trains the epochs of steady currents
of hour.py's case "narrow: 24 + 1 epochs", on two processes, or goes on with the run that did. From there it trains a
few batches with SLTT-1, and counts how many of 2,000 training images without augmentation spikes get right. No test
image chooses anything. One thread, on a CPU with bfloat16, a quarter of an hour beside the training. Each case is a row
of docs/results/last-epoch.json. It ends with the table of docs/results.md.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hour
import torch
from cells import Row
from tables import DOCS, fill
from torch import Tensor, nn
from trainings import Log, built_run

import sltt
from sltt.training.average import averaged_model
from sltt.training.checkpoints import load_checkpoint
from sltt.training.parameters import parameter_groups
from sltt.training.phases import freeze_norm

PATH = DOCS / "results" / "last-epoch.json"
IMAGES, BATCH, DECAY = 2000, 125, 0.95
CASES: list[Row] = [
    {"start": "the last weights", "rate": 0.0, "batches": 0, "steps": 16},
    {"start": "the average", "rate": 0.0, "batches": 0, "steps": 16},
    {"start": "the average", "rate": 0.0, "batches": 0, "steps": 32},
    {"start": "the last weights", "rate": 0.003, "batches": 40, "steps": 16},
    {"start": "the average", "rate": 0.003, "batches": 40, "steps": 16},
    {"start": "the average", "rate": 0.003, "batches": 150, "steps": 16},
    {"start": "the average", "rate": 0.001, "batches": 150, "steps": 16},
]


def picture(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def augmented(samples: Any, batches: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of training samples, drawn alike in every case."""
    torch.manual_seed(5)
    order = torch.randperm(len(samples)).tolist()
    for b in range(batches):
        xs, ys = zip(*(samples[i] for i in order[b * BATCH : (b + 1) * BATCH]), strict=True)
        yield picture(torch.stack(xs)), torch.tensor(ys)


def train(built: Any, case: Row, samples: Any) -> nn.Module:
    """The average of the weights over batches of SLTT-1, at a learning rate that falls to 0."""
    model, rule = built.model, sltt.SLTT(k=1, rescale=True, hoist=True)
    optimizer = built.optimizer(parameter_groups(model, built.norm_weight_decay, built.norm_bias_lr))
    average = averaged_model(model, DECAY)
    for b, (x, y) in enumerate(augmented(samples, case["batches"])):
        freeze_norm(model.train())
        for group in optimizer.param_groups:
            group["lr"] = case["rate"] * (1 - (b + 0.5) / case["batches"]) * group.get("lr_factor", 1.0)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            rule(model, x, y, built.loss, steps=case["steps"], seed=b)
        optimizer.step()
        average.update_parameters(model)
    return average.module


@torch.no_grad()
def measure(model: nn.Module, samples: Any, steps: int) -> Row:
    """The share of samples that spikes get right, and their cross entropy."""
    right = loss = 0.0
    chosen = range(0, len(samples), len(samples) // IMAGES)[:IMAGES]
    for start in range(0, IMAGES, 250):
        xs, ys = zip(*(samples[i] for i in chosen[start : start + 250]), strict=True)
        y = torch.tensor(ys)
        with torch.autocast("cpu", torch.bfloat16):
            logits = sltt.unroll(model.eval(), picture(torch.stack(xs)), steps=steps).mean(0).float()
        right += (logits.argmax(1) == y).sum().item()
        loss += nn.functional.cross_entropy(logits, y, reduction="sum").item()
    return {"right": right / IMAGES, "loss": round(loss / IMAGES, 4)}


def row(run: Path, case: Row) -> Row:
    built = built_run(run)
    checkpoint, splits = load_checkpoint(run / "last.ckpt"), built.data.splits(case["steps"])
    built.model.load_state_dict(checkpoint["model" if case["start"] == "the last weights" else "averaged"])
    built.model.to(memory_format=torch.channels_last)
    model = train(built, case, splits.train) if case["batches"] else built.model
    return {**case, **measure(model, splits.plain, case["steps"])}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("--run", type=Path, default=Path("runs") / "last-epoch")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    if not (given.run / "result.json").exists():
        hour.train([*hour.options(given.images, "narrow: 24 + 1 epochs", given.seed), "--epochs", "24"], given.run)
    torch.set_num_threads(1)
    log = Log(PATH)
    for case in CASES:
        if not log.find(case):
            print(log.add(row(given.run, case)), flush=True)
    fill()
