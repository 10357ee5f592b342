"""Processes that run the cases of benchmarks/peers.py: each answers a line of its input with a line of JSON."""

import contextlib
import ctypes
import gc
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peer_cases import CASES, NETWORKS, build, cosine

from sltt.analysis import peak_memory, process_peak, reset_process_peak

# What a worker may hold between its turns, in bytes: beyond, it gives memory back, since all workers are alive at once.
# It pays with new pages in its next turn, a few percent of the time.
HELD_AT_MOST = 4e9
# PyTorch's own kernels and ours, oneDNN's, and MKL's
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}


@dataclass(frozen=True)
class Setting:
    """What all cases of a run share.

    Attributes:
        network: its name.
        steps: T.
        batch: samples; None is the network's own.
        threads: of PyTorch.
        avx2: without AVX-512.
        device: cpu or cuda.
        clock: wall, seconds that pass; or process, seconds that the process computes: with one thread these are hardly
            disturbed by other processes.
    """

    network: str
    steps: int
    batch: int | None = None
    threads: int = torch.get_num_threads()
    avx2: bool = False
    clock: Literal["wall", "process"] = "wall"
    device: str = "cpu"

    def described(self) -> dict[str, Any]:
        """For a row of the results."""
        size, *shape = NETWORKS[self.network][1]
        batch, on = self.batch or size, hardware(self.threads, self.avx2, self.device)
        found = {**asdict(self), "batch": batch, "input": [batch, *shape], "hardware": on}
        del found["device"]  # the hardware says it
        return found


def hardware(threads: int, avx2: bool = False, device: str = "cpu") -> str:
    """What a measurement runs on."""
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
        versions = f"driver {driver}, CUDA {torch.version.cuda}, PyTorch {torch.__version__}"
        return f"{torch.cuda.get_device_name()}, {versions}"
    capability = "AVX2" if avx2 else torch.backends.cpu.get_cpu_capability()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{threads} thread{'s' * (threads > 1)} on {model} ({capability}), PyTorch {torch.__version__}"


def work(setting: Setting, case: str) -> None:
    """A worker."""
    with contextlib.suppress(OSError):  # where memory runs out, it is this process that ends
        Path("/proc/self/oom_score_adj").write_text("1000")
    torch.set_num_threads(setting.threads)
    device = torch.device(setting.device)
    model, x, y = build(setting.network, case, setting.batch, device)
    clock = time.perf_counter if setting.clock == "wall" else time.process_time

    def run() -> float:
        model.zero_grad(set_to_none=True)
        finish(device)
        began = clock()
        CASES[case].run(model, x, y, setting.steps)
        finish(device)
        return clock() - began

    def timed() -> float:
        seconds = run()
        if resident_set() > HELD_AT_MOST:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        return seconds

    def resident() -> int:
        nonlocal model
        run()
        model = build(setting.network, case, setting.batch, device)[0]  # without states that other libraries keep
        gc.collect()
        before = resident_set()
        reset_process_peak(device)
        run()
        return process_peak(device) - before

    actions: dict[str, Callable[[], Any]] = {
        "time": timed,
        "cosine": lambda: cosine(setting.network, case, setting.steps, device),
        "memory": lambda: peak_memory(run, device),  # in a new process: no state of an earlier iteration to free
        "resident": resident,
    }
    for line in sys.stdin:
        print(json.dumps(actions[line.strip()]()), flush=True)


def finish(device: torch.device) -> None:
    """Wait for what was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def resident_set() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


class EndedError(Exception):
    """A worker gives no answer; says why."""


class Worker:
    """A process that answers each line of its input with a line of JSON.

    Args:
        command: the process.
        limit: seconds that an answer may take.
        environment: on top of this process's.
    """

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
        """The answer; raises EndedError if there is none."""
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


def start(setting: Setting, case: str, limit: float, **environment: str) -> Worker:
    """A worker for a case."""
    environment |= {"OMP_NUM_THREADS": str(setting.threads), **(AVX2 if setting.avx2 else {})}
    return Worker([sys.executable, __file__, json.dumps(asdict(setting)), case], limit, **environment)


if __name__ == "__main__":
    work(Setting(**json.loads(sys.argv[1])), sys.argv[2])
