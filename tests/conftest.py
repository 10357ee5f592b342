import copy
import functools
import importlib.metadata
import itertools
import os
import sys

os.environ["OMP_NUM_THREADS"] = "1"  # the tests, and the processes that they start, run beside each other on two cores

import hypothesis
import pytest
import torch
from torch import nn

import sltt
from sltt.kernels.layers import sparse

hypothesis.settings.register_profile("no time limit", deadline=None, max_examples=40)
hypothesis.settings.load_profile("no time limit")

# what takes a third of the time of a small training, and changes nothing here
os.fsync = lambda descriptor: None  # tests kill processes, and no machine
importlib.metadata.entry_points = functools.cache(importlib.metadata.entry_points)  # which Fabric reads each time
if not torch.accelerator.is_available():  # it formats a stack for each absent device
    torch.manual_seed = torch.default_generator.manual_seed

# what forks a process with threads, reads /proc or runs bash
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="it needs Linux")
LOSS = sltt.losses.CrossEntropyMSE()
SURROGATES = [sltt.surrogates.Triangle(), sltt.surrogates.Triangle(gamma=0.7), sltt.surrogates.Rectangle()]
SURROGATES += [sltt.surrogates.Sigmoid(), sltt.surrogates.ArcTan(), sltt.surrogates.FastSigmoid()]
SURROGATES += [sltt.surrogates.Exponential(), sltt.surrogates.Gaussian()]
SURROGATES += [sltt.surrogates.Above(sltt.surrogates.Triangle())]
NEURONS = {
    "LIF": sltt.LIF,
    "LIF(tau=2)": lambda **kwargs: sltt.LIF(tau=2.0, **kwargs),
    "IF": sltt.IF,
    "PLIF": lambda **kwargs: sltt.PLIF(tau=2.0, **kwargs),
}
RULES = {
    "BPTT": sltt.BPTT(),
    "BPTT(segment=2)": sltt.BPTT(segment=2),
    "BPTT(recompute=True)": sltt.BPTT(recompute=True),
    "BPTT(fold=4)": sltt.BPTT(fold=4),
    "BPTT(segment=2, fold=2)": sltt.BPTT(segment=2, fold=2),
    "TBPTT(2)": sltt.TBPTT(2),
    "TBPTT(3, fold=2)": sltt.TBPTT(3, fold=2),
    "SLTT": sltt.SLTT(),
    "SLTT(recompute)": sltt.SLTT(recompute=True),
    "SLTT(fold=3)": sltt.SLTT(fold=3),
    "SLTT(hoist)": sltt.SLTT(hoist=True),
    "BPTT(hoist)": sltt.BPTT(hoist=True),
    "SLTT(k=1)": sltt.SLTT(k=1),
    "OTTT": sltt.OTTT(decay=0.5),
    "OTTT(k=2)": sltt.OTTT(decay=0.5, k=2),
    "OTTT(inputs=False)": sltt.OTTT(decay=0.5, inputs=False),
    "RateBased": sltt.RateBased(),
    "RateBased(steady)": sltt.RateBased(steady=True),
    "Mixed": sltt.Mixed({"*[12]": "all"}),  # the first neurons of the networks in the tests
    "Mixed(default=2)": sltt.Mixed({"*[12]": 3}, default=2),
    "SLTT(k=2, rescale)": sltt.SLTT(k=2, rescale=True),
    "SLTT(k=2, fold=4)": sltt.SLTT(k=2, fold=4),
    "SLTT(k=2, hoist)": sltt.SLTT(k=2, hoist=True),
}
# the first rule of each class, and those that run a batch in another way: for tests of what is around a rule
KINDS = list({type(rule): name for name, rule in reversed(RULES.items())}.values())
KINDS += ["BPTT(segment=2)", "TBPTT(3, fold=2)", "SLTT(hoist)", "SLTT(k=1)", "RateBased(steady)"]
each_kind = pytest.mark.parametrize("rule", [RULES[name] for name in KINDS], ids=KINDS)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=NEURONS.values(), ids=NEURONS.keys())
def neuron(request):
    return request.param


@pytest.fixture(params=[("PLIF", "LIF"), ("LIF(tau=2)", "IF")], ids="+".join)
def neurons(request):
    """Make neurons of two kinds in turn, for the two layers of a network."""
    kinds = itertools.cycle(NEURONS[name] for name in request.param)
    return lambda: next(kinds)()


@pytest.fixture(params=RULES.values(), ids=RULES.keys())
def rule(request):
    return request.param


@pytest.fixture
def sparse_calls(monkeypatch):
    """The calls of layers that ran sparse from here on: which layer, forward or gradient."""
    seen = []
    forward, gradient = sparse.forward, sparse.weight_gradient
    monkeypatch.setattr(sparse, "forward", lambda *a: (seen.append(("forward", a[0])), forward(*a))[1])
    monkeypatch.setattr(sparse, "weight_gradient", lambda *a: (seen.append(("grad", a[0])), gradient(*a))[1])
    return seen


@pytest.fixture
def elsewhere(monkeypatch):
    """Tensors say that they are on another device than the CPU: a GPU's code runs, with the CPU's operations."""
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)


def small_network(neuron=sltt.LIF, norm=False, dropout=0.0):
    """Two layers of neurons on inputs [B, 6], with weights large enough for both to spike; in float64."""
    layers = [nn.Linear(6, 8), nn.BatchNorm1d(8) if norm else nn.Identity(), neuron(), sltt.Dropout(dropout)]
    layers += [nn.Linear(8, 7), neuron(), nn.Linear(7, 3)]
    for layer in layers:
        if isinstance(layer, nn.Linear):
            layer.weight.data.mul_(3)
    return nn.Sequential(*layers).double()


def batch(steps=4, size=5):
    """A sequence [T, B, 6], and labels [B]."""
    return 2 * torch.randn(steps, size, 6, dtype=torch.float64), torch.randint(3, (size,))


def gradient(model):
    """The gradients in a model as one vector."""
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def gradients(model, rule, x, y, loss=None, **kwargs):
    """The gradients that a rule leaves in a copy of the model, as one vector, and what it returned."""
    model = copy.deepcopy(model)
    out = rule(model, x, y, loss or sltt.losses.CrossEntropyMSE(), **kwargs)
    return gradient(model), out


def seeded(call, *args, **kwargs):
    torch.manual_seed(1)
    return call(*args, **kwargs)
