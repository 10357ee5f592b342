"""How far a rule's gradient agrees with that of exact BPTT: the paper's Fig. 3, for any network and data."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sltt.rules import BPTT, SLTT, TBPTT, Rule
from sltt.rules.base import Loss

# Below this cosine the direction of a step is more than 18° off.
AGREES = 0.95


@dataclass(frozen=True)
class Agreement:
    """The gradient g of a rule beside the gradient g* of exact BPTT.

    Attributes:
        rule: what was compared.
        cosine: g · g* / (|g| |g*|), over all parameters; 1 for the same direction, NaN for a zero gradient.
        norm_ratio: |g| / |g*|.
        dropped: |g − g*| / |g*|, the share of the gradient that the rule does not have.
        layers: (cosine, norm ratio) of the parameters of each module, by its name.
    """

    rule: str
    cosine: float
    norm_ratio: float
    dropped: float
    layers: dict[str, tuple[float, float]]


def agreement(
    model: nn.Module,
    x: Tensor,
    target: Any,
    loss: Loss,
    rules: Sequence[Rule] = (SLTT(),),
    *,
    steps: int | None = None,
    dtype: torch.dtype | None = None,
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
        dtype: compute in this type, such as float64, where spikes do not flip by rounding; None keeps the model's.
    """
    x = x if dtype is None or not x.is_floating_point() else x.to(dtype)

    def gradient(rule: Rule) -> dict[str, Tensor]:
        twin = copy.deepcopy(model).to(dtype) if dtype else copy.deepcopy(model)
        twin.zero_grad(set_to_none=True)
        with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
            rule(twin, x, target, loss, steps=steps)
        return {name: p.grad.flatten() for name, p in twin.named_parameters() if p.grad is not None}

    exact = gradient(BPTT())
    return [_compare(repr(rule), gradient(rule), exact) for rule in rules]


def windows(steps: int) -> list[Rule]:
    """SLTT, and truncated BPTT with windows of 2, 4, 8, … below T time steps."""
    return [SLTT(), *(TBPTT(2**i) for i in range(1, max(steps - 1, 1).bit_length()) if 2**i < steps)]


def advice(found: Sequence[Agreement]) -> str:
    """Which of the rules to take, given their agreement in the order of their windows, shortest first."""
    spatial = found[0]
    share = f"SLTT drops {spatial.dropped:.0%} of the gradient here (cosine {spatial.cosine:.3f})"
    best = next((a for a in found if a.cosine >= AGREES), None)
    if best is spatial:
        return f"{share}: take SLTT."
    if best is not None:
        return f"{share}: take {best.rule}, the shortest window with a cosine of {AGREES} or more ({best.cosine:.3f})."
    return f"{share}, and no window below T reaches {AGREES}: take BPTT."


def _compare(rule: str, found: dict[str, Tensor], exact: dict[str, Tensor]) -> Agreement:
    modules: dict[str, list[str]] = {}
    for name in exact:
        modules.setdefault(name.rpartition(".")[0], []).append(name)
    cosine, ratio, dropped = _measure(found, exact, list(exact))
    layers = {module: _measure(found, exact, names)[:2] for module, names in modules.items()}
    return Agreement(rule, cosine, ratio, dropped, layers)


def _measure(found: dict[str, Tensor], exact: dict[str, Tensor], names: list[str]) -> tuple[float, float, float]:
    b = torch.cat([exact[name] for name in names]).double()
    a = torch.cat([found[name] if name in found else torch.zeros_like(exact[name]) for name in names]).double()
    norm = b.norm()
    return float(a @ b / (a.norm() * norm)), float(a.norm() / norm), float((a - b).norm() / norm)
