"""The memory that is counted at PyTorch's allocator beside what the resident set of the process shows.

    python benchmarks/memory.py [--steps 4] [--batch 32]

One training iteration of resnet18 under each rule, gradients kept from one iteration to the next. The resident set is
the kernel's high-water mark above its level before the iteration, the median of three, in a process whose malloc gives
blocks back to the system at once; else it shows what malloc holds for later as well.
"""

import argparse
import gc
import os
import statistics
import subprocess
import sys

import torch
from peer_workers import resident_set

import sltt
from sltt.analysis import peak_memory, process_peak, reset_process_peak
from sltt.parallel.devices import return_freed_memory

RULES = {"SLTT": sltt.SLTT(), "SLTT(recompute=True)": sltt.SLTT(recompute=True), "BPTT": sltt.BPTT()}
RETURN_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_TOP_PAD_": "0"}
CPU = torch.device("cpu")


def measure(rule: sltt.Rule, steps: int, batch: int) -> tuple[int, int]:
    """Bytes of an iteration by the allocator, and by the resident set."""
    torch.manual_seed(0)
    model = sltt.models.resnet18().to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    x, y = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
    loss = sltt.losses.CrossEntropyMSE()

    def run() -> None:
        rule(model, x, y, loss, steps=steps)

    run()
    run()
    resident = []
    for _ in range(3):
        gc.collect()
        return_freed_memory()
        before = resident_set()
        reset_process_peak(CPU)
        run()
        resident.append(process_peak(CPU) - before)
    return peak_memory(run), int(statistics.median(resident))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rule", choices=RULES, help=argparse.SUPPRESS)  # of the process of one measurement
    options = parser.parse_args()
    if options.rule:
        allocator, resident = measure(RULES[options.rule], options.steps, options.batch)
        print(f"{options.rule:22}{allocator / 1e6:10.1f}{resident / 1e6:10.1f}{resident / allocator - 1:+10.1%}")
        return
    print(f"resnet18, T = {options.steps}, batch {options.batch}: MB of an iteration")
    print(f"{'rule':22}{'allocator':>10}{'resident':>10}{'differs':>10}", flush=True)
    for rule in RULES:
        words = [sys.executable, __file__, *sys.argv[1:], "--rule", rule]
        subprocess.run(words, env={**os.environ, **RETURN_AT_ONCE}, check=True)


if __name__ == "__main__":
    main()
