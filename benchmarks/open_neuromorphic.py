"""Small networks and long sequences beside other libraries: docs/results/sequences.json, and the table made of it.

    python benchmarks/open_neuromorphic.py [--works linear-512 mlp] [--cases SLTT "JAX SLTT, by hand"] [--rounds 3]
                                           [--device cuda]    # with --works, the rows of other works are kept
    python benchmarks/open_neuromorphic.py --rates 2,5,10,20,40    # docs/results/rates.json, and its figure
    python benchmarks/open_neuromorphic.py --widths 64,256,1024,4096    # docs/results/widths.json, and its figure

docs/performance.md says what the works are. With `--rates`, so many percent of the inputs and of the neurons of each
layer are active: the biases are chosen for that. With `--widths`, hidden layers have so many neurons, at 5%. Each case
runs in a process of its own, and the processes take turns. Before anything is timed, each gradient is compared with
that of the plain equations in float64, on a small network.

Time is processor time of one thread, or on CUDA the time that passes. It is that of forward and backward together: some
rules interleave them.
"""

# pyright: reportMissingImports=false
import argparse
import functools
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from cells import write
from curves_figure import draw
from peer_cases import jelly_neuron
from tables import DOCS, fill
from torch import Tensor, nn
from turns import Worker, hardware, in_turns, process_memory, serve, timed

import sltt
from sltt import kernels

LAMBDA = 0.9  # of the membrane potential; threshold 1, soft reset, triangle surrogate


class Work(NamedTuple):
    """A network and its input."""

    widths: tuple[int, ...]  # of the input and of the layers; neurons stand behind each layer but the readout's
    batch: int
    steps: int
    density: float | None = None  # of the input, 0 and 1; None is a dense input
    recurrent: bool = False  # the neurons read their own spikes
    classes: int = 0  # of a readout, with the cross-entropy at each step; without one, the loss is the sum of spikes
    device: str = "cpu"
    static: bool = False  # the first time step of the input is shown in all
    rate: float | None = None  # of the neurons of each layer; None takes the biases as they are


WORKS = {
    "mlp": Work((700, 256, 256), 64, 100, 0.05, classes=20),
    "mlp-1024": Work((700, 1024, 1024), 32, 250, 0.05, classes=20),
    **{f"linear-{n}": Work((n, n), 16, 500) for n in (256, 512, 1024, 2048, 4096, 8192)},
    "recurrent-256": Work((700, 256), 64, 100, 0.05, recurrent=True, classes=20),
    "recurrent-1024": Work((700, 1024), 32, 250, 0.05, recurrent=True, classes=20),
    "static": Work((784, 1000), 128, 25, classes=10, static=True),
    "tiny": Work((24, 16, 16), 4, 6, 0.3, classes=3),
    "tiny-recurrent": Work((24, 16), 4, 6, 0.3, recurrent=True, classes=3),
    "tiny-linear": Work((16, 16), 4, 6),
    "tiny-static": Work((24, 16), 4, 6, classes=3, static=True),
}
CURVES = "mlp", "recurrent-256"  # over rates and widths
SHOWN = "mlp", "mlp-1024", "linear-256", "linear-512", "linear-2048", "recurrent-256", "recurrent-1024", "static"

Made = tuple[Callable[[], Any], Callable[[], Tensor]]  # an iteration and, after one, its gradient


def work_of(name: str) -> Work:
    """Return the work of a name; `mlp@10/64` is `mlp` with 10% of inputs and neurons active, hidden layers of 64."""
    name, _, options = name.partition("@")
    percent, _, width = options.partition("/")
    work = WORKS[name]
    if width:
        work = work._replace(widths=(work.widths[0], *[int(width)] * (len(work.widths) - 1)))
    return work._replace(density=float(percent) / 100, rate=float(percent) / 100) if percent else work


