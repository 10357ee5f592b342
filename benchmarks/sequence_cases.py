"""Networks that benchmarks/open_neuromorphic.py measures, and an iteration of each rule here and of other libraries."""

# pyright: reportMissingImports=false
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sltt

LAMBDA = 0.9  # of the membrane potential; threshold 1, soft reset, triangle surrogate


class Work(NamedTuple):
    """A network and its input.

    Attributes:
        widths: of the input and of the layers; neurons stand behind each layer but the readout's.
        batch: samples.
        steps: T.
        density: of the input, 0 and 1; None is a dense input.
        recurrent: the neurons read their own spikes.
        device: of weights and input.
        classes: a readout, with the cross-entropy at each time step; without one, the loss is the sum of spikes.
    """

    widths: tuple[int, ...]
    batch: int
    steps: int
    density: float | None = None
    recurrent: bool = False
    classes: int = 0
    device: str = "cpu"


WORKS = {
    "mlp": Work((700, 256, 256), 64, 100, 0.05, classes=20),
    **{f"linear-{n}": Work((n, n), 16, 500) for n in (256, 512, 1024, 2048, 4096, 8192)},
    **{f"recurrent-{n}": Work((700, n), 64, 100, 0.05, recurrent=True, classes=20) for n in (128, 256, 512, 1024)},
    "tiny": Work((24, 16, 16), 4, 6, 0.3, classes=3),
    "tiny-recurrent": Work((24, 16), 4, 6, 0.3, recurrent=True, classes=3),
    "tiny-linear": Work((16, 16), 4, 6),
}

Weights = dict[str, Tensor]
Iteration = Callable[[], Any]


def weights_of(work: Work) -> Weights:
    """The weights that all cases share, so that some 5 to 20% of the neurons fire."""
    generator = torch.Generator().manual_seed(0)
    found, density = {}, work.density or 1.0
    pairs = [*zip(work.widths, work.widths[1:], strict=False)]
    for i, (fan_in, width) in enumerate(pairs):
        gain = 0.35 / (fan_in * (density if i == 0 else 0.1)) ** 0.5
        found[f"w{i}"] = gain * torch.randn(width, fan_in, generator=generator)
        found[f"b{i}"] = torch.full((width,), 0.02)
    if work.recurrent:
        width = work.widths[-1]
        found["r"] = 0.3 / (0.1 * width) ** 0.5 * torch.randn(width, width, generator=generator)
    if work.classes:
        found["w"] = torch.randn(work.classes, work.widths[-1], generator=generator) / work.widths[-1] ** 0.5
        found["b"] = torch.zeros(work.classes)
    return found


def batch_of(work: Work) -> tuple[Tensor, Tensor]:
    """The input [T, B, n] and labels [B]."""
    generator = torch.Generator().manual_seed(1)
    shape = work.steps, work.batch, work.widths[0]
    dense = work.density is None
    x = torch.randn(shape, generator=generator) if dense else torch.rand(shape, generator=generator)
    x = x if work.density is None else (x < work.density).float()
    y = torch.randint(max(2, work.classes), (work.batch,), generator=generator)
    return x.to(work.device), y.to(work.device)


def network(work: Work, weights: Weights, neuron: Callable[[], nn.Module], recurrent: Any = None) -> nn.Sequential:
    """The network with a library's neurons."""
    layers: list[nn.Module] = []
    for i in range(len(work.widths) - 1):
        layers.append(linear(weights[f"w{i}"], weights[f"b{i}"]))
        layers.append(recurrent(linear(weights["r"])) if work.recurrent else neuron())
    return nn.Sequential(*layers, *([linear(weights["w"], weights["b"])] if work.classes else [])).to(work.device)


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    layer.weight.data = weight.clone()
    if bias is not None:
        layer.bias.data = bias.clone()
    return layer


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def summed(logits: Tensor, y: Tensor) -> Tensor:
    """The sum of all spikes, as the Open Neuromorphic benchmark has it."""
    return logits.sum()


def loss_of(work: Work) -> Callable[[Tensor, Tensor], Tensor]:
    return F.cross_entropy if work.classes else summed


def ours(rule: sltt.Rule) -> Callable[[Work], tuple[Iteration, Callable[[], Tensor]]]:
    def make(work: Work) -> tuple[Iteration, Callable[[], Tensor]]:
        def neuron() -> sltt.LIF:
            return sltt.LIF(tau=1 / (1 - LAMBDA))

        model = network(work, weights_of(work), neuron, lambda layer: sltt.Recurrent(neuron(), layer))
        (x, y), loss = batch_of(work), loss_of(work)

        def run() -> None:
            model.zero_grad()
            rule(model, x, y, loss)

        return run, lambda: gradient(model)

    return make


