"""Compare a rule's gradient with that of exact BPTT: the paper's Fig. 3, for any network and data."""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sltt._torch import keep_generators
from sltt.checks import instance, sequence
from sltt.rules import BPTT, OTTT, SLTT, TBPTT, Rule
from sltt.rules.batch import StepLoss
from sltt.sequence.copies import copy_model

# Below this cosine the direction of a step is more than 18° off.
AGREES = 0.95
# The loss is scaled by this power of two, as in a training with float16, which rounds small gradients to zero.
SCALE = 2.0**12


@dataclass(frozen=True)
class Agreement:
    """The gradient g of a rule beside the gradient g* of exact BPTT.

    Attributes:
        rule: what was compared.
        cosine: g · g* / (|g| |g*|), over all parameters; 1 for the same direction, NaN for a zero gradient.
        norm_ratio: |g| / |g*|.
        dropped: |g − g*| / |g*|, the share of the gradient that the rule does not have.
        layers: (cosine, norm ratio) of the parameters of each module, by its name.
        least: the smallest cosine, over all parameters or one module with a weight matrix, of gradients that do not go
            through resets (`detach_reset`). A readout that every rule trains exactly holds the cosine of all parameters
            up while the first layer learns nothing; and the surrogate of a reset hides what a neuron remembers.
    """

    rule: str
    cosine: float
    norm_ratio: float
    dropped: float
    layers: dict[str, tuple[float, float]]
    least: float


def agreement(
    model: nn.Module,
    x: Tensor,
    target: Any,
    loss: StepLoss,
    rules: Sequence[Rule] = (SLTT(),),
    *,
    steps: int | None = None,
) -> list[Agreement]:
    """Compare the gradients of `rules` on one batch with that of BPTT; the model is left as it was.

        for found in agreement(model, x, y, loss, [SLTT(), TBPTT(2)]):
            print(found.rule, found.cosine)

    Args:
        model: maps one time step to logits; in the mode that it is in.
        x: sequence [T, B, ...], or with `steps` a static input [B, ...].
        target: what `loss` compares with.
        loss: of one time step.
        rules: what to compare. All see the same random numbers, so the same dropout.
        steps: T for a static input.
    """
    for rule in sequence("rules", rules, "rules, such as [sltt.SLTT()]"):
        instance("a rule", rule, Rule)
    exact = _Exact(model, x, target, loss, steps)
    return [exact.compare(rule) for rule in rules]


def windows(steps: int) -> list[Rule]:
    """Return SLTT, and truncated BPTT with windows of 2, 4, 8, … below T time steps."""
    return [SLTT(), *(TBPTT(2**i) for i in range(1, max(steps - 1, 1).bit_length()) if 2**i < steps)]


def cheaper_rules(model: nn.Module, steps: int) -> list[Rule]:
    """Return the rules of less memory than BPTT, least first: SLTT, OTTT if possible, and `windows`."""
    spatial, *truncated = windows(steps)
    try:
        OTTT().check(model, steps)
        return [spatial, OTTT(), *truncated]
    except ValueError:
        return [spatial, *truncated]


class _Exact:
    """The gradient of exact BPTT on one batch, and how far others agree with it."""

    def __init__(self, model: nn.Module, x: Tensor, target: Any, loss: StepLoss, steps: int | None):
        self.model, self.x, self.target, self.loss, self.steps, self.scale = model, x, target, loss, steps, SCALE

    @functools.cached_property
    def gradients(self) -> dict[str, Tensor]:
        gradients = self._gradients(BPTT())
        while self.scale > 1 and not all(g.isfinite().all() for g in gradients.values()):
            self.scale /= 2
            gradients = self._gradients(BPTT())
        return gradients

    @functools.cached_property
    def without_resets(self) -> "_Exact":
        """Return the same, where no gradient goes through the neurons' resets."""
        model = copy_model(self.model)
        attached: list[Any] = [m for m in model.modules() if getattr(m, "detach_reset", True) is False]
        for neuron in attached:
            neuron.detach_reset = True
        return _Exact(model, self.x, self.target, self.loss, self.steps) if attached else self

    def compare(self, rule: Rule) -> Agreement:
        exact = self.gradients  # first, since it finds the scale
        gradients = self._gradients(rule)
        layers = {module: _measure(gradients, exact, names)[:2] for module, names in _modules(exact).items()}
        other = self.without_resets
        least = _worst_cosine(gradients if other is self else other._gradients(rule), other.gradients)
        return Agreement(repr(rule), *_measure(gradients, exact, list(exact)), layers, least)

    def _gradients(self, rule: Rule) -> dict[str, Tensor]:
        twin = copy_model(self.model)
        twin.zero_grad(set_to_none=True)
        with keep_generators(self.x.device):
            arguments = twin, self.x, self.target, self.loss
            how = {"backward": lambda value: (value * self.scale).backward(), "update": lambda: None}
            rule(*arguments, steps=self.steps, **how)
        return {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}


def _modules(parameters: Iterable[str]) -> dict[str, list[str]]:
    """Return the names of parameters by the module that has them."""
    modules: dict[str, list[str]] = {}
    for name in parameters:
        modules.setdefault(name.rpartition(".")[0], []).append(name)
    return modules


def _worst_cosine(gradients: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Return the smallest cosine, of all parameters or of a module with a weight matrix; 0 without a gradient."""
    cosines = [_measure(gradients, exact, list(exact))[0]]
    for names in _modules(exact).values():
        if any(exact[name].ndim > 1 and exact[name].any() for name in names):
            cosine, ratio, _ = _measure(gradients, exact, names)
            cosines.append(cosine if ratio else 0.0)
    return min(cosines)


def _measure(gradients: dict[str, Tensor], exact: dict[str, Tensor], names: list[str]) -> tuple[float, float, float]:
    b = torch.cat([exact[name].flatten() for name in names]).double()
    a = torch.cat([gradients.get(name, torch.zeros_like(exact[name])).flatten() for name in names]).double()
    norm = b.norm()
    return float(a @ b / (a.norm() * norm)), float(a.norm() / norm), float((a - b).norm() / norm)
