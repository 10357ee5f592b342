"""Credit through delays, beside one graph of plain PyTorch over all time steps."""

import copy

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


def expected(model, x, y, *, window=1, cut=lambda t, n: False, trained=None, traced=None):
    """Σ_t over one graph, whose states are constants behind each window.

    `traced`: λ by the name of a linear layer, whose weight then has Σ_t E[t] x̂[t]ᵀ, E the error of its output.
    """
    model, total, seen = written_out(model, cut), 0, {}
    for name, layer in model.named_modules():
        if traced is not None and isinstance(layer, nn.Linear):
            seen[name] = []
            layer.register_forward_hook(
                lambda _, x, y, name=name: (
                    seen[name].append((x[0].detach(), y)) or (y.requires_grad and y.retain_grad())
                )
            )
    for t, x_t in enumerate(x):
        with torch.set_grad_enabled(trained is None or t in trained):
            value = LOSS(model(x_t), y) / len(x)
        total = total + (value if value.requires_grad else 0)
        if (t + 1) % window == 0:
            sltt.detach(model)
    total.backward()
    for name, steps in seen.items():
        layer, trace, ones, w, b = model.get_submodule(name), 0, 0, 0, 0
        for read, out in steps:
            trace, ones = traced[name] * trace + read, traced[name] * ones + 1
            if out.grad is not None:
                w, b = w + out.grad.T @ trace, b + ones * out.grad.sum(0)
        layer.weight.grad, layer.bias.grad = w, b
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
}


@pytest.mark.parametrize("fold", FOLDS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("network", NETWORKS)
def test_a_rule_is_exact_through_delays(network, rule, fold):
    (kind, settings, plain), (x, y) = RULES[rule], data()
    model = NETWORKS[network]()
    got = found(model, kind(**settings, fold=fold), x, y, seed=3)
    want = expected(model, x, y, **plain) * (11 / 4 if "rescale" in rule else 1)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
