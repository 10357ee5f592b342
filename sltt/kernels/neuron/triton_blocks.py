"""Sizes of the programs of the neuron's Triton kernels: those that `tune` found fastest on a device.

They are in the cache folder, in a file for each GPU and version of Triton, which a process reads once. No result
depends on them: kernels that add up floating-point numbers of several neurons keep their first choice.
"""

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sltt.kernels.native import cache_folder
from sltt.surrogates import Triangle

NEURONS = 2**24  # in all time steps of a call that is timed
TUNED = (("steps_forward", 6), ("steps_backward", 1), ("steps_replayed", 6))  # kernels, and time steps


def tuned(kernel: str, x: Tensor, first: tuple[int, int]) -> tuple[int, int]:
    """Return the warps and the neurons of a program of `kernel`, whose input is x; `first` if none are tuned."""
    return sizes(x.device).get(_key(kernel, x.dtype), first)


@functools.cache
def sizes(device: torch.device) -> dict[str, tuple[int, int]]:
    """Return the tuned sizes on a device, from its file."""
    try:
        found = json.loads(_file(device).read_text(encoding="utf-8"))
        return {key: (int(warps), int(neurons)) for key, (warps, neurons) in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def tune(device: torch.device, timed: Callable[[Callable[[], object]], float]) -> list[dict[str, Any]]:
    """Time sizes of programs, write the fastest of each kernel to the device's file, and return the times.

    Args:
        device: with Triton.
        timed: returns the seconds of a call.
    """
    from sltt.kernels.neuron.step import NeuronStep, neuron_step  # which imports this

    step, found, rows = NeuronStep(0.5, 1.0, None, False, False, Triangle()), sizes(device), []
    found.clear()
    for dtype in (torch.float32, torch.bfloat16):
        for kernel, steps in TUNED:
            key, trained = _key(kernel, dtype), kernel != "steps_forward"
            x = torch.randn(NEURONS // steps * steps, device=device, dtype=dtype, requires_grad=trained)
            v = torch.zeros(NEURONS // steps, device=device)
            ones = torch.ones_like(x)

            def run(v: Tensor = v, x: Tensor = x, ones: Tensor = ones, steps: int = steps) -> None:
                s, _ = neuron_step(step, v, x, None, steps, cut=True)
                if s.requires_grad:
                    torch.autograd.grad(s, x, ones)

            times = {}
            for warps in (2, 4, 8):
                for vectors in (1, 2):  # of 128 bits for each thread
                    found[key] = warps, 32 * warps * vectors * 16 // dtype.itemsize
                    times[found[key]] = timed(run)
            found[key] = min(times, key=times.__getitem__)
            rows += [{"kernel": key, "warps": w, "neurons": n, "seconds": s} for (w, n), s in times.items()]
    file = _file(device)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return rows


def _key(kernel: str, dtype: torch.dtype) -> str:
    return f"{kernel}, {8 * dtype.itemsize} bits"


def _file(device: torch.device) -> Path:
    import triton  # pyright: ignore[reportMissingImports]

    name = torch.cuda.get_device_name(device) if torch.cuda.is_available() else device.type
    name = re.sub(r"\W+", "-", name)
    return cache_folder() / f"blocks-{name}-triton{triton.__version__}.json"
