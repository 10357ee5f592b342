import pytest
import torch

from sltt import kernels
from sltt.kernels.neuron import steady
from sltt.neurons import lif_step
from tests.conftest import SURROGATES
from tests.kernels.steps import CONSTANTS, SIZES, compiling, layouts


@pytest.mark.parametrize("steps", [8, 19])
@pytest.mark.parametrize("learnable", [False, True], ids=["constant", "learnable"])
@pytest.mark.parametrize("constants", CONSTANTS, ids=str)
def test_steps_under_a_steady_current_equal_the_plain_ones(constants, learnable, steps):
    with kernels.using(compile="off"):
        check_steady(constants, learnable, steps)


def test_compiled_steps_under_a_steady_current_equal_the_plain_ones(monkeypatch):
    monkeypatch.setattr(steady, "UNROLLED", 2)  # compiles in a third of the time of four
    with compiling("on"):
        check_steady(CONSTANTS[7], True, 4)


def check_steady(constants, learnable, steps):
    """Each neuron's derivative of its rate is the gradient, through time, of the mean of its spikes."""
    constants = {"v_threshold": 0.8, "surrogate": SURROGATES[0], **constants}
    for n in SIZES:
        x = (1.5 * torch.randn(n, dtype=torch.float64)).requires_grad_()
        decay = torch.full_like(x, 0.6).requires_grad_()
        v, spikes = torch.full_like(x, 0.3), []
        for _ in range(steps):
            s, v = lif_step(v, x, decay=decay, **constants)
            spikes.append(s)
        rate = sum(spikes) / steps
        by_input, by_decay = torch.autograd.grad(rate.sum(), (x, decay))
        step = kernels.NeuronStep(decay=None if learnable else 0.6, **constants)
        given = torch.tensor(0.6, dtype=torch.float64) if learnable else None
        seen = []
        found = kernels.steady_steps(step, x.detach(), steps, torch.float64, 0.3, given, seen.append)
        assert torch.equal(found.rate, rate)
        assert torch.equal(torch.cat(seen), torch.cat(spikes))
        torch.testing.assert_close(found.by_input, by_input, rtol=1e-10, atol=1e-12)
        assert len(found.by_parameters) == learnable
        for by in found.by_parameters:
            torch.testing.assert_close(by, by_decay, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("layout", layouts())
def test_steps_under_a_steady_current_in_any_memory_format(layout, compile_mode):
    step = kernels.NeuronStep(decay=0.5, v_threshold=1.0, surrogate=SURROGATES[0], **CONSTANTS[0])
    x = layouts()[layout]
    seen = []
    found, expected = (
        kernels.steady_steps(step, c, 3, torch.float32, 0.0, see=seen.append) for c in (x, x.contiguous())
    )
    torch.testing.assert_close(found.rate, expected.rate)
    torch.testing.assert_close(found.by_input, expected.by_input)
    assert torch.equal(*seen)
