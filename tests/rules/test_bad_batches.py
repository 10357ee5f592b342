"""Bad input to rules and surrogates: each case ends in the error that says what is wrong."""

import math
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import sltt
from sltt import kernels, losses, surrogates
from sltt.analysis import agreement
from sltt.sequence.steps import check_input
from tests.bad_values import CHOICE, FLAG, OBJECT, assert_refused, constructions, number, whole

HOW = {"recompute": FLAG, "fold": whole(0, -1), "hoist": FLAG}
CONSTRUCTORS = [(surrogates.Triangle, {}, {"gamma": number(0, -1)})]
CONSTRUCTORS += [(surrogates.Rectangle, {}, {"gamma": number(0, -1)})]
CONSTRUCTORS += [(surrogates.Sigmoid, {}, {"alpha": number(0, -1)}), (surrogates.ArcTan, {}, {"alpha": number(0, -1)})]
CONSTRUCTORS += [(surrogates.FastSigmoid, {}, {"alpha": number(0, -1), "scale": number(0, -1)})]
CONSTRUCTORS += [(surrogates.Exponential, {}, {"alpha": number(0, -1), "scale": number(0, -1)})]
CONSTRUCTORS += [(surrogates.Gaussian, {}, {"sigma": number(0, -1), "scale": number(0, -1)})]
CONSTRUCTORS += [(surrogates.Above, {}, {"surrogate": OBJECT})]
CONSTRUCTORS += [(sltt.BPTT, {}, HOW | {"segment": whole(0, -1).but("none")})]
CONSTRUCTORS += [(sltt.TBPTT, {"window": 2}, HOW | {"window": whole(0, -1)})]
CONSTRUCTORS += [(sltt.SLTT, {}, HOW | {"k": whole(0, -1).but("none"), "rescale": FLAG, "credit": CHOICE})]
CONSTRUCTORS += [(sltt.OTTT, {}, {"decay": number(-0.1, 1.1).but("none"), "online": FLAG, "k": whole(0).but("none")})]
CONSTRUCTORS += [(sltt.RateBased, {}, {"steady": FLAG})]


class Pair(nn.Module):
    def forward(self, x):
        return x, x


X, Y, LOSS = torch.randn(4, 5, 6), torch.randint(3, (5,)), losses.CrossEntropyMSE()
ELSEWHERE = nn.Parameter(torch.ones(()))
DAMAGED = X.masked_fill(X.max() == X, math.nan)


def network():
    return nn.Sequential(nn.Linear(6, 8), sltt.LIF(), nn.Linear(8, 3))


def train(rule=sltt.SLTT(), model=None, x=X, target=Y, loss=LOSS, **kwargs):
    return rule(network() if model is None else model, x, target, loss, **kwargs)


def register(**kwargs):
    return sltt.register(**{"kind": Pair, "states": ["v"], **kwargs})


def using(**kwargs):
    with kernels.using(**kwargs):
        pass


