"""One training iteration here and in other libraries: the same network, data and loss, side by side.

    pip install '.[bench]'
    python benchmarks/peers.py [--network resnet18|vgg11|digits] [--steps 6] [--cases "NAME;…"] [--repeats 7]
                               [--limit 1800] [--json FILE] [--figure FILE]
    python benchmarks/peers.py --steps 4,16,64 --cases "SLTT;BPTT;SpikingJelly SLTT;SpikingJelly BPTT" \
                               --json FILE --figure FILE
    python benchmarks/figure.py JSON FIGURE   # of what a run has written so far

The JSON is written after each T, and the same command goes on where it stopped. A case that runs out of memory, or
needs more than `--limit` seconds for one answer, is left out of the rest, and the others go on.

Every case runs in a process of its own; the processes take turns, one iteration each, so that a drift of the machine's
speed meets all alike. An iteration is zero_grad and the gradients of one batch, without an optimizer step. Time is the
median after one iteration that is not counted; ratios are medians of the ratios within a turn. Memory is what PyTorch's
allocator holds at the peak above its level before the iteration, gradients included, and beside it the peak of the
resident set, read in another process whose malloc returns large blocks at once. The first is exact; the second is the
kernel's high-water mark, which counts in batches for each core and is off by tens of megabytes at times.

Before anything is timed, the gradient of each case is compared with that of SLTT or BPTT by the plain equations: in
float64, since in float32 a rounding error flips spikes, and with fixed statistics in BatchNorm, since SpikingJelly's
layer-by-layer BPTT takes them over all time steps together. The cosine is printed: 1 means the same gradient. Where the
dynamics differ by design, so does the cosine: snnTorch has no gradient through the reset, Norse scales its input.

The neurons: τ = 1.1, threshold 1, soft reset, no input scaling, triangle surrogate. `relu` is the same network with
ReLU instead of neurons, step by step: the floor.
"""

# pyright: reportMissingImports=false
import argparse
import contextlib
import ctypes
import gc
import json
import os
import select
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import sltt
from sltt import kernels
from sltt.analysis import peak_memory, process_peak, reset_process_peak
from sltt.training.console import megabytes

NETWORKS = {
    "resnet18": (sltt.models.resnet18, (32, 3, 32, 32)),
    "vgg11": (sltt.models.vgg11, (16, 2, 48, 48)),
    "digits": (sltt.models.DigitsNet, (128, 1, 8, 8)),  # a case in seconds
}
# What a worker may hold between its turns, in bytes: beyond, it gives memory back, since all workers are alive at once.
# It pays with new pages in its next turn, a few percent of the time.
HELD_AT_MOST = 4e9
LOSS = sltt.losses.CrossEntropyMSE()
TAU = 1.1
Iteration = Callable[[nn.Module, Tensor, Tensor, int], Any]


