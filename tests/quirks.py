"""Networks whose forward does more than layers do, at random, against the plain loop of docs.

python tests/quirks.py --count 2000
"""

import argparse
import random
import sys
from collections import Counter

import torch
import torch.nn.functional as F
from torch import nn

import sltt

SIDE = torch.linspace(-1, 1, 400).view(20, 20).sin()


class Net(nn.Module):
    """Two layers of neurons, with `quirks`: functions of the network and what passes at a place in it."""

    def __init__(self, width=20, kind="plain", shared=False):
        super().__init__()
        self.a, self.n1 = nn.Linear(6, width), sltt.LIF(tau=2.0)
        self.norm = nn.BatchNorm1d(width) if kind == "norm" else nn.Identity()
        self.b = self.a2 = nn.Linear(width, width)
        self.n2 = sltt.Recurrent(sltt.LIF(tau=3.0), nn.Linear(width, width)) if kind == "recurrent" else sltt.PLIF(2.0)
        self.o, self.shared, self.t, self.mix, self.log = nn.Linear(width, 3), shared, 0, 0.0, {"seen": 0}
        self.mixes = [0.0]
        self.norms = nn.ModuleList(nn.BatchNorm1d(width, affine=False) for _ in range(12))
        self.register_buffer("mean", torch.zeros(width))
        self.quirks = {}

    def forward(self, x):
        h = self.at("current", self.norm(self.a(3 * x)))
        s = self.at("spikes", self.n1(h))
        h = self.b(s) + (0.3 * self.a2(s) if self.shared else 0)
        return self.at("end", self.o(self.n2(self.at("hidden", h))))

    def at(self, place, h):
        for quirk in self.quirks.get(place, ()):
            h = quirk(self, h)
        return h


def attribute(**values):
    """Change attributes of the first neurons, or of the network, before they are used."""

    def quirk(net, h):
        for name, change in values.items():
            owner = net.n1 if hasattr(net.n1, name) else net
            setattr(owner, name, change(getattr(owner, name)))
        return h

    return quirk


def without_graph(change):
    def quirk(net, h):
        with torch.no_grad():
            change(net, h)
        return h

    return quirk


def every_other(net, h):
    net.t += 1
    return h.flip(1) if net.t % 2 else h


def counted(net, h):
    net.log["seen"] += 1
    return h * (1 + 0.1 * net.log["seen"])


def hooked(how):
    def quirk(net, h):
        h = h * 1
        if h.requires_grad:
            how(h)
        return h

    return quirk


def norm_of_step(net, h):
    net.t += 1
    return net.norms[(net.t - 1) % 12](h)


def set_state(change):
    def quirk(net, h):
        net.n1.v = change(net.n1.v)
        return h

    return quirk


def damp(net, h):
    if isinstance(net.n2, sltt.Recurrent):
        net.n2.s = 0.5 * net.n2.s
    return h