def per_sequence(work: Work, model: nn.Module, logits: Tensor, y: Tensor) -> None:
    """Backward of logits [T, B, C] of all steps."""
    if work.classes:
        F.cross_entropy(logits.flatten(0, 1), y.repeat(work.steps)).backward()
    else:
        logits.sum().backward()


def spikingjelly(work: Work) -> tuple[Iteration, Callable[[], Tensor]]:
    """Multi-step mode."""
    from spikingjelly.activation_based import functional, neuron, surrogate

    def node(**more: Any) -> nn.Module:
        return neuron.LIFNode(
            tau=1 / (1 - LAMBDA), decay_input=False, v_reset=None,
            surrogate_function=surrogate.PiecewiseQuadratic(alpha=1.0), **more,
        )  # fmt: skip

    def recurrent(feedback: nn.Linear) -> nn.Module:
        return _Added(node(), feedback)

    model = network(work, weights_of(work), lambda: node(step_mode="m"), recurrent)
    x, y = batch_of(work)

    def run() -> None:
        model.zero_grad()
        functional.reset_net(model)
        per_sequence(work, model, model(x), y)

    return run, lambda: gradient(model)


class _Added(nn.Module):
    """A single-step neuron that reads its own spikes, over all steps."""

    def __init__(self, node: nn.Module, feedback: nn.Linear) -> None:
        super().__init__()
        self.node, self.feedback = node, feedback

    def forward(self, x: Tensor) -> Tensor:
        spikes = [self.node(x[0])]
        for x_t in x[1:]:
            spikes.append(self.node(x_t + self.feedback(spikes[-1])))
        return torch.stack(spikes)


def snntorch(work: Work) -> tuple[Iteration, Callable[[], Tensor]]:
    import snntorch as snn

    def node() -> nn.Module:
        return snn.Leaky(beta=LAMBDA, spike_grad=sltt.surrogates.Triangle(), init_hidden=True, reset_delay=False)

    model = network(work, weights_of(work), node)
    x, y = batch_of(work)

    def run() -> None:
        model.zero_grad()
        for m in model:
            if isinstance(m, snn.Leaky):
                m.mem = torch.zeros(0)
        per_sequence(work, model, torch.stack([model(x_t) for x_t in x]), y)

    return run, lambda: gradient(model)


def norse(work: Work) -> tuple[Iteration, Callable[[], Tensor]]:
    from norse.torch import LIFBoxCell, LIFBoxParameters

    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = LIFBoxCell(LIFBoxParameters(tau_mem_inv=torch.tensor(1 - LAMBDA)), dt=1.0)

        def forward(self, x: Tensor) -> Tensor:
            state, spikes = None, []
            for x_t in x:
                s, state = self.cell(x_t, state)
                spikes.append(s)
            return torch.stack(spikes)

    model = network(work, weights_of(work), Cell)
    x, y = batch_of(work)

    def run() -> None:
        model.zero_grad()
        per_sequence(work, model, model(x), y)

    return run, lambda: gradient(model)


def sinabs(work: Work) -> tuple[Iteration, Callable[[], Tensor]]:
    import sinabs.layers as sl

    def node() -> nn.Module:
        return sl.LIF(tau_mem=-1 / torch.tensor(LAMBDA).log(), norm_input=False)

    model = network(work, weights_of(work), node)
    x, y = batch_of(work)
    x = x.transpose(0, 1).contiguous()

    def run() -> None:
        model.zero_grad()
        for m in model:
            if isinstance(m, sl.LIF):
                m.reset_states()
        per_sequence(work, model, model(x).transpose(0, 1), y)

    return run, lambda: gradient(model)


