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
from tests.references import measured


class Taps(nn.Module):
    """A delay that keeps every input, in its graph; `cut(t, n)` says whether a tap is a constant."""

    def __init__(self, taps, cut):
        super().__init__()
        self.taps, self.cut, self.inputs = taps, cut, []

    def forward(self, x):
        self.inputs.append(x)
        t = len(self.inputs) - 1
        taps = {n: self.inputs[t - n] if t >= n else torch.zeros_like(x) for n in self.taps}
        return torch.cat([tap.detach() if self.cut(t, n) else tap for n, tap in taps.items()], 1)


def written_out(model, cut):
    """The network with delays and neurons of plain PyTorch."""
    model = copy.deepcopy(model)
    for name, module in [*model.named_modules()]:
        if isinstance(module, sltt.Delay | sltt.Neuron):
            parent, _, last = name.rpartition(".")
            plain = Taps(module.taps, cut) if isinstance(module, sltt.Delay) else Plain(module)
            setattr(model.get_submodule(parent), last, plain)
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

    for layer in [m for m in model.modules() if traced and isinstance(m, nn.Linear)]:
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
    """A random network: depth, sizes, taps before weights and behind neurons, normalisation, recurrence."""
    draw, sizes, layers = random.Random(seed), [6], []
    for _ in range(draw.randint(1, 3)):
        taps = draw.sample(range(8), draw.randint(1, 3)) if draw.random() < 0.8 else None
        sizes.append(draw.randint(4, 9))
        layers += [*([sltt.Delay(taps)] if taps else []), nn.Linear(sizes[-2] * len(taps or [0]), sizes[-1])]
        layers[-1].weight.data.mul_(2)
        layers += [nn.BatchNorm1d(sizes[-1], affine=False)] if draw.random() < 0.3 else []
        layers += [draw.choice([sltt.LIF, sltt.ALIF])(tau=2.0)]
        if draw.random() < 0.3:
            layers[-1] = sltt.Recurrent(layers[-1], nn.Linear(sizes[-1], sizes[-1]))
        layers += [sltt.Delay([draw.randint(0, 3)])] if draw.random() < 0.3 else []
    return nn.Sequential(*layers, nn.Linear(sizes[-1], 3)).double()


def data():
    torch.manual_seed(1)
    return 2 * torch.randn(11, 5, 6, dtype=torch.float64), torch.randint(3, (5,))


