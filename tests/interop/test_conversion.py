"""Neurons of other libraries, and ours in their place."""

import math
from unittest import mock

import pytest
import torch
from torch import nn

import sltt
from sltt.interop import convert
from sltt.interop.adapted import Adapter
from tests.conftest import batch
from tests.interop.libraries import gradients_of, network

EXACT = {"rtol": 1e-10, "atol": 1e-13}


def check_equal(model, x, y, tolerance):
    """Outputs, and gradients of BPTT, which pass every path through time, before and after the conversion."""
    converted, run = convert(model), mock.patch.object(Adapter, "find_ours", return_value=False)
    with run:  # by their own code
        outputs = sltt.unroll(model, x)
        gradients = [gradients_of(rule, model, x, y) for rule in (sltt.BPTT(), sltt.SLTT())]
    if x.dtype == torch.float64:
        assert torch.equal(outputs > 0.5, sltt.unroll(converted, x) > 0.5)
    torch.testing.assert_close(sltt.unroll(converted, x), outputs, **tolerance)
    assert outputs.any()
    for rule, expected in zip((sltt.BPTT(), sltt.SLTT()), gradients, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(gradients_of(rule, converted, x, y), expected, **tolerance)
    assert not [
        m for m in converted.modules() if sltt.sequence.state.emits_spikes(m) and not isinstance(m, sltt.Stateful)
    ]
    return converted


@pytest.mark.parametrize("name", ["LIFNode", "IFNode", "ParametricLIFNode"])
@pytest.mark.parametrize(
    ("v_reset", "decay_input", "detach_reset"),
    [(None, False, False), (None, True, True), (0.0, False, True), (-0.3, True, False)],
)
def test_neurons_of_spikingjelly(name, v_reset, decay_input, detach_reset):
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    kwargs = {"v_threshold": 0.8, "v_reset": v_reset, "detach_reset": detach_reset}
    if name != "IFNode":
        kwargs["decay_input"] = decay_input
        kwargs["tau" if name == "LIFNode" else "init_tau"] = 3.0
    model = network(*(getattr(neuron, name)(**kwargs) for _ in range(2))).double()
    check_equal(model, *batch(steps=6), EXACT)


@pytest.mark.parametrize(
    ("name", "alpha"),
    [
        ("PiecewiseQuadratic", 0.7),
        ("Rect", 0.5),
        ("Sigmoid", 4.0),
        ("ATan", 2.0),
        ("PiecewiseExp", 3.0),
        ("SoftSign", 2.0),
        ("SuperSpike", 0.8),
        ("Erf", 2.0),
    ],
)
def test_surrogates_of_spikingjelly(name, alpha):
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    theirs = getattr(pytest.importorskip("spikingjelly.activation_based.surrogate"), name)(alpha)
    ours = convert(neuron.IFNode(surrogate_function=theirs)).surrogate
    x = torch.linspace(-3, 3, 601, dtype=torch.float64, requires_grad=True)
    assert torch.equal(theirs(x), ours(x))
    (expected,) = torch.autograd.grad(theirs(x).sum(), x)
    torch.testing.assert_close(ours.derivative(x.detach()), expected, rtol=1e-10, atol=1e-14)


SNNTORCH = {
    "zero": {"beta": 0.7, "reset_mechanism": "zero"},
    "zero, at once": {"beta": 0.7, "reset_mechanism": "zero", "reset_delay": False},
    "subtract": {"beta": 0.7},
    "no leak, subtract": {"beta": 1.0},
    "no leak, zero": {"beta": 1.0, "reset_mechanism": "zero", "threshold": 0.6},
}


@pytest.mark.parametrize("kwargs", SNNTORCH.values(), ids=SNNTORCH.keys())
def test_neurons_of_snntorch(kwargs):
    snntorch = pytest.importorskip("snntorch")
    x, y = batch(steps=6)
    neurons = [snntorch.Leaky(init_hidden=True, spike_grad=sltt.surrogates.ArcTan(), **kwargs) for _ in range(2)]
    check_equal(network(*neurons).double(), x, y, EXACT)
    neurons = [snntorch.Leaky(init_hidden=True, **kwargs) for _ in range(2)]
    converted = check_equal(network(*neurons), x.float(), y, {"rtol": 1e-4, "atol": 1e-6})
    assert converted[1].surrogate == sltt.surrogates.Above(sltt.surrogates.ArcTan())


NEURONS = {
    "IF": lambda: sltt.IF(v_threshold=0.4),
    "IF, hard": lambda: sltt.IF(v_reset=0.0, v_threshold=0.4),
    "LIF, hard": lambda: sltt.LIF(tau=3.0, v_reset=0.0, v_threshold=0.3, v_init=0.0),
    "LIF": lambda: sltt.LIF(
        tau=3.0, subtract=0.45, v_threshold=0.3, surrogate=sltt.surrogates.Above(sltt.surrogates.ArcTan())
    ),
    "PLIF, hard": lambda: sltt.PLIF(tau=2.0, v_reset=0.0, v_threshold=0.3),
}


@pytest.mark.parametrize("neuron", NEURONS)
def test_networks_in_snntorch(neuron):
    utils, make = pytest.importorskip("snntorch.utils"), NEURONS[neuron]
    layers = [nn.Conv2d(2, 4, 3), make(), sltt.Dropout(0.5), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 5), make()]
    layers[0].weight.data *= 3
    layers[5].weight.data.abs_().mul_(0.6)
    model, x = nn.Sequential(*layers).double().eval(), 2 * torch.rand(12, 3, 2, 6, 6, dtype=torch.float64)
    expected, theirs = sltt.unroll(model, x), sltt.interop.to_snntorch(model)
    utils.reset(theirs)
    assert 0.02 < expected.mean() < 0.9
    assert torch.equal(torch.stack([theirs(x_t) for x_t in x]), expected)
    assert [p.shape for p in theirs.parameters()] == [p.shape for p in model.parameters()]


