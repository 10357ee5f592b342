"""Time of a sample in C on this machine, over the firing rate, beside `sltt.unroll` and ONNX Runtime.

    python benchmarks/microcontroller.py [RUN]

The network is that of the digits, one sample at a time, on one thread; RUN is a trained one. Thresholds are raised and
lowered for other rates. The logits are compared before anything is timed.
"""

import ctypes
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cells import markdown
from torch import Tensor, nn
from turns import in_turns, timed

import sltt
from sltt.interop import to_c, to_onnx
from sltt.interop.c import Arithmetic, Exported, pixels_first

FLAGS = ("Makefile", "-march=native")  # the flags of the exported Makefile; and with this one more
WEIGHTS: tuple[Arithmetic, ...] = ("float32", "int8")
STEPS = 4
THRESHOLDS = (0.5, 1.0, 1.5, 3.0)


def in_c(exported: Exported, name: str, x: Tensor, flags: str) -> tuple[Callable[[], Any], np.ndarray]:
    """Compile a network; return a call that runs x [1, ...] for all steps, and where it leaves the last logits."""
    library, makefile = exported.folder / f"{flags}.so", (exported.folder / "Makefile").read_text()
    options = makefile.partition("CFLAGS ?= ")[2].partition("\n")[0].split() + [flags] * (flags != "Makefile")
    command = ["gcc", *options, "-fPIC", "-shared", "-o", str(library), f"{name}.c"]
    subprocess.run(command, cwd=exported.folder, check=True)
    code, kind = ctypes.CDLL(str(library)), np.int32 if exported.network.integers else np.float32
    given = exported.network.to_integers(x[None]) if exported.network.integers else x[None]
    arrays = [
        np.zeros(exported.ram // 4, np.int32),
        np.ascontiguousarray(
            pixels_first(exported.network, given).numpy().astype(np.int8 if kind is np.int32 else kind)
        ),
        np.zeros(exported.network.output.size, kind),
    ]
    places = [a.ctypes.data_as(ctypes.c_void_p) for a in arrays]
    reset, step = getattr(code, f"{name}_reset"), getattr(code, f"{name}_step")

    def run(arrays: list[np.ndarray] = arrays) -> None:
        reset(*places[:2])
        for _ in range(STEPS):
            step(places[0], places[2])

    return run, arrays[2]


def in_onnx_runtime(model: nn.Module, x: Tensor, path: Path) -> Callable[[], Any]:
    """Return a call that runs the exported step on x [1, ...] for all steps, and gives the last logits."""
    import onnxruntime  # pyright: ignore[reportMissingImports]

    first = to_onnx(model, x, path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    shapes = {i.name: [1, *i.shape[1:]] for i in session.get_inputs()}
    start = {name: np.full(shapes[name], value, np.float32) for name, value in first.items()}

    def run() -> Any:
        states, logits = start, None
        for _ in range(STEPS):
            logits, *after = session.run(None, {"x": x.numpy(), **states})
            states = dict(zip(start, after, strict=True))
        return logits

    return run


def main() -> None:
    """Print the table."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = sltt.load(sys.argv[1]) if len(sys.argv) > 1 else sltt.models.DigitsNet().eval()
    digits = sltt.data.Digits().splits(STEPS)
    assert digits.test is not None
    x, _ = digits.collate([digits.test[i] for i in range(8)])
    print(f"microseconds for a sample of {STEPS} steps; processor time, medians of 25 turns; gcc; one thread")
    columns = ["threshold", "firing rate", "unroll", "ONNX Runtime"]
    columns += [f"{weights}, {flags}" for weights in WEIGHTS for flags in FLAGS]
    one, rows = x[:1], []
    for threshold in THRESHOLDS:
        for neuron in model.modules():
            if isinstance(neuron, sltt.LIF):
                neuron.v_threshold = threshold
        with sltt.analysis.firing_rates(model) as rates:
            expected = sltt.unroll(model, one, steps=STEPS)[-1, 0]
        with tempfile.TemporaryDirectory() as folder:
            run = in_onnx_runtime(model, one, Path(folder) / "step.onnx")
            torch.testing.assert_close(torch.from_numpy(run())[0], expected, rtol=1e-3, atol=1e-3)
            calls: list[Callable[[], Any]] = [lambda: sltt.unroll(model, one, steps=STEPS), run]
            for weights in WEIGHTS:
                exported = to_c(model, x, Path(folder) / weights, name="net", steps=STEPS, weights=weights)
                for flags in FLAGS:
                    call, logits = in_c(exported, "net", one, flags)
                    call()
                    reference = exported.network.unroll(one)[-1, 0]
                    torch.testing.assert_close(torch.from_numpy(logits).to(reference), reference, rtol=1e-4, atol=1e-4)
                    calls.append(call)
            turns = in_turns([timed(call, time.process_time, least=0.01) for call in calls], 25)
        microseconds = (f"{1e6 * statistics.median(times):.0f}" for times in turns)
        rows.append([str(threshold), f"{rates.mean():.3f}", *microseconds])
        faster = ([o / t for o, t in zip(turns[1], times, strict=True)] for times in turns)
        ratios = ("{1:.3g} [{0:.3g}, {2:.3g}]".format(*statistics.quantiles(ratio, n=4)) for ratio in faster)
        rows.append(["", "times as fast as ONNX Runtime", *ratios])
    print(markdown(columns, rows))


if __name__ == "__main__":
    main()
