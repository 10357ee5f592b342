"""Networks that benchmarks/peers.py measures, and an iteration of each rule here and in SpikingJelly.

The neurons: τ = 1.1, threshold 1, soft reset, no input scaling, triangle surrogate.
"""

# pyright: reportMissingImports=false
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import sltt
from sltt import kernels

LOSS = sltt.losses.CrossEntropyMSE()
TAU = 1.1
TRIANGLE = sltt.surrogates.Triangle()
Iteration = Callable[[nn.Module, Tensor, Tensor, int], Any]
Neuron = Callable[[], nn.Module]


def vgg11_max(neuron: Neuron) -> nn.Module:
    """Make VGG-11 with the maximum where it has the average: what is pooled stays a spike."""
    model: Any = sltt.models.vgg11(in_channels=2, neuron=neuron)
    for i, layer in enumerate(model.features):
        if isinstance(layer, nn.AvgPool2d):
            model.features[i] = nn.MaxPool2d(2)
    model.pool = nn.AdaptiveMaxPool2d(7)
    return model


# what makes the network, its input, and its name in a table
NETWORKS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...], str]] = {
    "resnet18": (sltt.models.resnet18, (32, 3, 32, 32), "ResNet-18"),
    "vgg11": (partial(sltt.models.vgg11, in_channels=2), (16, 2, 48, 48), "VGG-11"),
    "vgg11-max": (vgg11_max, (16, 2, 48, 48), "VGG-11 with max pooling"),
    "spikformer": (sltt.models.spikformer, (32, 3, 32, 32), "Spikformer"),
    "digits": (sltt.models.DigitsNet, (128, 1, 8, 8), "DigitsNet"),  # a case in seconds
}


