"""Surrogate gradients: the spike is a step function, its derivative is replaced by a smooth one.

Your own in three lines:

    class Cauchy(sltt.surrogates.Surrogate):
        def derivative(self, x):
            return 1 / (math.pi * (1 + x**2))
"""

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from sltt.checks import instance, number
from sltt.frozen import Frozen


class Surrogate(Frozen, ABC):
    """Spike s = H(x) with x = u − V_th and H(0) = 1; backward ∂s/∂x = `derivative(x)`.

    A subclass defines `derivative`. It must be elementwise, and keep the shape and dtype of its argument.
    """

    def __init_subclass__(cls) -> None:
        if cls.__call__ is not Surrogate.__call__:
            raise TypeError(f"{cls.__name__} has a __call__ of its own, which kernels do not run: define `fires`")

    def fires(self, x: Tensor) -> Tensor:
        """Return True where a neuron fires, at x = u − V_th."""
        return x >= 0

    @abstractmethod
    def derivative(self, x: Tensor) -> Tensor:
        """Return ∂s/∂x at x = u − V_th, of x's shape."""

    def __call__(self, x: Tensor) -> Tensor:
        return _Spike.apply(x, self)  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in vars(self).items())})"


class Triangle(Surrogate):
    """∂s/∂x = max(0, 1 − |x|/γ) / γ; with γ = 1 the surrogate of the SLTT paper (Meng et al. 2023).

    Args:
        gamma: half the width of the triangle, in units of the membrane potential.
    """

    def __init__(self, gamma: float = 1.0):
        self.gamma = number("gamma", gamma, above=0)

    def derivative(self, x: Tensor) -> Tensor:
        return (1 - x.abs() / self.gamma).clamp(min=0) / self.gamma


class Rectangle(Surrogate):
    """∂s/∂x = 1[|x| < γ/2] / γ (Wu et al. 2018).

    Args:
        gamma: width of the rectangle, in units of the membrane potential.
    """

    def __init__(self, gamma: float = 1.0):
        self.gamma = number("gamma", gamma, above=0)

    def derivative(self, x: Tensor) -> Tensor:
        return (x.abs() < self.gamma / 2).to(x.dtype) / self.gamma


class Sigmoid(Surrogate):
    """∂s/∂x = α σ(αx) (1 − σ(αx)), the derivative of a sigmoid.

    Args:
        alpha: α, per unit of membrane potential; the slope at x = 0 is α/4.
    """

    def __init__(self, alpha: float = 4.0):
        self.alpha = number("alpha", alpha, above=0)

    def derivative(self, x: Tensor) -> Tensor:
        sigma = torch.sigmoid(self.alpha * x)
        return self.alpha * sigma * (1 - sigma)


class ArcTan(Surrogate):
    """∂s/∂x = α/2 / (1 + (π α x / 2)²), the derivative of arctan(π α x / 2) / π (Fang et al. 2021).

    Args:
        alpha: α, per unit of membrane potential; the slope at x = 0 is α/2.
    """

    def __init__(self, alpha: float = 2.0):
        self.alpha = number("alpha", alpha, above=0)

    def derivative(self, x: Tensor) -> Tensor:
        return self.alpha / 2 / (1 + (math.pi * self.alpha / 2 * x) ** 2)


class FastSigmoid(Surrogate):
    """∂s/∂x = c α/2 / (1 + α|x|)², the derivative of a fast sigmoid (Zenke & Ganguli 2018).

    Args:
        alpha: slope of the fast sigmoid.
        scale: c, the integral of the derivative.
    """

    def __init__(self, alpha: float = 25.0, scale: float = 1.0):
        self.alpha = number("alpha", alpha, above=0)
        self.scale = number("scale", scale, above=0)

    def derivative(self, x: Tensor) -> Tensor:
        return self.scale * self.alpha / 2 / (1 + self.alpha * x.abs()) ** 2


class Exponential(Surrogate):
    """∂s/∂x = c α/2 exp(−α|x|) (Shrestha & Orchard 2018).

    Args:
        alpha: how fast the derivative falls, in units of one over the membrane potential.
        scale: c, the integral of the derivative.
    """

    def __init__(self, alpha: float = 2.0, scale: float = 1.0):
        self.alpha = number("alpha", alpha, above=0)
        self.scale = number("scale", scale, above=0)

    def derivative(self, x: Tensor) -> Tensor:
        return self.scale * self.alpha / 2 * torch.exp(-self.alpha * x.abs())


class Gaussian(Surrogate):
    """∂s/∂x = c exp(−x²/(2σ²)) / (σ √(2π)) (Yin et al. 2021).

    Args:
        sigma: standard deviation, in units of the membrane potential.
        scale: c, the integral of the derivative.
    """

    def __init__(self, sigma: float = 0.5, scale: float = 1.0):
        self.sigma = number("sigma", sigma, above=0)
        self.scale = number("scale", scale, above=0)

    def derivative(self, x: Tensor) -> Tensor:
        return self.scale / (self.sigma * math.sqrt(2 * math.pi)) * torch.exp(-0.5 * (x / self.sigma) ** 2)


class Above(Surrogate):
    """Another surrogate with H(0) = 0: a neuron fires above its threshold, not at it, as in snnTorch and Norse.

    Args:
        surrogate: gives the derivative.
    """

    def __init__(self, surrogate: Surrogate):
        self.surrogate = instance("surrogate", surrogate, Surrogate)

    def fires(self, x: Tensor) -> Tensor:
        return x > 0

    def derivative(self, x: Tensor) -> Tensor:
        return self.surrogate.derivative(x)


class _Spike(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, surrogate: Surrogate) -> Tensor:
        return surrogate.fires(x).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Surrogate], output: Tensor) -> None:
        x, ctx.surrogate = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return grad * ctx.surrogate.derivative(x), None
