"""One training iteration here and in other libraries: the same network, data and loss, side by side.

    pip install '.[bench]'
    python benchmarks/peers.py [--network resnet18|vgg11|vgg11-max|shd|digits] [--steps 6] [--cases "NAME;…"]
                               [--device cpu|cuda] [--batch N] [--threads N] [--avx2] [--clock wall|process] [--times]
                               [--repeats 7] [--limit 1800] [--json FILE]
    python benchmarks/peers.py --steps 4,16,64 --cases "SLTT;BPTT;SpikingJelly SLTT;SpikingJelly BPTT" --json FILE

The JSON is written after each T, and the same command goes on where it stopped. A case that runs out of memory, or
needs more than `--limit` seconds for one answer, is left out of the rest, and the others go on.

Every case runs in a process of its own; the processes take turns, one iteration each, so that a drift of the machine's
speed meets all alike. An iteration is zero_grad and the gradients of one batch, without an optimizer step; an
evaluation is T time steps without a graph. Time is the median after one iteration that is not counted; a ratio is the
median of the ratios within a turn, with the smallest and the largest. `--clock process` takes the processor time of one
thread, which other work on the machine hardly disturbs. Memory is what PyTorch's allocator holds at the peak above its
level before the iteration, gradients included, and beside it the peak of the resident set, read in another process
whose malloc returns large blocks at once. The first is exact; the second is the kernel's high-water mark, which counts
in batches for each core and is off by tens of megabytes at times.

Before anything is timed, the gradient of each case is compared with that of SLTT or BPTT by the plain equations: in
float64, since in float32 a rounding error flips spikes, and with fixed statistics in BatchNorm, since SpikingJelly's
layer-by-layer BPTT takes them over all time steps together. The cosine is printed: 1 means the same gradient. Where the
dynamics differ by design, so does the cosine: snnTorch has no gradient through the reset, Norse scales its input.
`--times` leaves cosine and memory out.

`relu` is the same network with ReLU instead of neurons, step by step: the floor. Cases in bf16 and evaluations are
compared with ReLU in bf16 and with its evaluation. The other cases are in benchmarks/peer_cases.py.
"""

import argparse
import json
import statistics
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from peer_cases import CASES, NETWORKS
from peer_workers import EndedError, Setting, start
from rich.console import Console
from rich.table import Table
from turns import quotient

from sltt.training.console import megabytes

Row = dict[str, Any]
CONSOLE = Console(highlight=False, width=max(Console().width, 140))


def measure(setting: Setting, names: list[str], repeats: int, limit: float, times: bool) -> list[Row]:
    """A row for each case; one that ended has an "error" and lacks what was not measured."""
    began = datetime.now(UTC).isoformat(timespec="seconds")
    rows: list[Row] = [{**setting.described(), "began": began, "case": name} for name in names]
    for row in rows if not times else ():
        measure_memory(setting, row, limit)
        line = row.get("error") or f"{megabytes(row['memory'])}, resident {megabytes(row.get('resident', 0))}"
        CONSOLE.print(f"{row['case']}: {line}", style="dim")
    measure_times(setting, [row for row in rows if "error" not in row], repeats, limit)
    return rows


