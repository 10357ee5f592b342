"""A run: what it installs, what it claims, and that nothing is left of it."""

import copy
import pickle

import pytest
import torch
from torch import nn

import sltt
from sltt.sequence.claims import run_of
from sltt.sequence.run import Run
from sltt.sequence.steps import time_steps
from tests.conftest import LOSS, batch, gradients, small_network


class Doubling(sltt.Step):
    """Doubles what every layer of one role gives."""

    def __init__(self, role):
        self.role = role

    def neuron(self, layer, *args):
        return self._times("neuron", super().neuron(layer, *args))

    def weight(self, layer, *args):
        return self._times("weight", super().weight(layer, *args))

    def norm(self, layer, *args):
        return self._times("norm", super().norm(layer, *args))

    def keeper(self, layer, *args):
        return self._times("keeper", super().keeper(layer, *args))

    def pool(self, layer, *args):
        return self._times("pool", super().pool(layer, *args))

    def _times(self, role, y):
        return 2 * y if role == self.role else y


class Doubled(sltt.SLTT):
    def __init__(self, role, fold=1):
        super().__init__(fold=fold)
        self.role = role

    def step(self):
        return Doubling(self.role)


class Twice(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


def network(role=None):
    """A network with a layer of every role; that of `role` inside a module that doubles what it gives."""
    torch.manual_seed(0)
    layers = {
        "weight": nn.Conv1d(1, 4, 3, padding=1),
        "norm": nn.BatchNorm1d(4),
        "neuron": sltt.LIF(),
        "keeper": sltt.Dropout(0.0),
        "pool": nn.AvgPool1d(2),
    }
    made = [Twice(layer) if name == role else layer for name, layer in layers.items()]
    return nn.Sequential(nn.Unflatten(1, (1, 6)), *made, nn.Flatten(), sltt.LIF(tau=3.0), nn.Linear(12, 3)).double()


@pytest.mark.parametrize("fold", [1, 3])
@pytest.mark.parametrize("role", ["norm", "keeper", "pool"])  # which the network has once
def test_a_rule_changes_what_layers_of_a_role_do(role, fold):
    x, y = batch()
    found, out = gradients(network(), Doubled(role, fold), x, y)
    expected, twin = gradients(network(role), sltt.SLTT(), x, y)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(out.logits, twin.logits)


@pytest.mark.parametrize("role", ["neuron", "weight"])
def test_a_rule_changes_what_all_layers_of_a_role_do(role):
    x, y = batch()
    plain, changed = (gradients(network(), rule, x, y)[1].logits for rule in (sltt.SLTT(), Doubled(role)))
    assert not torch.allclose(plain, changed)


def left(model):
    """What a run has left in a model."""
    forwards = [name for name, module in model.named_modules() if "forward" in vars(module)]
    claims = [name for name, module in model.named_modules() if run_of(module)]
    hooks = [name for name, module in model.named_modules() if module._forward_hooks or module._forward_pre_hooks]
    kept = [m for m in model.modules() if getattr(m, "v", None) is not None or getattr(m, "mask", None) is not None]
    return forwards, claims, hooks, kept, torch._C._len_torch_function_stack()


def test_nothing_of_a_run_is_left_also_after_an_error_in_any_place(rule):
    if isinstance(rule, sltt.Mixed):
        rule = sltt.Mixed({"*": 2})
    for place in ("nowhere", "loss", "layer", "backward"):
        model, calls = small_network(norm=True, dropout=0.5), []

        def fails(*args, calls=calls):
            calls.append(args)
            if len(calls) > (0 if isinstance(rule, sltt.RateBased) else 2):
                raise KeyError("planted")

        fails.sees_folds = True
        hook = model[4].register_forward_hook(fails) if place == "layer" else None
        loss = (lambda o, y: (fails(), LOSS(o, y))[1]) if place == "loss" else LOSS
        backward = (lambda value: (fails(), value.backward())) if place == "backward" else None
        try:
            rule(model, *batch(steps=9), loss, backward=backward)
        except KeyError:
            assert calls
        if hook:
            hook.remove()
        assert left(model) == ([], [], [], [], 0)


def test_a_forward_of_the_users_own_runs_and_comes_back():
    model, (x, y), calls = small_network(), batch(), []
    own = model[2].forward
    model[2].forward = kept = lambda x: (calls.append(len(x)), own(x))[1]
    sltt.SLTT()(model, x, y, LOSS)
    assert calls == [5] * len(x)
    assert vars(model[2])["forward"] is kept


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_that_is_made_in_a_run_runs_by_itself(how):
    model, (x, y), copies = small_network(), batch(), []

    def backward(value):
        copies.append(how(model))
        value.backward()

    sltt.SLTT(fold=2)(model, x, y, LOSS, backward=backward)
    expected = sltt.unroll(model, x)
    for twin in copies:
        sltt.reset(twin)
        torch.testing.assert_close(sltt.unroll(twin, x), expected)


def test_a_part_whose_states_are_empty_may_run_a_sequence_of_its_own():
    inner, (x, _) = nn.Sequential(nn.Linear(6, 6), sltt.LIF()).double(), batch()
    outer = nn.Sequential(inner, nn.Linear(6, 3)).double()
    with Run(outer, time_steps(x, None), sltt.Step(), grad=False) as run:
        expected = sltt.unroll(inner, x)  # before the first step
        assert run_of(inner[1]) is run
        run(x[0])
        with pytest.raises(ValueError, match=r"1 \(LIF\) is in the middle of another sequence"):
            sltt.unroll(inner, x)
    torch.testing.assert_close(sltt.unroll(inner, x), expected)