def by_rule(rule: sltt.Rule, **options: Any) -> Iteration:
    def run(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> None:
        with kernels.using(**options):
            rule(model, x, y, LOSS, steps=steps)

    return run


def in_bf16(iteration: Iteration) -> Iteration:
    """Under autocast to bfloat16, with float32 weights and membrane potentials."""

    def run(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            iteration(model, x, y, steps)

    return run


def folded_bptt(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> None:
    sltt.BPTT(fold=steps)(model, x, y, LOSS, steps=steps)


def relu(steps_model: nn.Module, x: Tensor, y: Tensor, steps: int) -> None:
    """The floor: T times forward and backward of a network without state."""
    for _ in range(steps):
        (LOSS(steps_model(x), y) / steps).backward()


def jelly_neuron(kind: str, **kwargs: Any) -> nn.Module:
    from spikingjelly.activation_based import neuron, surrogate

    return getattr(neuron, kind)(
        tau=TAU,
        decay_input=False,
        v_reset=None,
        surrogate_function=surrogate.PiecewiseQuadratic(alpha=1.0),
        detach_reset=False,
        **kwargs,
    )


class Folded(nn.Module):
    """SpikingJelly's multi-step neuron in a network whose other layers have time folded into the batch."""

    steps = 1

    def __init__(self) -> None:
        super().__init__()
        self.node = jelly_neuron("LIFNode", step_mode="m")

    def forward(self, x: Tensor) -> Tensor:
        return self.node(x.unflatten(0, (Folded.steps, -1))).flatten(0, 1)


def jelly_bptt(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> None:
    from spikingjelly.activation_based import functional

    functional.reset_net(model)
    Folded.steps = steps
    logits = model(x.repeat(steps, 1, 1, 1))
    LOSS(logits, y.repeat(steps)).backward()


def jelly_sltt(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> None:
    from spikingjelly.activation_based import functional

    functional.reset_net(model)
    for _ in range(steps):
        (LOSS(model(x), y) / steps).backward()


def snntorch_neuron() -> nn.Module:
    import snntorch

    surrogate = sltt.surrogates.Triangle()
    return snntorch.Leaky(beta=1 - 1 / TAU, spike_grad=surrogate, init_hidden=True, reset_delay=False)


def snntorch_sltt(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> None:
    nodes: list[Any] = [m for m in model.modules() if type(m).__name__ == "Leaky"]
    for node in nodes:
        node.mem = torch.zeros(0)
    for _ in range(steps):
        (LOSS(model(x), y) / steps).backward()
        for node in nodes:
            node.mem = node.mem.detach()


class NorseNeuron(nn.Module):
    """Norse's feed-forward cell with its state kept."""

    def __init__(self) -> None:
        super().__init__()
        from norse.torch import LIFBoxCell, LIFBoxParameters

        self.cell = LIFBoxCell(LIFBoxParameters(tau_mem_inv=torch.tensor(1 / TAU)), dt=1.0)
        self.state: Any = None

    def forward(self, x: Tensor) -> Tensor:
        spikes, self.state = self.cell(x, self.state)
        return spikes


def norse_sltt(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> None:
    nodes = [m for m in model.modules() if isinstance(m, NorseNeuron)]
    for node in nodes:
        node.state = None
    for _ in range(steps):
        (LOSS(model(x), y) / steps).backward()
        for node in nodes:
            node.state = node.state._replace(v=node.state.v.detach())


LIF = sltt.LIF
# name: neuron, iteration, memory format, the rule whose gradient it should have
CASES: dict[str, tuple[Callable[[], nn.Module], Iteration, torch.memory_format, str]] = {
    "relu": (nn.ReLU, relu, torch.channels_last, ""),
    "relu, default format": (nn.ReLU, relu, torch.contiguous_format, ""),
    "relu, bf16": (nn.ReLU, in_bf16(relu), torch.channels_last, ""),
    "SLTT": (LIF, by_rule(sltt.SLTT()), torch.channels_last, "SLTT"),
    "SLTT, bf16": (LIF, in_bf16(by_rule(sltt.SLTT())), torch.channels_last, ""),
    "SLTT, default format": (LIF, by_rule(sltt.SLTT()), torch.contiguous_format, "SLTT"),
    "SLTT, not compiled": (LIF, by_rule(sltt.SLTT(), compile="off"), torch.channels_last, "SLTT"),
    "SLTT, k = 1": (LIF, by_rule(sltt.SLTT(k=1)), torch.channels_last, ""),
    "SLTT, recompute": (LIF, by_rule(sltt.SLTT(recompute=True)), torch.channels_last, "SLTT"),
    "SLTT, hoist": (LIF, by_rule(sltt.SLTT(hoist=True)), torch.channels_last, "SLTT"),
    "BPTT": (LIF, by_rule(sltt.BPTT()), torch.channels_last, "BPTT"),
    "BPTT, fold = T": (LIF, folded_bptt, torch.channels_last, "BPTT"),
    "BPTT, recompute": (LIF, by_rule(sltt.BPTT(recompute=True)), torch.channels_last, "BPTT"),
    "BPTT, recompute = 2": (LIF, by_rule(sltt.BPTT(segment=2)), torch.channels_last, "BPTT"),
    "SpikingJelly SLTT": (lambda: jelly_neuron("SLTTLIFNode"), jelly_sltt, torch.contiguous_format, "SLTT"),
    "SpikingJelly BPTT": (Folded, jelly_bptt, torch.contiguous_format, "BPTT"),
    "snnTorch, detached": (snntorch_neuron, snntorch_sltt, torch.contiguous_format, "SLTT"),
    "Norse, detached": (NorseNeuron, norse_sltt, torch.contiguous_format, "SLTT"),
}


def build(network: str, case: str) -> tuple[nn.Module, Tensor, Tensor]:
    """The case's network with the weights that all cases share, and the batch."""
    make, shape = NETWORKS[network]
    neuron, _, memory_format, _ = CASES[case]
    torch.manual_seed(0)
    weights = make(in_channels=shape[1]).state_dict()
    model = make(in_channels=shape[1], neuron=neuron)
    model.load_state_dict(weights, strict=False)  # other libraries keep constants of their neurons there
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator)
    y = torch.randint(10, shape[:1], generator=generator)
    return model.to(memory_format=memory_format), x.to(memory_format=memory_format), y


def cosine(network: str, case: str, steps: int) -> float | None:
    """Cosine between the case's gradient and that of its rule, by the plain equations."""
    rule = CASES[case][3]
    if not rule:
        return None
    grads = []
    for name, iteration in ((case, CASES[case][1]), (rule, by_rule(getattr(sltt, rule)(), compile="off", bits=False))):
        model, x, y = build(network, name)
        model.double()
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.eval().get_buffer("running_var").fill_(0.02)  # small enough for every layer to spike
        iteration(model, x[:2].double(), y[:2], steps)
        layers = (m for m in model.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d | nn.Linear))
        grads.append(torch.cat([p.grad.flatten() for m in layers for p in m.parameters() if p.grad is not None]))
    return torch.cosine_similarity(*grads, dim=0).item()


def work(network: str, case: str, steps: int) -> None:
    """A worker: answers each line of its input with a line of JSON."""
    with contextlib.suppress(OSError):  # where memory runs out, it is this process that ends
        Path("/proc/self/oom_score_adj").write_text("1000")
    model, x, y = build(network, case)
    iteration = CASES[case][1]

    def run() -> float:
        model.zero_grad(set_to_none=True)
        began = time.perf_counter()
        iteration(model, x, y, steps)
        return time.perf_counter() - began

    def timed() -> float:
        seconds = run()
        if resident_set() > HELD_AT_MOST:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        return seconds

    def resident() -> int:
        nonlocal model
        run()
        model = build(network, case)[0]  # without the states that other libraries keep after an iteration
        gc.collect()
        device = torch.device("cpu")
        before = resident_set()
        reset_process_peak(device)
        run()
        return process_peak(device) - before

    actions: dict[str, Callable[[], Any]] = {
        "time": timed,
        "cosine": lambda: cosine(network, case, steps),
        "memory": lambda: peak_memory(run),  # in a new process: no state of an earlier iteration to free
        "resident": resident,
    }
    for line in sys.stdin:
        print(json.dumps(actions[line.strip()]()), flush=True)


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


def start(row: dict[str, Any], limit: float, **environment: str) -> Worker:
    """A worker for the case of a row."""
    options = ["--network", row["network"], "--steps", str(row["steps"]), "--work", row["case"]]
    return Worker([sys.executable, __file__, *options], limit, **environment)


def measure(
    network: str, steps: int, names: list[str], repeats: int, limit: float, console: Console
) -> list[dict[str, Any]]:
    """A row for each case; one that ended has an "error" and lacks what was not measured."""
    shared = {"network": network, "input": NETWORKS[network][1], "hardware": hardware(), "steps": steps}
    rows = [{**shared, "case": name} for name in names]
    for row in rows:
        measure_memory(row, limit)
        line = row["error"] if "error" in row else f"{megabytes(row['memory'])}, resident {megabytes(row['resident'])}"
        console.print(f"{row['case']}: {line}", style="dim")
    measure_times([row for row in rows if "error" not in row], repeats, limit)
    return rows


def measure_memory(row: dict[str, Any], limit: float) -> None:
    # malloc gives back every block above 64 kB: the resident set is then what is in use
    worker = start(row, limit, MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")
    try:
        for what in ("memory", "resident", "cosine"):
            row[what] = worker.ask(what)
    except EndedError as error:
        row["error"] = str(error)
    finally:
        worker.close()


def measure_times(rows: list[dict[str, Any]], repeats: int, limit: float) -> None:
    """All cases take turns."""
    workers = [start(row, limit) for row in rows]
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


def hardware() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
    instructions = torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads()
    return f"{threads} thread{'s' * (threads > 1)} on {model} ({instructions}), PyTorch {torch.__version__}"


def ratio(rows: list[dict[str, Any]], row: dict[str, Any], to: str) -> float | None:
    """Median over the turns of the ratio of times."""
    other = next((r for r in rows if r["case"] == to), None)
    if other is None:
        return None
    return statistics.median(a / b for a, b in zip(row["times"], other["times"], strict=True))


def print_table(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(title=f"{rows[0]['network']}, T = {rows[0]['steps']}", title_justify="left")
    for heading in ("case", "seconds", "min – max", "/ relu", "/ SJ SLTT", "memory", "resident", "cosine"):
        table.add_column(heading, justify="left" if heading == "case" else "right", no_wrap=True)
    measured = [row for row in rows if "error" not in row]
    for row in rows:
        if "error" in row:
            table.add_row(row["case"], "", row["error"])
            continue
        ratios = [ratio(measured, row, to) for to in ("relu", "SpikingJelly SLTT")]
        table.add_row(
            row["case"],
            f"{row['seconds']:.2f}",
            f"{row['min']:.2f} – {row['max']:.2f}",
            *("" if r is None else f"{r:.2f}" for r in ratios),
            megabytes(row["memory"]),
            megabytes(row["resident"]),
            "" if row["cosine"] is None else f"{row['cosine']:.6f}",
        )
    console.print(table)


def sweep(
    network: str,
    all_steps: list[int],
    names: list[str],
    repeats: int,
    limit: float,
    file: Path | None,
    console: Console,
) -> list[dict[str, Any]]:
    """The rows of every T, written to the file after each; what the file has already is not measured again."""
    rows: list[dict[str, Any]] = json.loads(file.read_text()) if file and file.exists() else []
    failed: dict[str, str] = {}
    for steps in all_steps:
        mine = [row for row in rows if (row["network"], row["steps"]) == (network, steps) and row["case"] in names]
        if len(mine) == len(names):
            console.print(f"T = {steps} is in {file} already", style="dim")
        else:
            rows = [row for row in rows if row not in mine]
            mine = measure(network, steps, [name for name in names if name not in failed], repeats, limit, console)
            mine += [{"network": network, "steps": steps, "case": name, "error": why} for name, why in failed.items()]
            rows += mine
            if file:
                file.write_text(json.dumps(rows, indent=1))
        print_table(mine, console)
        failed |= {row["case"]: f"not run, since T = {steps} failed" for row in mine if "error" in row} | failed
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, default="resnet18")
    parser.add_argument("--steps", default="6", help="one T, or several separated by commas")
    parser.add_argument("--cases", help="names separated by semicolons; default: all")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--limit", type=float, default=1800, help="seconds for one answer of a case")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.network, options.work, int(options.steps))
        return
    console = Console(highlight=False, width=max(Console().width, 110))
    console.print(hardware())
    names = options.cases.split(";") if options.cases else list(CASES)
    if unknown := [name for name in names if name not in CASES]:
        raise SystemExit(f"unknown cases {unknown}; known: {'; '.join(CASES)}")
    steps = [int(n) for n in options.steps.split(",")]
    rows = sweep(options.network, steps, names, options.repeats, options.limit, options.json, console)
    if options.figure:
        from figure import draw

        draw(rows, options.figure)


if __name__ == "__main__":
    main()
