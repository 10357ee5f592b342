"""Neurons of other libraries that run by ours, as they are."""

import contextlib
import copy
from unittest import mock

import pytest
import torch
from torch import nn

import sltt
from sltt.interop.adapted import Adapter, find_own_code
from tests.conftest import LOSS, batch
from tests.interop.libraries import CASES, gradients_of, network_of, norse

RULES = [sltt.SLTT(), sltt.SLTT(fold=1), sltt.BPTT(fold=3), sltt.TBPTT(window=2), sltt.BPTT(segment=2)]
KINDS = "LIF", "IF", "PLIF", "Leaky", "Lapicque", "Synaptic", "LIFBox", "IAF"
OWN = "jelly LIF, soft", "sinabs LIF with current"
OWN += "snn Leaky, learned threshold", "snn Lapicque, zero", "snn Synaptic, zero"
ADAPTED = [name for name in CASES if name.split()[1].rstrip(",") in KINDS and name not in OWN]


@contextlib.contextmanager
def counted(own=False):
    """Count the calls that run by ours; with `own`, there are none."""
    calls, run = [], Adapter.run
    find = (lambda self: False) if own else Adapter.find_ours
    counts = lambda self, *args: (calls.append(1), run(self, *args))[1]  # noqa: E731
    with mock.patch.object(Adapter, "run", counts), mock.patch.object(Adapter, "find_ours", find):
        yield calls


def states_of(model):
    found = []
    for module in model.modules():
        for name in sltt.sequence.state.state_names(module):
            sltt.sequence.state.map_tensors(found.append, getattr(module, name))
    return [state.detach() for state in found if state.numel()]


@pytest.mark.parametrize("case", ADAPTED)
def test_gradients_and_states_are_those_of_their_own_code(case):
    library, name, settings = CASES[case]
    model, x, y = network_of(library(name, **settings))
    for rule in RULES:
        found = []
        for own in (True, False):
            left = []
            see = lambda *_, left=left: left.append(states_of(model))  # noqa: E731
            see.sees_folds = True
            handle = model.register_forward_hook(see)
            with counted(own) as calls:
                found.append((gradients_of(rule, model, x, y), sltt.unroll(model, x, fold=1)))
            handle.remove()
            found[-1] += (torch.cat([state.flatten() for state in left[-1]]),)
            assert own or calls
        torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("surrogate", ["ours", "theirs"])
@pytest.mark.parametrize("case", ADAPTED)
def test_states_have_their_own_type_under_autocast(case, surrogate):
    library, name, settings = CASES[case]
    model, x, _ = network_of(library(name, **settings))
    for module in model.float().modules():
        if hasattr(module, "spike_grad") and surrogate == "theirs":
            module.spike_grad = pytest.importorskip("snntorch.surrogate").atan()
    found = []
    for own in (True, False):
        left = []
        handle = model.register_forward_hook(lambda *_, left=left: left.append(states_of(model)))
        with counted(own), torch.autocast("cpu", torch.bfloat16):
            found.append(sltt.unroll(model, x.float(), fold=1).float())
        handle.remove()
        found.append([state.dtype for state in left[-1]])
    assert found[1] == found[3]
    assert torch.equal(found[0], found[2]) or torch.bfloat16 in found[1]


OTHERS = {f"norse {name}": (norse, name, {}) for name in ("LIFRefracCell", "LIFExCell", "LSNNCell")}


@pytest.mark.parametrize("case", [*CASES, *OTHERS])
def test_neurons_that_their_own_code_runs_are_named_with_a_reason(case):
    library, name, settings = (CASES | OTHERS)[case]
    model, x, _ = network_of(library(name, **settings))
    sltt.unroll(model, x, fold=1)
    found = find_own_code(model)
    assert [one.split()[0].removesuffix(".module") for one in found] == ([] if case in ADAPTED else ["1", "3"])


def jelly_network(**settings):
    neuron, layer = (pytest.importorskip(f"spikingjelly.activation_based.{name}") for name in ("neuron", "layer"))
    torch.manual_seed(0)
    layers = layer.Conv2d(2, 8, 3, padding=1), layer.BatchNorm2d(8), neuron.LIFNode(**settings), layer.MaxPool2d(2)
    return nn.Sequential(*layers, layer.Flatten(), layer.Linear(8 * 9, 3))