def by_rule(rule: sltt.Rule | Callable[[int], sltt.Rule], **options: Any) -> Iteration:
    """Run a rule, or the one that is made for T."""

    def run(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> None:
        taken = rule if isinstance(rule, sltt.Rule) else rule(steps)
        with kernels.using(**options):
            taken(model, x, y, LOSS, steps=steps)

    return run


def mixed(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> None:
    """Keep the gradient through time in the first layer of neurons."""
    first = next(name for name, m in model.named_modules() if isinstance(m, sltt.LIF))
    sltt.Mixed({first: "all"})(model, x, y, LOSS, steps=steps)


def captured(rule: sltt.Rule) -> Iteration:
    """In a CUDA graph, which the first iteration captures."""
    graphs: dict[nn.Module, Any] = {}

    def run(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> None:
        if model not in graphs:
            graphs[model] = sltt.graphed(rule, model, LOSS, x, y, steps=steps)
        graphs[model](x, y)

    return run


def relu(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> None:
    """The floor: T times forward and backward of a network without state."""
    for _ in range(steps):
        (LOSS(model(x), y) / steps).backward()


def evaluation(**options: Any) -> Iteration:
    def run(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> None:
        with kernels.using(**options):
            sltt.unroll(model, x, steps=steps)

    return run


@torch.no_grad()
def relu_evaluation(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> None:
    for _ in range(steps):
        model(x)


def jelly_neuron(kind: str, tau: float = TAU, **more: Any) -> nn.Module:
    from spikingjelly.activation_based import neuron, surrogate

    slope = surrogate.PiecewiseQuadratic(alpha=1.0)
    soft_reset = {"v_reset": None, "detach_reset": False}
    return getattr(neuron, kind)(tau=tau, decay_input=False, surrogate_function=slope, **soft_reset, **more)


def reset(model: nn.Module) -> None:
    from spikingjelly.activation_based import functional

    functional.reset_net(model)


class Folded(nn.Module):
    """SpikingJelly's multi-step neuron in a network whose other layers have time folded into the batch."""

    steps = 1

    def __init__(self) -> None:
        super().__init__()
        self.node = jelly_neuron("LIFNode", step_mode="m")

    def forward(self, x: Tensor) -> Tensor:
        return self.node(x.unflatten(0, (Folded.steps, -1))).flatten(0, 1)


def jelly_bptt(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> None:
    reset(model)
    Folded.steps = steps
    logits = model(x.repeat(steps, *[1] * (x.ndim - 1)))
    LOSS(logits, y.repeat(steps)).backward()


class Unit(nn.Sequential):
    """Layers that SpikingJelly's memopt checkpoints as one: weight, norm and neuron, as its authors take them."""


def into_units(model: Any) -> None:
    """Group the layers of VGG, and of the blocks of ResNet, in units; the modules keep their order."""
    if isinstance(model, sltt.models.ResNet):
        block: Any
        for block in model.blocks:
            block.neuron1, block.norm1 = Unit(block.norm1, block.neuron1), nn.Identity()
            block.conv1 = Unit(block.conv1, block.norm2, block.neuron2)
            block.norm2, block.neuron2 = nn.Identity(), nn.Identity()
        return
    units: list[Unit] = []
    pooled = False
    for layer in model.features:
        if isinstance(layer, nn.AvgPool2d) or (isinstance(layer, nn.Conv2d) and not pooled):
            units.append(Unit())  # a pooling goes first: what the unit reads is spikes
        units[-1].append(layer)
        pooled = isinstance(layer, nn.AvgPool2d)
    model.features = nn.Sequential(*units)


def checkpoint(model: nn.Module, x: Tensor, targets: type[nn.Module]) -> None:
    """Level 1 of SpikingJelly's memopt: checkpoints, and spikes that are read as bits. Higher levels need CUDA."""
    from spikingjelly.activation_based import memopt

    def forward(model: nn.Module) -> Tensor:
        reset(model)
        Folded.steps = 1
        return model(x)

    memopt.optimize_memory(model, targets, forward, level=1)


def checkpoint_units(model: nn.Module, x: Tensor) -> None:
    into_units(model)
    checkpoint(model, x, Unit)


def checkpoint_blocks(model: nn.Module, x: Tensor) -> None:
    checkpoint(model, x, type(model.blocks[0]))  # type: ignore[index]


def jelly_sltt(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> None:
    reset(model)
    relu(model, x, y, steps)


@dataclass(frozen=True)
class Case:
    """What is measured under a name."""

    neuron: Neuron
    run: Iteration
    floor: str = "relu"  # the case with ReLU that its time is divided by
    peer: str | None = None  # the case of SpikingJelly that its time is divided by
    rule: str | None = None  # whose gradient it should have; none is not compared
    channels_last: bool = True  # the memory format of images and weights; else PyTorch's default
    evaluates: bool = False  # in evaluation mode, with the statistics of BatchNorm that one pass over the batch leaves
    prepare: Callable[[nn.Module, Tensor], None] | None = None  # changes the network, once, with the batch at hand


def our_case(run: Iteration, rule: str | None = None) -> Case:
    """Make a case with our neurons; `rule` is that whose gradient it should have."""
    return Case(sltt.LIF, run, peer=f"SpikingJelly {rule or 'SLTT'}", rule=rule)


def peer_case(neuron: Neuron, run: Iteration, rule: str) -> Case:
    """Make a case of SpikingJelly."""
    return Case(neuron, run, peer=f"SpikingJelly {rule}", rule=rule, channels_last=False)


def in_bf16(case: Case) -> Case:
    """Run a case under autocast to bfloat16, with float32 weights and membrane potentials."""

    def run(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> None:
        with torch.autocast(x.device.type, torch.bfloat16):
            case.run(model, x, y, steps)

    return replace(case, run=run, floor="relu, bf16", peer=case.peer and f"{case.peer}, bf16", rule=None)


class OwnLIF(sltt.Neuron):
    """The arithmetic of LIF, as a user writes it."""

    @staticmethod
    def step(x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        u = (1 - 1 / TAU) * v + x
        s = TRIANGLE(u - 1.0)
        return s, u - s


def compiled_case(neuron: Neuron) -> Case:
    """Make a case of neurons that are compiled in layers of any size, beside our LIF."""
    return Case(neuron, by_rule(sltt.SLTT(), compile="on"), floor="SLTT, compiled")


RELU = Case(nn.ReLU, relu)
JELLY_SLTT = peer_case(lambda: jelly_neuron("SLTTLIFNode"), jelly_sltt, "SLTT")
JELLY_BPTT = peer_case(Folded, jelly_bptt, "BPTT")
JELLY = {
    "SpikingJelly SLTT": JELLY_SLTT,
    "SpikingJelly BPTT": JELLY_BPTT,
    "SpikingJelly SLTT, bf16": in_bf16(JELLY_SLTT),
    "SpikingJelly BPTT, bf16": in_bf16(JELLY_BPTT),
}
CASES: dict[str, Case] = {
    "relu": RELU,
    "relu, bf16": in_bf16(RELU),
    "relu, evaluation": Case(nn.ReLU, relu_evaluation, floor="relu, evaluation", evaluates=True),
    "SLTT": our_case(by_rule(sltt.SLTT()), "SLTT"),
    "SLTT, dense": our_case(by_rule(sltt.SLTT(), sparse="off"), "SLTT"),
    "SLTT, bf16": in_bf16(our_case(by_rule(sltt.SLTT()))),
    "SLTT, bf16, dense": in_bf16(our_case(by_rule(sltt.SLTT(), sparse="off"))),
    "SLTT, graph": our_case(captured(sltt.SLTT())),
    "SLTT, bf16, graph": in_bf16(our_case(captured(sltt.SLTT()))),
    "SLTT, bf16, fold = T": in_bf16(our_case(by_rule(lambda steps: sltt.SLTT(fold=steps)))),
    "BPTT, bf16, fold = T": in_bf16(our_case(by_rule(lambda steps: sltt.BPTT(fold=steps)), "BPTT")),
    "SLTT, k = 1": our_case(by_rule(sltt.SLTT(k=1))),
    "SLTT, compiled": compiled_case(sltt.LIF),
    "SLTT, own neuron": compiled_case(OwnLIF),
    "SLTT, ALIF": compiled_case(lambda: sltt.ALIF(TAU)),
    "SLTT, recompute": our_case(by_rule(sltt.SLTT(recompute=True)), "SLTT"),
    "SLTT, fold = 1": our_case(by_rule(sltt.SLTT(fold=1)), "SLTT"),
    "SLTT, fold = 2": our_case(by_rule(sltt.SLTT(fold=2)), "SLTT"),
    "SLTT, fold = T": our_case(by_rule(lambda steps: sltt.SLTT(fold=steps)), "SLTT"),
    "OTTT": our_case(by_rule(sltt.OTTT())),
    "RateBased": our_case(by_rule(sltt.RateBased())),
    "Mixed": our_case(mixed),
    "BPTT": our_case(by_rule(sltt.BPTT()), "BPTT"),
    "BPTT, fold = T": our_case(by_rule(lambda steps: sltt.BPTT(fold=steps)), "BPTT"),
    "BPTT, recompute": our_case(by_rule(sltt.BPTT(recompute=True)), "BPTT"),
    "BPTT, segment = 2": our_case(by_rule(sltt.BPTT(segment=2)), "BPTT"),
    "BPTT, segment = √T": our_case(by_rule(lambda steps: sltt.BPTT(segment=round(steps**0.5))), "BPTT"),
    "BPTT, segment = auto": our_case(by_rule(sltt.BPTT(segment="auto")), "BPTT"),
    "evaluation": Case(sltt.LIF, evaluation(), floor="relu, evaluation", evaluates=True),
    "evaluation, dense": Case(sltt.LIF, evaluation(sparse="off"), floor="relu, evaluation", evaluates=True),
    **JELLY,
    **{f"{name}, channels last": replace(case, channels_last=True) for name, case in JELLY.items()},
    "SpikingJelly memopt, units": replace(JELLY_BPTT, prepare=checkpoint_units),
    "SpikingJelly memopt, blocks": replace(JELLY_BPTT, prepare=checkpoint_blocks),
}


def build(
    network: str, case: str, batch: int | None = None, device: torch.device | None = None
) -> tuple[nn.Module, Tensor, Tensor]:
    """The case's network with the weights that all cases share, and the batch; None is the network's own size."""
    make, (size, *shape), _ = NETWORKS[network]
    torch.manual_seed(0)
    weights = make(neuron=nn.ReLU).state_dict()
    model = make(neuron=CASES[case].neuron)
    model.load_state_dict(weights, strict=False)  # other libraries keep constants of their neurons there
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((batch or size, *shape), generator=generator)
    y = torch.randint(10, x.shape[:1], generator=generator)
    model, x, y = model.to(device), x.to(device), y.to(device)
    if CASES[case].channels_last and x.ndim == 4:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if CASES[case].evaluates:
        settle(model, x)
    if prepare := CASES[case].prepare:
        prepare(model, x)
    return model, x, y


def settle(model: nn.Module, x: Tensor) -> None:
    """Give BatchNorm the statistics of a batch and switch to evaluation: firing rates are then as after a training."""
    for norm in (m for m in model.modules() if isinstance(m, _BatchNorm)):
        norm.momentum = None  # their mean over the steps
    sltt.unroll(model, x, steps=2) if any(isinstance(m, sltt.LIF) for m in model.modules()) else model(x)
    model.eval()


def cosine(network: str, case: str, steps: int, device: torch.device | None = None) -> float | None:
    """Cosine between the case's gradient and that of its rule, by the plain equations."""
    rule = CASES[case].rule
    if not rule:
        return None
    grads = []
    exact = by_rule(getattr(sltt, rule)(), compile="off", bits=False)
    for name, iteration in ((case, CASES[case].run), (rule, exact)):
        model, x, y = build(network, name, 2, device)
        model.double()
        for norm in (m for m in model.modules() if isinstance(m, _BatchNorm)):
            norm.eval().get_buffer("running_var").fill_(0.02)  # small enough for every layer to spike
        iteration(model, x.double(), y, steps)
        layers = (m for m in model.modules() if isinstance(m, nn.Conv2d | _BatchNorm | nn.Linear))
        grads.append(torch.cat([p.grad.flatten() for m in layers for p in m.parameters() if p.grad is not None]))
    return torch.cosine_similarity(*grads, dim=0).item()