WITHOUT = {
    r"use v_reset=0, or LIF with subtract=1\.5": sltt.LIF(tau=3.0),
    r"use v_reset=0, or LIF with subtract": sltt.IF(v_reset=-0.1),
    r"\(IntegerLIF\), which has other dynamics than IF, LIF and PLIF": sltt.IntegerLIF(),
    "scale the weights before it": sltt.LIF(v_reset=0.0, decay_input=True),
    "has a v_init: leave it out": sltt.IF(v_init=0.5),
}


@pytest.mark.parametrize("remedy", WITHOUT)
def test_neurons_that_snntorch_has_not_are_named(remedy):
    pytest.importorskip("snntorch")
    with pytest.raises(ValueError, match=rf"snnTorch has no counterpart for .*{remedy}"):
        sltt.interop.to_snntorch(nn.Sequential(nn.Linear(6, 8), WITHOUT[remedy]))


@pytest.mark.parametrize(
    "kwargs", [{"beta": 0.7, "reset_mechanism": "zero", "reset_delay": False}, {"beta": 1.0}, {"beta": 0.8}], ids=str
)
def test_neurons_of_snntorch_with_a_synaptic_current(kwargs):
    snntorch = pytest.importorskip("snntorch")
    settings = {"alpha": 0.6, "init_hidden": True, "spike_grad": sltt.surrogates.ArcTan(), **kwargs}
    model = network(*(snntorch.Synaptic(**settings) for _ in range(2))).double()
    assert type(check_equal(model, *batch(steps=6), EXACT)[1]) is sltt.CubaLIF