@functools.cache
def weights_of(work: Work) -> dict[str, Tensor]:
    """The weights that all cases share, in the order of the layers, so that 2 to 12% of the neurons fire, or `rate`."""
    generator = torch.Generator().manual_seed(0)
    found, density = {}, work.density or 1.0
    for i, (fan_in, width) in enumerate(itertools.pairwise(work.widths)):
        gain = 0.35 / (fan_in * (density if i == 0 else 0.1)) ** 0.5
        found[f"w{i}"] = gain * torch.randn(width, fan_in, generator=generator)
        found[f"b{i}"] = torch.full((width,), 0.02)
    if work.recurrent:
        width = work.widths[-1]
        found["r"] = 0.3 / (0.1 * width) ** 0.5 * torch.randn(width, width, generator=generator)
    if work.classes:
        found["w"] = torch.randn(work.classes, work.widths[-1], generator=generator) / work.widths[-1] ** 0.5
        found["b"] = torch.zeros(work.classes)
    if work.rate is not None:
        cpu = work._replace(device="cpu")
        for i in range(len(work.widths) - 1):
            low, high = -4.0, 4.0
            for _ in range(14):
                found[f"b{i}"].fill_(middle := (low + high) / 2)
                low, high = (low, middle) if firing(cpu, found)[i] > work.rate else (middle, high)
    return found


def batch_of(work: Work) -> tuple[Tensor, Tensor]:
    """The input [T, B, n] and labels [B]."""
    generator = torch.Generator().manual_seed(1)
    shape = work.steps, work.batch, work.widths[0]
    if work.density is None:
        x = torch.randn(shape, generator=generator)
    else:
        x = (torch.rand(shape, generator=generator) < work.density).float()
    x = x[0].expand(shape) if work.static else x
    y = torch.randint(max(2, work.classes), (work.batch,), generator=generator)
    return x.to(work.device), y.to(work.device)


def network(work: Work, neuron: Callable[..., nn.Module], weights: Mapping[str, Tensor] | None = None) -> nn.Sequential:
    """Build the network with a library's neurons; those that read their own spikes are made of the layer for that."""
    layers = []
    for fan_in, width in itertools.pairwise(work.widths):
        feedback = [nn.Linear(width, width, bias=False)] if work.recurrent else []
        layers += [nn.Linear(fan_in, width), neuron(*feedback)]
    if work.classes:
        layers.append(nn.Linear(work.widths[-1], work.classes))
    model = nn.Sequential(*layers)
    parameters = (p for m in model.modules() if isinstance(m, nn.Linear) for p in m.parameters())
    for parameter, value in zip(parameters, (weights or weights_of(work)).values(), strict=True):
        parameter.data = value.clone()
    return model.to(work.device)


def loss_of(work: Work) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the cross-entropy, or the sum of all spikes, as the Open Neuromorphic benchmark has it."""
    return F.cross_entropy if work.classes else lambda logits, y: logits.sum()


def made(model: nn.Module, backward: Callable[[], object]) -> Made:
    """Return an iteration that ends in `backward`, and what gives the gradient of all parameters."""

    def run() -> None:
        model.zero_grad()
        backward()

    return run, lambda: torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def ours(feedback: nn.Linear | None = None) -> nn.Module:
    lif = sltt.LIF(tau=1 / (1 - LAMBDA))
    return sltt.Recurrent(lif, feedback) if feedback else lif


def firing(work: Work, weights: Mapping[str, Tensor] | None = None) -> list[float]:
    """Return the share of neurons of each layer that fire in a time step."""
    model, (x, _) = network(work, ours, weights), batch_of(work)
    with sltt.analysis.firing_rates(model) as rates:
        sltt.unroll(model, x)
    return [round(rate, 4) for rate in rates.by_layer().values()]


def by_rule(rule: sltt.Rule, dtype: torch.dtype = torch.float32) -> Callable[[Work], Made]:
    def make(work: Work) -> Made:
        model, (x, y), loss = network(work, ours).to(dtype), batch_of(work), loss_of(work)
        x, steps = (x[0], work.steps) if work.static else (x, None)
        x = x.to(dtype)
        return made(model, lambda: rule(model, x, y, loss, steps=steps))

    return make


def by_sequence(neuron: Callable[..., nn.Module]) -> Callable[[Work], Made]:
    """Make a case of neurons that take all time steps in a call."""

    def make(work: Work) -> Made:
        model, (x, y), loss = network(work, neuron), batch_of(work), loss_of(work)
        y = y.repeat(work.steps)
        return made(model, lambda: loss(model(x).flatten(0, 1), y).backward())

    return make


class _Steps(nn.Module):
    """A library's neuron, called step by step from a new state on; `call(x, state)` gives spikes and state."""

    def __init__(self, call: Callable[[Tensor, Any], tuple[Tensor, Any]], *modules: nn.Module) -> None:
        super().__init__()
        self.call, self.modules_of_call = call, nn.ModuleList(modules)

    def forward(self, x: Tensor) -> Tensor:
        state, spikes = None, []
        for x_t in x:
            s, state = self.call(x_t, state)
            spikes.append(s)
        return torch.stack(spikes)


