"""One training iteration here and in SpikingJelly: the same network, data and loss, side by side.

    pip install '.[bench]'
    python benchmarks/peers.py [--network resnet18|vgg11|vgg11-max|spikformer|digits] [--steps 6] [--cases "NAME;…"]
                               [--device cpu|cuda] [--batch N] [--threads N] [--clock wall|process]
                               [--only memory|times] [--repeats 7] [--json FILE]
    python benchmarks/peers.py --steps 4,16,64 --cases "SLTT;BPTT;SpikingJelly SLTT;SpikingJelly BPTT" --json FILE

docs/performance.md says what is measured, and how. The cases are in benchmarks/peer_cases.py. The JSON is written when
the memory of a T is measured, and when its times are. The same command goes on where it stopped. A case that runs out
of memory, or needs more than half an hour for one answer, is left out of the rest, and the others go on. `--only`
measures one of the two: memory where other work runs, times where none does.

The resident set is read in another process than the time, whose malloc returns large blocks at once. Gradients are
compared in float64, since in float32 a rounding error flips spikes, and with fixed statistics in BatchNorm, since
SpikingJelly's layer-by-layer BPTT takes them over all time steps together. A cosine of 1 means the same gradient.
"""

import argparse
import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from cells import recorded, write
from peer_cases import CASES, NETWORKS, build, cosine
from peer_tables import Row, cases_table
from turns import EndedError, Worker, give_back, hardware, in_turns, process_memory, process_peak, serve, timed

from sltt.analysis import peak_memory
from sltt.training.console import megabytes

COMPARED = 3  # time steps at which gradients are compared
LIMIT = 1800  # seconds for one answer of a case
# A worker whose peak is above that gives memory back after each turn, since all workers are alive at once. It pays with
# new pages in its next turn, a few percent of the time.
HELD_AT_MOST = 4e9


@dataclass(frozen=True)
class Setting:
    """What all cases of a run share."""

    network: str
    steps: int
    batch: int
    threads: int = torch.get_num_threads()
    clock: Literal["wall", "process"] = "wall"  # seconds that pass, or seconds that the process computes
    device: str = "cpu"

    def described(self) -> dict[str, Any]:
        """Return the entries that it has in a row of the results."""
        shape = [self.batch, *NETWORKS[self.network][1][1:]]
        found = {**asdict(self), "input": shape, "hardware": hardware(self.threads, self.device)}
        del found["device"]  # the hardware says it
        return found


def work(setting: Setting, case: str) -> None:
    """Measure one case, in a process of its own."""
    torch.set_num_threads(setting.threads)
    device = torch.device(setting.device)
    model, x, y = build(setting.network, case, setting.batch, device)

    def run() -> None:
        model.zero_grad(set_to_none=True)
        CASES[case].run(model, x, y, setting.steps)

    one = timed(run, time.perf_counter if setting.clock == "wall" else time.process_time, device=device)

    def seconds() -> float:
        found = one()
        if process_peak(torch.device("cpu")) > HELD_AT_MOST:
            give_back()
        return found

    def warmed() -> Callable[[], None]:
        """Run once, for what libraries compile, and take a new network, without the states that they keep."""
        nonlocal model
        run()
        model = build(setting.network, case, setting.batch, device)[0]
        gc.collect()
        return run

    serve(
        {
            "time": seconds,
            "cosine": lambda: cosine(setting.network, case, min(setting.steps, COMPARED), device),
            "memory": lambda: peak_memory(warmed(), device),
            "resident": lambda: process_memory(warmed(), device),
        }
    )


def start(setting: Setting, case: str, **environment: str) -> Worker:
    """Start a worker for a case."""
    command = [sys.executable, __file__, "--serve", json.dumps(asdict(setting)), case]
    return Worker(command, LIMIT, OMP_NUM_THREADS=str(setting.threads), **environment)


