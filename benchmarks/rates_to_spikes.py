"""What a network loses from rates to spikes: accuracy on the validation images of a run, and with their mirror images.

    python benchmarks/rates_to_spikes.py RUN [--steps 4 8] [--threads 2]

RUN is a training such as `sltt train cifar10-small`, stopped after its steady currents, or at its end. Its last weights
run on rates of T + 1 levels, of 65 levels (nearly the analog network), and on spikes, in bfloat16.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import sltt
from sltt.commands.parsing import Recipe, run_config

BATCH, ANALOG = 200, 64


def rates(model: nn.Module, x: Tensor, steps: int) -> Tensor:
    """Logits of the rates [B, C]; the rule's gradient is not used."""
    y = torch.zeros(len(x), dtype=torch.long)
    return sltt.RateBased(steady=True)(model, x, y, nn.CrossEntropyLoss(), steps=steps).logits[0]


def spikes(model: nn.Module, x: Tensor, steps: int) -> Tensor:
    """Mean logits of the spikes [B, C]."""
    return sltt.unroll(model, x, steps=steps).mean(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    built = Recipe("rates_to_spikes", str(run_config(options.run)), [], of_run=True).build()
    model = sltt.load(options.run, checkpoint="last").to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    splits = built.data.splits(built.steps)
    if splits.validation is None:
        raise SystemExit(f"{options.run} held no images out: train with --data.validation 0.04")
    cases: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
        f"rates, {T + 1} levels": partial(rates, steps=T) for T in (ANALOG, *options.steps)
    }
    cases |= {f"spikes, T = {T}": partial(spikes, steps=T) for T in options.steps}
    right = {name: [0, 0] for name in cases}
    samples = range(len(splits.validation))  # type: ignore[arg-type]
    for start in samples[::BATCH]:
        x, y = splits.collate([splits.validation[i] for i in samples[start : start + BATCH]])
        x = x.contiguous(memory_format=torch.channels_last)
        for name, run in cases.items():
            with torch.autocast("cpu", torch.bfloat16):
                alone, mirrored = (run(model, view).float() for view in (x, x.flip(-1)))
            right[name][0] += int((alone.argmax(1) == y).sum())
            right[name][1] += int(((alone + mirrored).argmax(1) == y).sum())
    for name, counts in right.items():
        print(name, *(f"{count / len(samples):.2%}" for count in counts), sep="\t")


if __name__ == "__main__":
    main()