SEQUENCE_CALLS = [
    ("x of one dimension", {"x": torch.randn(5), "target": 0}, r"expected input \[T, B, ...\], time first, got"),
    ("a static x of one dimension", {"x": X[0, 0], "target": 0, "steps": 3}, r"expected input \[B, ...\] with steps"),
    ("x of a list", {"x": [1.0]}, "x must be a Tensor, got"),
    ("x with NaN", {"x": DAMAGED}, "expected a finite input, got 1 NaN or infinite of 120 values"),
    ("no time step", {"x": X[:0]}, "expected at least one time step"),
    ("steps of zero", {"x": X[0], "steps": 0}, "steps must be at least 1, got 0"),
    ("steps of a fraction", {"x": X[0], "steps": 2.5}, "steps must be a whole number, got 2.5"),
    ("steps of a bool", {"x": X[0], "steps": True}, "steps must be a whole number, got True"),
    ("a model of a class", {"model": sltt.LIF}, "model must be a Module, got"),
    ("a model that gives two", {"model": nn.Sequential(nn.Identity(), sltt.LIF(), Pair())}, "to return the logits"),
]  # fmt: skip
BATCH_CALLS = [
    ("target of another batch", {"target": Y[:3]}, r"expected a target for each of the 5 samples"),
    ("labels above the classes", {"target": Y + 3}, r"labels must be in 0 … 2 \(the model has 3 outputs\)"),
    ("labels of floats", {"target": Y.float()}, r"labels must be class indices in int64, got torch.float32"),
    ("labels of two dimensions", {"target": Y[:, None]}, r"expected logits \[B, C\] and labels \[B\], got"),
    ("labels of a list", {"target": Y.tolist()}, "target must be a Tensor, got"),
    ("a loss for each sample", {"loss": nn.CrossEntropyLoss(reduction="none")}, "a loss that returns a scalar"),
    ("a loss of a float", {"loss": lambda o, y: 0.5}, "expected a loss that returns a scalar tensor, got 0.5"),
    ("a loss of other weights", {"loss": lambda o, y: ELSEWHERE * 1}, "the loss does not depend on the logits"),
    ("a loss of text", {"loss": "mse"}, "loss must be a function of the logits and the target, got 'mse'"),
    ("a loss of a class", {"loss": losses.CrossEntropyMSE}, r"loss must be .*call it: CrossEntropyMSE\(\)"),
]  # fmt: skip
Forgetful = type("Forgetful", (sltt.Rule,), {"run": lambda self, batch: None})
RULES = {
    "BPTT": sltt.BPTT(), "SLTT": sltt.SLTT(), "SLTT(fold=2)": sltt.SLTT(fold=2), "OTTT": sltt.OTTT(),
    "RateBased": sltt.RateBased(), "Mixed": sltt.Mixed({"1": 2}),
}  # fmt: skip
OTHER_CALLS = [
    ("Mixed(windows: 0)", partial(sltt.Mixed, {"1": 0}), ValueError, "window of 1 must be"),
    ("Mixed(windows: True)", partial(sltt.Mixed, {"1": True}), ValueError, "window of 1 must be"),
    ("Mixed(windows: list)", partial(sltt.Mixed, ["1"]), ValueError, "windows must be"),
    ("Mixed(default: 0)", partial(sltt.Mixed, {}, default=0), ValueError, "window of default must be"),
    ("agreement(steps)", partial(agreement, network(), X[0], Y, LOSS, steps=2.5), ValueError, "steps must be"),
    ("Mixed(unknown layer)", partial(train, sltt.Mixed({"none": 2})), ValueError, "none"),
    ("SLTT(rescale without k)", partial(sltt.SLTT, rescale=True), ValueError, "rescale=True needs k"),
    ("SLTT(hoist and fold)", partial(sltt.SLTT, hoist=True, fold=2), ValueError, "choose one"),
    ("OTTT(online and fold)", partial(sltt.OTTT, online=True, fold=2), ValueError, "online updates the weights after"),
    ("RateBased(steady and fold)", partial(sltt.RateBased, steady=True, fold=2), ValueError, "steady runs the network"),
    ("SLTT(k > T)", partial(train, sltt.SLTT(k=9)), ValueError, "trains 9 steps, but .* T = 4; use k ≤ T"),
    ("Rule(run: nothing)", partial(train, Forgetful()), ValueError, "`run` of a rule returns must be an Output"),
    ("BPTT(recompute: number)", partial(sltt.BPTT, recompute=3), ValueError, "recompute must be True or False"),
    ("BPTT(segment and hoist)", partial(sltt.BPTT, segment=2, hoist=True), ValueError, "choose one"),
    ("OTTT(online without update)", partial(train, sltt.OTTT(online=True)), ValueError, "call it with update=…"),
    ("register(kind: instance)", partial(register, kind=Pair()), ValueError, "kind must be a class"),
    ("register(states: text)", partial(register, states="mem"), ValueError, "states must be names of attributes"),
    ("register(reset: text)", partial(register, reset="reset"), ValueError, "reset must be a function"),
    ("register(spikes: text)", partial(register, spikes="yes"), ValueError, "spikes must be"),
    ("register(check: flag)", partial(register, check=True), ValueError, "check must be a function"),
    ("register(translate: text)", partial(register, translate="no"), ValueError, "translate must be a function"),
    ("once(tensor)", partial(sltt.once, X), ValueError, "once takes a module or a method of one"),
    ("reset(list)", partial(sltt.reset, [network()]), ValueError, "model must be a Module, got"),
    ("using(compile)", partial(using, compile="maybe"), ValueError, "compile must be one of"),
    ("using(bits)", partial(using, bits="no"), ValueError, "bits must be True or False"),
    ("using(typo)", partial(using, typo=1), TypeError, "typo"),
]  # fmt: skip


def batches():
    """Bad arguments of the call of each rule, and of `unroll`."""
    for label, arguments, message in SEQUENCE_CALLS + BATCH_CALLS:
        calls = [partial(train, rule, **arguments) for rule in RULES.values()]
        yield pytest.param(calls, ValueError, message, id=label)
    for label, arguments, message in SEQUENCE_CALLS:
        arguments = {name: value for name, value in arguments.items() if name != "target"}
        call = partial(sltt.unroll, **{"model": network(), "x": X, **arguments})
        yield pytest.param([call], ValueError, message, id=f"unroll: {label}")


OTHERS = [pytest.param([call], error, message, id=label) for label, call, error, message in OTHER_CALLS]


@pytest.mark.parametrize(("calls", "error", "message"), [*constructions(CONSTRUCTORS), *batches(), *OTHERS])
def test_bad_input_is_refused(calls, error, message):
    assert_refused(calls, error, message)


@pytest.mark.parametrize(
    ("make", "name", "value", "expected"),
    [
        (surrogates.Triangle, "gamma", Fraction(1, 2), 0.5),
        (surrogates.Triangle, "gamma", np.float32(0.5), 0.5),
        (partial(sltt.TBPTT, window=1), "fold", "auto", "auto"),
        (sltt.TBPTT, "window", np.int64(3), 3),
        (sltt.SLTT, "k", 1, 1),
        (sltt.OTTT, "decay", 0, 0.0),
    ],
)
def test_what_is_at_the_edge_is_taken(make, name, value, expected):
    found = getattr(make(**{name: value}), name)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize("target", [Y[:, None], nn.functional.one_hot(Y, 3)], ids=["[B, 1]", "one-hot"])
def test_labels_of_another_shape_are_the_targets_fault(target):
    with pytest.raises(ValueError, match=r"labels are class indices, one a sample: y.squeeze\(1\) .*y.argmax\(1\)"):
        train(target=target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_large_values_whose_sum_is_infinite_are_a_finite_input(dtype):
    x = torch.full((4, 3), torch.finfo(dtype).max, dtype=dtype)
    assert x.sum().isinf()
    check_input(x)
    x[0, 0], x[1, 0] = math.inf, -math.inf
    with pytest.raises(ValueError, match="got 2 NaN or infinite of 12 values"):
        check_input(x)
