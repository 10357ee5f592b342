"""Spiking transformers of the published size: memory and time of the rules, and their gradients beside BPTT's.

    python benchmarks/transformers.py IMAGES

Spikformer-4-384 and QKFormer-4-384 with soft reset, eight images of CIFAR-10, float32, one thread. IMAGES is a folder
train/CLASS/*, as of `sltt.data.ImageFolder`. Memory is the peak of a training batch, without the gradients. Time is
processor time of one batch, after one that is not counted. Cosines: before the training, and after 40 batches of 16
images with SLTT-1 and AdamW. Rows of docs/results/transformers.json. It ends with the tables of docs/transformers.md.
About a quarter of an hour.
"""

import argparse
import json
import time
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from short import NEURON, images
from tables import DOCS, fill
from torch import nn

import sltt
from sltt.memory import peak_memory

RESULTS = DOCS / "results" / "transformers.json"
NETWORKS = {
    "Spikformer": partial(sltt.models.spikformer, neuron=NEURON),
    "QKFormer": partial(sltt.models.qkformer, neuron=NEURON),
}
RULES: dict[str, sltt.Rule] = {"BPTT": sltt.BPTT(), "SLTT": sltt.SLTT(), "SLTT-1": sltt.SLTT(k=1), "OTTT": sltt.OTTT()}
COMPARED: list[sltt.Rule] = [sltt.SLTT(), sltt.OTTT(), sltt.TBPTT(2)]
LOSS = sltt.losses.CrossEntropyMSE(alpha=0.0)
BATCH, TRAINED = 8, 40
Samples = Any


def made(network: str) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[network]()


def cost(network: str, steps: int, rule: str, x: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
    """Bytes and seconds of a training batch."""
    model = made(network)

    def iteration() -> None:
        model.zero_grad(set_to_none=False)
        RULES[rule](model, x, y, LOSS, steps=steps)

    iteration()
    start = time.process_time()
    iteration()
    seconds = time.process_time() - start
    return {"memory": peak_memory(iteration, x.device), "seconds": seconds}


def agreements(network: str, samples: Samples, x: torch.Tensor, y: torch.Tensor) -> list[dict[str, Any]]:
    """Cosines with BPTT's gradient, of all parameters and the lowest of a layer, before and after a short training."""
    model, rows = made(network), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.06)
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0)).tolist()
    for batches in (0, TRAINED):
        for start in range(0, 16 * batches, 16):
            xs, ys = zip(*(samples[i] for i in order[start : start + 16]), strict=True)
            optimizer.zero_grad()
            sltt.SLTT(k=1)(model, torch.stack(xs), torch.stack(ys), LOSS, steps=4)
            optimizer.step()
        found = sltt.analysis.agreement(model, x, y, LOSS, COMPARED, steps=4)
        cosines = {one.rule: [one.cosine, one.least] for one in found}
        rows.append({"network": network, "batches": batches, "cosines": cosines})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    samples = images(parser.parse_args().images / "train", 64, 32)
    chosen = torch.randperm(len(samples), generator=torch.Generator().manual_seed(1))[:BATCH]
    x, y = samples.tensors[0][chosen], samples.tensors[1][chosen]
    found: dict[str, list[Any]] = {"costs": [], "agreements": []}
    for network in NETWORKS:
        for steps, rule in product((4, 16), RULES):
            row = {"network": network, "steps": steps, "rule": rule, **cost(network, steps, rule, x, y)}
            found["costs"].append(row)
            print(row, flush=True)
        found["agreements"] += agreements(network, samples, x, y)
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    fill()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