def jax_case(cut: bool) -> Callable[[Work], tuple[Iteration, Callable[[], Tensor]]]:
    """A jitted scan over the neurons; products with inputs stand in front of it, for all steps at once."""

    def make(work: Work) -> tuple[Iteration, Callable[[], Tensor]]:
        import jax
        import jax.numpy as jnp

        spike: Any = jax.custom_jvp(lambda u: (u >= 0).astype(u.dtype))
        spike.defjvps(lambda du, s, u: jnp.maximum(0, 1 - jnp.abs(u)) * du)
        stop = jax.lax.stop_gradient if cut else lambda one: one

        def layer(currents: Any, feedback: Any = None) -> Any:
            def step(carry: Any, x: Any) -> Any:
                v, s = (stop(one) for one in carry)
                u = LAMBDA * v + x + (0 if feedback is None else s @ feedback.T)
                s = spike(u - 1)
                return (u - s, s), s

            zero = jnp.zeros_like(currents[0])
            return jax.lax.scan(step, (zero, zero), currents)[1]

        def loss(weights: Any, x: Any, y: Any) -> Any:
            s = x
            for i in range(len(work.widths) - 1):
                s = layer(s @ weights[f"w{i}"].T + weights[f"b{i}"], weights.get("r"))
            if not work.classes:
                return s.sum()
            logits = jax.nn.log_softmax(s @ weights["w"].T + weights["b"])
            return -jnp.take_along_axis(logits, jnp.broadcast_to(y, logits.shape[:2])[..., None], -1).mean()

        weights = {name: jnp.asarray(value.numpy()) for name, value in weights_of(work).items()}
        x, y = (jnp.asarray(one.numpy()) for one in batch_of(work))
        step = jax.jit(jax.value_and_grad(loss))
        found: list[Any] = []

        def run() -> None:
            found[:] = jax.block_until_ready(step(weights, x, y))

        order = [name for name, _ in named(work)]
        return run, lambda: torch.cat([torch.from_numpy(jax.device_get(found[1][n]).copy()).flatten() for n in order])

    return make


def named(work: Work) -> list[tuple[str, Tensor]]:
    """The weights in the order of a network's parameters."""
    weights = weights_of(work)
    layers = [name for i in range(len(work.widths) - 1) for name in (f"w{i}", f"b{i}")]
    order = [*layers, *(["r"] if work.recurrent else []), *(["w", "b"] if work.classes else [])]
    return [(name, weights[name]) for name in order]


class Case(NamedTuple):
    """A library with a rule.

    Attributes:
        make: gives an iteration and, after one, its gradient.
        rule: of the gradient that it should have; None is not compared: other equations, or a detached reset.
        recurrent: it has a recurrent layer.
    """

    make: Callable[[Work], tuple[Iteration, Callable[[], Tensor]]]
    rule: str | None
    recurrent: bool = True


CASES = {
    "SLTT": Case(ours(sltt.SLTT()), "SLTT"),
    "BPTT": Case(ours(sltt.BPTT()), "BPTT"),
    "OTTT": Case(ours(sltt.OTTT()), None),
    "SLTT, fold = 1": Case(ours(sltt.SLTT(fold=1)), "SLTT"),
    "BPTT, fold = 1": Case(ours(sltt.BPTT(fold=1)), "BPTT"),
    "JAX SLTT": Case(jax_case(cut=True), "SLTT"),
    "JAX BPTT": Case(jax_case(cut=False), "BPTT"),
    "SpikingJelly BPTT": Case(spikingjelly, "BPTT"),
    "snnTorch BPTT": Case(snntorch, None, recurrent=False),
    "Norse BPTT": Case(norse, None, recurrent=False),
    "sinabs BPTT": Case(sinabs, None, recurrent=False),
}


def exact(work: Work, rule: str) -> Tensor:
    """The gradient of the plain equations in float64."""
    weights = [(name, value.double().requires_grad_()) for name, value in named(work)]
    w, spike = dict(weights), sltt.surrogates.Triangle()
    x, y = batch_of(work)
    keep = torch.Tensor.detach if rule == "SLTT" else lambda one: one
    count = len(work.widths) - 1
    v = [torch.zeros(work.batch, n, dtype=torch.float64) for n in work.widths[1:]]
    s, total = [torch.zeros_like(one) for one in v], torch.zeros((), dtype=torch.float64)
    for x_t in x.double():
        before, out = s, x_t
        s = []
        for i in range(count):
            u = LAMBDA * keep(v[i]) + out @ w[f"w{i}"].T + w[f"b{i}"]
            u = u + keep(before[i]) @ w["r"].T if work.recurrent else u
            out = spike(u - 1)
            v[i] = u - out
            s.append(out)
        out = out @ w["w"].T + w["b"] if work.classes else out
        total = total + loss_of(work)(out, y)
    total.backward()
    return torch.cat([value.grad.flatten() for _, value in weights if value.grad is not None])