@pytest.mark.parametrize(("name", "slope"), [("atan", 3.0), ("sigmoid", 5.0), ("fast_sigmoid", 25)])
def test_surrogates_of_snntorch(name, slope):
    snntorch = pytest.importorskip("snntorch")
    theirs = getattr(pytest.importorskip("snntorch.surrogate"), name)(slope)
    ours = convert(snntorch.Leaky(1.0, init_hidden=True, spike_grad=theirs)).surrogate
    x = torch.linspace(-3, 3, 601, requires_grad=True)
    assert torch.equal(theirs(x), ours(x))
    assert ours(torch.zeros(1)) == 0
    (expected,) = torch.autograd.grad(theirs(x).sum(), x)
    torch.testing.assert_close(ours.derivative(x.detach()), expected)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("LIFSqueeze", {"tau_mem": 3.0, "norm_input": False}),
        ("LIFSqueeze", {"tau_mem": 3.0, "norm_input": True}),
        ("LIFSqueeze", {"tau_mem": 3.0, "norm_input": False, "tau_syn": 2.0}),
        ("LIFSqueeze", {"tau_mem": 3.0, "norm_input": True, "tau_syn": 2.0}),
        ("IAFSqueeze", {}),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("reset", "surrogate"), [("MembraneSubtract", "SingleExponential"), ("MembraneReset", "Gaussian")]
)
def test_neurons_of_sinabs(name, kwargs, reset, surrogate):
    layers, activation = pytest.importorskip("sinabs.layers"), pytest.importorskip("sinabs.activation")

    def make():
        neuron = getattr(layers, name)(
            num_timesteps=1,
            spike_fn=activation.SingleSpike,
            reset_fn=getattr(activation, reset)(),
            surrogate_grad_fn=getattr(activation, surrogate)(),
            spike_threshold=torch.tensor(0.4),
            **kwargs,
        )
        return neuron.requires_grad_(False)

    x, y = batch(steps=6)
    converted = check_equal(network(make(), make()), x.float(), y, {"rtol": 1e-4, "atol": 1e-6})
    assert isinstance(converted[1], sltt.CubaLIF) == ("tau_syn" in kwargs)


def kept(module):
    return pytest.importorskip("sltt.interop.norse").KeepState(module)


def of_norse(kind, **kwargs):
    """Parameters of Norse's cells, with another time constant and threshold than theirs."""
    kwargs = {name: torch.tensor(value) if isinstance(value, float) else value for name, value in kwargs.items()}
    return kind(tau_mem_inv=torch.tensor(300.0, dtype=torch.float64), v_th=torch.tensor(0.2), **kwargs)


def soft(norse, **kwargs):
    reset = pytest.importorskip("norse.torch.functional.reset").reset_subtract
    return norse.LIFBoxCell(of_norse(norse.LIFBoxParameters, reset_method=reset, **kwargs))


def to_rest(norse, kind, rest):
    parameters = {"LIFBoxCell": norse.LIFBoxParameters, "LIFCell": norse.LIFParameters}[kind]
    return getattr(norse, kind)(of_norse(parameters, v_leak=rest, v_reset=rest))


CELLS = {
    "box": (lambda n: to_rest(n, "LIFBoxCell", 0.0), sltt.LIF),
    "box below 0": (lambda n: to_rest(n, "LIFBoxCell", -0.25), sltt.LIF),
    "box, soft": (lambda n: soft(n, method="super"), sltt.LIF),
    "box, soft, triangle": (lambda n: soft(n, method="triangle", alpha=1), sltt.LIF),
    "integrator": (lambda n: n.IAFCell(n.IAFParameters(v_reset=torch.tensor(0.1))), sltt.IF),
    "synaptic current": (lambda n: to_rest(n, "LIFCell", 0.0), sltt.CubaLIF),
    "synaptic current below 0": (lambda n: to_rest(n, "LIFCell", -0.25), sltt.CubaLIF),
}


@pytest.mark.parametrize(("make", "ours"), CELLS.values(), ids=CELLS)
def test_cells_of_norse(make, ours):
    norse = pytest.importorskip("norse.torch")
    model = network(kept(make(norse)), kept(make(norse))).double()
    assert type(check_equal(model, *batch(steps=6), EXACT)[1]) is ours


def test_an_integrator_of_norse_that_has_run_is_converted():
    used = kept(pytest.importorskip("norse.torch").IAFCell())
    used(torch.randn(2, 3))  # which marks its v_reset to require a gradient
    assert isinstance(convert(used), sltt.IF)


