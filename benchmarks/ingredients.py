"""What each part of the recipe `cifar10-hour` brings: short trainings, each with one change, on validation images.

    python benchmarks/ingredients.py IMAGES [--runs runs/ingredients] [--seed 0] [--cases recipe "no Cutout" …]

Widths 32, 128 and 128: four epochs of steady currents, and one of SLTT-1, T = 16. IMAGES is a folder
train/CLASS/*, test/CLASS/*, as of `sltt.data.ImageFolder`. A tenth of the training images validates; no test image is
looked at. One thread, on a CPU with bfloat16, about a quarter of an hour a case. Each case is a row of
docs/results/ingredients.json, and a run that is resumed. It ends with the table of docs/results.md.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cells import Row
from tables import DOCS
from torch import Tensor, nn
from trainings import measure_cases, train, views

import sltt

PATH = DOCS / "results" / "ingredients.json"
SETTINGS = (
    "--data sltt.data.ImageFolder --data.root {images} --data.size 32 --data.crop_padding 4 --data.validation 0.1 "
    "--data.cutout 8 --data.reflect true --model.widths [32,128,128] --steps 16 --epochs 5 --schedule.warmup 1"
)
STEADY = "rule: {class_path: sltt.RateBased, init_args: {steady: true}}"
SLTTK = "{epochs: 1, lr: 0.003, freeze_norm: true}"
PHASES = f"[{{epochs: 4, {STEADY}}}, {SLTTK}]"


def muon(lr: str) -> list[str]:
    """Options for Muon on convolutions, at a learning rate."""
    return ["--optimizer", "ingredients.MuonSGD", "--optimizer.conv_lr", lr]


def begins(setting: str) -> list[str]:
    """Options for a setting of the first three epochs."""
    return ["--phases", f"[{{epochs: 3, {setting}, {STEADY}}}, {{epochs: 1, {STEADY}}}, {SLTTK}]"]


CASES: dict[str, list[str]] = {  # options that change the recipe
    "recipe": [],
    "no SLTT-1: five epochs of steady currents": ["--phases", f"[{{epochs: 5, {STEADY}}}]"],
    "T = 4, in the last two epochs 16": begins("steps: 4"),
    "crops of 24 pixels in the first three epochs": begins("crop: 24"),
    "mirrored in every other epoch": ["--data.alternate_flip", "true"],
    "no Cutout": ["--data.cutout", "0"],
    "Mixup, α = 0.2": ["--data.mixup", "0.2"],
    "one distortion by RandAugment": ["--data.randaugment", "1"],
    "weights not averaged": ["--ema", "null"],
    "first convolution learned": ["--model", "ingredients.LearnedFirst"],
    "momentum 0.1 of BatchNorm, not 0.4": ["--model", "ingredients.SlowNorm"],
    "Muon for convolutions, rate 0.08": muon("0.08"),
}


def options(images: Path, case: str, seed: int = 0) -> list[str]:
    """Of `sltt train cifar10-hour`, for a case."""
    return [*SETTINGS.format(images=images).split(), "--phases", PHASES, "--seed", str(seed), *CASES[case]]


class LearnedFirst(sltt.models.ShallowVGG):
    """With random filters of 2×2 pixels that learn, in place of the fixed contrasts."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.contrasts[0] = nn.Conv2d(3, 24, 2, bias=False)


class SlowNorm(sltt.models.ShallowVGG):
    """BatchNorm's statistics follow ten batches, not the last few."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.1


class MuonSGD(torch.optim.SGD):
    """SGD, and Muon for the weights W of convolutions, as matrices [outputs, the others].

        m ← μ m + g,   W ← √outputs W / |W| − η orthogonal(g + μ m)

    Args:
        params, lr, sgd: of SGD.
        conv_lr: η, times the factor of the schedule.
        conv_momentum: μ.

    Source: Jordan 2024 (kellerjordan.github.io/posts/muon).
    """

    def __init__(self, params: Any, lr: float = 0.3, conv_lr: float = 0.08, conv_momentum: float = 0.6, **sgd: Any):
        super().__init__(params, lr=lr, **sgd)
        self.share, self.conv_momentum = conv_lr / lr, conv_momentum

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim == 4 and p.grad is not None:
                    self._move(p, p.grad, group["lr"] * self.share)
                    p.grad = None  # SGD leaves it alone
        return super().step(closure)

    def _move(self, weight: Tensor, grad: Tensor, lr: float) -> None:
        state = self.state[weight]
        moved = state.setdefault("momentum", torch.zeros_like(weight)).mul_(self.conv_momentum).add_(grad)
        update = orthogonal((grad + self.conv_momentum * moved).flatten(1)).view_as(weight)
        weight.mul_(len(weight) ** 0.5 / weight.norm()).sub_(lr * update.to(weight.dtype))


def orthogonal(matrix: Tensor) -> Tensor:
    """About U Vᵀ, of the singular value decomposition U S Vᵀ.

    X ← 3.4445 X − 4.775 X Xᵀ X + 2.0315 (X Xᵀ)² X,   five times
    """
    x = matrix.T if len(matrix) > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    return x.T if len(matrix) > matrix.shape[1] else x


def measure(images: Path, case: str, seed: int, run: Path) -> Row:
    train(["cifar10-hour", *options(images, case, seed)], run)
    return views(run, "validation")


if __name__ == "__main__":
    torch.set_num_threads(1)
    measure_cases(__doc__, PATH, list(CASES), measure, base=["recipe"])  # the others are compared with it
