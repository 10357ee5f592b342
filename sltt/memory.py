"""Peak memory of one call, counted at the allocator, and the memory that is free."""

import gc
import itertools
import os
import re
import threading
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import psutil
import torch
from torch.autograd import profiler as autograd_profiler
from torch.autograd.profiler import profile, record_function


def peak_memory(call: Callable[[], Any], device: str | torch.device = "cpu") -> int:
    """Return bytes alive at the peak of `call()` above those alive before it.

        peak_memory(lambda: rule(model, x, y, loss))

    On the CPU every allocation that PyTorch makes is counted, so the figure is exact and the same in every run; what
    libraries allocate by themselves (scratch space of oneDNN) is not in it. On CUDA it is the caching allocator's
    count. The call runs once; run it once before if its first run allocates what later runs keep, such as gradients.

    Raises ValueError on a device for which PyTorch counts no peak, such as Apple's "mps", and on the CPU RuntimeError
    while a profiler of PyTorch runs, which the measurement would end.

    Args:
        call: what to measure, for example `lambda: rule(model, x, y, loss, steps=6)`.
        device: where it allocates.
    """
    if not callable(call):
        raise ValueError(f"call must be a function without arguments, such as lambda: rule(…), got {call!r}")
    return trace_memory(lambda mark: call(), device)[0]


def counts_peak(device: str | torch.device) -> bool:
    """Return whether the peak of memory is counted on a device."""
    return torch.device(device).type in ("cpu", "cuda")


def is_profiled(device: str | torch.device = "cpu") -> bool:
    """Tell whether a profiler runs that a measurement on the device would end, since PyTorch has one for all."""
    return torch.device(device).type == "cpu" and autograd_profiler._is_profiler_enabled and not _profiler.locked()


def trace_memory(call: Callable[[Callable[[], None]], Any], device: str | torch.device) -> tuple[int, list[int]]:
    """Return the `peak_memory` of `call(mark)`, and the bytes alive at each `mark()` above those alive before.

    Raises RuntimeError while a profiler or another measurement runs, which this one would end.
    """
    if not counts_peak(device):
        raise ValueError(f"PyTorch counts no peak of memory on {torch.device(device).type}: measure on the CPU")
    if is_profiled(device):
        raise RuntimeError("a profiler of PyTorch is running, and measuring memory would end it: measure outside of it")
    if not _profiler.acquire(blocking=False):
        raise RuntimeError("memory is being measured already: measure one call at a time")
    collects = gc.isenabled()
    try:
        gc.disable()  # what an earlier measurement has left, freed within the call, would lower its peak
        return _trace(call, torch.device(device))
    finally:
        _profiler.release()
        if collects:
            gc.enable()


_profiler = threading.Lock()  # PyTorch has one for all threads


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
    profiler = profile(use_kineto=True, profile_memory=True)  # torch.profiler's spends seconds on tables of its own
    with profiler:
        call(_mark)
    results = profiler.kineto_results
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
    """Return bytes that PyTorch could still allocate: free on a CUDA device, and held unused; elsewhere, free RAM."""
    device = torch.device(device)
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available


def call_memory(device: torch.device) -> int | None:
    """Return bytes that the time steps of a call may take on a CUDA device; None elsewhere.

    An eighth of the device's memory, the same in each run; half of what is free if that is less.
    """
    if device.type != "cuda":
        return None
    return min(torch.cuda.mem_get_info(device)[1] // 8, available_memory(device) // 2)


def parse_bytes(size: str | int) -> int:
    """Return bytes in "8GB" (8·10⁹), "8GiB" (8·2³⁰), "500 MB" or a whole number; raise ValueError for anything else."""
    match = re.fullmatch(r"\s*(\d+|\d+\.\d+(?=\s*[kKMGT]))\s*(?:([kKMGT])(i?))?B?\s*", str(size))
    power = " KMGT".index((match[2] or " ").upper()) if match else 0
    value = Fraction(match[1]) * (1024 if match[3] else 1000) ** power if match else 0
    if value < 1 or not isinstance(size, str | int):
        raise ValueError(f"expected a memory size such as 8GB or 500MB, got {size!r}")
    return int(value)
