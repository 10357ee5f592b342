"""Credit through delays, beside one graph of plain PyTorch over all time steps."""

import copy
import random
from functools import partial

import pytest
import torch
from torch import nn

import sltt
from tests.conftest import LOSS, gradient
from tests.neurons.plain import Plain


class Taps(nn.Module):
    """A delay that keeps every input, in its graph; `cut(t, n)` says whether a tap is a constant."""

    def __init__(self, taps, cut):
        super().__init__()
        self.taps, self.cut, self.inputs = taps, cut, []

    def forward(self, x):
        self.inputs.append(x)
        t = len(self.inputs) - 1
        taps = [self.inputs[t - n] if t >= n else torch.zeros_like(x) for n in self.taps]
        return torch.cat([x.detach() if self.cut(t, n) else x for n, x in zip(self.taps, taps, strict=True)], 1)


def written_out(model, cut):
    """The network with delays and neurons of plain PyTorch."""
    model = copy.deepcopy(model)
    for name, module in [*model.named_modules()]:
        if isinstance(module, sltt.Delay | sltt.Neuron):
            new = Taps(module.taps, cut) if isinstance(module, sltt.Delay) else Plain(module)
            vars(model.get_submodule(name.rpartition(".")[0]))["_modules"][name.rpartition(".")[2]] = new
    return model


def expected(model, x, y, *, window=1, cut=lambda t, n: False, trained=None, traced=False):
    """The gradients of one graph, whose states are constants behind each window; 0 for a parameter without one.

    With `traced`, a linear layer has Σ_t E[t] x̂[t]ᵀ, E the error of its output; λ = 0.5, and 0 of a readout.
    """
    model, total, seen = written_out(model, cut), 0, {}

    def note(layer, read, out):
        seen.setdefault(layer, []).append((read[0].detach(), out))
        if out.requires_grad:
            out.retain_grad()

    for layer in model.modules() if traced else ():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(note)
    for t, x_t in enumerate(x):
        with torch.set_grad_enabled(trained is None or t in trained):
            value = LOSS(model(x_t), y) / len(x)
        total = total + (value if value.requires_grad else 0)
        if (t + 1) % window == 0:
            sltt.detach(model)
    total.backward()
    for layer, steps in seen.items():
        decay, trace, ones = 0.5 * (layer.out_features != 3), 0, 0
        w, b = map(torch.zeros_like, (layer.weight, layer.bias))
        for read, out in steps:
            trace, ones = decay * trace + read, decay * ones + 1
            if out.grad is not None:
                w, b = w + out.grad.T @ trace, b + ones * out.grad.sum(0)
        layer.weight.grad, layer.bias.grad = w.detach(), b.detach()
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])


