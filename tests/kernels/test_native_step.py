"""The neuron's step in native code against the plain one: the same bits."""

import itertools
import math

import pytest
import torch

import sltt
from sltt import kernels, surrogates
from sltt.kernels import native
from sltt.kernels.neuron import native_step
from sltt.kernels.spikes.looks import BITS, PACK_FROM
from sltt.neurons import lif_step
from tests.conftest import SURROGATES
from tests.kernels.steps import Steep, threads

pytestmark = pytest.mark.skipif(native.problem() is not None, reason=str(native.problem()))
CONSTANTS = list(itertools.product([None, 0.0, -0.3], [False, True], [False, True]))
DTYPES = torch.float32, torch.bfloat16
DIFFERENTIATED = tuple({*native_step.SURROGATES} - {surrogates.Sigmoid, surrogates.Exponential, surrogates.Gaussian})


@pytest.fixture
def calls(monkeypatch):
    """Names of the native functions that were called."""
    seen = []
    for name in ("forward", "gradient"):
        function = getattr(native_step.NativeStep, name)
        monkeypatch.setattr(native_step.NativeStep, name, lambda *a, n=name, f=function: (seen.append(n), f(*a))[1])
    return seen


def run(mode, constants, surrogate, n, learnable=False, dtype=torch.float32, steps=1, cut=False, **more):
    """Spikes, membrane potentials, gradients and bits of some steps."""
    torch.manual_seed(0)
    v, x = torch.randn(n, requires_grad=True), (1.5 * torch.randn(steps * n)).to(dtype).requires_grad_()
    decay = torch.tensor(0.6, requires_grad=True) if learnable else None
    fixed = kernels.NeuronStep(None if learnable else 0.6, 0.8, *constants, surrogate, **more)
    with kernels.using(compile=mode):
        s, v_next = kernels.neuron_step(fixed, v, x, decay, steps, cut)
        ((s * torch.randn(s.shape, dtype=dtype)).sum() + (v_next * torch.randn(n)).sum()).backward()
        with torch.no_grad():
            again = kernels.neuron_step(fixed, v, x, decay, steps)
    found = [s, v_next, x.grad, v.grad, *again]
    found += [decay.grad] if learnable else []
    return found + ([] if (bits := getattr(s.untyped_storage(), BITS, None)) is None else [bits])


def check(*args, **kwargs):
    plain, fast = (run(mode, *args, **kwargs) for mode in ("off", "on"))
    assert all(torch.equal(a, b) for a, b in zip(plain, fast, strict=True))


@pytest.mark.parametrize("learnable", [False, True], ids=["constant", "learnable"])
@pytest.mark.parametrize("constants", CONSTANTS, ids=str)
def test_every_reset(constants, learnable, calls):
    for dtype, steps in itertools.product(DTYPES, (1, 3)):
        check(constants, SURROGATES[0], PACK_FROM + 8, learnable, dtype, steps)
    check(constants, SURROGATES[0], PACK_FROM + 8, learnable, steps=3, subtract=1.1)
    check(constants, SURROGATES[0], PACK_FROM + 8, learnable, steps=3, most=2.0)
    assert {*calls} == {"forward", "gradient"}


@pytest.mark.parametrize("surrogate", [s for s in SURROGATES if isinstance(s, DIFFERENTIATED)], ids=repr)
def test_every_surrogate(surrogate, calls):
    for s in (surrogate, sltt.surrogates.Above(surrogate)):
        check(CONSTANTS[0], s, 1023)
    assert {*calls} == {"forward", "gradient"}


@pytest.mark.parametrize(
    ("constants", "surrogate"),
    [(c, SURROGATES[0]) for c in CONSTANTS]
    + [(CONSTANTS[-1], s) for s in SURROGATES[1:] if isinstance(s, DIFFERENTIATED)],
    ids=str,
)
def test_a_steady_current(constants, surrogate):
    """The derivative of the rate is the gradient, through time, of the mean of the spikes."""
    shapes = (0,), (1,), (63,), (64,), (513,), (3 * 2**14 + 24,), (4, 3, 8, 9)
    v_reset, *flags = constants
    for shape, dtype, s in itertools.product(shapes, DTYPES, (surrogate, sltt.surrogates.Above(surrogate))):
        given = (1.5 * torch.randn(shape)).to(dtype)
        given.view(-1)[::7] = 1.0
        given = given.transpose(0, -1)  # not in the order of its dimensions
        x, rate, decay = given.float().requires_grad_(), torch.tensor(0.5), torch.full_like(given, 0.5).float()
        v, total = torch.full_like(x, v_reset or 0.0), 0.0
        fixed = {"v_reset": v_reset, "decay_input": flags[0], "detach_reset": flags[1], "surrogate": s}
        for _ in range(5):
            fired, v = lif_step(v, x, decay=decay.requires_grad_(), **fixed)
            total = total + fired
        slopes = torch.autograd.grad((total / 5).sum(), (x, decay))
        for learned in (None, rate):
            step = kernels.NeuronStep(None if learned is rate else 0.5, 1.0, **fixed)
            with kernels.using(compile="on"):
                mean, *found = kernels.steady_means(step, given, 5, torch.float32, v_reset or 0.0, learned)
            assert torch.equal(mean, (total / 5).to(dtype))
            torch.testing.assert_close(found, [slopes[0].to(dtype), slopes[1]][: len(found)])
            assert len(found) == 1 + (learned is rate)