QUIRKS = {  # what, and where in the network
    "threshold grows": ("current", attribute(v_threshold=lambda v: 1.2 * v)),
    "tau changes": ("current", attribute(tau=lambda tau: tau + 0.5)),
    "reset changes": ("spikes", attribute(v_reset=lambda v: None if v is not None else 0.0)),
    "state clamped": ("spikes", set_state(lambda v: v.clamp(max=0.3))),
    "state clamped never": ("spikes", set_state(lambda v: v.clamp(min=-1e6))),
    "state detached": ("spikes", set_state(lambda v: v.detach())),
    "state damped": ("end", damp),
    "weights change by data": ("end", lambda net, h: (net.b.weight.data.mul_(1.05), h)[1]),
    "recurrent weights change": ("end", without_graph(lambda net, h: [p.data.mul_(1.1) for p in net.n2.parameters()])),
    "every other step": ("current", every_other),
    "counts in a dictionary": ("current", counted),
    "mixes samples": ("current", lambda net, h: h - 0.2 * h.mean(0)),
    "mixes a little": ("hidden", lambda net, h: h - 3e-5 * h.flip(0)),
    "mixes by a flag": ("hidden", lambda net, h: h - net.mix * h.mean(0)),
    "mixes by a list": ("hidden", lambda net, h: h - net.mixes[0] * h.mean(0)),
    "mixes neurons that fired": ("spikes", lambda net, h: torch.where(h == 1, h - h.mean(0), h)),
    "knows the place in the batch": ("current", lambda net, h: h + 0.3 * SIDE[: len(h), :1].to(h).expand_as(h[:20])),
    "mean of the past": ("current", without_graph(lambda net, h: net.mean.mul_(0.5).add_(h.mean(0)))),
    "reads the mean": ("current", lambda net, h: h + net.mean),
    "a norm for each step": ("current", norm_of_step),
    "noise": ("current", lambda net, h: h + 0.3 * torch.rand_like(h)),
    "functional dropout": ("hidden", lambda net, h: F.dropout(h, 0.3)),
    "hook on a tensor": ("hidden", hooked(lambda h: h.register_hook(lambda g: 0.5 * g))),
    "hook of the batch on a tensor": ("hidden", hooked(lambda h: h.register_hook(lambda g: g - g.mean(0)))),
    "retain_grad": ("current", hooked(lambda h: h.retain_grad())),
    "decides by a value": ("current", lambda net, h: -h if h.max() > 4 else h),
}
HOOKS = {
    "forward": lambda m: m.register_forward_hook(lambda m, i, o: 0.8 * o),
    "forward of the batch": lambda m: m.register_forward_hook(lambda m, i, o: o - 0.1 * o.mean(0)),
    "forward pre": lambda m: m.register_forward_pre_hook(lambda m, i: (0.9 * i[0],)),
    "backward": lambda m: m.register_full_backward_hook(lambda m, gi, go: None if gi[0] is None else (0.5 * gi[0],)),
    "backward pre": lambda m: m.register_full_backward_pre_hook(lambda m, go: (0.5 * go[0],)),
    "weight": lambda m: next(m.parameters(), nn.Parameter(torch.ones(1))).register_hook(lambda g: g.clamp(-1e-3, 1e-3)),
}
BETWEEN = {  # what changes between two batches
    "nothing": lambda net: None,
    "a flag": lambda net: setattr(net, "mix", 0.5),
    "a threshold": lambda net: setattr(net.n1, "v_threshold", 0.7),
    "a module": lambda net: setattr(net, "b", nn.Linear(*net.b.weight.shape[::-1]).to(net.b.weight)),
    "neurons": lambda net: setattr(net, "n1", sltt.LIF(tau=3.0)),
    "the mode": lambda net: net.eval(),
    "a value in a list": lambda net: net.mixes.__setitem__(0, 0.5),
    "a hook": lambda net: net.a.register_forward_hook(lambda m, i, o: o - 0.3 * o.mean(0)),
    "a hook on a weight": lambda net: net.a.weight.register_hook(lambda g: g.clamp(-1e-3, 1e-3)),
    "a parametrization": lambda net: nn.utils.parametrizations.weight_norm(net.b),
    "a frozen layer": lambda net: net.a.requires_grad_(False),
    "a forward": lambda net: setattr(net.norm, "forward", lambda h: h - 0.3 * h.mean(0)),
}


class Clock:
    """A loss with weights over time."""

    def __init__(self, net):
        self.t = 0

    def __call__(self, o, y):
        self.t += 1
        return F.cross_entropy(o, y) * (1 + self.t % 5)


LOSSES = {
    "plain": lambda net: F.cross_entropy,
    "lambda": lambda net: lambda o, y: F.cross_entropy(o, y) + 0.1 * o.square().mean(),
    "clock": Clock,
    "state": lambda net: lambda o, y: F.cross_entropy(o, y) + 0.3 * net.n1.v.square().mean(),
    "weights": lambda net: lambda o, y: F.cross_entropy(o, y) + 0.1 * net.b.weight.square().mean(),
}
RULES = {  # with the steps of a window
    "SLTT": (sltt.SLTT(), 1),
    "BPTT": (sltt.BPTT(), None),
    "TBPTT(2)": (sltt.TBPTT(2), 2),
    "BPTT(segment=2)": (sltt.BPTT(segment=2), None),
    "BPTT(segment=1, checkpoints=1)": (sltt.BPTT(segment=1, checkpoints=1), None),
    "SLTT(fold=3)": (sltt.SLTT(fold=3), 1),
    "BPTT(fold=2)": (sltt.BPTT(fold=2), None),
    "SLTT(recompute)": (sltt.SLTT(recompute=True), 1),
    "Mixed": (sltt.Mixed({"*": "all"}), None),
    "unroll": (None, None),
}