def found(model, rule, x, y, **kwargs):
    """The gradients of a rule, 0 for a parameter without one."""
    model = copy.deepcopy(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    rule(model, x, y, LOSS, **kwargs)
    return gradient(model)


def chain(*taps, neuron=sltt.LIF, sizes=(6, 8, 7, 3)):
    """Linear layers with a delay before each, where taps are given."""
    layers = []
    for before, after, n in zip(sizes[:-1], sizes[1:], taps, strict=True):
        layers += [sltt.Delay(n)] if n else []
        layers += [nn.Linear(before * len(n or [0]), after), neuron(tau=2.0)]
        layers[-2].weight.data.mul_(2)
    return nn.Sequential(*layers[:-1]).double()


class Branches(nn.Module):
    """Delays side by side and behind each other; a shortcut from tap 0; a delay behind weights, and one that skips."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(24, 8)
        self.head, self.skip = nn.Linear(16, 3), nn.Linear(8, 3)
        self.lif1, self.lif2, self.lif3 = (sltt.LIF(tau=2.0) for _ in range(3))
        # registered in another order than they run
        self.last, self.late, self.of_b, self.of_a = map(sltt.Delay, ([0, 2], [3], [1], [0, 2]))
        for layer in (self.a, self.b, self.c):
            layer.weight.data.mul_(2)

    def forward(self, x):
        a = self.of_a(self.lif1(self.a(x)))
        b = self.of_b(self.lif2(self.late(self.b(x))))
        c = self.lif3(self.c(torch.cat([a, b], 1)) + a[:, :8])
        return self.head(self.last(c)) + self.skip(b)


def drawn(seed):
    """A random network: depth, sizes, taps, normalisation, recurrence, and shortcuts from a tap 0."""
    draw, sizes = random.Random(seed), [6]
    layers = []
    for _ in range(draw.randint(1, 3)):
        taps = draw.sample(range(8), draw.randint(1, 3)) if draw.random() < 0.8 else None
        sizes.append(draw.randint(4, 9))
        layers += [sltt.Delay(taps)] if taps else []
        layers += [nn.Linear(sizes[-2] * len(taps or [0]), sizes[-1])]
        layers[-1].weight.data.mul_(2)
        layers += [nn.BatchNorm1d(sizes[-1], affine=False)] if draw.random() < 0.3 else []
        neuron = draw.choice([sltt.LIF, sltt.ALIF])(tau=2.0)
        again = draw.random() < 0.3
        layers += [sltt.Recurrent(neuron, nn.Linear(sizes[-1], sizes[-1])) if again else neuron]
        layers += [sltt.Delay([draw.randint(0, 3)])] if draw.random() < 0.3 else []
    return nn.Sequential(*layers, nn.Linear(sizes[-1], 3)).double()


def data(steps=11):
    torch.manual_seed(1)
    return 2 * torch.randn(steps, 5, 6, dtype=torch.float64), torch.randint(3, (5,))


NETWORKS = {
    "all": lambda: chain([0, 3], [0, 2, 5], [0, 4]),
    "hidden": lambda: chain(None, [0, 2], [1, 3]),
    "input": lambda: chain([0, 2], None, None),
    "longer than T": lambda: chain(None, [0, 30], [2, 40, 1]),
    "PLIF": lambda: chain(None, [1, 2], [0], neuron=sltt.PLIF),
    "ALIF": lambda: chain(None, [4, 2], [0, 3], neuron=sltt.ALIF),
    "branches": lambda: Branches().double(),
    **{f"random {seed}": partial(drawn, seed) for seed in range(4)},
}
FOLDS = [1, 2, 5, 11]
DRAWN = set(torch.randperm(11, generator=torch.Generator().manual_seed(3))[:4].tolist())
WINDOW = {"cut": lambda t, n: t // 4 != (t - n) // 4, "window": 4}
RULES = {
    "SLTT": (sltt.SLTT, {}, {}),
    "SLTT(none)": (sltt.SLTT, {"credit": "none"}, {"cut": lambda t, n: n > 0}),
    "SLTT(k)": (sltt.SLTT, {"k": 4}, {"trained": DRAWN}),
    "SLTT(k, rescale)": (sltt.SLTT, {"k": 4, "rescale": True}, {"trained": DRAWN}),
    "TBPTT": (sltt.TBPTT, {"window": 4}, WINDOW),
    "BPTT": (sltt.BPTT, {}, {"window": 100}),
    "BPTT(segment)": (sltt.BPTT, {"segment": 4}, {"window": 100}),
    "SLTT(recompute)": (sltt.SLTT, {"recompute": True}, {}),
    "OTTT": (sltt.OTTT, {}, {"traced": True}),
    "OTTT(none)": (sltt.OTTT, {"credit": "none"}, {"traced": True, "cut": lambda t, n: n > 0}),
    "OTTT(k)": (sltt.OTTT, {"k": 4}, {"traced": True, "trained": DRAWN}),
}


# every network with every rule, in turn with these folds; the first network with each. The λ of PLIF has a trace, too
CASES = [(n, r, FOLDS[(i + j) % 4]) for i, n in enumerate(NETWORKS) for j, r in enumerate(RULES)]
CASES = [(n, r, f) for n, r, f in CASES if n != "PLIF" or "OTTT" not in r]
CASES += [("all", rule, fold) for rule in RULES for fold in FOLDS if ("all", rule, fold) not in CASES]


@pytest.mark.parametrize(("network", "rule", "fold"), CASES)
def test_a_rule_is_exact_through_delays(network, rule, fold):
    (kind, settings, plain), (x, y) = RULES[rule], data()
    model = NETWORKS[network]()
    if kind is sltt.OTTT and any(isinstance(m, sltt.Recurrent) for m in model):
        fold = 1  # as it says, in float64
    got = found(model, kind(**settings, fold=fold), x, y, seed=3)
    want = expected(model, x, y, **plain) * (11 / 4 if "rescale" in rule else 1)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
