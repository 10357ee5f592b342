"""Layers on spikes: milliseconds of the dense layer and of the sparse one, forward and gradients.

    python benchmarks/sparse.py [--repeats 15] [--dtypes float32 bfloat16] [--json FILE]

Dense and sparse runs alternate; a figure is the median, with the fastest in brackets. The time is the processor time of
one thread, which other processes hardly disturb. Results are compared before they are timed.
`dense` is PyTorch's layer. `dense, ours` are the gradients that layers take where they run dense. `even` is the density
up to which the sparse layer is taken. A table of docs/performance.md is made of docs/results/layers.json.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from cells import markdown, write
from torch import Tensor
from torch.ops import aten  # pyright: ignore[reportMissingImports]
from turns import hardware, in_turns, timed

from sltt.kernels import native
from sltt.kernels.layers import costs, sparse
from sltt.kernels.layers.values import convolution_gradients
from sltt.kernels.spikes.bits import pack

LAYERS = {  # name: channels, pixels a side, outputs, kernel, stride
    "64→64, 32×32": (64, 32, 64, 3, 1),
    "128→128, 16×16": (128, 16, 128, 3, 1),
    "256→256, 8×8": (256, 8, 256, 3, 1),
    "512→512, 4×4": (512, 4, 512, 3, 1),
    "64→128, 32×32, stride 2": (64, 32, 128, 3, 2),
    "256→512, 8×8, 1×1, stride 2": (256, 8, 512, 1, 2),
    "16→32, 32×32": (16, 32, 32, 3, 1),
}
BATCH = 32
DENSITIES = (0.05, 0.1, 0.15, 0.2, 0.3)
COLUMNS = "dense", *(f"at {d}" for d in DENSITIES), "dense, ours"
Runs = dict[str, Callable[[], Tensor]]  # by column


def runs_of(name: str, batch: int, dtype: torch.dtype) -> tuple[sparse.LayerSizes, dict[str, Runs]]:
    """The layer, and its runs in each pass."""
    channels, side, outputs, kernel, stride = LAYERS[name]
    pad, strides, one, none = kernel // 2, [stride] * 2, [1, 1], [0, 0]
    axes = strides, [pad] * 2, one
    weight = channels_last(torch.randn(outputs, channels, kernel, kernel) / 8, dtype)
    inputs = [channels_last((torch.rand(batch, channels, side, side) < d).float(), dtype) for d in DENSITIES]
    x = inputs[2]
    layer = sparse.conv_layer(x.shape, weight.shape, (stride, stride), ((pad, pad), (pad, pad)))
    bits, packed = [pack(x) for x in inputs], sparse.pack_weight(layer, weight)
    grad = channels_last(torch.randn(layer.y_shape), dtype)

    def dense(which: int) -> Runs:
        mask = [i == which for i in range(3)]
        return {
            "dense": lambda: aten.convolution_backward(grad, x, weight, None, *axes, False, none, 1, mask)[which],
            "dense, ours": lambda: convolution_gradients(grad, x, weight, axes, 1, mask[:2])[which],  # type: ignore[dict-item,return-value]
        }

    def active(run: Callable[[Tensor], Tensor]) -> Runs:
        return {f"at {d}": partial(run, b) for d, b in zip(DENSITIES, bits, strict=True)}

    passes: dict[str, Runs] = {
        "forward": {"dense": lambda: F.conv2d(x, weight, None, stride, pad)}
        | active(lambda b: sparse.forward(layer, b, packed, None, dtype)),
        "input gradient": dense(0),
        "weight gradient": dense(1) | active(lambda b: sparse.weight_gradient(layer, b, grad)),
    }
    for runs in passes.values():
        expected = runs["dense"]()
        for column in runs.keys() & {COLUMNS[3], "dense, ours"}:  # at the density of x
            error = (runs[column]() - expected).abs().max() / expected.abs().max()
            assert error < (1e-5 if dtype == torch.float32 else 2e-2), f"{name}, {column}: {error:.1e}"
    return layer, passes


def channels_last(x: Tensor, dtype: torch.dtype) -> Tensor:
    """In the type and memory format of the layers."""
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def milliseconds(runs: Runs, repeats: int) -> dict[str, tuple[float, float]]:
    """Median and fastest of each run, all in turn."""
    times = in_turns([timed(run, time.thread_time) for run in runs.values()], repeats)
    return {column: (1e3 * statistics.median(one), 1e3 * min(one)) for column, one in zip(runs, times, strict=True)}


def main() -> None:
    """Print a table for each type."""
    parser = argparse.ArgumentParser(description="Layers on spikes, dense and sparse.")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if problem := native.problem():
        raise SystemExit(f"no sparse layers: {problem}")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rows = []
    for name in arguments.dtypes:
        dtype = getattr(torch, name)
        lines = []
        for case in LAYERS:
            layer, passes = runs_of(case, BATCH, dtype)
            even = dict(zip(("forward", "weight gradient"), costs.break_even(layer, dtype), strict=True))
            for what, runs in passes.items():
                with torch.no_grad():
                    found = milliseconds(runs, arguments.repeats)
                rows.append({"layer": case, "dtype": name, "pass": what, "milliseconds": found})
                bound = f"{even[what]:.2f}" if what in even else ""
                cells = ("{:.2f} ({:.2f})".format(*found[column]) if column in found else "" for column in COLUMNS)
                lines.append([case, what, *cells, bound])
        print(f"milliseconds, {name}:\n\n{markdown(['layer', 'pass', *COLUMNS, 'even'], lines)}")
    if arguments.json:
        how = {"hardware": hardware(1), "batch": BATCH, "repeats": arguments.repeats}
        write(arguments.json, {**how, "rows": rows})


if __name__ == "__main__":
    main()
