"""A study: the gradient of BPTT by blocks of time steps, at memory that does not grow with T.

    python benchmarks/blocks.py [--steps 100 400 1600]

The error of a neuron obeys a recursion backwards in time, a[t] = ψ[t] e[t] + λ a[t+1] ∂v/∂u, whose factor is λ at most.
Run over a block of M steps from M steps behind its end, it is exact but for λ^M. A block then waits for the next one,
in each layer: the layer that is n below the last holds n + 2 blocks. Neurons run again with a graph over two blocks,
and layers with weights run once. Printed for each network and T: memory and processor time of a batch, and the relative
error of the gradient, beside BPTT and BPTT in segments of √T, which runs each step twice.
"""

import argparse
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from turns import in_turns, timed

import sltt
from sltt import kernels
from sltt.analysis import peak_memory

B = 64


class Waiting:
    """Blocks of a layer of neurons that wait for their error."""

    def __init__(self, linear: nn.Linear, neuron: Any):
        self.linear, self.neuron = linear, neuron
        self.blocks: deque[tuple[Tensor, Tensor, Tensor]] = deque()  # input, current, potential before
        self.errors: deque[Tensor] = deque()
        self.v: Tensor | None = None

    def forward(self, x: Tensor, steps: int) -> Tensor:
        current = self.linear(x)
        before = torch.zeros_like(current[:B]) if self.v is None else self.v
        spikes, self.v = self.run(before, current, steps)
        self.blocks.append((x.bool(), current, before))  # inputs are spikes
        return spikes

    def run(self, v: Tensor, current: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        self.neuron.v = v
        return self.neuron.advance(current, steps), self.neuron.v

    def backward(self) -> Tensor:
        """Send the error through the first block, from the end of the second if there is one; return ∂L/∂current."""
        errors = [*self.errors][:2]
        error = torch.cat(errors)
        current = torch.cat([current for _, current, _ in [*self.blocks][: len(errors)]]).requires_grad_()
        x, _, before = self.blocks[0]
        with torch.enable_grad():
            spikes, _ = self.run(before, current, len(current) // B)
            (of_current,) = torch.autograd.grad(spikes, current, error)
        of_current = of_current[: len(x)]
        self.linear.weight.grad.addmm_(of_current.T, x.to(of_current.dtype))  # type: ignore[union-attr]
        self.linear.bias.grad.add_(of_current.sum(0))  # type: ignore[union-attr]
        self.blocks.popleft()
        self.errors.popleft()
        return of_current


@torch.no_grad()
def by_blocks(model: nn.Sequential, x: Tensor, y: Tensor, block: int) -> None:
    """Write the gradients of the mean loss over T steps [T, B, N]."""
    hidden: list[Any]
    head: Any
    *hidden, head = model
    layers = [Waiting(linear, neuron) for linear, neuron in zip(hidden[::2], hidden[1::2], strict=True)]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    T = len(x)
    for end in range(block, T + block, block):
        z, steps = x[end - block : end].flatten(0, 1), len(x[end - block : end])
        for layer in layers:
            z = layer.forward(z, steps)
        logits = head(z)
        error = (F.softmax(logits, 1) - F.one_hot(y, logits.shape[1]).repeat(steps, 1)) / (T * B)
        head.weight.grad.addmm_(error.T, z)
        head.bias.grad.add_(error.sum(0))
        ready = [error @ head.weight]
        for layer in reversed(layers):
            layer.errors.extend(ready)
            found = []
            while len(layer.errors) > 1 or (end >= T and layer.errors):
                found.append(layer.backward())
            ready = [one @ layer.linear.weight for one in found if layer is not layers[0]]
    for layer in layers:
        layer.neuron.reset()


def network(hidden: int, tau: float) -> nn.Sequential:
    torch.manual_seed(0)
    layers = []
    for i in range(hidden):
        layers += [nn.Linear(256 if i else 700, 256), sltt.LIF(tau=tau, v_threshold=0.5)]
    return nn.Sequential(*layers, nn.Linear(256, 20))


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])  # type: ignore[union-attr]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 400, 1600])
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with kernels.using(sparse="off"):
        measure(asked.steps, asked.repeats)


def measure(lengths: Sequence[int], repeats: int) -> None:
    """Print a line for each network, T and way."""
    for hidden, tau in ((2, 2.0), (3, 2.0), (2, 10.0), (3, 10.0)):
        block = math.ceil(math.log(1e-3) / math.log(1 - 1 / tau))
        for T in lengths:
            model, y = network(hidden, tau), torch.randint(20, (B,))
            x = (torch.rand(T, B, 700) < 0.05).float()
            rules = {"BPTT": sltt.BPTT(), "segments": sltt.BPTT(segment=round(math.sqrt(T))), "SLTT": sltt.SLTT()}
            loss = nn.CrossEntropyLoss()

            def trained(rule: sltt.Rule, model: Any = model, x: Tensor = x, y: Tensor = y, loss: Any = loss) -> None:
                model.zero_grad()
                rule(model, x, y, loss, mean_logits=True)

            runs: dict[str, Callable[[], Any]] = {name: partial(trained, rule) for name, rule in rules.items()}
            for m in (block, -(-block // 3)):
                runs[f"blocks of {m}"] = partial(by_blocks, model, x, y, m)
            found = {}
            for name, run in runs.items():
                run()
                found[name] = gradient(model)
            times = in_turns([timed(run, time.process_time) for run in runs.values()], repeats)
            for (name, run), seconds in zip(runs.items(), times, strict=True):
                error = float((found[name] - found["BPTT"]).norm() / found["BPTT"].norm())
                cost = f"{peak_memory(run) / 1e6:.1f} MB, {1e3 * statistics.median(seconds):.0f} ms"
                print(f"{hidden} layers, τ = {tau:g}, T = {T}: {name}, {cost}, error {error:.1e}", flush=True)


if __name__ == "__main__":
    main()