def test_a_sequential_state_of_norse_becomes_a_sequential():
    norse = pytest.importorskip("norse.torch")
    box = norse.LIFBoxCell(of_norse(norse.LIFBoxParameters))
    model = kept(norse.SequentialState(*network(box, norse.IAFCell()), norse.LICell())).double()
    converted = check_equal(model, *batch(steps=6), EXACT)
    assert [type(m).__name__ for m in converted] == ["Linear", "LIF", "Linear", "IF", "Linear", "KeepState"]


def test_a_learnable_time_constant_goes_on_learning():
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    model = network(neuron.ParametricLIFNode(), neuron.ParametricLIFNode()).double()
    converted = convert(model)
    assert converted[1].w.item() == model[1].w.item()
    assert converted[1].w.dtype == torch.float64
    sltt.BPTT()(converted, *batch(), sltt.losses.CrossEntropyMSE())
    assert converted[1].w.grad.abs() > 0
    assert model[1].w.grad is None  # a copy


def test_a_converted_network_folds():
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    model = convert(network(neuron.LIFNode(), neuron.LIFNode()).double())
    x, y = batch()
    torch.testing.assert_close(gradients_of(sltt.SLTT(fold=2), model, x, y), gradients_of(sltt.SLTT(), model, x, y))


def test_a_neuron_that_is_used_twice_stays_one():
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    shared = neuron.LIFNode()
    converted = convert(nn.ModuleDict({"a": nn.Sequential(shared), "b": shared}))
    assert converted["a"][0] is converted["b"]


def test_a_memory_of_spikingjelly_that_does_not_spike_stays():
    layer = pytest.importorskip("spikingjelly.activation_based.layer")
    assert isinstance(convert(layer.Dropout(0.5)), layer.Dropout)


def test_ours_and_layers_without_a_state_stay():
    model = network(sltt.LIF(), sltt.Dropout(0.5))
    assert [type(m) for m in convert(model)] == [type(m) for m in model]
    assert isinstance(convert(sltt.IF()), sltt.IF)


def test_all_that_cannot_be_translated_is_named_at_once():
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    snntorch = pytest.importorskip("snntorch")
    model = nn.Sequential(
        neuron.LIFNode(step_mode="m"),
        nn.Sequential(neuron.KLIFNode()),
        snntorch.Leaky(0.5, init_hidden=True, reset_mechanism="none"),
    )
    message = (
        r"no exact counterpart here for 0 \(LIFNode\), which is in multi-step mode.*; "
        r"1.0 \(KLIFNode\), which has other dynamics than LIFNode.*; "
        r"2 \(Leaky\), which has no reset that ours have"
    )
    with pytest.raises(ValueError, match=message):
        convert(model)
    assert type(model[0]) is neuron.LIFNode


