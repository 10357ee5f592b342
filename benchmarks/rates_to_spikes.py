"""What a network loses from rates to spikes: accuracy on the validation images of a run, and with their mirror images.

    python benchmarks/rates_to_spikes.py RUN [--steps 4 8] [--threads 2]

RUN is a training such as `sltt train cifar10-small`, stopped after its steady currents, or at its end. Its last weights
run on rates of T + 1 levels, of 65 levels (nearly the analog network), on spikes, and on spikes with max pooling of
sums over time (`sltt.RunningMax`) in place of each step, in bfloat16.
"""

import argparse
import copy
import functools
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from trainings import built_run

import sltt

BATCH, ANALOG = 200, 64
Logits = Callable[[nn.Module, Tensor], Tensor]


def rates(model: nn.Module, x: Tensor, steps: int) -> Tensor:
    """Logits of the rates [B, C]; the rule's gradient is not used."""
    y = torch.zeros(len(x), dtype=torch.long)
    return sltt.RateBased(steady=True)(model, x, y, nn.CrossEntropyLoss(), steps=steps).logits[0]


def spikes(model: nn.Module, x: Tensor, steps: int) -> Tensor:
    """Mean logits of the spikes [B, C]."""
    return sltt.unroll(model, x, steps=steps).mean(0)


@functools.cache
def over_time(model: nn.Module) -> nn.Module:
    """A copy that pools sums over time in place of each step."""
    model = copy.deepcopy(model)
    for name, module in [*model.named_modules()]:
        if isinstance(module, nn.MaxPool2d):
            model.set_submodule(name, sltt.RunningMax(module))
    return model


def pooled_over_time(model: nn.Module, x: Tensor, steps: int) -> Tensor:
    """Mean logits of the spikes [B, C] of such a copy."""
    return spikes(over_time(model), x, steps)


def validation(run: Path) -> tuple[nn.Module, Iterator[tuple[Tensor, Tensor]]]:
    """The last weights of a run, and its validation images in batches."""
    built = built_run(run)
    splits = built.data.splits(built.steps)
    held: Any = splits.validation
    if held is None:
        raise SystemExit(f"{run} held no images out: train with --data.validation 0.04")
    samples = range(len(held))
    batches = (splits.collate([held[i] for i in samples[n : n + BATCH]]) for n in samples[::BATCH])
    model: Any = sltt.load(run, checkpoint="last")
    model.to(memory_format=torch.channels_last)
    return model, ((x.contiguous(memory_format=torch.channels_last), y) for x, y in batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, batches = validation(options.run)
    cases: dict[str, Logits] = {f"rates, {T + 1} levels": partial(rates, steps=T) for T in (ANALOG, *options.steps)}
    cases |= {f"spikes, T = {T}": partial(spikes, steps=T) for T in options.steps}
    if any(isinstance(module, nn.MaxPool2d) for module in model.modules()):
        cases |= {f"spikes, T = {T}, pooled over time": partial(pooled_over_time, steps=T) for T in options.steps}
    right: dict[str, tuple[list[bool], list[bool]]] = {name: ([], []) for name in cases}
    for x, y in batches:
        for name, run in cases.items():
            with torch.autocast("cpu", torch.bfloat16):
                alone, mirrored = (run(model, view).float() for view in (x, x.flip(-1)))
            for hits, logits in zip(right[name], (alone, alone + mirrored), strict=True):
                hits += (logits.argmax(1) == y).tolist()
    for name, both in right.items():
        print(name, *(f"{statistics.mean(hits):.2%}" for hits in both), sep="\t")


if __name__ == "__main__":
    main()
