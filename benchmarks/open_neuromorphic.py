"""Small networks and long sequences beside other libraries: docs/results/sequences.json, and the table made of it.

    python benchmarks/open_neuromorphic.py [--works linear-512 mlp] [--cases SLTT "JAX SLTT"] [--rounds 3]
                                           [--device cuda]

The works are the task of the Open Neuromorphic benchmark (github.com/open-neuromorphic/snn-library-benchmarks: a linear
layer and LIF neurons, 16 samples, 500 time steps, a dense input), an MLP of the sizes of the Spiking Heidelberg Digits,
and a recurrent layer. Each case runs in a process of its own. Processes take turns, so that what slows the machine
meets all alike. Before anything is timed, each gradient is compared with that of the plain equations in float64.

Time is processor time of one thread, or on CUDA the time that passes. It is that of forward and backward together: some
rules interleave them.
"""

# pyright: reportMissingImports=false
import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peer_workers import finish, hardware
from sequence_cases import CASES, WORKS, exact

from sltt.analysis import process_peak, reset_process_peak

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "sequences.json"


def check(case: str, of: str, device: str) -> None:
    """Compare the gradient of a case with the plain equations on a small network; raise ValueError where it differs."""
    work = WORKS["tiny-recurrent" if WORKS[of].recurrent else "tiny" if WORKS[of].classes else "tiny-linear"]
    work, rule = work._replace(device=device), CASES[case].rule
    if rule is None:
        return
    run, given = CASES[case].make(work)
    run()
    cosine = torch.cosine_similarity(given().double().cpu(), exact(work._replace(device="cpu"), rule), dim=0).item()
    if cosine < 0.9999:
        raise ValueError(f"{case}: the gradient on {of} has a cosine of {cosine:.4f} with that of {rule}")


def serve(work: str, case: str, on: str) -> None:
    """Answer each line of the input: a number of iterations with the seconds of one, "peak" with the bytes of one."""
    torch.set_num_threads(1)
    check(case, work, on)
    run, _ = CASES[case].make(WORKS[work]._replace(device=on))
    run()
    device, clock = torch.device(on), time.process_time if on == "cpu" else time.perf_counter
    for line in map(str.strip, sys.stdin):
        count = 1 if line == "peak" else int(line)
        if line == "peak":
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # gives memory that is free back to the system
        finish(device)
        reset_process_peak(device)
        held, began = process_peak(device), clock()
        for _ in range(count):
            run()
        finish(device)
        seconds = (clock() - began) / count
        print(process_peak(device) - held if line == "peak" else seconds, flush=True)


def start(work: str, case: str, device: str) -> subprocess.Popen[str]:
    """A process for a case. XLA takes one thread, as PyTorch does."""
    one = {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, __file__, "--serve", work, case, device],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **one},
    )  # fmt: skip


def measure(work: str, cases: list[str], rounds: int, device: str) -> list[dict[str, Any]]:
    """Seconds and peak memory of each case, in turns."""
    workers = {case: start(work, case, device) for case in cases}

    def ask(case: str, question: object) -> float:
        pipe: Any = workers[case]
        pipe.stdin.write(f"{question}\n")
        pipe.stdin.flush()
        return float(pipe.stdout.readline() or "nan")

    counts = {case: max(1, int(0.5 / ask(case, 1))) for case in cases}  # so that an answer takes half a second
    turns = [{case: ask(case, counts[case]) for case in cases} for _ in range(rounds)]
    peaks = {case: ask(case, "peak") for case in cases}
    for worker in workers.values():
        worker.communicate()
    return [
        {
            "work": work,
            "case": case,
            "seconds": [round(turn[case], 5) for turn in turns],
            "peak_MB": round(peaks[case] / 1e6, 1),
        }
        for case in cases
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--works", nargs="+", choices=WORKS, default=["mlp", "linear-512", "linear-2048", "recurrent-256"]
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=[*CASES])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        return serve(*given.serve)
    rows = []
    for work in given.works:
        cases = [c for c in given.cases if CASES[c].recurrent or not WORKS[work].recurrent]
        rows += measure(work, cases, given.rounds, given.device)
        for row in rows[-len(cases) :]:
            print(
                f"{work:16}{row['case']:22}{statistics.median(row['seconds']):9.4f} s  {row['peak_MB']:8.1f} MB",
                flush=True,
            )
    found = {"hardware": hardware(1, device=given.device), "rows": rows}
    given.out.write_text(json.dumps(found, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
