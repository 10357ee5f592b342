"""The learning rate to take: a range test, in which the rate rises from batch to batch."""

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sltt.analysis.iteration import check_optimizer
from sltt.checks import instance, number, whole_number
from sltt.rules import Rule
from sltt.rules.batch import StepLoss

MEMORY = 0.95  # of the moving average of the losses
DIVERGED = 4.0  # times the lowest loss: the test ends
FEWEST = 10  # batches of a test
FALLS = 0.02  # of the first loss, at least: less is the noise of batches


@dataclass(frozen=True)
class RateTest:
    """Result of a range test.

    Attributes:
        rates: learning rate of each batch.
        losses: of the batches, as a moving average.
        suggestion: the rate at which the loss falls fastest; None where it falls by less than 2%.
        lowest: the rate with the lowest loss: larger ones are too large.
    """

    rates: list[float]
    losses: list[float]
    suggestion: float | None
    lowest: float


def find_learning_rate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Any]],
    loss: StepLoss,
    rule: Rule,
    optimizer: torch.optim.Optimizer,
    *,
    steps: int | None = None,
    smallest: float = 1e-5,
    largest: float = 1.0,
    count: int = 100,
    clip_norm: float | None = None,
) -> RateTest:
    """Raise the learning rate from batch to batch, and find where the loss falls fastest.

        find_learning_rate(model, batches, loss, SLTT(), optimizer).suggestion

    The rate of batch i is smallest · (largest / smallest)^(i / (count − 1)). The test ends early where the loss is four
    times its lowest value. For a loss below zero, it ends where the loss has risen by three times its size. Weights and
    optimizer are afterwards as before. A suggestion depends on the batch size and the weights: test those that are
    trained.

    See `agreement` for the other arguments.

    Args:
        batches: (x, target), at least ten; `count` of them are used.
        rule: that trains.
        optimizer: of the parameters; the rates of its groups keep their ratios.
        smallest: the first rate.
        largest: the last rate.
        count: the number of batches.
        clip_norm: scale gradients down to this norm.

    Raises:
        ValueError: fewer batches than ten, or rates in another order.

    Source: Smith, WACV 2017 (arXiv 1506.01186).
    """
    instance("rule", rule, Rule)
    check_optimizer(model, optimizer)
    number("smallest", smallest, above=0)
    number("largest", largest, above=smallest)
    whole_number("count", count, least=FEWEST)
    if clip_norm is not None:
        number("clip_norm", clip_norm, above=0)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    own = [group["lr"] for group in optimizer.param_groups]
    factors = [group.get("lr_factor", 1.0) for group in optimizer.param_groups]
    ratios = [factor * lr / own[0] if own[0] else factor for lr, factor in zip(own, factors, strict=True)]
    rates: list[float] = []
    losses: list[float] = []
    average = 0.0

    def update() -> None:
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
        optimizer.zero_grad()

    try:
        optimizer.zero_grad()
        for i, (x, target) in zip(range(count), batches, strict=False):
            rate = smallest * (largest / smallest) ** (i / (count - 1))
            for group, ratio in zip(optimizer.param_groups, ratios, strict=True):
                group["lr"] = rate * ratio
            value = float(rule(model, x, target, loss, steps=steps, update=update).loss)
            if not math.isfinite(value):
                break
            if not rule.online:
                update()
            average = MEMORY * average + (1 - MEMORY) * value
            rates.append(rate)
            losses.append(average / (1 - MEMORY ** (i + 1)))
            lowest = min(losses)
            scale = lowest if lowest > 0 else max(abs(losses[0]), -lowest)
            if losses[-1] > lowest + (DIVERGED - 1) * scale:
                break
    finally:
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
        optimizer.zero_grad()
    if len(rates) < FEWEST:
        raise ValueError(
            f"the test needs ten batches with a finite loss, got {len(rates)}: give more batches, or lower `smallest`"
        )
    return RateTest(rates, losses, *_choose_rates(rates, losses))


def _choose_rates(rates: list[float], losses: list[float]) -> tuple[float | None, float]:
    """Return the rate where the loss falls fastest, per factor of the rate, and that of the lowest loss."""
    lowest = min(range(len(losses)), key=losses.__getitem__)
    slopes = [losses[i + 1] - losses[i - 1] for i in range(1, lowest)]
    if not slopes or min(slopes) >= 0 or losses[0] - losses[lowest] < FALLS * abs(losses[0]):
        return None, rates[lowest]
    return rates[1 + slopes.index(min(slopes))], rates[lowest]
