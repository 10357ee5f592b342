"""The first hour on a GPU: one step after the other, each with a log; docs/gpu.md fills itself.

    python benchmarks/gpu.py [--data DIR]      # or: make gpu
    python benchmarks/gpu.py --device cpu      # small sizes, to try the script; docs stay as they are

A step that ran through is not run again. So the same command goes on where it stopped, and tries again what failed.
Logs are in runs/gpu, results in docs/results/gpu. `--data DIR` has CIFAR-10 as folders of images, for the last step.

    python benchmarks/gpu.py --wheels DIR                                             # where there is a network
    python benchmarks/gpu.py --first --minutes 9 --out OUT --wheels DIR [--device cpu]    # on the GPU's machine
    python benchmarks/gpu.py --second --minutes 27 --out OUT --wheels DIR    # the tests, in shards
    python benchmarks/gpu.py --third --minutes 27 --out OUT --wheels DIR     # the kernels against the equations

The first minutes on a GPU that is lent (`first_hour.py`): each result is a line of JSON at once, and the same command
goes on after the last one. It needs no network and installs nothing: Python 3.12, PyTorch 2.11 and Triton 3.6 are
enough, with the packages in DIR, which `--wheels` alone collects: numpy, pyyaml, packaging, lightning-fabric,
lightning-utilities, rich, markdown-it-py, mdurl, pygments, psutil, jsonargparse, docstring-parser, typeshed-client,
importlib-resources, tensorboard, protobuf and absl-py for trainings; pytest, pytest-timeout, pluggy, iniconfig,
hypothesis, sortedcontainers and attrs for tests; spikingjelly with loguru, whose lines say so where it is missing.
DIR also names this package and its version.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__" and {"--first", "--second", "--third", "--wheels", "--step"} & {*sys.argv}:
    import first_hour  # needs none of the packages below

    sys.exit(first_hour.main())

import tables
import torch
from cells import by, recorded, write
from peer_cases import build, by_rule
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from turns import finish, hardware, in_turns, timed

import sltt

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "gpu.md"
NETWORKS = [("resnet18", 128, 6), ("vgg11", 64, 10), ("spikformer", 64, 4)]  # samples and T
CASES = (
    "relu;SLTT;SLTT, graph;SLTT, fold = 1;SLTT, fold = 2;SLTT, fold = T;BPTT;BPTT, fold = T;SpikingJelly SLTT;"
    "SpikingJelly BPTT;relu, bf16;SLTT, bf16;SLTT, bf16, graph;SLTT, bf16, fold = T;BPTT, bf16, fold = T;"
    "SpikingJelly SLTT, bf16;SpikingJelly BPTT, bf16"
)


def commands(device: str, results: Path, runs: Path, data: str | None) -> Iterator[tuple[str, list[str]]]:
    """Yield the name and the command of each step, in the order of what is wanted first; on a CPU, of small sizes."""
    small, python = device == "cpu", [sys.executable]
    own = [*python, __file__, "--device", device, "--measure"]
    files = ["tests/test_cuda.py", "tests/test_waits.py", *([] if small else ["tests/kernels/triton_equations.py"])]
    yield "tests", [*python, "-m", "pytest", "-p", "no:xdist", "--timeout", "0", *files]
    yield "profile", [*own, "profile"]
    for network, batch, steps in [("digits", 16, 2)] if small else NETWORKS:
        setting = ["--network", network, "--batch", str(batch), "--steps", str(steps), "--device", device]
        cases = ["--cases", "relu;SLTT;SpikingJelly BPTT" if small else CASES, "--repeats", "1" if small else "9"]
        file = str(results / f"{network}.json")
        yield network, [*python, "benchmarks/peers.py", *setting, *cases, "--json", file]
    yield "kernels", [*own, "kernels"]
    works = ["tiny", "tiny-recurrent"] if small else ["mlp", "linear-512", "linear-2048", "recurrent-256"]
    cases = ["SLTT", "BPTT", "OTTT", "SLTT, fold = 1", "SpikingJelly BPTT"]
    setting = ["--works", *works, "--cases", *cases, "--device", device, "--rounds", "1" if small else "3"]
    file = str(results / "sequences.json")
    yield "sequences", [*python, "benchmarks/open_neuromorphic.py", *setting, "--out", file]
    if small or data:
        recipe = ["digits", "--epochs", "1"] if small else ["cifar10", "--precision", "bf16-mixed"]
        root, run = ["--data.root", str(data)] if data else [], runs / "cifar10"
        again = ["--resume", str(run)] if (run / "config.yaml").exists() else [*recipe, *root, "--run", str(run)]
        yield "cifar10", [*python, "-m", "sltt", "train", *again, "--device", device]


def measure_profile(device: torch.device) -> list[dict[str, Any]]:
    """Profile a batch: the share of time in which the device is busy, what it launches, and the time of the host."""
    network, batch, steps = ("digits", 16, 2) if device.type == "cpu" else NETWORKS[0]
    run = partial(by_rule(sltt.SLTT()), *build(network, "SLTT", batch, device), steps)
    for _ in range(5):
        run()
    finish(device)
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as found:
        began = time.perf_counter()
        run()
        host = time.perf_counter() - began
        finish(device)
        total = time.perf_counter() - began
    print(found.key_averages().table(sort_by="self_cuda_time_total" if cuda else "self_cpu_time_total"))
    launched: list[Any] = [e for e in found.events() or () if e.device_type.name == "CUDA"]
    busy = sum(e.time_range.elapsed_us() for e in launched) / 1e6 / total
    what = f"{network}, batch {batch}, T = {steps}, SLTT"
    return [{"what": what, "seconds": total, "host": host, "busy": busy, "launches": len(launched)}]


def measure_kernels(device: torch.device) -> list[dict[str, Any]]:
    """Time T steps of LIF neurons, forward and backward, and a copy; both as bytes that must be moved in a second."""
    neurons, rows = 2**16 if device.type == "cpu" else 2**24, []
    for dtype in (torch.float32, torch.bfloat16):
        for steps in (1, 6):
            x = torch.randn(steps, neurons, device=device, dtype=dtype, requires_grad=True)
            step = partial(neuron_step, sltt.LIF(), x, torch.randn_like(x), steps)
            copy = partial(torch.empty_like(x).copy_, x.detach())
            turns = in_turns([timed(run, device=device) for run in (step, copy)], 10)
            seconds, copied = (statistics.median(times) for times in turns)
            # the forward reads x and writes spikes and a float32; the backward reads that and a gradient, writes one
            moved = x.numel() * (4 * dtype.itemsize + 8)
            row = {"dtype": str(dtype).removeprefix("torch."), "steps": steps, "seconds": seconds}
            rows.append({**row, "rate": moved / seconds, "copy": 2 * x.nbytes / copied})
    return rows


def neuron_step(neuron: sltt.LIF, x: Tensor, grad: Tensor, steps: int) -> None:
    sltt.reset(neuron)
    neuron.advance(x, steps, cut=True).backward(grad)


MEASURED = {"profile": measure_profile, "kernels": measure_kernels}


def run_step(name: str, command: list[str], log: Path) -> dict[str, Any]:
    """Run a step into its log; return how it ended."""
    print(f"{name}: {log}", flush=True)
    began = time.perf_counter()
    with log.open("w") as file:
        code = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT).returncode
    last = [line for line in log.read_text().splitlines() if line.strip()][-1:]
    found = {"step": name, "code": code, "seconds": round(time.perf_counter() - began, 1), "last": "".join(last)}
    print(f"  {'FAILED' if code else 'done'} after {found['seconds']} s: {found['last']}", flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--data", help="folder of CIFAR-10")
    parser.add_argument("--measure", choices=MEASURED, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("PyTorch sees no CUDA device: try the script with --device cpu")
    trial = given.device == "cpu"
    runs = ROOT / "runs" / ("gpu-trial" if trial else "gpu")
    results = (runs / "results" if trial else ROOT / "docs" / "results") / "gpu"
    for folder in (runs, results):
        folder.mkdir(parents=True, exist_ok=True)
    if given.measure:
        rows = MEASURED[given.measure](torch.device(given.device))
        on = hardware(torch.get_num_threads(), given.device)
        write(results / f"{given.measure}.json", {"hardware": on, "rows": rows})
        return 0
    file = results / "steps.json"
    ended = by(recorded(file), "step")
    for name, command in commands(given.device, results, runs, given.data):
        if name not in ended or ended[name]["code"]:
            ended[name] = run_step(name, command, runs / f"{name}.log")
            write(file, [*ended.values()])
            page = tables.filled(PAGE.read_text(), results.parent)
            (runs / PAGE.name if trial else PAGE).write_text(page)
    return int(any(one["code"] for one in ended.values()))


if __name__ == "__main__":
    sys.exit(main())
