import math

import pytest
import torch

from sltt import surrogates
from sltt.surrogates import Above, ArcTan, Exponential, FastSigmoid, Gaussian, Rectangle, Sigmoid, Surrogate, Triangle
from tests.conftest import SURROGATES

FORMULAS = [(Triangle(), lambda x: max(0.0, 1 - abs(x)))]
FORMULAS += [(Triangle(gamma=0.5), lambda x: max(0.0, 1 - abs(x) / 0.5) / 0.5)]
FORMULAS += [(Rectangle(), lambda x: float(abs(x) < 0.5)), (Rectangle(gamma=2.0), lambda x: float(abs(x) < 1) / 2)]
FORMULAS += [(Sigmoid(), lambda x: 4 / (1 + math.exp(-4 * x)) * (1 - 1 / (1 + math.exp(-4 * x))))]
FORMULAS += [(ArcTan(), lambda x: 1 / (1 + (math.pi * x) ** 2))]
FORMULAS += [(ArcTan(alpha=3.0), lambda x: 1.5 / (1 + (math.pi * 3 * x / 2) ** 2))]
FORMULAS += [(FastSigmoid(), lambda x: 12.5 / (1 + 25 * abs(x)) ** 2)]
FORMULAS += [(FastSigmoid(alpha=1.0, scale=2.0), lambda x: 1 / (1 + abs(x)) ** 2)]
FORMULAS += [(Exponential(), lambda x: math.exp(-2 * abs(x)))]
FORMULAS += [(Exponential(alpha=3.0, scale=2.0), lambda x: 3 * math.exp(-3 * abs(x)))]
FORMULAS += [(Gaussian(), lambda x: 2 * math.exp(-2 * x * x) / math.sqrt(2 * math.pi))]
FORMULAS += [(Gaussian(sigma=2.0, scale=3.0), lambda x: 1.5 * math.exp(-x * x / 8) / math.sqrt(2 * math.pi))]


@pytest.mark.parametrize(("surrogate", "formula"), FORMULAS, ids=[repr(s) for s, _ in FORMULAS])
def test_spike_and_derivative_equal_the_formulas(surrogate, formula):
    points = [*torch.linspace(-5, 5, 201, dtype=torch.float64).tolist(), -0.0, 1e-300, -1e-300, 0.5 - 1e-9, 0.5 + 1e-9]
    x = torch.tensor(points, dtype=torch.float64, requires_grad=True)
    spikes = surrogate(x)
    (slopes,) = torch.autograd.grad(spikes.sum(), x)
    assert torch.equal(spikes, (x >= 0).double())
    assert slopes.tolist() == pytest.approx([formula(point) for point in points], abs=1e-12)


@pytest.mark.parametrize("surrogate", SURROGATES, ids=repr)
def test_derivative_integrates_to_one(surrogate):
    x = torch.linspace(-9, 9, 200_001, dtype=torch.float64).sinh()  # dense around 0, up to 4000
    assert torch.trapezoid(surrogate.derivative(x), x).item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("surrogate", SURROGATES, ids=repr)
def test_the_type_is_kept(surrogate, dtype):
    x = torch.randn(9, dtype=dtype, requires_grad=True)
    spike = surrogate(x)
    spike.sum().backward()
    assert spike.dtype == x.grad.dtype == dtype


def test_above_fires_above_the_threshold_and_not_at_it():
    x = torch.tensor([-1e-7, 0.0, 1e-7], requires_grad=True)
    for surrogate, spikes in ((Sigmoid(), [0, 1, 1]), (Above(Sigmoid()), [0, 0, 1])):
        spike = surrogate(x)
        assert spike.tolist() == spikes
        (slope,) = torch.autograd.grad(spike.sum(), x)
        assert torch.equal(slope, Sigmoid().derivative(x.detach()))


def test_ones_own_surrogate_needs_only_a_derivative():
    class Cauchy(Surrogate):
        def derivative(self, x):
            return 1 / (math.pi * (1 + x**2))

    with pytest.raises(TypeError, match="Twice has a __call__ of its own, which kernels do not run"):
        type("Twice", (Cauchy,), {"__call__": lambda self, x: 2 * super().__call__(x)})
    x = torch.tensor([0.0, 1.0], requires_grad=True)
    Cauchy()(x).sum().backward()
    assert x.grad.tolist() == pytest.approx([0.31831, 0.15915], abs=1e-4)


def test_gradients_under_torch_func():
    x = torch.randn(7)
    slope = torch.func.vmap(torch.func.grad(lambda v: surrogates.Triangle()(v)))(x)
    assert torch.equal(slope, surrogates.Triangle().derivative(x))


@pytest.mark.parametrize("make", [Triangle, Rectangle, Sigmoid, ArcTan, FastSigmoid, Exponential, Gaussian])
def test_a_width_or_slope_of_zero_is_refused(make):
    with pytest.raises(ValueError, match="greater than 0, got 0"):
        make(0.0)


def test_equal_by_their_values():
    assert Triangle() == Triangle(1.0) != Triangle(2.0)
    assert hash(Triangle()) == hash(Triangle(1.0))
    assert Triangle() != Rectangle()
    assert repr(Triangle(2.0)) == "Triangle(gamma=2.0)"