@pytest.mark.parametrize("n", [0, 1, 7, 8, 511, 4096, 5001, 3 * 2**14 + 24])
def test_any_size(n):
    check(CONSTANTS[0], SURROGATES[0], n, steps=2, cut=True)


def test_not_a_number_and_infinity():
    step = kernels.NeuronStep(0.5, 1.0, None, False, False, sltt.surrogates.Triangle())
    results = []
    for mode in ("off", "on"):
        x = torch.tensor([float("nan"), float("inf"), float("-inf"), 1.0, -0.0], requires_grad=True)
        with kernels.using(compile=mode):
            s, v = kernels.neuron_step(step, torch.zeros(5), x)
            (s.sum() + v.sum()).backward()
        results.append([s, v, x.grad])
    torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "surrogate", [surrogates.Sigmoid(3.0), surrogates.Exponential(5.0, 2.0), surrogates.Gaussian()], ids=repr
)
def test_surrogates_with_an_exponential(surrogate, calls):
    x = torch.cat([torch.linspace(-60, 60, 100_001), torch.tensor([0.8, -1e30, 1e30, math.nan])]).requires_grad_()
    s, _ = kernels.neuron_step(kernels.NeuronStep(0.5, 0.8, None, False, False, surrogate), torch.zeros_like(x), x)
    s.sum().backward()
    expected = surrogate.derivative((x.detach() - 0.8).double()).float()
    torch.testing.assert_close(x.grad, expected, rtol=3e-6, atol=1e-14, equal_nan=True)
    assert calls == ["forward", "gradient"]


def test_threads_change_nothing():
    results = []
    for number in (1, 2, 4):
        with threads(number):
            results.append(run("on", CONSTANTS[0], SURROGATES[0], 2**18))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


class Late(sltt.surrogates.Triangle):
    def fires(self, x):
        return x > 0.5


class Borrowed(sltt.surrogates.Triangle):
    fires = sltt.surrogates.Above.fires


class LateAbove(sltt.surrogates.Above):
    def derivative(self, x):
        return self.surrogate.derivative(x - 0.5)


def test_surrogates_that_native_code_does_not_have(calls):
    """Another threshold runs as it is written; another derivative only where it is needed."""
    for surrogate, expected in ((Late(), []), (Steep(), ["forward"] * 2)):
        calls.clear()
        with kernels.using(compile="auto"):
            plain, fast = (run(mode, CONSTANTS[0], surrogate, 64) for mode in ("off", "auto"))
        assert all(torch.equal(a, b) for a, b in zip(plain, fast, strict=True))
        assert calls == expected


@pytest.mark.parametrize("surrogate", [Borrowed(), LateAbove(sltt.surrogates.Triangle())], ids=repr)
def test_a_neuron_at_its_threshold_fires_as_its_surrogate_says(surrogate):
    """With this constant, v = 0.6 · 0 + x."""
    results = []
    for mode in ("off", "auto"):
        x = torch.tensor([0.8, 0.8 + 2**-20, 0.3], requires_grad=True)
        with kernels.using(compile=mode):
            step = kernels.NeuronStep(0.6, 0.8, None, False, False, surrogate)
            s, _ = kernels.neuron_step(step, torch.zeros(3), x)
            s.sum().backward()
        results.append([s, x.grad])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert results[0][0].tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("v", "x"), [(torch.float64, torch.float64), (torch.float32, torch.float16), (torch.bfloat16, torch.bfloat16)]
)
def test_types_that_native_code_does_not_have(v, x, calls):
    s, v = kernels.neuron_step(
        kernels.NeuronStep(0.5, 1.0, None, False, False, SURROGATES[0]), torch.zeros(9, dtype=v), torch.ones(9, dtype=x)
    )
    assert s.dtype == x
    assert s.sum() == 9
    assert not calls


def test_without_a_library_the_compiled_step_runs(monkeypatch):
    with_library = run("auto", CONSTANTS[0], SURROGATES[0], 4096)
    monkeypatch.setattr(native, "find_loaded", lambda: None)
    assert all(map(torch.equal, run("auto", CONSTANTS[0], SURROGATES[0], 4096), with_library))


def test_the_backward_unpacks_nothing(monkeypatch):
    def refuse(*args):
        raise AssertionError

    monkeypatch.setattr(sltt.kernels.neuron.step, "unpack", refuse)
    neuron, x = sltt.LIF(), torch.randn(2, 4096, requires_grad=True)
    with kernels.using(compile="on"):
        neuron(x).sum().backward()
    assert x.grad.abs().sum() > 0
