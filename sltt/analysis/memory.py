"""Peak memory, counted at the allocator for one call, or read from the system for a whole process."""

import contextlib
import itertools
import os
import re
import resource
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function


def peak_memory(call: Callable[[], Any], device: str | torch.device = "cpu") -> int:
    """Bytes alive at the peak of `call()` above those alive before it.

        peak_memory(lambda: rule(model, x, y, loss))

    On the CPU every allocation that PyTorch makes is counted, so the figure is exact and the same in every run; what
    libraries allocate by themselves (scratch space of oneDNN) is not in it. On CUDA it is the caching allocator's
    count. The call runs once; run it once before if its first run allocates what later runs keep, such as gradients.

    Args:
        call: what to measure, for example `lambda: rule(model, x, y, loss, steps=6)`.
        device: where it allocates.
    """
    return trace_memory(lambda mark: call(), device)[0]


def trace_memory(call: Callable[[Callable[[], None]], Any], device: str | torch.device) -> tuple[int, list[int]]:
    """As `peak_memory`, of `call(mark)`, and the bytes alive at each `mark()` above those alive before the call.

    Raises RuntimeError inside another measurement, since the inner one would end the outer: fold="auto" measures its
    first two batches, so run these before. Another thread's measurement is waited for.
    """
    if getattr(_this_thread, "measures", False):
        raise RuntimeError("memory is being measured already; a rule with fold='auto' measures its first two batches")
    with _profiler:
        _this_thread.measures = True
        try:
            return _trace(call, torch.device(device))
        finally:
            _this_thread.measures = False


_profiler = threading.Lock()  # PyTorch has one for all threads
_this_thread = threading.local()


def _trace(call: Callable[[Callable[[], None]], Any], device: torch.device) -> tuple[int, list[int]]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        levels: list[int] = []
        call(lambda: levels.append(torch.cuda.memory_allocated(device) - before))
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before, levels
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes to the terminal at each start and stop
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        call(_mark)
    assert profiler.profiler is not None
    results = profiler.profiler.kineto_results
    assert results is not None
    events: list[Any] = [event for event in results.events() if event.name() in ("[memory]", MARK)]
    events.sort(key=lambda event: event.start_ns())
    sizes = [event.nbytes() if event.name() == "[memory]" else 0 for event in events]
    alive = list(itertools.accumulate(sizes, initial=0))
    return max(alive), [level for level, event in zip(alive, events, strict=False) if event.name() == MARK]


MARK = "sltt.mark"


def _mark() -> None:
    with record_function(MARK):
        pass


def available_memory(device: str | torch.device = "cpu") -> int:
    """Bytes that PyTorch could still allocate: free on a CUDA device, and held unused; on the CPU, free RAM."""
    device = torch.device(device)
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def parse_bytes(size: str | int) -> int:
    """Bytes in "8GB", "500 MB" or a number; raises ValueError for anything else."""
    match = re.fullmatch(r"\s*([\d.]+)\s*([kMGT]?)i?B?\s*", str(size))
    try:
        value = float(match[1]) if match else 0.0
    except ValueError:
        value = 0.0
    if not match or value <= 0:
        raise ValueError(f"expected a memory size such as 8GB or 500MB, got {size!r}")
    return int(value * 1000 ** " kMGT".index(match[2] or " "))


def reset_process_peak(device: torch.device) -> None:
    """Start anew the peak that `process_peak` reads."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):  # not allowed in some containers: the peak is then that of the process so far
        Path("/proc/self/clear_refs").write_text("5")


def process_peak(device: torch.device) -> int:
    """Bytes at the peak since `reset_process_peak`: allocated on a CUDA device, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
