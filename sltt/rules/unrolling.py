"""Time steps of a network without a rule: no graph, no gradient.

Shapes: T time steps, B samples, C classes.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from sltt import kernels
from sltt.checks import instance
from sltt.rules.diagnosis import note
from sltt.rules.folding import choose_fold, fold_of
from sltt.sequence.run import Run
from sltt.sequence.step import Step
from sltt.sequence.steps import Sequence, time_steps


def unroll(model: nn.Module, x: Tensor, *, steps: int | None = None, fold: int | Literal["auto"] = "auto") -> Tensor:
    """Run T time steps without a graph and return the logits [T, B, C]; the prediction is their mean over time.

    An input that is NaN or infinite raises ValueError on the CPU, and gives logits that are NaN on another device.

    Args:
        model: maps the input of one time step [B, ...] to logits [B, C]; its mode, training or not, stays as it is.
        x: a sequence, time first [T, B, ...]; or, with `steps`, a static input [B, ...] shown at every step.
        steps: T for a static input.
        fold: time steps in one call of the network, as of the rules.
    """
    instance("model", model, nn.Module)
    return run_steps(model, time_steps(x, steps), fold_of(fold))[0]


@torch.no_grad()
def run_steps(
    model: nn.Module, sequence: Sequence, fold: int | Literal["auto"], states: dict[str, Any] | None = None
) -> tuple[Tensor, dict[str, Any]]:
    """Run the time steps of a sequence from states on; return the logits [T, B, C] and the states behind them."""
    x = sequence.x
    network = Run(model, sequence, Step(), hoist=True, repeats=False, grad=False)
    layout = network.layout
    # a real batch shows whether calls change weights, so that the next ones share what is made of them
    looks = not layout.steady and not layout.looked and sequence.steps > 1 and x.device.type == "cpu"
    before = [(p, p.clone()) for p in model.parameters()] if looks else []
    try:
        n = choose_fold(network, fold).forward
        with network:
            network.resume(states or {})
            calls = [range(t, min(t + n, sequence.steps)) for t in range(0, sequence.steps, n)]
            network.weights = kernels.WeightCache(len(calls))
            logits = [network(network.sequence.input(call), len(call)).clone() for call in calls]
            (result,), states = network.result(torch.cat(logits)), network.states()
        if looks:
            layout.looked, layout.steady = True, all(torch.equal(p, was) for p, was in before)
    except Exception as error:
        note(error, network)
        raise
    finally:
        torch.clear_autocast_cache()  # casts of weights without a graph would cut them off in a training after it
    return result, states
