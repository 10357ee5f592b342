"""Rules that keep paths through time across layers: cosine with BPTT's gradient, and what they learn.

    python benchmarks/deeper.py [--seeds 3]

Networks of 2, 3 and 4 hidden layers of 64 LIF, on the data and with the settings of the recipes `sequential-digits` and
`recall-marked`, all training samples and no validation split. Each training adds a line to docs/results/deeper.json.
Run the command again to continue. It ends with the tables of docs/recall.md. About half an hour on one core.

Every rule here runs one step of the network at a time, and sums over the steps what `Trace.gradient` gives for each
weight layer. In its comments:

    x[t]     what the layer reads, with a 1 for the bias               [B, in + 1]
    a[t]     = λ a[t−1] + x[t], its trace, where neurons follow        [B, in + 1]
    h[t]     = ∂s[t]/∂u[t], the surrogate derivative                   [B, out]
    g[t]     = ∂L/∂s[t] through the layers above within step t         [B, out]
"""

import argparse
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tables import DOCS, fill
from torch import Tensor, nn
from trainings import Log, fit

import sltt
from sltt.sequence.hooks import hooked

PATH = DOCS / "results" / "deeper.json"
LAMBDA = 1 - 1 / 5.0  # of both recipes
WIDTH = 64


class Trace:
    """SLTT: g[t] h[t] ⊗ x[t]."""

    def gradient(self, x: Tensor, a: Tensor, h: Tensor, g: Tensor) -> Tensor:
        """The part of a step in the gradient of a layer, [out, in + 1]."""
        return (g * h).T @ x


class Presynaptic(Trace):
    """OTTT: g[t] h[t] ⊗ a[t]."""

    def gradient(self, x: Tensor, a: Tensor, h: Tensor, g: Tensor) -> Tensor:
        return (g * h).T @ a


class Postsynaptic(Trace):
    """OTPE: g[t] R[t],   R[t] = λ R[t−1] + h[t] ⊗ a[t], a matrix for each sample."""

    r: Tensor | float = 0.0

    def gradient(self, x: Tensor, a: Tensor, h: Tensor, g: Tensor) -> Tensor:
        self.r = LAMBDA * self.r + h[:, :, None] * a[:, None]
        return torch.einsum("bi,bij->ij", g, self.r)


class Factorised(Trace):
    """F-OTPE: R[t] is taken as h̄[t] ⊗ z[t], z[t] = λ z[t−1] + a[t], h̄[t] the mean of h with weights λ^{t−τ}."""

    z: Tensor | float = 0.0
    h: Tensor | float = 0.0
    weight = 0.0

    def gradient(self, x: Tensor, a: Tensor, h: Tensor, g: Tensor) -> Tensor:
        self.z = LAMBDA * self.z + a
        self.h = LAMBDA * self.h + h
        self.weight = LAMBDA * self.weight + 1
        return (g * self.h / self.weight).T @ self.z


class Smoothed(Trace):
    """pp_prop: g[t] h[t] f[t] ⊗ a[t],   f[t] = λ² f[t−1] + (1 − λ): of LIF, the postsynaptic trace is one number."""

    f = 0.0

    def gradient(self, x: Tensor, a: Tensor, h: Tensor, g: Tensor) -> Tensor:
        self.f = LAMBDA**2 * self.f + (1 - LAMBDA)
        return self.f * (g * h).T @ a