NETWORKS = {
    "all": lambda: chain([0, 3], [0, 2, 5], [0, 4]),
    "hidden": lambda: chain(None, [0, 2], [1, 3]),
    "longer than T": lambda: chain(None, [0, 30], [2, 40, 1]),
    "PLIF": lambda: chain(None, [1, 2], [0], neuron=sltt.PLIF),
    "branches": lambda: Branches().double(),
    **{f"random {seed}": partial(drawn, seed) for seed in range(4)},
}
FOLDS = [1, 2, 5, 11]
DRAWN = sltt.SLTT(k=4).draw(11, seed=4)  # without the first
RULES = {
    "SLTT": (sltt.SLTT, {}, {}),
    "SLTT(none)": (sltt.SLTT, {"credit": "none"}, {"cut": lambda t, n: n > 0}),
    "SLTT(k)": (sltt.SLTT, {"k": 4}, {"trained": DRAWN}),
    "TBPTT": (sltt.TBPTT, {"window": 4}, {"cut": lambda t, n: t // 4 != (t - n) // 4, "window": 4}),
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
    (kind, settings, plain), (x, y), model = RULES[rule], data(), NETWORKS[network]()
    if kind is sltt.OTTT and any(isinstance(m, sltt.Recurrent) for m in model.modules()):
        fold = 1  # as it says, in float64
    got = found(model, kind(**settings, fold=fold), x, y, seed=4)
    torch.testing.assert_close(got, expected(model, x, y, **plain), rtol=1e-9, atol=1e-12)


class Around(nn.Module):
    """A delay, and something that goes around it, or comes and goes."""

    def __init__(self, how):
        super().__init__()
        self.first, self.lif, self.how, self.steps = nn.Linear(6, 8), sltt.LIF(), how, 0
        self.late, self.later, self.head = sltt.Delay([2]), sltt.Delay([1]), nn.Linear(8, 3)
        self.double()

    def forward(self, x):
        s, self.steps = self.lif(self.first(x)), self.steps + 1
        late = self.late(s)
        if self.how == "two on one input" or (self.how == "later ones" and self.steps > 3):
            late = late + self.later(s if self.how == "two on one input" else late)
        return self.head(late + s if self.how == "shortcut" else late)


@pytest.mark.parametrize(
    ("how", "rule", "message"),
    [
        ("shortcut", sltt.SLTT(fold=1), r"the loss reads what is before late \(Delay\) not only .* from tap 0"),
        ("shortcut", sltt.OTTT(fold=1), "not only through it"),
        ("two on one input", sltt.SLTT(fold=2), r"later \(Delay\) reads what is before late .* join delays"),
        ("later ones", sltt.SLTT(fold=1), r"later \(Delay\) runs in another order than in the first time step"),
        ("", sltt.OTTT(online=True), "online updates the weights: use credit='none'"),
        ("", sltt.RateBased(), r"late \(Delay\)"),
    ],
    ids=str,
)
def test_where_the_error_cannot_come_back_in_time(how, rule, message):
    x, y = data()
    with pytest.raises((ValueError, RuntimeError), match=message):
        rule(Around(how), x, y, LOSS, update=lambda: None)
    if how:
        found(Around(how), sltt.SLTT(credit="none", fold=1), x, y)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_windows_of_one_step_keep_many_spikes_of_a_delay(depth):
    """Which are kept as bits."""
    x, y = torch.randn(5, 64, 6), torch.zeros(64).long()
    model = nn.Sequential(nn.Linear(6, 64), sltt.LIF(), sltt.Delay([depth]), nn.Linear(64, 3))
    got = [found(model, rule, x, y) for rule in (sltt.TBPTT(1, fold=1), sltt.SLTT(credit="none"))]
    torch.testing.assert_close(*got)


def test_mixed_keeps_a_delay_for_its_window():
    model, (x, y) = chain(None, [0, 2], [1, 3]), data()
    torch.testing.assert_close(found(model, sltt.Mixed({"2": "all", "5": "all"}), x, y), expected(model, x, y))


@pytest.mark.parametrize("rule", [sltt.SLTT(fold=1), sltt.SLTT(fold=4), sltt.OTTT(k=3), sltt.BPTT(segment=3)], ids=repr)
def test_a_delay_under_all_else(rule):
    """Lengths, autocast, scaled losses, a second batch, copies, evaluation, and inputs that the caller fills again."""
    model, (x, y) = chain([0, 3], [0, 2], [1, 4]), data()
    lengths = [11, 4, 7, 1, 5]
    cut = x * (torch.arange(11)[:, None, None] < torch.tensor(lengths)[:, None])
    padded = found(model, rule, cut, sltt.Padded(y, lengths), seed=1)
    torch.testing.assert_close(padded, found(model, rule, cut + (cut == 0), sltt.Padded(y, lengths), seed=1))
    scaled = found(model, rule, x, y, seed=1, backward=lambda value: (1024 * value).backward())
    torch.testing.assert_close(scaled / 1024, found(model, rule, x, y, seed=1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = found(model.float(), rule, x.float(), y, seed=1)
    assert torch.cosine_similarity(half, found(model, rule, x.float(), y, seed=1), 0) > 0.9
    assert not [name for name in model.state_dict() if name[0] not in "147"]
    logits, frame = sltt.unroll(model.double(), x, fold=4), torch.empty_like(x[0])
    twin = written_out(model, lambda t, n: False)
    torch.testing.assert_close(logits, torch.stack([twin(x_t) for x_t in x]).detach())
    model(x[0])
    model = copy.deepcopy(model)  # in the middle of a sequence
    torch.testing.assert_close(torch.stack([model(frame.copy_(x_t)) for x_t in x[1:]]).detach(), logits[1:])


def test_spikes_are_kept_as_bits_and_other_values_as_they_are():
    delay, x = sltt.Delay([0, 2]), (torch.rand(5, 64, 128) < 0.2).float()
    x[2] = torch.randn(64, 128)
    given = torch.stack([delay.advance(x_t, cut=True) for x_t in x])
    assert [type(kept).__name__ for kept in delay.past] == ["Spikes", "Spikes"]
    torch.testing.assert_close(given, torch.cat([x, torch.cat([torch.zeros(2, 64, 128), x[:-2]])], 2))
    with pytest.raises(ValueError, match="keeps a state"):
        delay(x[0][:3])


def test_statistics_of_a_norm_change_while_graphs_wait():
    """Images have the same memory format in each time step, also where a delay has zeros still."""
    layers, (x, y) = [], (2 * torch.randn(6, 16, 2, 16, 16), torch.randint(3, (16,)))
    for channels in (2, 64):
        layers += [nn.Conv2d(channels, 32, 3, padding=1), nn.BatchNorm2d(32), sltt.LIF(), sltt.Delay([0, 3])]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 3))
    want, formats = found(model, sltt.SLTT(fold=6), x, y), []
    model[4].register_forward_hook(lambda layer, args, out: formats.append(args[0].stride()))
    torch.testing.assert_close(found(model, sltt.SLTT(fold=1), x, y), want, rtol=1e-3, atol=1e-5)
    assert len(set(formats)) == 1


@pytest.mark.parametrize(
    "rule",
    [
        sltt.SLTT(),
        sltt.OTTT(),
        *(pytest.param(rule(fold=1), marks=pytest.mark.slow) for rule in (sltt.SLTT, sltt.OTTT)),
    ],
    ids=repr,
)
def test_memory_does_not_grow_with_time(rule):
    model = nn.Sequential(*chain(None, [0, 2], [1, 3], sizes=(6, 64, 64, 3))).float()
    x, y = torch.randn(200, 64, 6), torch.randint(3, (64,))
    steps = (40, 120) if rule.fold == 1 else (100, 200)  # of several calls
    peaks = [measured(rule, model, x[:t], y, mean_logits=True) for t in steps]
    assert peaks[1] <= 1.002 * peaks[0]


def test_recurrent_weights_have_their_traces_in_steps_without_a_backward():
    recurrent, (x, y) = sltt.Recurrent(sltt.LIF(tau=2.0), nn.Linear(8, 8)), data()
    model = nn.Sequential(nn.Linear(6, 8), recurrent, nn.Linear(8, 3))
    want = expected(model.double(), x, y, traced=True, trained=DRAWN).float()
    for fold in (1, 4):  # in float32 a kernel runs the layer
        got = found(model.float(), sltt.OTTT(k=4, fold=fold), x.float(), y, seed=4)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
