"""Rules at sizes where every fast path is on by default, against a loop of the plain equations under autograd."""

import copy

import pytest
import torch
from torch import nn

import sltt
from sltt.kernels import native
from sltt.kernels.neuron import native_step, step
from sltt.kernels.spikes import looks
from tests.conftest import LOSS, gradient
from tests.neurons.plain import plain
from tests.references import by_hand, every

pytestmark = pytest.mark.skipif(native.problem() is not None, reason=str(native.problem()))

STEPS = 4
RULES = {
    "SLTT": (sltt.SLTT(), every(1)),
    "SLTT(fold=3)": (sltt.SLTT(fold=3), every(1)),
    "SLTT(recompute)": (sltt.SLTT(recompute=True), every(1)),
    "TBPTT(2)": (sltt.TBPTT(2), every(2)),
    "BPTT": (sltt.BPTT(), lambda model, t: None),
    "BPTT(fold=4)": (sltt.BPTT(fold=4), lambda model, t: None),
    "BPTT(segment=2)": (sltt.BPTT(segment=2), lambda model, t: None),
    "Mixed": (sltt.Mixed({"*": 2}), every(2)),
}
NEURONS = {
    "LIF": lambda: sltt.LIF(tau=2.0),
    "LIF, hard": lambda: sltt.LIF(tau=2.0, v_reset=0.0, detach_reset=True),
    "PLIF": lambda: sltt.PLIF(tau=2.0),
    "ALIF": lambda: sltt.ALIF(tau=2.0),
    "CubaLIF": lambda: sltt.CubaLIF(tau=3.0, tau_syn=2.0),
}


def network(neuron):
    """Convolutions on images and on spikes, each behind a BatchNorm; pooling; a linear layer on spikes."""
    torch.manual_seed(0)
    layers = [
        *(nn.Conv2d(2, 64, 3, padding=1), nn.BatchNorm2d(64), neuron()),
        *(nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), neuron(), nn.MaxPool2d(2)),
        *(nn.Conv2d(64, 64, 3, padding=1), neuron(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(1024, 256), neuron()),
        nn.Linear(256, 5),
    ]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def batch():
    x = 1.5 * torch.randn(STEPS * 8, 2, 16, 16).contiguous(memory_format=torch.channels_last)
    return x.unflatten(0, (STEPS, 8)), torch.randint(5, (8,))


@pytest.fixture
def ran(monkeypatch, sparse_calls):
    """How often each fast path ran."""
    calls = dict.fromkeys(("native", "normed", "looks"), 0)

    def counted(name, owner, attribute):
        real = getattr(owner, attribute)

        def call(*args, **kwargs):
            found = real(*args, **kwargs)
            calls[name] += found is not None
            return found

        monkeypatch.setattr(owner, attribute, call)

    counted("looks", looks, "Spikes")
    counted("normed", step, "prepare_norm")
    real = native_step.NativeStep.forward
    monkeypatch.setattr(
        native_step.NativeStep,
        "forward",
        lambda self, *args: (calls.__setitem__("native", calls["native"] + 1), real(self, *args))[1],
    )
    return lambda: {**calls, "sparse": len(sparse_calls)}


CASES = [(rule, "LIF") for rule in RULES] + [(r, n) for r in ("SLTT", "BPTT(fold=4)") for n in NEURONS if n != "LIF"]


@pytest.mark.parametrize(("rule", "neuron"), CASES)
def test_fast_paths_have_the_gradient_of_the_plain_equations(rule, neuron, ran):
    native.library()
    rule, cut = RULES[rule]
    model, (x, y) = network(NEURONS[neuron]), batch()
    reference = plain(copy.deepcopy(model))
    rule(model, x, y, LOSS)
    seen = ran()
    assert all(seen[path] > 0 for path in ("looks", "sparse"))
    assert (seen["native"] > 0) == isinstance(model[2], sltt.LIF | sltt.PLIF | sltt.CubaLIF)
    assert (seen["normed"] > 0) == isinstance(model[2], sltt.LIF)
    expected, _ = by_hand(reference, x, y, cut)
    found = gradient(model)
    assert found.shape == expected.shape
    error = (found - expected).norm() / expected.norm()
    assert error < 1e-2, error  # sums in another order, by which a spike may differ