def plain_loop(net, x, y, loss, window):
    """A time step in a plain call; the graph is cut behind each window."""
    sltt.reset(net)
    outputs, total, waiting = [], 0.0, 0.0
    for t, x_t in enumerate(x):
        o = net(x_t)
        outputs.append(o.detach().clone())
        if loss is None:
            continue
        value = loss(o, y) / len(x)
        total, waiting = total + value.detach(), waiting + value
        if (t + 1) % (window or len(x)) == 0 or t + 1 == len(x):
            waiting.backward()
            waiting = 0.0
            sltt.detach(net)
    sltt.reset(net)
    return [torch.as_tensor(total), torch.stack(outputs)]


def run(net, rule, window, loss, between, dtype):
    """What two batches give, and leave in the network: by a rule, or by the plain loop where it is "plain"."""
    found, loss = [], loss(net)
    for i in range(2):
        generator = torch.Generator().manual_seed(i)
        x, y = 2 * torch.randn(6, 5, 6, generator=generator).to(dtype), torch.randint(3, (5,), generator=generator)
        torch.manual_seed(i)
        if window == "unroll":
            with torch.no_grad():
                found += [sltt.unroll(net, x)] if rule != "plain" else plain_loop(net, x, y, None, None)[1:]
        elif rule == "plain":
            found += plain_loop(net, x, y, loss, window)
        else:
            found += [*rule(net, x, y, loss)]
        torch.manual_seed(7)
        between(net)
    gradients = [p.grad for p in net.parameters()]
    return [*found, *gradients, *net.parameters(), *(b.to(dtype) for b in net.buffers() if b.numel())]


def case(quirks=(), hook=None, at="b", between="nothing", loss="plain", rule="SLTT", dtype=torch.float64, **network):
    """Return "equal", "refused" or "different" for a network with these quirks, under a rule."""

    def make():
        torch.manual_seed(3)
        net = Net(**network).to(dtype)
        for name in quirks:
            place, quirk = QUIRKS[name]
            net.quirks.setdefault(place, []).append(quirk)
        if hook:
            HOOKS[hook](getattr(net, at))
        return net

    by, window = RULES[rule]
    window = "unroll" if by is None else window
    on_weight = hook == "weight" or between == "a hook on a weight"
    if on_weight and ("segment" in rule or rule == "Mixed"):  # it sees the gradient of each of their backwards
        return "not run"
    try:
        expected = run(make(), "plain", window, LOSSES[loss], BETWEEN[between], dtype)
    except Exception:  # nothing to compare with
        return "not run"
    try:
        found = run(make(), by, window, LOSSES[loss], BETWEEN[between], dtype)
    except (ValueError, RuntimeError):
        return "refused"
    tolerance = 1e-9 if dtype == torch.float64 else 2e-3
    for a, b in zip(found, expected, strict=True):
        a, b = (torch.zeros(()) if one is None else one.detach() for one in (a, b))
        if not torch.allclose(*torch.broadcast_tensors(a.double(), b.double()), rtol=tolerance, atol=tolerance):
            return "different"
    return "equal"


def drawn(seed):
    """Settings of a case, by a seed."""
    r = random.Random(seed)
    wide = r.random() < 0.15
    return {
        "quirks": sorted(r.sample(sorted(QUIRKS), r.choice([0, 1, 1, 1, 2, 3]))),
        "hook": r.choice([None, None, *HOOKS]),
        "at": r.choice(["a", "b", "norm", "n1", "o"]),
        "between": r.choice(sorted(BETWEEN)),
        "loss": r.choice(["plain", "plain", *LOSSES]),
        "rule": r.choice(sorted(RULES)),
        "dtype": torch.float32 if wide else torch.float64,
        "width": 256 if wide else 20,
        "kind": r.choice(["plain", "norm", "recurrent"]),
        "shared": r.random() < 0.2,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0)
    given = parser.parse_args()
    results = Counter()
    for seed in range(given.first, given.first + given.count):
        results[result := case(**drawn(seed))] += 1
        if result == "different":
            print(seed, drawn(seed), flush=True)
    print(dict(results))
    sys.exit(results["different"] > 0)