def refusals():
    yield "spikingjelly.activation_based.neuron", lambda n: n.LIFNode(store_v_seq=True), "store_v_seq = False"
    yield "spikingjelly.activation_based.neuron", lambda n: type("Own", (n.LIFNode,), {})(), "other dynamics"
    yield (
        "spikingjelly.activation_based",
        lambda a: a.neuron.LIFNode(surrogate_function=a.surrogate.S2NN()),
        "the surrogate S2NN",
    )
    for kwargs, message in (
        ({"learn_beta": True}, "learns beta"),
        ({"learn_threshold": True}, "learns threshold"),
        ({"threshold": 0.0}, "the threshold 0, which is not positive"),
        ({"beta": torch.tensor([0.1, 0.2])}, "another beta for each neuron"),
        ({"beta": 0.0}, "keeps 0 of its membrane potential"),
        ({"output": True}, "gives its state with its spikes"),
        ({"init_hidden": False}, "gives its state with its spikes"),
        ({"graded_spikes_factor": 2.0}, "spikes that are not 0 or 1"),
        ({"state_quant": lambda mem: mem}, "rounds its membrane potential"),
        ({"reset_mechanism": "none"}, "has no reset that ours have"),
        ({"reset_mechanism": "subtract", "reset_delay": False}, "fires once more, without a spike"),
        ({"spike_grad": lambda x: x}, "has the surrogate"),
        ({"surrogate_disable": True}, "has the surrogate"),
    ):
        arguments = {"beta": 0.5, "init_hidden": True, "reset_mechanism": "zero", **kwargs}
        yield "snntorch", lambda s, arguments=arguments: s.Leaky(**arguments), message
    zero = {"init_hidden": True, "reset_mechanism": "zero"}
    yield "snntorch", lambda s: s.Synaptic(0.5, 0.5, **zero), "resets the next input, too"
    yield "snntorch", lambda s: s.Lapicque(0.5, **zero), "resets the next input, too"
    yield "snntorch", lambda s: s.Lapicque(R=5.0, C=0.5, init_hidden=True), r"scales its input .R is not 1"
    yield "snntorch", lambda s: s.Alpha(0.6, 0.5, init_hidden=True), "other dynamics than Leaky, Lapicque and Synaptic"
    for kwargs, message in (
        ({"num_timesteps": None, "batch_size": 4}, "num_timesteps=1"),
        ({"train_alphas": True}, "learns its decay"),
        ({"min_v_mem": -1.0}, "min_v_mem"),
        ({"record_states": True}, "records its states"),
        ({}, "learns tau_mem"),
    ):
        arguments = {"tau_mem": 3.0, "num_timesteps": 1, **kwargs}
        yield (
            "sinabs",
            lambda s, arguments=arguments: s.layers.LIFSqueeze(spike_fn=s.activation.SingleSpike, **arguments),
            message,
        )
    yield "sinabs.layers", lambda s: s.IAFSqueeze(num_timesteps=1), "fire several times in a time step"
    for reset, message in (
        ("MembraneReset", "neurons that did not fire"),
        ("MembraneSubtract", "a reset that ours do not have"),
    ):
        yield (
            "sinabs",
            lambda s, reset=reset: s.layers.IAFSqueeze(
                num_timesteps=1, spike_fn=s.activation.SingleSpike, reset_fn=getattr(s.activation, reset)(0.3)
            ),
            message,
        )
    yield "norse.torch", lambda n: n.LIFBoxCell(), "passes its state through its calls: wrap it"
    for make, message in (
        (lambda n: n.LIFAdExCell(), "holds a LIFAdExCell, of other dynamics"),
        (lambda n: n.LIFBoxCell(n.LIFBoxParameters(v_leak=torch.tensor(0.1))), "v_leak that is not v_reset"),
        (lambda n: n.LIFBoxCell(n.LIFBoxParameters(method="tanh")), "the surrogate tanh of alpha = 100"),
        (lambda n: n.LIFBoxCell(dt=0.02), "keeps -1 of its membrane potential"),
        (lambda n: n.SequentialState(n.LIFBoxCell(), return_hidden=True), "return_hidden=False"),
    ):
        yield "norse.torch", lambda n, make=make: kept(make(n)), message


@pytest.mark.parametrize(("library", "make", "message"), list(refusals()))
def test_what_is_not_the_same_is_refused_with_the_reason(library, make, message):
    module = make(pytest.importorskip(library))
    with pytest.raises(ValueError, match=message):
        convert(module)


def test_a_registered_type_says_how_it_is_translated():
    class Plain(nn.Module):
        pass

    sltt.register(Plain, states=["v"], spikes=True)
    with pytest.raises(ValueError, match="registered without translate"):
        convert(nn.Sequential(Plain()))
    sltt.register(Plain, states=["v"], spikes=True, translate=lambda module: sltt.LIF(tau=math.pi))
    assert convert(nn.Sequential(Plain()))[0].tau == math.pi
    hooked = nn.Sequential(Plain())
    hooked[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(ValueError, match=r"0 \(Plain\), which has hooks that ours would not run"):
        convert(hooked)
    sltt.register(Plain, states=["v"], spikes=True, translate=lambda module: None)
    with pytest.raises(ValueError, match=r"translate of sltt\.register gives for Plain must be a Module, got None"):
        convert(nn.Sequential(Plain()))