class Local(sltt.Rule):
    """Traces for the hidden layers of an MLP; the readout, which has no memory, has its exact gradient.

    Args:
        inner: of the hidden layers but the last.
        last: of the last, behind which no neurons remember.
    """

    def __init__(self, inner: type[Trace], last: type[Trace]):
        self.inner, self.last = inner, last

    def run(self, batch: Any) -> sltt.Output:
        weights = [module for module in batch.model.modules() if isinstance(module, nn.Linear)]
        neurons = [module for module in batch.model.modules() if isinstance(module, sltt.LIF)]
        traces = [*(self.inner() for _ in neurons[:-1]), self.last()]
        calls: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        followed: dict[nn.Module, Tensor | float] = dict.fromkeys(weights, 0.0)

        def keep(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            calls[module] = inputs[0], output

        with hooked(*(module.register_forward_hook(keep) for module in (*weights, *neurons))):
            for t in range(batch.steps):
                loss = batch.forward(range(t, t + 1))
                spikes = [calls[neuron][1] for neuron in neurons]
                readout = list(weights[-1].parameters())
                signals = torch.autograd.grad(loss, [*spikes, *readout], retain_graph=True)
                grads = [*zip(readout, signals[len(spikes) :], strict=True)]
                for layer, neuron, trace, g in zip(weights[:-1], neurons, traces, signals[: len(spikes)], strict=True):
                    current, s = calls[neuron]
                    (h,) = torch.autograd.grad(s, current, torch.ones_like(s), retain_graph=True)
                    x = F.pad(calls[layer][0].detach(), (0, 1), value=1.0)
                    a = followed[layer] = LAMBDA * followed[layer] + x
                    found = trace.gradient(x, a, h, g)
                    grads += [(layer.weight, found[:, :-1]), (layer.bias, found[:, -1])]
                for p, grad in grads:
                    p.grad = grad if p.grad is None else p.grad + grad
                batch.detach()
        return batch.output()


RULES: dict[str, sltt.Rule] = {
    "BPTT": sltt.BPTT(),
    "traces": Local(Presynaptic, Presynaptic),
    "F-OTPE": Local(Factorised, Presynaptic),
    "OTPE": Local(Postsynaptic, Presynaptic),
    "pp_prop": Local(Smoothed, Smoothed),
    "SLTT": Local(Trace, Trace),
}


class Task(NamedTuple):
    """A recipe's data and settings."""

    data: Callable[[], sltt.data.Data]
    values: int  # of a time step
    classes: int
    epochs: int
    batch_size: int


marked = partial(sltt.data.Recall, validation=0, cues=4, delay=0, classes=2, noise=0.5, channels=20)
digits = partial(sltt.data.SequentialDigits, validation=0, augment=False)
TASKS = {
    "sequential-digits": Task(digits, values=8, classes=10, epochs=20, batch_size=64),
    "recall-marked": Task(marked, values=21, classes=2, epochs=15, batch_size=128),
}
STEPS = 8
LOSS = sltt.losses.CrossEntropyMSE(alpha=0.0)


def network(task: str, layers: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    neuron = partial(sltt.LIF, tau=1 / (1 - LAMBDA), detach_reset=True)
    return sltt.models.MLP([TASKS[task].values, *[WIDTH] * layers, TASKS[task].classes], neuron=neuron, norm=False)


def train(model: nn.Module, task: str, rule: sltt.Rule, seed: int, epochs: int) -> float:
    """Train a network, and its test accuracy."""
    data = TASKS[task].data()
    optimizer = partial(torch.optim.AdamW, lr=0.005, weight_decay=0.0)
    how: dict[str, Any] = {"steps": STEPS, "epochs": epochs, "batch_size": TASKS[task].batch_size, "seed": seed}
    fit(model, data, rule, loss=LOSS, optimizer=optimizer, **how)
    return sltt.evaluate(model, data, steps=STEPS, loss=LOSS, device="cpu").accuracy


def cosines(model: nn.Module, task: str) -> dict[str, float]:
    """Cosine of each rule's gradient of all parameters with BPTT's, on one batch of training samples."""
    splits = TASKS[task].data().splits(STEPS)
    x, y = splits.collate([splits.train[i] for i in range(256)])
    rules = [rule for name, rule in RULES.items() if name != "BPTT"]
    found = sltt.analysis.agreement(model, x, y, LOSS, rules)
    return {name: one.cosine for name, one in zip(list(RULES)[1:], found, strict=True)}


def gradients(task: str, layers: int) -> dict[str, Any]:
    """The cosines before training and after an epoch of BPTT."""
    model = network(task, layers, seed=0)
    before = cosines(model, task)
    train(model, task, sltt.BPTT(), seed=0, epochs=1)
    return {"untrained": before, "after an epoch": cosines(model, task)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    log = Log(PATH)
    for layers, task in product((2, 3, 4), TASKS):
        case = {"layers": layers, "task": task, "cosines": True}
        if not log.find(case):
            print(log.add(case | gradients(task, layers)), flush=True)
    for seed, layers, task, name in product(range(given.seeds), (2, 3, 4), TASKS, RULES):
        case = {"layers": layers, "task": task, "rule": name, "seed": seed}
        if not log.find(case):
            test = train(network(task, layers, seed), task, RULES[name], seed, TASKS[task].epochs)
            print(log.add(case | {"test": test}), flush=True)
    fill()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
