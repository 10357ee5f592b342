"""The first minutes on a GPU, in steps: what `python benchmarks/gpu.py --first` runs.

A step is a process with a time limit of its own. Each result is a line of JSON, printed and appended to
OUT/results.jsonl at once, with the device, the driver and the versions. The same command goes on after the last result.
"""

# pyright: reportMissingImports=false
import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# beside PyTorch, Triton and what they need: of trainings, and of the tests
WHEELS = [
    *("numpy", "pyyaml", "packaging", "lightning-fabric", "lightning-utilities", "rich", "markdown-it-py", "mdurl"),
    *("pygments", "psutil", "jsonargparse", "docstring-parser", "typeshed-client", "importlib-resources"),
    *("tensorboard", "protobuf", "absl-py", "spikingjelly", "loguru"),
    *("pytest", "pytest-timeout", "pluggy", "iniconfig", "hypothesis", "sortedcontainers", "attrs"),
]
# seconds of each step
FIRST = {"doctor": 80, "kernels": 90, "resnet": 170, "profile": 60, "fit": 90, "capture": 50}
SHARDS = {
    "rules": ["tests/test_cuda.py", "-k", "rules_do_not_wait"],
    "cuda": ["tests/test_cuda.py", "-k", "not rules_do_not_wait"],
    "waits": ["tests/test_waits.py"],
}
EQUATIONS = {
    "neurons": ["tests/kernels/triton_equations.py", "-k", "not (norm or each_channel or every_rule)"],
    "norms": ["tests/kernels/triton_equations.py", "-k", "norm"],
    "others": ["tests/kernels/triton_equations.py", "-k", "(each_channel or every_rule) and not norm"],
}
# channels and pixels of ResNet-18, and what tries the script
STAGES = {"cuda": [(64, 32), (128, 16), (256, 8), (512, 4)], "cpu": [(8, 8), (64, 4)]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", action="store_true", help="measure, in some nine minutes")
    parser.add_argument("--second", action="store_true", help="run the tests of a device")
    parser.add_argument("--third", action="store_true", help="run the kernels against the equations")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu-first")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--wheels", type=Path, help="folder of packages; without --first and so on, collect them there")
    parser.add_argument("--python", default="3.12", help="version of Python for which --wheels collects")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.step:
        return int(measure(given.step, given.device, given.out))
    own = [sys.executable, __file__, "--device", given.device, "--out", str(given.out), "--step"]
    test = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "--timeout", "0"]
    paths = [str(ROOT), *([str(given.wheels)] if given.wheels else []), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    if given.device == "cpu":  # beside other work, threads that wait for each other take all the time
        environment |= {"OMP_NUM_THREADS": "1"}
        if not given.first:  # the tests run on a device in the memory of the host, and in Triton's interpreter
            environment |= {"STANDIN": "1", "TRITON_INTERPRET": "1"}
            test += ["-W", "ignore:An output with one", "-W", "ignore:Module already imported"]
    steps: dict[str, tuple[float, list[str]]] = {}
    if given.first:
        steps |= {name: (limit, [*own, name]) for name, limit in FIRST.items()}
    if given.second:
        steps |= {f"tests of {name}": (540, [*test, *shard]) for name, shard in SHARDS.items()}
    if given.third:
        steps |= {f"equations of {name}": (540, [*test, *shard]) for name, shard in EQUATIONS.items()}
    if not steps:
        return collect(given.wheels, given.python)
    return run_steps(steps, given.out, 60 * given.minutes, environment)


def collect(folder: Path, python: str) -> int:
    """Unpack the packages of WHEELS into a folder, for Linux on x86-64, and the name and version of this one."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    (own := folder / f"sltt-{version}.dist-info").mkdir(parents=True, exist_ok=True)
    (own / "METADATA").write_text(f"Metadata-Version: 2.1\nName: sltt\nVersion: {version}\n")
    platforms = [part for name in ("manylinux_2_28", "manylinux2014") for part in ("--platform", f"{name}_x86_64")]
    how = ["--no-deps", "--only-binary=:all:", "--python-version", python, *platforms, "--upgrade"]
    return subprocess.run([sys.executable, "-m", "pip", "install", "--target", str(folder), *how, *WHEELS]).returncode


def run_steps(steps: dict[str, tuple[float, list[str]]], out: Path, seconds: float, environment: dict[str, str]) -> int:
    """Run what is left of the steps, as long as there is time; return 1 if one of them has failed."""
    out.mkdir(parents=True, exist_ok=True)
    end, failed = time.monotonic() + seconds, False
    for name, (limit, command) in steps.items():
        if any(row["step"] == name and row.get("ended") == "done" for row in rows(out)):
            continue
        began, limit = time.monotonic(), min(limit, end - time.monotonic())
        if limit < 5:
            print(f"no time is left for {name}: run the command again", flush=True)
            return 1
        with (out / f"{name}.log").open("a") as log:
            to = None if "--step" in command else log
            try:
                done = subprocess.run(command, cwd=ROOT, env=environment, timeout=limit, stderr=log, stdout=to)
                code: Any = done.returncode
            except subprocess.TimeoutExpired:
                code = f"more than {limit:.0f} s"
        failed |= code != 0
        last = [line for line in (out / f"{name}.log").read_text().splitlines() if line.strip()][-1:]
        ended = {"ended": "failed", "why": code, "last": "".join(last)} if code else {"ended": "done"}
        say(out, {"step": name, **ended, "seconds": round(time.monotonic() - began, 1)})
    return int(failed)


def rows(out: Path) -> list[dict[str, Any]]:
    file = out / "results.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def say(out: Path, row: dict[str, Any]) -> None:
    """Print a result, and keep it."""
    line = json.dumps(row, ensure_ascii=False)
    print(line, flush=True)
    with (out / "results.jsonl").open("a") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def measure(step: str, device: str, out: Path) -> bool:
    """Run the cases of a step that have no result; one that raises has its error for a result. Tell if one has."""
    import torch

    on, known = describe(device), {row.get("what") for row in rows(out) if row["step"] == step and "error" not in row}
    failed = False
    torch.backends.cudnn.benchmark = True
    for what, case in STEPS[step](torch.device(device)):
        if what not in known:
            began = time.monotonic()
            try:
                found = case()
            except Exception as error:
                optional = isinstance(error, ModuleNotFoundError) and error.name == "spikingjelly"
                found = {"missing" if optional else "error": f"{type(error).__name__}: {error}"[:500]}
                failed |= not optional
            say(out, {"step": step, "what": what, **found, "took": round(time.monotonic() - began, 2), "on": on})
    return failed


def describe(device: str) -> str:
    import torch

    versions = f"PyTorch {torch.__version__}, Python {sys.version.split()[0]}"
    try:
        import triton

        versions += f", Triton {triton.__version__}"
    except ImportError:
        pass
    if device == "cpu":
        return f"CPU ({torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads), {versions}"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout.strip().splitlines()[:1]
    name, capability = torch.cuda.get_device_name(), ".".join(map(str, torch.cuda.get_device_capability()))
    return f"{name} (sm {capability}), driver {''.join(driver)}, CUDA {torch.version.cuda}, {versions}"


def seconds(run: Callable[[], object], device: Any, repeats: int = 7, least: float = 0.02) -> float:
    """Return the median time of a call, after three: on a GPU by events, around as many calls as take `least` s."""
    import torch

    def spent(calls: int) -> float:
        if device.type == "cpu":
            began = time.perf_counter()
            for _ in range(calls):
                run()
            return time.perf_counter() - began
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    if device.type == "cpu":
        repeats, least = 1, 0.0
    spent(1 if device.type == "cpu" else 3)
    calls = 1 if not least else max(1, min(1000, int(least / max(1e-6, spent(1)))))
    return statistics.median(spent(calls) / calls for _ in range(repeats))


def replayed(run: Callable[[], object], device: Any) -> float:
    """Return the time of a call as a CUDA graph; on a CPU, as it is."""
    import torch

    if device.type == "cpu":
        return seconds(run, device)
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        kept = run()  # noqa: F841  its memory is the graph's
    return seconds(graph.replay, device)


Cases = Iterable[tuple[str, Callable[[], dict[str, Any]]]]


def doctor(device: Any) -> Cases:
    """Versions, the rate of a copy, and convolutions of ResNet-18: both layouts, with and without a bias."""
    import torch

    from sltt import kernels

    small = device.type == "cpu"

    def versions() -> dict[str, Any]:
        found = {"triton": kernels.triton_problem(device), "compiler": kernels.compiler_problem(device)}
        memory = {} if small else dict(zip(("free", "memory"), torch.cuda.mem_get_info(), strict=True))
        return {**found, "cudnn": torch.backends.cudnn.version(), **memory}

    def copy() -> dict[str, Any]:
        x = torch.ones(2**20 if small else 2**29, device=device, dtype=torch.bfloat16)
        y = torch.empty_like(x)
        spent = seconds(lambda: y.copy_(x), device)
        return {"ms": 1e3 * spent, "gb_s": 2 * x.nbytes / spent / 1e9}

    def convolution(channels: int, side: int, form: Any, bias: bool) -> dict[str, Any]:
        layer = torch.nn.Conv2d(channels, channels, 3, padding=1, bias=bias, device=device, dtype=torch.bfloat16)
        x = torch.randn(2 if small else 768, channels, side, side, device=device, dtype=torch.bfloat16)
        layer, x = layer.to(memory_format=form), x.to(memory_format=form).requires_grad_()  # type: ignore[call-overload]
        grad, wanted = torch.ones_like(x), [x, *layer.parameters()]
        forward = replayed(lambda: layer(x), device)
        both = replayed(lambda: torch.autograd.grad(layer(x), wanted, grad), device)
        flop = 2 * 9 * channels * x.numel()
        return {"forward_ms": 1e3 * forward, "both_ms": 1e3 * both, "tflop_s": 3 * flop / both / 1e12}

    yield "versions", versions
    yield "copy", copy
    for (channels, side), last, bias in product(STAGES[device.type], (True, False), (False, True)):
        form = torch.channels_last if last else torch.contiguous_format
        name = f"convolution, C = {channels}, {'channels last' if last else 'channels first'}, bias {bias}"
        yield name, partial(convolution, channels, side, form, bias)


def neuron_kernels(device: Any) -> Cases:
    """Time a neuron's step, with and without the BatchNorm before it: forward, and both passes by `autograd.grad`."""
    import torch

    import sltt

    batch = 2 if device.type == "cpu" else 128

    def case(channels: int, side: int, steps: int, norm: bool, last: bool) -> dict[str, Any]:
        form = torch.channels_last if last else torch.contiguous_format
        x = torch.randn(batch * steps, channels, side, side, device=device, dtype=torch.bfloat16)
        x = x.to(memory_format=form).requires_grad_()
        layer, neuron, grad = torch.nn.BatchNorm2d(channels, device=device), sltt.LIF(), torch.ones_like(x)

        def forward() -> Any:
            neuron.reset()
            s = neuron.advance_normalised(layer, x, None, steps, True) if norm else None
            return neuron.advance(layer(x) if norm else x, steps, True) if s is None else s

        once, both = replayed(forward, device), replayed(lambda: torch.autograd.grad(forward(), [x], grad), device)
        # 16 bits each: x and s; x again where it is replayed, ∂L/∂s and ∂L/∂x; with a norm x for its statistics, and x,
        # ∂L/∂y and ∂L/∂x of its gradient. 32 bits: v before and after a call, or u of a single step, twice.
        moved = 2 * (4 + (steps > 1) + 4 * norm) + 8 / steps
        return {"forward_ms": 1e3 * once, "both_ms": 1e3 * both, "gb_s": moved * x.numel() / both / 1e9}

    ends = STAGES[device.type][:: len(STAGES[device.type]) - 1]
    for (channels, side), steps, norm, last in product(ends, (6, 1), (True, False), (True, False)):
        name = f"C = {channels}, T = {steps}{', BatchNorm' * norm}, channels {'last' if last else 'first'}"
        yield name, partial(case, channels, side, steps, norm, last)


def network(device: Any, neuron: Any, last: bool = True) -> tuple[Any, Any, Any, int]:
    """Make ResNet-18, a batch and T; on a CPU the network of the digits."""
    import torch

    import sltt

    torch.manual_seed(0)
    small = device.type == "cpu"
    make, shape, steps = (
        (sltt.models.DigitsNet, (2, 1, 8, 8), 2) if small else (sltt.models.resnet18, (128, 3, 32, 32), 6)
    )
    model, x = make(neuron=neuron).to(device), torch.randn(shape, device=device)
    if last:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model, x, torch.randint(10, shape[:1], device=device), steps


def train_batch(rule: Any, device: Any, by_graph: bool) -> tuple[Callable[[], object], Any]:
    """Return what trains a batch of ResNet-18 in bf16, without the optimizer, and its input."""
    import torch

    import sltt

    model, x, y, steps = network(device, sltt.LIF)
    loss = sltt.losses.CrossEntropyMSE()
    with torch.autocast(device.type, torch.bfloat16):
        step = sltt.graphed(rule, model, loss, x, y, steps=steps) if by_graph else None

    def run() -> None:
        if step:
            step(x, y)
            return
        for p in model.parameters():
            p.grad = None
        with torch.autocast(device.type, torch.bfloat16):
            rule(model, x, y, loss, steps=steps)

    return run, x


def timed_batch(make: Callable[[], Callable[[], object]], device: Any) -> dict[str, Any]:
    """Time a batch; give the peak of allocated memory, and what is reserved then."""
    import gc

    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    run = make()
    spent = seconds(run, device, least=0.2)
    found = {"ms": 1e3 * spent}
    if device.type == "cuda":
        found |= {
            "peak_mb": torch.cuda.max_memory_allocated() / 1e6,
            "reserved_mb": torch.cuda.max_memory_reserved() / 1e6,
        }
    return found


def resnet(device: Any) -> Cases:
    """ResNet-18 in bf16: folds, by graph and without; SpikingJelly if it is there; ReLU."""
    import torch

    import sltt

    small = device.type == "cpu"
    rules = {
        "default": sltt.SLTT(),
        "fold 6": sltt.SLTT(fold=6),
        "fold 1": sltt.SLTT(fold=1),
        "fold 2": sltt.SLTT(fold=2),
    }
    for (name, rule), by_graph in product(rules.items(), (True, False)):
        if not (small and by_graph):
            make = partial(lambda *given: train_batch(*given)[0], rule, device, by_graph)
            yield f"SLTT, {name}, {'graph' if by_graph else 'eager'}", partial(timed_batch, make, device)
    from peer_cases import Folded, jelly_bptt, relu

    def peer(neuron: Any, iteration: Any, last: bool) -> Callable[[], object]:
        model, x, y, steps = network(device, neuron, last)

        def run() -> None:
            for p in model.parameters():
                p.grad = None
            with torch.autocast(device.type, torch.bfloat16):
                iteration(model, x, y, steps)

        return run

    for last in (True, False):
        form = "channels last" if last else "channels first"
        yield f"SpikingJelly BPTT, {form}", partial(timed_batch, partial(peer, Folded, jelly_bptt, last), device)
    yield "ReLU", partial(timed_batch, partial(peer, torch.nn.ReLU, relu, True), device)


def profiled(device: Any) -> Cases:
    """Profile a batch with six steps in a call: kernels by their time, and the share in which none runs."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    import sltt

    cuda = device.type == "cuda"

    def case() -> dict[str, Any]:
        run, _ = train_batch(sltt.SLTT(fold=6), device, cuda)
        run()
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as found:
            began = time.perf_counter()
            run()
            if cuda:
                torch.cuda.synchronize()
            total = time.perf_counter() - began
        events: list[Any] = [e for e in found.events() or () if (e.device_type.name == "CUDA") == cuda]
        spent: dict[str, list[float]] = {}
        for e in events:
            spent.setdefault(e.name[:80], []).append(e.time_range.elapsed_us() if cuda else e.self_cpu_time_total)
        top = sorted(((sum(us) / 1e3, len(us), name) for name, us in spent.items()), reverse=True)[:25]
        busy = sum(sum(us) for us in spent.values()) / 1e6
        return {"ms": 1e3 * total, "busy": busy / total, "launches": len(events), "top_ms_count_name": top}

    yield "SLTT, fold 6", case


def training(device: Any) -> Cases:
    """Time batches of `fit`, with and without processes that load data, beside a batch alone."""
    import torch

    import sltt
    from sltt.training.console import Console

    # a callback would have `fit` read each loss at once; without, the second epoch tells the time of a batch
    count = 6 if device.type == "cpu" else 60

    def fit(workers: int) -> dict[str, Any]:
        import tempfile

        model, given, _, steps = network(device, sltt.LIF)
        batch = len(given)
        x = torch.randn(batch * count, *given.shape[1:])
        data = torch.utils.data.TensorDataset(x, torch.randint(10, (len(x),)))
        loader: Any = torch.utils.data.DataLoader(
            data, batch, shuffle=True, num_workers=workers, pin_memory=device.type == "cuda"
        )
        with tempfile.TemporaryDirectory() as folder:
            how = {"steps": steps, "device": device.type, "precision": "bf16-mixed", "report": Console(quiet=True)}
            loss: Any = sltt.losses.CrossEntropyMSE()
            found = sltt.fit(model, loader, run=f"{folder}/run", loss=loss, epochs=2, **how)
        first, second = (1e3 * row["seconds"] / count for row in found.history)
        return {"ms": second, "first_epoch_ms": first, "peak_mb": found.history[0]["peak_memory"] / 1e6}

    make = partial(lambda: train_batch(sltt.SLTT(), device, device.type == "cuda")[0])
    yield "a batch alone", partial(timed_batch, make, device)
    for workers in (0, 4):
        yield f"fit, {workers} workers", partial(fit, workers)


def capture(device: Any) -> Cases:
    """Let a capture fail, and go on: without a graph, and then with one of another network."""
    import torch

    import sltt
    from sltt.training.graphs import Graphs

    class Refuses(torch.nn.Module):
        refuses = True

        def forward(self, x: Any) -> Any:
            if self.refuses and torch.cuda.is_current_stream_capturing():
                x.sum().item()
            return torch.nn.functional.dropout(x, 0.1)

    def case() -> dict[str, Any]:
        if device.type == "cpu":
            return {"skipped": "a CPU has no graphs"}
        layer = Refuses()
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), layer, sltt.LIF(), torch.nn.Linear(16, 3)).to(device)
        x, y = torch.randn(32, 8, device=device), torch.randint(3, (32,), device=device)
        rule, found, problems = sltt.SLTT(fold=1), [], []
        for layer.refuses in (True, False):
            graphs = Graphs(model, device, demanded=False)
            for _ in range(6):
                for p in model.parameters():
                    p.grad = None
                out = graphs(lambda x, y: rule(model, x, y, sltt.losses.CrossEntropyMSE(), steps=4), x, y)
                found.append(out.loss.item())
            problems.append(graphs.problem)
        return {"problem": problems[0], "problem_of_the_next": problems[1], "losses": found}

    yield "a capture that fails, then on", case


STEPS: dict[str, Callable[[Any], Cases]] = {
    **{"doctor": doctor, "kernels": neuron_kernels, "resnet": resnet},
    **{"profile": profiled, "fit": training, "capture": capture},
}
if __name__ == "__main__":
    sys.exit(main())