def test_layers_of_spikingjelly_are_those_of_pytorch():
    jelly, x, y = jelly_network(), 2 * torch.randn(4, 5, 2, 6, 6), torch.arange(5) % 3
    ours = sltt.interop.convert(jelly)
    assert [type(m).__module__.partition(".")[0] for m in ours] == ["torch", "torch", "sltt", *["torch"] * 3]
    with counted() as calls:
        gradients = gradients_of(sltt.SLTT(), jelly, x, y)
    assert len(calls) <= 2  # all time steps at once, as structure proves; first with the BatchNorm
    torch.testing.assert_close(gradients, gradients_of(sltt.SLTT(fold=1), ours, x, y), rtol=1e-4, atol=1e-6)
    jelly[0].step_mode = "m"
    with pytest.raises(ValueError, match=r"0 .Conv2d. is in multi-step mode"):
        sltt.SLTT()(jelly, x, y, LOSS)


@pytest.mark.parametrize("resets", ["subtract", "zero", "none"])
@pytest.mark.parametrize("name", ["beta", "threshold"])
def test_a_constant_of_snntorch_that_is_changed_has_its_effect(name, resets):
    """In the middle of a sequence, and where no counter of changes sees it."""
    library = CASES["snn Leaky"][0]
    model, x, y = network_of(library("Leaky", reset_mechanism=resets))
    found = []

    def shrink(module, args):
        getattr(module, name).data.mul_(0.9)

    for own in (True, False):
        before = model[1].beta.clone(), model[1].threshold.clone()
        handle = model[1].register_forward_pre_hook(
            lambda m, args: getattr(m, name).data.mul_(0.9).new_tensor([]).tolist() or None
        )
        with counted(own):
            found.append(gradients_of(sltt.BPTT(fold=1), model, x, y))
        handle.remove()
        model[1].beta.data, model[1].threshold.data = before
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


CHANGES = {
    "clamped": lambda n: n.mem.detach().clamp_(max=0.2),
    "halved": lambda n: setattr(n, "mem", n.mem.detach().mul_(0.5)),
    "another reset": lambda n: setattr(n, "reset_mechanism", "none"),
}


@pytest.mark.parametrize("resets", ["subtract", "zero"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_state_of_snntorch_that_is_changed_in_place_has_its_effect(change, resets):
    model, x, y = network_of(CASES["snn Leaky"][0]("Leaky", reset_mechanism=resets))
    found = []
    model[1].register_forward_hook(lambda module, *_: CHANGES[change](module))
    for own in (True, False):
        with counted(own):
            found.append(gradients_of(sltt.SLTT(fold=1), model, x, y))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("change", ["threshold", "state", "first state", "method", "subclass", "hook on the surrogate"])
def test_what_is_changed_has_its_effect(change):
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    model, (x, y) = nn.Sequential(nn.Linear(6, 8), neuron.LIFNode(), nn.Linear(8, 3)), batch(steps=4)
    node = model[1]
    if change == "first state":
        node.set_reset_value("v", 0.3)
        torch.testing.assert_close(sltt.unroll(sltt.interop.convert(model), x.float()), sltt.unroll(model, x.float()))
    elif change == "method":
        node.single_step_forward = lambda x: x.relu()
    elif change == "subclass":
        model[1] = type("Own", (neuron.LIFNode,), {"single_step_functional_forward": lambda s, i, v: (i, v)})()
    elif change == "hook on the surrogate":
        node.surrogate_function = copy.deepcopy(node.surrogate_function)  # which all nodes share by default
        node.surrogate_function.register_forward_hook(lambda module, args, s: s / 2)

    def before(module, args):
        if change == "threshold":
            module.v_threshold += 0.5
        elif change == "state" and isinstance(module.v, torch.Tensor):
            module.v = module.v + 0.3

    found = []
    for own in (True, False):
        node.v_threshold = 0.5
        handle = model[1].register_forward_pre_hook(before)
        with counted(own):
            found.append(gradients_of(sltt.BPTT(fold=1), model.double(), x, y))
        handle.remove()
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)
