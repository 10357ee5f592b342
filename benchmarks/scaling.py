"""Several processes: what was measured here with one and two, and what a reduction would cost on many GPUs.

    python benchmarks/scaling.py [--network digits|resnet18] [--batch 32] [--steps 4] [--repeats 5] [--json FILE]
    python benchmarks/scaling.py --model-only [--tflops 150] [--nvlink 300] [--nic 25]

Measured, on the CPU through gloo, one thread for each process: samples in a second of all processes, the seconds that a
batch spends in reducing gradients, and memory at the peak of a process above its weights and gradients. The batch is
that of each process, so that two have twice the work. Medians over the repeats.

Modelled, not measured: batches on machines of eight GPUs. The multiplications of a batch are counted, and divided by
`--tflops` (10^12 multiply-accumulates and additions in a second, sustained) for its seconds. The gradients of a batch
are reduced in a ring within each machine (`--nvlink`, GB/s for each GPU), then between machines (`--nic`, GB/s for each
GPU, and 20 microseconds a message): 2 (n − 1)/n bytes in and out of each of n. `after` is the share of a batch that
waits for one reduction after the last backward, as sltt does it; `overlap` is what would be left if it ran beside
the backward of the last time step, which is where the gradients become final; `each` is one reduction after every
backward pass, the naive way.

The tables of docs/several.md are `--steps 2 --batch 8 --repeats 3 --json docs/results/scaling.json`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import sltt
from sltt.analysis import count_operations, peak_memory
from sltt.parallel.devices import make_fabric
from sltt.parallel.processes import Processes
from sltt.training.console import megabytes

NETWORKS = {"digits": (sltt.models.DigitsNet, (1, 8, 8)), "resnet18": (sltt.models.resnet18, (3, 32, 32))}
RULES = {"BPTT": sltt.BPTT(), "SLTT": sltt.SLTT(), "SLTT(k=1)": sltt.SLTT(k=1)}
LOSS = sltt.losses.CrossEntropyMSE()
# of the paper: T, batch of each GPU, and the K of SLTT-K
MODELLED = {
    "resnet18": (sltt.models.resnet18, (3, 32, 32), 6, 128, 2),
    "nfresnet101": (sltt.models.nfresnet101, (3, 224, 224), 6, 32, 2),
}
GPUS, MACHINE = (8, 64, 512), 8
LATENCY = 20e-6  # seconds of a message between machines


def worker(network: str, batch: int, steps: int, repeats: int) -> None:
    """One of the processes: print what it measured, in the first."""
    torch.set_num_threads(1)
    make, shape = NETWORKS[network]
    processes = Processes(make_fabric("cpu"))
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x, y = torch.randn(batch, *shape), torch.randint(10, (batch,))
    found = {}
    for name, rule in RULES.items():

        def gradients(rule: sltt.Rule = rule) -> None:
            optimizer.zero_grad(set_to_none=False)
            rule(model, x, y, LOSS, steps=steps)

        gradients()  # makes the gradients, and compiles
        whole, reducing = [], []
        for _ in range(repeats):
            processes.highest(0)  # begin together
            began = time.perf_counter()
            gradients()
            done = time.perf_counter()
            processes.reduce_gradients(model.parameters())
            reducing.append(time.perf_counter() - done)
            optimizer.step()
            whole.append(time.perf_counter() - began)
        seconds = statistics.median(whole)
        found[name] = {
            "processes": processes.count,
            "samples_per_second": processes.count * batch / seconds,
            "reduction_seconds": statistics.median(reducing),
            "seconds": seconds,
            "memory": processes.highest(peak_memory(gradients)),
        }
    if processes.rank == 0:
        print(json.dumps(found))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The rows of one and of two processes, by rule."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    settings = (f"--{key}={getattr(options, key)}" for key in ("network", "batch", "steps", "repeats"))
    worker = [__file__, "--worker", *settings]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    rows: dict[str, Any] = {name: [] for name in RULES}
    for count in (1, 2):
        text = subprocess.check_output([*launch, str(count), *worker], text=True, env=environment)
        for name, row in json.loads(text.splitlines()[-1]).items():
            rows[name].append(row)
    return rows


def show_measured(rows: dict[str, Any], options: argparse.Namespace, console: Console) -> None:
    title = f"measured: {options.network}, T = {options.steps}, {options.batch} samples a process, CPU, gloo"
    headings = "rule", "processes", "samples/s", "ratio", "reduction", "of a batch", "memory"
    lines = []
    for name, several in rows.items():
        for row in several:
            ratio = row["samples_per_second"] / several[0]["samples_per_second"]
            speed = f"{row['samples_per_second']:.1f}", f"{ratio:.2f}"
            reduction = f"{1e3 * row['reduction_seconds']:.1f} ms", f"{row['reduction_seconds'] / row['seconds']:.1%}"
            lines.append([name, str(row["processes"]), *speed, *reduction, megabytes(row["memory"])])
    show(title, headings, lines, console)


def show(title: str, headings: Sequence[str], lines: Iterable[Sequence[str]], console: Console) -> None:
    console.print(f"\n{title}")
    table = Table(box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "rule" else "right")
    for cells in lines:
        table.add_row(*cells)
    console.print(table)


def reduction_seconds(nbytes: int, gpus: int, nvlink: float, nic: float) -> float:
    """Of a ring within each machine of eight, and one between the machines for the eighth that each GPU has then."""
    local, machines = min(gpus, MACHINE), gpus // MACHINE
    within = 2 * (local - 1) / local * nbytes / (nvlink * 1e9)
    if machines <= 1:
        return within
    between = 2 * (machines - 1) / machines * nbytes / local / (nic * 1e9)
    return within + between + 2 * (machines - 1) * LATENCY


def model_rows(network: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """What a reduction costs, by rule and number of GPUs."""
    make, shape, steps, batch, k = MODELLED[network]
    rows = []
    with torch.device("meta"):  # counts without computing
        model, x, y = make(), torch.empty(batch, *shape), torch.empty(batch, dtype=torch.long)
    nbytes = sum(p.nbytes for p in model.parameters())
    rules = {
        "BPTT": (sltt.BPTT(), 1, steps),
        "SLTT": (sltt.SLTT(), steps, steps),
        f"SLTT(k={k})": (sltt.SLTT(k=k), k, k),
    }
    for name, (rule, passes, trained) in rules.items():
        counted = count_operations(model, x, y, LOSS, rule, steps=steps)
        seconds = 2 * sum(counted) / (options.tflops * 1e12)
        last = 2 * counted.backward / trained / (options.tflops * 1e12)  # the backward of one time step
        for gpus in GPUS:
            once = reduction_seconds(nbytes, gpus, options.nvlink, options.nic)
            waits = {"after": once, "overlap": max(once - last, 0), "each": passes * once}
            row = {"network": network, "steps": steps, "batch": batch, "rule": name, "gpus": gpus, "bytes": nbytes}
            shares = {key: wait / (seconds + wait) for key, wait in waits.items()}
            rows.append({**row, "batch_seconds": seconds, "reduction_seconds": once, **shares})
    return rows


def show_modelled(network: str, rows: list[dict[str, Any]], console: Console) -> None:
    _, _, steps, batch, _ = MODELLED[network]
    title = f"modelled: {network}, T = {steps}, {batch} samples a GPU, {megabytes(rows[0]['bytes'])} of gradients"
    lines = []
    for row in rows:
        times = f"{1e3 * row['batch_seconds']:.0f} ms", f"{1e3 * row['reduction_seconds']:.2f} ms"
        shares = (f"{row[key]:.1%}" for key in ("after", "overlap", "each"))
        lines.append([row["rule"], str(row["gpus"]), *times, *shares])
    show(title, ("rule", "GPUs", "a batch", "reduction", "after", "overlap", "each"), lines, console)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, default="resnet18", help="to measure")
    parser.add_argument("--batch", type=int, default=32, help="samples of each process")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tflops", type=float, default=150.0)
    parser.add_argument("--nvlink", type=float, default=300.0)
    parser.add_argument("--nic", type=float, default=25.0)
    parser.add_argument("--model-only", action="store_true", help="measure nothing")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.network, options.batch, options.steps, options.repeats)
        return
    console = Console()
    measured = None
    if not options.model_only:
        measured = measure(options)
        show_measured(measured, options, console)
    modelled = []
    for network in MODELLED:
        rows = model_rows(network, options)
        show_modelled(network, rows, console)
        modelled += rows
    console.print(
        f"with {options.tflops:g} TFLOP/s, NVLink {options.nvlink:g} GB/s, network {options.nic:g} GB/s a GPU"
    )
    if options.json:
        settings = {key: value for key, value in vars(options).items() if key not in ("json", "worker")}
        found = {"settings": settings, "measured": measured, "modelled": modelled}
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