def measure_memory(setting: Setting, row: Row, compare: bool) -> None:
    questions = ["memory"] + ["resident"] * (setting.device == "cpu") + ["cosine"] * compare
    # malloc gives back every block above 64 kB: the resident set is then what is in use
    worker = start(setting, row["case"], MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")
    try:
        for what in questions:
            row[what] = worker.ask(what)
    except EndedError as error:
        row["error"] = str(error)
    finally:
        worker.close()
    cosine = f", cosine {row['cosine']:.6f}" if row.get("cosine") is not None else ""
    print(f"{row['case']}: {row.get('error') or megabytes(row['memory'])}{cosine}", flush=True)


def measure_times(setting: Setting, rows: list[Row], repeats: int) -> None:
    """All cases take turns; one that ends is not asked again."""
    began = datetime.now(UTC).isoformat(timespec="seconds")
    # malloc keeps what is freed, as in `sltt.fit`: else new pages take up to a fifth of the time, of some cases more
    workers = [start(setting, row["case"], MALLOC_MMAP_MAX_="0", MALLOC_TRIM_THRESHOLD_="-1") for row in rows]

    def ask(row: Row, worker: Worker) -> float:
        if "error" not in row:
            try:
                return worker.ask("time")
            except EndedError as error:
                row["error"] = str(error)
                print(f"{row['case']}: {error}", flush=True)
        return math.nan

    turns = in_turns([partial(ask, *one) for one in zip(rows, workers, strict=True)], repeats)
    for row, worker, times in zip(rows, workers, turns, strict=True):
        worker.close()
        if "error" not in row:
            row |= {"seconds": statistics.median(times), "times": times, "began": began}


def sweep(
    setting: Setting, all_steps: list[int], names: list[str], repeats: int, only: str, file: Path | None
) -> list[Row]:
    """Measure every T, and write the file after each part; what the file has already is not measured again."""
    rows = recorded(file) if file else []
    failed: dict[str, str] = {}

    def keep() -> None:
        if file:
            write(file, rows)

    for steps in all_steps:
        setting = replace(setting, steps=steps)
        described = setting.described()
        known = {row["case"]: row for row in rows if row["case"] in names and {**row, **described} == row}
        mine = [known.get(name, {**described, "case": name}) for name in names]
        rows = [row for row in rows if row not in mine] + mine
        for row in mine:
            if row["case"] in failed and "error" not in row:
                row["error"] = failed[row["case"]]
            if only != "times" and not row.keys() & {"memory", "error"}:
                compared = {(one["network"], one["case"]) for one in rows if "cosine" in one}
                measure_memory(setting, row, (setting.network, row["case"]) not in compared)
                keep()
        if only != "memory" and any(not row.keys() & {"times", "error"} for row in mine):
            measure_times(setting, [row for row in mine if "error" not in row], repeats)
        keep()
        if timed_rows := [row for row in mine if "times" in row]:
            print(f"\n{cases_table(timed_rows)}", flush=True)
        failed |= {row["case"]: f"not run, since T = {steps} failed" for row in mine if "error" in row} | failed
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, default="resnet18")
    parser.add_argument("--steps", default="6", help="one T, or several separated by commas")
    parser.add_argument("--cases", help="names separated by semicolons; default: all but CUDA graphs")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batch", type=int, help="samples; default: the network's own")
    parser.add_argument("--threads", type=int, default=Setting.threads)
    parser.add_argument("--clock", choices=["wall", "process"], default="wall")
    parser.add_argument("--only", choices=["memory", "times"], default="", help="memory and gradients, or times")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return work(Setting(**json.loads(options.serve[0])), options.serve[1])
    if options.clock == "process" and options.threads > 1:
        raise SystemExit("--clock process is the time of one thread: add --threads 1")
    names = options.cases.split(";") if options.cases else [name for name in CASES if "graph" not in name]
    if unknown := [name for name in names if name not in CASES]:
        raise SystemExit(f"unknown cases {unknown}; known: {'; '.join(CASES)}")
    steps = [int(n) for n in options.steps.split(",")]
    batch = options.batch or NETWORKS[options.network][1][0]
    given = options.network, steps[0], batch, options.threads, options.clock, options.device
    sweep(Setting(*given), steps, names, options.repeats, options.only, options.json)
    return None


if __name__ == "__main__":
    main()
