"""Networks that nobody tuned for: SLTT and BPTT here, beside SpikingJelly's BPTT and the same network with ReLU.

    pip install '.[bench]'
    python benchmarks/networks.py [--networks resnet18-64,unet,…] [--batch 8] [--threads 1] [--repeats 7] [--json FILE]

Each is a class with a forward of its own, as one writes it. Weights, data, loss and neurons are the same in every case:
τ = 2, threshold 1, reset to 0, detached, arctangent surrogate; SpikingJelly's layers in step mode "m" are those of
PyTorch on time that is folded into the batch, and its neuron runs all steps in one call. Our rules are called with
their defaults on the network as it is. SpikingJelly and ReLU run in the faster memory format, by a trial before the
turns. ReLU runs T times, each with a backward. First, outputs of all time steps and gradients of BPTT are compared with
SpikingJelly's in float64, with fixed statistics in BatchNorm, since its layers take those over all time steps together.

Turns alternate in one process: a ratio is of one turn. The time of one thread is processor time, that of several is
wall time. Memory is the peak of what PyTorch allocates in a batch. The DVS network has half the batch.
"""

# pyright: reportMissingImports=false
import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cells import recorded, write
from peer_cases import reset
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from turns import hardware, in_turns, quotient, serve, timed

import sltt
from sltt.analysis import peak_memory
from sltt.training.console import megabytes

LOSS = nn.CrossEntropyLoss()
Neuron = Callable[[], nn.Module]
Run = Callable[[], Any]


def ours() -> nn.Module:
    return sltt.LIF(2.0, v_reset=0.0, detach_reset=True, surrogate=sltt.surrogates.ArcTan())


class Folded(nn.Module):
    """SpikingJelly's multi-step neuron, behind layers whose batch has all time steps."""

    steps = 1

    def __init__(self) -> None:
        super().__init__()
        from spikingjelly.activation_based import neuron, surrogate

        more = {"decay_input": False, "detach_reset": True, "surrogate_function": surrogate.ATan()}
        self.node = neuron.LIFNode(2.0, v_reset=0.0, step_mode="m", **more)

    def forward(self, x: Tensor) -> Tensor:
        return self.node(x.unflatten(0, (Folded.steps, -1))).flatten(0, 1)


def conv3x3(inside: int, out: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inside, out, 3, stride, padding=1, groups=groups, bias=False)


class Basic(nn.Module):
    """torchvision's BasicBlock: the last neuron reads the sum."""

    def __init__(self, inside: int, out: int, stride: int, neuron: Neuron):
        super().__init__()
        self.conv1, self.bn1, self.sn1 = conv3x3(inside, out, stride), nn.BatchNorm2d(out), neuron()
        self.conv2, self.bn2, self.sn2 = conv3x3(out, out), nn.BatchNorm2d(out), neuron()
        self.downsample = None
        if stride != 1 or inside != out:
            self.downsample = nn.Sequential(nn.Conv2d(inside, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.sn1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.sn2(out)


class SEW(Basic):
    """Spike-element-wise (Fang et al., NeurIPS 2021): the sum of the spikes."""

    def __init__(self, inside: int, out: int, stride: int, neuron: Neuron):
        super().__init__(inside, out, stride, neuron)
        if self.downsample is not None:
            self.downsample.append(neuron())

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.sn1(self.bn1(self.conv1(x)))
        out = self.sn2(self.bn2(self.conv2(out)))
        return out + identity


class MS(Basic):
    """Membrane shortcut (Hu et al., 2021): neurons stand before the convolutions, the sum is of currents."""

    def __init__(self, inside: int, out: int, stride: int, neuron: Neuron):
        super().__init__(inside, out, stride, neuron)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(self.sn1(x)))
        out = self.bn2(self.conv2(self.sn2(out)))
        return out + (x if self.downsample is None else self.downsample(x))


class ResNet18(nn.Module):
    """torchvision's: a 7×7 stem of stride 2, max pooling, four stages of two blocks."""

    def __init__(self, neuron: Neuron, block: type[Basic] = Basic):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False)
        self.bn1, self.sn1, self.maxpool = nn.BatchNorm2d(64), neuron(), nn.MaxPool2d(3, 2, padding=1)
        self.layer1 = nn.Sequential(block(64, 64, 1, neuron), block(64, 64, 1, neuron))
        self.layer2 = nn.Sequential(block(64, 128, 2, neuron), block(128, 128, 1, neuron))
        self.layer3 = nn.Sequential(block(128, 256, 2, neuron), block(256, 256, 1, neuron))
        self.layer4 = nn.Sequential(block(256, 512, 2, neuron), block(512, 512, 1, neuron))
        self.last = neuron() if block is MS else nn.Identity()
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.sn1(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(self.last(x)), 1))