def measure_memory(setting: Setting, row: Row, limit: float) -> None:
    # malloc gives back every block above 64 kB: the resident set is then what is in use
    worker = start(setting, row["case"], limit, MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")
    try:
        for what in ("memory", "cosine") if setting.device == "cuda" else ("memory", "resident", "cosine"):
            row[what] = worker.ask(what)
    except EndedError as error:
        row["error"] = str(error)
    finally:
        worker.close()


def measure_times(setting: Setting, rows: list[Row], repeats: int, limit: float) -> None:
    """All cases take turns."""
    # malloc keeps what is freed, as in `sltt.fit`: else new pages take up to a fifth of the time, of some cases more
    workers = [start(setting, row["case"], limit, MALLOC_MMAP_MAX_="0", MALLOC_TRIM_THRESHOLD_="-1") for row in rows]
    turns: list[list[float]] = [[] for _ in rows]
    for _ in range(1 + repeats):
        for row, worker, times in zip(rows, workers, turns, strict=True):
            if "error" not in row:
                try:
                    times.append(worker.ask("time"))
                except EndedError as error:
                    row["error"] = str(error)
    for row, worker, times in zip(rows, workers, turns, strict=True):
        worker.close()
        del times[:1]  # the first turn
        if "error" not in row:
            row |= {"seconds": statistics.median(times), "min": min(times), "max": max(times), "times": times}


def ratio(rows: list[Row], row: Row, to: str | None) -> tuple[float, float, float] | None:
    """Of times within a turn: median, smallest and largest; None where the other case was not in this run."""
    other = next((r for r in rows if r["case"] == to and "error" not in r), None)
    if other is None or other.get("began") != row.get("began"):
        return None
    return quotient(row["times"], other["times"])


def print_table(rows: list[Row]) -> None:
    first = rows[0]
    clock = "processor time" if first.get("clock") == "process" else "time that passed"
    title = f"{first['network']}, batch {first['batch']}, T = {first['steps']}; {first['hardware']}; {clock}"
    table = Table(title=title, title_justify="left")
    for heading in ("case", "seconds", "min – max", "/ ReLU", "/ SpikingJelly", "memory", "resident", "cosine"):
        table.add_column(heading, justify="left" if heading == "case" else "right", no_wrap=True)
    for row in rows:
        if "error" in row:
            table.add_row(row["case"], "", row["error"])
            continue
        case = CASES[row["case"]]
        ratios = [ratio(rows, row, to) for to in (case.floor, case.peer)]
        table.add_row(
            row["case"],
            f"{row['seconds']:.3g}",
            f"{row['min']:.3g} – {row['max']:.3g}",
            *("" if r is None else f"{r[0]:.2f} ({r[1]:.2f} – {r[2]:.2f})" for r in ratios),
            *(megabytes(row[what]) if what in row else "" for what in ("memory", "resident")),
            "" if row.get("cosine") is None else f"{row['cosine']:.6f}",
        )
    CONSOLE.print(table)


def sweep(
    setting: Setting, all_steps: list[int], names: list[str], repeats: int, limit: float, times: bool, file: Path | None
) -> list[Row]:
    """The rows of every T, written to the file after each; what the file has already is not measured again."""
    rows: list[Row] = json.loads(file.read_text()) if file and file.exists() else []
    failed: dict[str, str] = {}
    for steps in all_steps:
        setting = replace(setting, steps=steps)
        described = setting.described()
        mine = [row for row in rows if row["case"] in names and {**row, **described} == row]
        if len(mine) == len(names):
            CONSOLE.print(f"T = {steps} is in {file} already", style="dim")
        else:
            rows = [row for row in rows if row not in mine]
            left = [name for name in names if name not in failed]
            mine = measure(setting, left, repeats, limit, times)
            mine += [{**described, "case": name, "error": why} for name, why in failed.items()]
            rows += mine
            if file:
                file.write_text(json.dumps(rows, indent=1) + "\n")
        print_table(mine)
        failed |= {row["case"]: f"not run, since T = {steps} failed" for row in mine if "error" in row} | failed
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, default="resnet18")
    parser.add_argument("--steps", default="6", help="one T, or several separated by commas")
    parser.add_argument("--cases", help="names separated by semicolons; default: all")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batch", type=int, help="samples; default: the network's own")
    parser.add_argument("--threads", type=int, default=Setting.threads)
    parser.add_argument("--avx2", action="store_true", help="without AVX-512")
    parser.add_argument("--clock", choices=["wall", "process"], default="wall")
    parser.add_argument("--times", action="store_true", help="no memory and no comparison of gradients")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--limit", type=float, default=1800, help="seconds for one answer of a case")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.clock == "process" and options.threads > 1:
        raise SystemExit("--clock process is the time of one thread: add --threads 1")
    runs = [name for name in CASES if options.device == "cuda" or "graph" not in name]
    names = options.cases.split(";") if options.cases else runs
    if unknown := [name for name in names if name not in CASES]:
        raise SystemExit(f"unknown cases {unknown}; known: {'; '.join(CASES)}")
    steps = [int(n) for n in options.steps.split(",")]
    given = options.network, steps[0], options.batch, options.threads, options.avx2, options.clock, options.device
    setting = Setting(*given)
    measured = options.repeats, options.limit, options.times
    sweep(setting, steps, names, *measured, options.json)


if __name__ == "__main__":
    main()
