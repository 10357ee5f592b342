"""Compare two versions of this library on random networks: logits, losses and gradients of every rule.

    python tests/versions.py ../old . --count 1000

Each version runs in a process of its own, on the same networks, weights, inputs and random draws. Small networks are in
float64; others are as large as the fast paths need: native steps, spikes as bits, layers on active inputs, a BatchNorm
in the neuron's pass. It prints each network that differs, and ends with an error if there is one.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

NEURONS = ["LIF()", "LIF(tau=2.0)", "LIF(tau=3.0, v_reset=0.0)", "IF()", "PLIF(tau=2.0)", "ALIF(tau=2.0)",
           "CubaLIF(tau=3.0, tau_syn=2.0)", "LIF(tau=2.0, decay_input=True, detach_reset=True)"]  # fmt: skip
RULES = ["SLTT(fold=1)", "SLTT(k=2, fold=1)", "SLTT(k=2, rescale=True, fold=1)", "SLTT(fold=3)",
         "SLTT(recompute=True)", "SLTT(hoist=True)", "BPTT(fold=1)", "BPTT(fold=4)", "BPTT(segment=2, fold=1)",
         "BPTT(segment=4, fold=2)", "BPTT(recompute=True)", "TBPTT(2, fold=1)", "TBPTT(3, fold=2)",
         "OTTT(decay=0.5)", "OTTT(decay=0.5, inputs=False)", "RateBased()", "RateBased(steady=True)",
         "Mixed({'*': 2})", "Mixed({'*1': 'all'}, default=2)"]  # fmt: skip
LOSSES = ["CrossEntropyMSE()", "CrossEntropyMSE(alpha=0.3, one_hot=True)", "Activity(weight=0.5)"]
OPTIONS: list[dict[str, Any]] = [{}, {}, {"sparse": "on"}, {"sparse": "off"}, {"bits": False}, {"compile": "off"}]


class Residual(nn.Module):
    """A sum around two layers."""

    def __init__(self, inner: nn.Module, around: nn.Module):
        super().__init__()
        self.inner, self.around = inner, around

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.around(x)


def network(draw: random.Random, large: bool) -> tuple[str, nn.Module, tuple[int, ...]]:
    """A random network, with a name and the shape of an input."""
    import sltt

    kind = draw.choice(["dense", "convolution", "residual", "recurrent"])
    name, norm, dropout = draw.choice(NEURONS), draw.random() < 0.6, draw.random() < 0.3

    def neuron() -> nn.Module:
        return eval(f"sltt.{name}", {"sltt": sltt})

    def block(layer: nn.Module, width: int, flat: bool) -> list[nn.Module]:
        normalise = nn.BatchNorm1d(width) if flat else nn.BatchNorm2d(width)
        return [layer, *[normalise] * norm, neuron(), *[sltt.Dropout(0.2)] * dropout]

    if kind in ("dense", "recurrent"):
        sizes = [64, 512, 512] if large else [6, 9, 8]
        layers = [m for a, b in pairwise(sizes) for m in block(nn.Linear(a, b), b, True)]
        if kind == "recurrent":
            layers.append(sltt.Recurrent(neuron(), nn.Linear(sizes[-1], sizes[-1], bias=False)))
        return f"{kind} {name}", nn.Sequential(*layers, nn.Linear(sizes[-1], 5)), (sizes[0],)
    width, side = (64, 16) if large else (6, 8)
    pool = draw.choice([nn.AvgPool2d(2), nn.MaxPool2d(2)])
    first = block(nn.Conv2d(2, width, 3, padding=1), width, False)
    second = block(nn.Conv2d(width, width, 3, padding=draw.choice([1, "same"])), width, False)
    middle: list[nn.Module] = second
    if kind == "residual":
        middle = [Residual(nn.Sequential(*second[:-1]), nn.Conv2d(width, width, 1)), neuron()]
    head = [nn.Flatten(), nn.Linear(width * side * side // 4, 5)]
    return f"{kind} {name}", nn.Sequential(*first, *middle, pool, *head), (2, side, side)


def run(seed: int, penalty: bool) -> tuple[str, list[Tensor]]:
    """One random network under a random rule: what it is, and its logits, loss, gradients and buffers."""
    import sltt
    from sltt import kernels

    draw = random.Random(seed)
    torch.manual_seed(seed)
    large = draw.random() < 0.3
    name, model, shape = network(draw, large)
    rule, loss = draw.choice(RULES), draw.choice(LOSSES)
    if "RateBased" in rule or "segment" in rule or (loss == LOSSES[2] and not penalty):
        loss = LOSSES[0]
    options, steps, static = draw.choice(OPTIONS), draw.choice([3, 4, 5]), draw.random() < 0.3
    if "recompute" in rule:
        options = {key: value for key, value in options.items() if key != "bits"}
    batch = draw.choice([8, 16]) if large else 4
    x, y = 1.5 * torch.randn(*(() if static else (steps,)), batch, *shape), torch.randint(5, (batch,))
    if not large:
        model, x = model.double(), x.double()
    elif len(shape) == 3:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    autocast = large and draw.random() < 0.3
    precise = "" if large else ", float64"
    what = f"{seed}: {name}{precise}, {rule}, {loss}, T = {steps}{', static' * static}, {options}{', bf16' * autocast}"
    with kernels.using(**options), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        make = {"sltt": sltt, "losses": sltt.losses}
        batches = []
        for _ in range(2):  # the second batch finds what the first one left
            T = steps if static else None
            batches.append(eval(f"sltt.{rule}", make)(model, x, y, eval(f"losses.{loss}", make), steps=T, seed=seed))
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    found = [batches[1].logits, batches[1].loss, *gradients, *model.buffers()]
    return what, [t.detach().double() for t in found]


def attempt(seed: int, penalty: bool) -> tuple[str, list[Tensor]]:
    """`run`, without results where a rule refuses the network."""
    try:
        return run(seed, penalty)
    except ValueError as error:
        return f"{seed}: refused: {error}", []


def differences(old: list[Tensor], new: list[Tensor], exact: bool) -> str | None:
    """How the results differ; None if they are the same up to rounding."""
    if [t.shape for t in old] != [t.shape for t in new]:
        return f"{len(old)} and {len(new)} results"
    # a bias in front of a BatchNorm has a gradient of rounding errors only
    largest = max((float(a.abs().max()) for a in old[2:] if a.numel()), default=0.0)
    for i, (a, b) in enumerate(zip(old, new, strict=True)):
        size = max(float(a.abs().max()), 1e-3 * largest if i > 1 else 1e-6) if a.numel() else 1.0
        error = float((a - b).abs().max()) / size if a.numel() else 0.0
        # a spike that rounding flips moves the logits of its sample and step, so that of 20 one may differ
        few = i == 0 and not exact and ((a - b).abs().flatten(0, -2).amax(-1) > 1e-3 * size).float().mean() <= 0.05
        if not error <= (1e-9 if exact else 2e-2 if i > 1 or few else 1e-3):
            return f"result {i} of {len(old)} by {error:.1e}"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", help="checkouts of the two versions")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--no-penalty", action="store_true", help="with losses of logits alone, without `Activity`")
    parser.add_argument("--results", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.results:
        import sltt

        if not Path(sltt.__file__).is_relative_to(given.folders[0]):
            raise SystemExit(f"{given.folders[0]} is no checkout of sltt: the one of {sltt.__file__} would run")
        torch.set_num_threads(1)
        seeds = range(given.first, given.first + given.count)
        torch.save([attempt(seed, not given.no_penalty) for seed in seeds], given.results)
        return
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{i}.pt" for i in range(2)]
        folders = [str(Path(where).resolve()) for where in given.folders]
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, where, "--count", str(given.count), "--first", str(given.first),
                 "--results", str(file), *["--no-penalty"] * given.no_penalty],
                env={**os.environ, "PYTHONPATH": where}, cwd=folder,
            )
            for where, file in zip(folders, files, strict=True)
        ]  # fmt: skip
        if max([process.wait() for process in processes]):
            raise SystemExit("a version failed")
        old, new = (torch.load(file) for file in files)
    wrong = refused = taken = 0
    for (what, before), (what_now, now) in zip(old, new, strict=True):
        refused += not before and not now
        taken += not before and bool(now)
        refuses = "refused by the second" if before and not now else None
        if problem := refuses or (before and differences(before, now, exact="float64" in what)):
            wrong += 1
            print(f"{what_now} differs: {problem}")
    print(f"{len(old)} networks, {refused} refused by both, {taken} by the first alone, {wrong} different")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
