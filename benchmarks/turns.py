"""Run cases in turns, so that what slows the machine meets all alike, and commands of `sltt` once."""

import contextlib
import ctypes
import gc
import json
import os
import resource
import select
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sltt.commands import main as command

CPU = torch.device("cpu")


def in_turns(cases: Sequence[Callable[[], float]], turns: int) -> list[list[float]]:
    """Ask each case for its seconds, all once in a turn; the first turn is not counted."""
    found = [[case() for case in cases] for _ in range(1 + turns)]
    return [list(times) for times in zip(*found[1:], strict=True)]


def timed(
    run: Callable[[], object], clock: Callable[[], float] = time.perf_counter, least: float = 0, device: Any = CPU
) -> Callable[[], float]:
    """Make a case of `run`: the seconds of one call, the mean of as many as take `least` seconds."""

    def seconds() -> float:
        finish(device)
        began, count, spent = clock(), 0, 0.0
        while not count or spent < least:
            run()
            finish(device)
            count, spent = count + 1, clock() - began
        return spent / count

    return seconds


def finish(device: torch.device) -> None:
    """Wait for what was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def process_memory(run: Callable[[], object], device: torch.device) -> int:
    """Return bytes of the process, or of the GPU, at the peak of a call above those before it."""
    gc.collect()
    give_back()
    reset_process_peak(device)
    before = process_peak(device)
    run()
    finish(device)
    return process_peak(device) - before


def reset_process_peak(device: torch.device) -> None:
    """Start anew the peak that `process_peak` reads."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):  # not allowed in some containers: the peak is then that of the process so far
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def process_peak(device: torch.device) -> int:
    """Return bytes at the peak since `reset_process_peak`: allocated on a CUDA device, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    lines = map(str.split, Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    peaks = [int(line[1]) for line in lines if line[:1] == ["VmHWM:"]]  # not in every container
    return 1024 * (peaks[0] if peaks else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def give_back() -> None:
    """Give memory that is free back to the system."""
    ctypes.CDLL(None).malloc_trim(0)


def quotient(times: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """Divide times within a turn; return the median, the smallest and the largest ratio."""
    ratios = [a / b for a, b in zip(times, other, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


class EndedError(Exception):
    """A worker gives no answer; says why."""


class Worker:
    """A process that answers each line of its input with a line of JSON, as `serve` does, within `limit` seconds."""

    def __init__(self, command: list[str], limit: float, **environment: str):
        self.limit = limit
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONWARNINGS": "ignore", **environment},
        )

    def ask(self, what: str) -> Any:
        """Return the answer; raise EndedError if there is none."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, and there is no answer to read
            print(what, file=self.process.stdin, flush=True)
        if not select.select([self.process.stdout], [], [], self.limit)[0]:
            self.process.kill()
            raise EndedError(f"more than {self.limit:g} s")
        if answer := self.process.stdout.readline():
            return json.loads(answer)
        code = self.process.wait()
        raise EndedError("killed, out of memory" if code == -signal.SIGKILL else f"ended with code {code}")

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError), self.process:
            pass  # closes its input, at which it ends


def serve(actions: Mapping[str, Callable[[], Any]]) -> None:
    """Answer each line of the input by the action of this name."""
    with contextlib.suppress(OSError):  # where memory runs out, it is this process that ends
        Path("/proc/self/oom_score_adj").write_text("1000")
    for line in sys.stdin:
        print(json.dumps(actions[line.strip()]()), flush=True)


def hardware(threads: int, device: str = "cpu") -> str:
    """Name what a measurement runs on."""
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
        versions = f"driver {driver}, CUDA {torch.version.cuda}, PyTorch {torch.__version__}"
        return f"{torch.cuda.get_device_name()}, {versions}"
    capability = torch.backends.cpu.get_cpu_capability()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{threads} thread{'s' * (threads > 1)} on {model} ({capability}), PyTorch {torch.__version__}"


def saved(words: Sequence[str], folder: Path) -> Any:
    """Run a command of `sltt` and return what it saves in a folder; end the script where it fails."""
    if code := command([*words, "--device", "cpu", "--save", str(folder)]):
        raise SystemExit(code)
    return json.loads((folder / f"{words[0]}.json").read_text())