class VGG(nn.Module):
    """VGG-11 with BatchNorm and max pooling."""

    def __init__(self, neuron: Neuron):
        super().__init__()
        layers: list[nn.Module] = []
        inside = 3
        for width in (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"):
            if isinstance(width, str):
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(inside, width, 3, padding=1), nn.BatchNorm2d(width), neuron()]
                inside = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Linear(512 * 2 * 2, 512), neuron(), nn.Linear(512, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


class Audio(nn.Module):
    """M5 (Dai et al., 2017) on raw sound, of which a time step brings 2,000 samples."""

    def __init__(self, neuron: Neuron):
        super().__init__()
        self.layers = nn.ModuleList()
        inside = 1
        for width, kernel, stride in ((64, 80, 4), (64, 3, 1), (128, 3, 1), (256, 3, 1)):
            conv = nn.Conv1d(inside, width, kernel, stride, padding=kernel // 2, bias=False)
            self.layers.append(nn.ModuleList([conv, nn.BatchNorm1d(width), neuron()]))
            inside = width
        self.pool, self.head = nn.MaxPool1d(4), nn.Linear(256, 35)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm, neuron in self.layers:  # type: ignore[misc]
            x = self.pool(neuron(norm(conv(x))))
        return self.head(x.mean(2))


class DVS(nn.Module):
    """SpikingJelly's network for DVS128 Gesture (Fang et al., ICCV 2021), with 64 channels."""

    def __init__(self, neuron: Neuron):
        super().__init__()
        stages = []
        for i in range(5):
            stages += [conv3x3(64 if i else 2, 64), nn.BatchNorm2d(64), neuron(), nn.MaxPool2d(2)]
        self.conv_fc = nn.Sequential(*stages, nn.Flatten(), nn.Linear(64 * 4 * 4, 512), neuron(), nn.Linear(512, 11))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_fc(x)


class Inverted(nn.Module):
    """MobileNetV2's block: 1×1, depthwise 3×3, 1×1 without a neuron behind."""

    def __init__(self, inside: int, out: int, stride: int, neuron: Neuron, expand: int = 4):
        super().__init__()
        wide = expand * inside
        self.expand = nn.Sequential(nn.Conv2d(inside, wide, 1, bias=False), nn.BatchNorm2d(wide), neuron())
        self.depthwise = nn.Sequential(conv3x3(wide, wide, stride, groups=wide), nn.BatchNorm2d(wide), neuron())
        self.project = nn.Sequential(nn.Conv2d(wide, out, 1, bias=False), nn.BatchNorm2d(out))
        self.adds = stride == 1 and inside == out

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.adds else y


class MobileNet(nn.Module):
    def __init__(self, neuron: Neuron):
        super().__init__()
        blocks, inside = [], 32
        for out, stride in ((24, 2), (24, 1), (32, 2), (32, 1), (32, 1), (64, 2), (64, 1), (64, 1), (96, 1), (96, 1)):
            blocks.append(Inverted(inside, out, stride, neuron))
            inside = out
        self.stem = nn.Sequential(conv3x3(3, 32, 2), nn.BatchNorm2d(32), neuron())
        self.blocks = nn.Sequential(*blocks)
        self.last = nn.Sequential(nn.Conv2d(96, 384, 1, bias=False), nn.BatchNorm2d(384), neuron())
        self.head = nn.Linear(384, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.blocks(self.stem(x))).mean([2, 3]))


class UNet(nn.Module):
    """An encoder and a decoder with shortcuts: logits for each pixel."""

    def __init__(self, neuron: Neuron):
        super().__init__()
        self.down1, self.down2, self.down3 = (self.pair(*s, neuron) for s in ((3, 32), (32, 64), (64, 128)))
        self.up2, self.up1 = nn.ConvTranspose2d(128, 64, 2, 2), nn.ConvTranspose2d(64, 32, 2, 2)
        self.merge2, self.merge1 = self.pair(128, 64, neuron), self.pair(64, 32, neuron)
        self.out = nn.Conv2d(32, 10, 1)

    @staticmethod
    def pair(inside: int, out: int, neuron: Neuron) -> nn.Module:
        first = conv3x3(inside, out), nn.BatchNorm2d(out), neuron()
        return nn.Sequential(*first, conv3x3(out, out), nn.BatchNorm2d(out), neuron())

    def forward(self, x: Tensor) -> Tensor:
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        x = self.down3(F.max_pool2d(two, 2))
        x = self.merge2(torch.cat([self.up2(x), two], 1))
        x = self.merge1(torch.cat([self.up1(x), one], 1))
        return self.out(x)


class Attention(nn.Module):
    """Spikformer's attention (Zhou et al., ICLR 2023) on tokens [B, D, N]."""

    def __init__(self, width: int, heads: int, neuron: Neuron):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.project = (token_layer(width, width, neuron) for _ in range(4))
        self.fire = neuron()

    def forward(self, x: Tensor) -> Tensor:
        b, d, n = x.shape
        q, k, v = (f(x).reshape(b, self.heads, d // self.heads, n) for f in (self.q, self.k, self.v))
        y = (v @ k.transpose(-2, -1)) @ q * 0.25
        return self.project(self.fire(y.reshape(b, d, n)))


def token_layer(inside: int, out: int, neuron: Neuron) -> nn.Module:
    return nn.Sequential(nn.Conv1d(inside, out, 1, bias=False), nn.BatchNorm1d(out), neuron())


class Transformer(nn.Module):
    """64 tokens of 4×4 pixels, 192 channels, four blocks."""

    def __init__(self, neuron: Neuron, width: int = 192, depth: int = 4):
        super().__init__()
        self.patch = nn.Sequential(nn.Conv2d(3, width, 4, 4, bias=False), nn.BatchNorm2d(width), neuron())
        self.position = nn.Parameter(0.02 * torch.randn(1, width, 64))
        self.attention = nn.ModuleList(Attention(width, 6, neuron) for _ in range(depth))
        self.mlp = nn.ModuleList(
            nn.Sequential(token_layer(width, 4 * width, neuron), token_layer(4 * width, width, neuron))
            for _ in range(depth)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2) + self.position
        for attention, mlp in zip(self.attention, self.mlp, strict=True):
            x = x + attention(x)
            x = x + mlp(x)
        return self.head(x.mean(2))


@dataclass(frozen=True)
class Network:
    """What makes it, the shape of a sample in a time step, T, and if each time step has an input of its own."""

    make: Callable[[Neuron], nn.Module]
    shape: tuple[int, ...]
    steps: int = 4
    sequence: bool = False


NETWORKS = {
    "resnet18-64": Network(ResNet18, (3, 64, 64)),
    "resnet18-128": Network(ResNet18, (3, 128, 128)),
    "sew-64": Network(partial(ResNet18, block=SEW), (3, 64, 64)),
    "ms-64": Network(partial(ResNet18, block=MS), (3, 64, 64)),
    "vgg-64": Network(VGG, (3, 64, 64)),
    "audio": Network(Audio, (1, 2000), 8, sequence=True),
    "dvs-128": Network(DVS, (2, 128, 128), 4, sequence=True),
    "mobilenet-64": Network(MobileNet, (3, 64, 64)),
    "unet-64": Network(UNet, (3, 64, 64)),
    "transformer": Network(Transformer, (3, 32, 32)),
}


class Case:
    """A network with one kind of neurons, and its batch."""

    def __init__(self, name: str, neuron: Neuron, batch: int, channels_last: bool = False):
        self.network = network = NETWORKS[name]
        torch.manual_seed(0)
        self.model = network.make(neuron)
        generator = torch.Generator().manual_seed(1)
        shape = batch // 2 if name.startswith("dvs") else batch, *network.shape
        if network.sequence:
            shape = network.steps, *shape
        self.x = torch.rand(shape, generator=generator) if len(network.shape) == 3 else torch.randn(shape)
        if name.startswith("dvs"):  # counts of events
            self.x = torch.poisson(0.1 * self.x / self.x.mean(), generator=generator)
        pixels = network.shape[1:] if name.startswith("unet") else ()
        self.y = torch.randint(10, (shape[network.sequence], *pixels), generator=generator)
        self.steps = None if network.sequence else network.steps
        if channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def run(self, rule: sltt.Rule) -> Any:
        self.model.zero_grad(set_to_none=True)
        return rule(self.model, self.x, self.y, LOSS, steps=self.steps)

    def layer_by_layer(self) -> Tensor:
        """SpikingJelly's BPTT; returns the logits [T·B, ...]."""
        self.model.zero_grad(set_to_none=True)
        reset(self.model)
        Folded.steps = steps = self.network.steps
        x = self.x.flatten(0, 1) if self.network.sequence else self.x.repeat(steps, *[1] * (self.x.ndim - 1))
        logits = self.model(x)
        LOSS(logits, self.y.repeat(steps, *[1] * (self.y.ndim - 1))).backward()
        return logits

    def step_by_step(self) -> None:
        """ReLU's training: T times forward and backward."""
        self.model.zero_grad(set_to_none=True)
        for t in range(self.network.steps):
            (LOSS(self.model(self.x[t] if self.network.sequence else self.x), self.y) / self.network.steps).backward()


def check(name: str) -> float:
    """Compare outputs and gradients with SpikingJelly's in float64; return the mean firing rate."""
    case, theirs = Case(name, ours, 2), Case(name, Folded, 2)
    with sltt.analysis.firing_rates(case.model) as rates:
        case.run(sltt.SLTT())
    found = []
    for one in (case, theirs):
        one.model.double()
        one.x = one.x.double()
    for norm in (m for m in case.model.modules() if isinstance(m, _BatchNorm)):
        norm.reset_running_stats()
        norm.momentum = None  # the mean over the steps
    sltt.unroll(case.model, case.x, steps=case.steps)
    theirs.model.load_state_dict(case.model.state_dict(), strict=False)
    for one in (case, theirs):
        one.model.eval()
    for rule in (sltt.BPTT(), sltt.SLTT(), sltt.SLTT(fold=1)):
        out = case.run(rule)
        found.append([out.logits, *(p.grad for p in case.model.parameters())])
    logits = theirs.layer_by_layer().unflatten(0, (case.network.steps, -1))
    torch.testing.assert_close(found[0], [logits, *(p.grad for p in theirs.model.parameters())], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found[1], found[2], rtol=1e-6, atol=1e-9)
    return rates.mean()


def faster(cases: list[Case], run: Callable[[Case], Run], clock: Callable[[], float]) -> tuple[Run, bool]:
    """Return the case of the memory format in which it is faster, and if this has the channels last."""
    times = in_turns([timed(run(case), clock) for case in cases], 2)
    best = min(range(len(cases)), key=lambda i: min(times[i]))
    return run(cases[best]), bool(best)


def measure(name: str, batch: int, threads: int, repeats: int) -> dict[str, Any]:
    """Measure all cases of a network, in turns."""
    rate, clock = check(name), time.process_time if threads == 1 else time.perf_counter
    formats = (False, True) if len(NETWORKS[name].shape) == 3 else (False,)
    runs: dict[str, Run] = {}
    last: dict[str, bool] = {}
    for label, neuron, run in (("SpikingJelly", Folded, Case.layer_by_layer), ("ReLU", nn.ReLU, Case.step_by_step)):
        cases = [Case(name, neuron, batch, channels_last) for channels_last in formats]
        runs[label], last[label] = faster(cases, lambda case, run=run: partial(run, case), clock)
    for rule in (sltt.SLTT(), sltt.BPTT()):
        case = Case(name, ours, batch)
        runs[type(rule).__name__] = partial(case.run, rule)
    for run in runs.values():
        run()  # the first batch of a rule looks at the network
    times = in_turns([timed(run, clock) for run in runs.values()], repeats)
    return {
        "network": name,
        "batch": len(case.y),
        "steps": case.network.steps,
        "rate": rate,
        "channels_last": last,
        "times": dict(zip(runs, times, strict=True)),
        "memory": {label: peak_memory(run) for label, run in runs.items()},
        "hardware": hardware(threads),
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def work(name: str, rule: str) -> None:
    """Measure a rule, in a process of its own."""
    run = partial(Case(name, ours, 8).run, {"SLTT": sltt.SLTT(), "BPTT": sltt.BPTT()}[rule])
    run()
    serve({"time": timed(run, time.process_time), "memory": lambda: peak_memory(run)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="keeps the rows of other networks, batches and threads")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return work(*options.serve)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    sltt.devices.keep_freed_memory()  # for all cases: new pages would take a part of the time
    for name in options.networks.split(","):
        row = measure(name, options.batch, options.threads, options.repeats)
        times, memory = row["times"], row["memory"]
        print(f"{name}, B = {row['batch']}, T = {row['steps']}, {row['rate']:.0%} fire:", end="")
        print(f" SpikingJelly {1e3 * statistics.median(times['SpikingJelly']):.0f} ms", end="")
        for label in ("SLTT", "BPTT", "ReLU"):
            middle, low, high = quotient(times[label], times["SpikingJelly"])
            print(f"; {label} {middle:.2f} ({low:.2f} to {high:.2f})", end="")
        print("; memory", ", ".join(f"{label} {megabytes(size)}" for label, size in memory.items()), flush=True)
        if options.json:
            same = ("network", "batch", "hardware")
            rows = [r for r in recorded(options.json) if any(r[key] != row[key] for key in same)]
            write(options.json, [*rows, row])


if __name__ == "__main__":
    main()