def spikingjelly(feedback: nn.Linear | None = None) -> nn.Module:
    """Make a neuron in multi-step mode, or one that runs step by step and reads its own spikes."""
    node: Any = jelly_neuron("LIFNode", 1 / (1 - LAMBDA), step_mode="s" if feedback else "m")

    def step(x: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        spikes = node(x if feedback is None or before is None else x + feedback(before))
        return spikes, spikes

    module = _Steps(step, node, feedback) if feedback else node
    module.register_forward_pre_hook(lambda *_: node.reset())
    return module


def snntorch(compiled: bool = False) -> nn.Module:
    import snntorch as snn

    neuron = snn.Leaky(beta=LAMBDA, spike_grad=sltt.surrogates.Triangle(), reset_delay=False)
    step: Any = torch.compile(lambda x, v: neuron(x, v), dynamic=False) if compiled else neuron
    return _Steps(lambda x, v: step(x, torch.zeros_like(x) if v is None else v), neuron)


def norse(compiled: bool = False) -> nn.Module:
    from norse.torch import LIFBoxCell, LIFBoxParameters

    cell = LIFBoxCell(LIFBoxParameters(tau_mem_inv=torch.tensor(1 - LAMBDA)), dt=1.0)
    return _Steps(torch.compile(cell, dynamic=False) if compiled else cell, cell)


def sinabs() -> nn.Module:
    import sinabs.layers as sl

    class Layer(sl.LIF):  # pyright: ignore[reportUntypedBaseClass]
        def forward(self, input_data: Tensor) -> Tensor:
            self.reset_states()
            return super().forward(input_data.transpose(0, 1)).transpose(0, 1)

    return Layer(tau_mem=-1 / torch.tensor(LAMBDA).log(), norm_input=False)


def jax_logits(cut: bool, work: Work, weights: Any, x: Any, by_hand=True, inside=False, unroll=1) -> Any:
    """Scan over each layer's neurons, products in front or inside; by hand, the backward pass keeps u alone."""
    import jax
    import jax.numpy as jnp

    spike: Any = jax.custom_jvp(lambda u: (u >= 0).astype(u.dtype))
    spike.defjvps(lambda du, s, u: jnp.maximum(0, 1 - jnp.abs(u)) * du)
    stop = jax.lax.stop_gradient if cut else lambda one: one
    flat = lambda one: one.reshape(-1, one.shape[-1])  # noqa: E731

    def forward(x: Any, w: Any, b: Any, r: Any) -> Any:
        def step(carry: Any, x: Any) -> Any:
            v, s = (stop(one) for one in carry)
            u = LAMBDA * v + (x @ w + b if inside else x) + (0 if r is None else s @ r)
            s = spike(u - 1)
            return (u - s, s), u

        shape = work.steps, work.batch, w.shape[1]
        inputs = x if inside else jnp.broadcast_to((flat(x) @ w + b).reshape(-1, *shape[1:]), shape)
        u = jax.lax.scan(step, (jnp.zeros(shape[1:]),) * 2, inputs, unroll=unroll)[1]
        return spike(u - 1), (x, u, w, r)

    def backward(kept: Any, ds: Any) -> Any:
        x, u, w, r = kept

        def step(later: Any, now: Any) -> Any:
            u, ds = now
            dv = LAMBDA * later
            ds = ds - dv + (0 if r is None else later @ r.T)
            du = dv + ds * jnp.maximum(0, 1 - jnp.abs(u - 1))
            return du, du

        if cut:
            du = ds * jnp.maximum(0, 1 - jnp.abs(u - 1))
        else:
            du = jax.lax.scan(step, jnp.zeros_like(u[0]), (u, ds), reverse=True, unroll=unroll)[1]
        dr = None if r is None else flat(spike(u[:-1] - 1)).T @ flat(du[1:])
        du = flat(du if len(x) == work.steps else du.sum(0))
        return (du @ w.T).reshape(x.shape), flat(x).T @ du, du.sum(0), dr

    layer: Any = lambda *inputs: forward(*inputs)[0]  # noqa: E731
    if by_hand:
        layer = jax.custom_vjp(layer)
        layer.defvjp(forward, backward)
    x = x[:1] if work.static and not inside else x  # the products of one step serve all
    for i in range(len(work.widths) - 1):
        x = layer(x, weights[f"w{i}"], weights[f"b{i}"], weights.get("r"))
    return (flat(x) @ weights["w"] + weights["b"]).reshape(*x.shape[:2], -1) if work.classes else x


JAX_FORMS = {
    "automatic": {"by_hand": False},
    "by hand": {},
    "by hand, unroll=4": {"unroll": 4},
    "by hand, inside": {"inside": True},
    "by hand, inside, unroll=4": {"inside": True, "unroll": 4},
}


def jax_case(cut: bool, **form: Any) -> Callable[[Work], Made]:
    """Make a case of a jitted gradient; weights are [in, out]."""

    def make(work: Work) -> Made:
        import jax
        import jax.numpy as jnp

        def loss(weights: Any, x: Any, y: Any) -> Any:
            logits = jax_logits(cut, work, weights, x, **form)
            if not work.classes:
                return logits.sum()
            logits = jax.nn.log_softmax(logits)
            return -jnp.take_along_axis(logits, jnp.broadcast_to(y, logits.shape[:2])[..., None], -1).mean()

        weights = {name: jnp.asarray(value.numpy()).T for name, value in weights_of(work).items()}
        x, y = (jnp.asarray(one.numpy()) for one in batch_of(work))
        step, found = jax.jit(jax.grad(loss)), {}

        def run() -> None:
            found.update(jax.block_until_ready(step(weights, x, y)))

        return run, lambda: torch.cat([torch.from_numpy(jax.device_get(found[n]).T.flatten()) for n in weights])

    return make


class Case(NamedTuple):
    """A library with a rule."""

    make: Callable[[Work], Made]
    rule: str | None  # of the gradient that it should have; None is not compared: other equations, or a detached reset;
    # or the case that it is another form of
    recurrent: bool = True  # it has a recurrent layer


CASES = {
    "SLTT": Case(by_rule(sltt.SLTT()), "SLTT"),
    "BPTT": Case(by_rule(sltt.BPTT()), "BPTT"),
    "OTTT": Case(by_rule(sltt.OTTT()), None),
    "SLTT, fold = 1": Case(by_rule(sltt.SLTT(fold=1)), "SLTT"),
    **{f"JAX SLTT, {name}": Case(jax_case(True, **form), "SLTT") for name, form in JAX_FORMS.items()},
    **{f"JAX BPTT, {name}": Case(jax_case(False, **form), "BPTT") for name, form in JAX_FORMS.items()},
    "SpikingJelly BPTT": Case(by_sequence(spikingjelly), "BPTT"),
    "snnTorch BPTT": Case(by_sequence(snntorch), None, recurrent=False),
    "snnTorch BPTT, compiled": Case(by_sequence(partial(snntorch, True)), "snnTorch BPTT", recurrent=False),
    "Norse BPTT": Case(by_sequence(norse), None, recurrent=False),
    "Norse BPTT, compiled": Case(by_sequence(partial(norse, True)), "Norse BPTT", recurrent=False),
    "sinabs BPTT": Case(by_sequence(sinabs), None, recurrent=False),
}
# curves leave out what is nowhere fastest, and what the figure does not show
_LEFT_OUT = "OTTT", "SLTT, fold = 1", "automatic", "inside, unroll=4", "snnTorch BPTT", "Norse BPTT", "sinabs BPTT"
CURVE_CASES = [case for case in CASES if not case.endswith(_LEFT_OUT)]


def check(case: str, of: str, device: str) -> None:
    """Raise ValueError where the gradient of a case differs from that of its rule in float64, on a small network."""
    given = work_of(of)
    kind = "-recurrent" if given.recurrent else "-static" if given.static else ""
    work = WORKS["tiny" + (kind or ("" if given.classes else "-linear"))]
    rule = CASES[case].rule
    if rule is None:
        return
    run, found = CASES[case].make(work._replace(device=device))
    run()
    with kernels.using(compile="off", bits=False):
        make = CASES[rule].make if " " in rule else by_rule(getattr(sltt, rule)(fold=1), torch.float64)
        plain, exact = make(work)
        plain()
    cosine = torch.cosine_similarity(found().double().cpu(), exact().double(), dim=0).item()
    if cosine < 0.9999:
        raise ValueError(f"{case}: the gradient on {of} has a cosine of {cosine:.4f} with that of {rule}")


def work_on(work: str, case: str, on: str) -> None:
    """Measure one case, in a process of its own: the mean seconds of an iteration over half a second, and its peak."""
    torch.set_num_threads(1)
    check(case, work, on)
    run, _ = CASES[case].make(work_of(work)._replace(device=on))
    run()
    device = torch.device(on)

    clock = time.process_time if on == "cpu" else time.perf_counter
    serve({"time": timed(run, clock, least=0.5, device=device), "peak": lambda: process_memory(run, device)})


def measure(work: str, cases: list[str], rounds: int, device: str) -> list[dict[str, Any]]:
    """Seconds and peak memory of each case, in turns. XLA takes one thread, as PyTorch does."""
    one = {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1", "OMP_NUM_THREADS": "1"}
    workers = [Worker([sys.executable, __file__, "--serve", work, case, device], 600, **one) for case in cases]
    turns = in_turns([partial(worker.ask, "time") for worker in workers], rounds)
    peaks = [worker.ask("peak") for worker in workers]
    for worker in workers:
        worker.close()
    return [
        {"work": work, "case": case, "seconds": [round(t, 5) for t in times], "peak_MB": round(peak / 1e6, 1)}
        for case, times, peak in zip(cases, turns, peaks, strict=True)
    ]


def place(row: Mapping[str, Any]) -> int:
    """The place of a row's work in the table."""
    return [*WORKS].index(row["work"].partition("@")[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--works", nargs="+", choices=WORKS)
    parser.add_argument("--cases", nargs="+", choices=CASES)
    parser.add_argument("--rounds", type=int, default=3)
    curve = parser.add_mutually_exclusive_group()
    curve.add_argument("--rates", help="firing rates in percent, separated by commas")
    curve.add_argument("--widths", help="neurons of a hidden layer, separated by commas")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        return work_on(*given.serve)
    points = given.rates.split(",") if given.rates else []
    if given.widths:
        points = [f"5/{width}" for width in given.widths.split(",")]
    rows, works = [], given.works or (CURVES if points else SHOWN)
    if points:
        works = [f"{work}@{point}" for work in works for point in points]
    for work in works:
        asked = given.cases or (CURVE_CASES if points else CASES)
        cases = [case for case in asked if CASES[case].recurrent or not work_of(work).recurrent]
        for row in measure(work, cases, given.rounds, given.device):
            seconds = statistics.median(row["seconds"])
            print(f"{work:16}{row['case']:22}{seconds:9.4f} s  {row['peak_MB']:8.1f} MB", flush=True)
            rows.append(row)
    out = given.out or DOCS / "results" / f"{'rates' if given.rates else 'widths' if points else 'sequences'}.json"
    result = {"hardware": hardware(1, given.device), "rates": {work: firing(work_of(work)) for work in works}}
    merges = (given.works or points) and out.exists()
    before: dict[str, Any] = json.loads(out.read_text()) if merges else {"hardware": None}
    if before["hardware"] == result["hardware"]:
        result["rates"] = before["rates"] | result["rates"]
        rows = sorted([*(row for row in before["rows"] if row["work"] not in works), *rows], key=place)
    write(out, {**result, "rows": rows})
    fill()
    if points:
        draw(out)
    return None


if __name__ == "__main__":
    main()
