"""Networks of other libraries under the rules."""

import copy
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import sltt
from tests.conftest import RULES, batch, gradients

LOSS = sltt.losses.CrossEntropyMSE()
FOLDS_NOTHING = {name: rule for name, rule in RULES.items() if "fold" not in name}
FOLDS_NOTHING["Mixed"] = sltt.Mixed({"1": "all"})  # the first neurons of the networks here
FOLDS_NOTHING["Mixed(default=2)"] = sltt.Mixed({"1": 3}, default=2)


def jelly(name, **kwargs):
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    functional = pytest.importorskip("spikingjelly.activation_based.functional")
    return SimpleNamespace(
        make=lambda size: getattr(neuron, name)(**kwargs), reset=functional.reset_net, detach=functional.detach_net
    )


def snn(name, recurrent=False, **kwargs):
    snntorch = pytest.importorskip("snntorch")

    def make(size):
        sizes = {"linear_features": size} if recurrent else {}
        # snnTorch's own surrogates give float32 for any input
        surrogate = sltt.surrogates.ArcTan()
        return getattr(snntorch, name)(beta=0.8, spike_grad=surrogate, init_hidden=True, **sizes, **kwargs)

    def reset(model):
        for m in model.modules():
            if isinstance(m, snntorch.SpikingNeuron):
                m.reset_mem()

    def detach(model):
        for m in model.modules():
            for state in ("spk", "syn", "mem"):
                if hasattr(m, state):
                    setattr(m, state, getattr(m, state).detach())

    return SimpleNamespace(make=make, reset=reset, detach=detach)


def sinabs(name, **kwargs):
    layers = pytest.importorskip("sinabs.layers")

    def detach(model):  # not by zero_grad, which zeroes the gradient of the time constants too
        for m in model.modules():
            for state in ("v_mem", "i_syn"):
                if getattr(m, state, None) is not None:
                    setattr(m, state, getattr(m, state).detach())

    def reset(model):
        for m in model.modules():
            if isinstance(m, layers.StatefulLayer):
                m.reset_states()

    return SimpleNamespace(
        make=lambda size: getattr(layers, name)(num_timesteps=1, **kwargs),
        reset=reset,
        detach=detach,
        dtype=torch.float32,  # of its spikes, for any input
    )


def norse(name, **parameters):
    torch_ = pytest.importorskip("norse.torch")
    interop = pytest.importorskip("sltt.interop.norse")
    kind = getattr(torch_, name)

    def make(size):
        args = (size, size) if "Recurrent" in name else ()
        p = {"p": getattr(torch_, parameters["p"])(**parameters["of_p"])} if parameters else {}
        return interop.KeepState(kind(*args, dt=0.001, **p))

    def each(function):
        return lambda model: [function(m) for m in model.modules() if isinstance(m, interop.KeepState)]

    def cut(m):
        m.state = None if m.state is None else type(m.state)(*(s.detach() for s in m.state))

    return SimpleNamespace(make=make, reset=each(lambda m: setattr(m, "state", None)), detach=each(cut))


CASES = {
    "jelly LIF": (jelly, "LIFNode", {"tau": 2.0}),
    "jelly LIF, soft": (jelly, "LIFNode", {"tau": 3.0, "decay_input": False, "v_reset": None, "store_v_seq": True}),
    "jelly IF": (jelly, "IFNode", {"detach_reset": True}),
    "jelly PLIF": (jelly, "ParametricLIFNode", {"v_reset": None}),
    "jelly KLIF": (jelly, "KLIFNode", {}),
    "snn Leaky": (snn, "Leaky", {}),
    "snn Leaky, zero": (snn, "Leaky", {"reset_mechanism": "zero", "reset_delay": False}),
    "snn Synaptic": (snn, "Synaptic", {"alpha": 0.5}),
    "snn RLeaky": (snn, "RLeaky", {"recurrent": True}),
    "snn RSynaptic": (snn, "RSynaptic", {"alpha": 0.5, "recurrent": True}),
    "sinabs LIF": (sinabs, "LIFSqueeze", {"tau_mem": 3.0, "norm_input": False}),
    "sinabs LIF with current": (sinabs, "LIFSqueeze", {"tau_mem": 3.0, "tau_syn": 2.0}),
    "sinabs IAF": (sinabs, "IAFSqueeze", {}),
    "norse LIFBox": (norse, "LIFBoxCell", {"p": "LIFBoxParameters", "of_p": {"v_th": torch.tensor(0.1)}}),
    "norse LIF": (norse, "LIFCell", {"p": "LIFParameters", "of_p": {"v_th": torch.tensor(0.1)}}),
    "norse IAF": (norse, "IAFCell", {}),
    "norse recurrent": (norse, "LIFRecurrentCell", {"p": "LIFParameters", "of_p": {"v_th": torch.tensor(0.1)}}),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def library(request):
    case, name, kwargs = request.param
    return case(name, **kwargs)


def network(*neurons):
    layers = [nn.Linear(6, 8), neurons[0], nn.Linear(8, 7), neurons[1], nn.Linear(7, 3)]
    for layer in layers:
        if isinstance(layer, nn.Linear):
            layer.weight.data.mul_(3)
    return nn.Sequential(*layers)


def network_of(library):
    """A network of the library's neurons, and a batch for it."""
    x, y = batch(steps=5)
    dtype = getattr(library, "dtype", torch.float64)
    return network(library.make(8), library.make(7)).to(dtype), x.to(dtype), y


def by_hand(model, x, y, reset, detach, window):
    """The gradient of a loop with the library's own functions, which cuts the graph every `window` steps."""
    reset(model)
    model.zero_grad()
    total = 0
    for t, x_t in enumerate(x):
        if t and t % window == 0:
            total.backward()
            detach(model)
            total = 0
        total = total + LOSS(model(x_t), y) / len(x)
    total.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    ("rule", "window"),
    [
        (sltt.BPTT(), 9),
        (sltt.BPTT(segment=2), 9),
        (sltt.TBPTT(2), 2),
        (sltt.SLTT(), 1),
        (sltt.SLTT(recompute=True), 1),
    ],
    ids=["BPTT", "BPTT(segment=2)", "TBPTT(2)", "SLTT", "SLTT(recompute)"],
)
def test_gradients_equal_the_library_s_own_loop(library, rule, window):
    model, x, y = network_of(library)
    expected = by_hand(model, x, y, library.reset, library.detach, window)
    model.zero_grad()
    out = rule(model, x, y, LOSS)
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    tolerance = {"rtol": 1e-10, "atol": 1e-13} if x.dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(found, expected, **tolerance)
    assert expected.abs().max() > 0
    assert torch.equal(out.logits, sltt.unroll(model, x))


def test_bptt_and_sltt_differ_by_what_the_state_carries(library):
    model, x, y = network_of(library)
    gap = gradients_of(sltt.BPTT(), model, x, y) - gradients_of(sltt.SLTT(), model, x, y)
    assert gap.norm() > 1e-3


def gradients_of(rule, model, x, y):
    model.zero_grad()
    rule(model, x, y, LOSS)
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_sltt_k_trains_the_steps_that_it_draws(library):
    model, x, y = network_of(library)
    total = 0
    for t in range(len(x)):
        seed = next(s for s in range(999) if torch.randperm(5, generator=torch.Generator().manual_seed(s))[0] == t)
        rule = sltt.SLTT(k=1, generator=torch.Generator().manual_seed(seed))
        total = total + gradients_of(rule, model, x, y)
    torch.testing.assert_close(total, gradients_of(sltt.SLTT(), model, x, y), rtol=1e-4, atol=1e-6)


def test_nothing_is_left_behind(library):
    """A second batch, of another size, has the gradient that it has alone."""
    model, x, y = network_of(library)
    expected = gradients_of(sltt.SLTT(), model, x[:, :3], y[:3])
    gradients_of(sltt.BPTT(), model, x, y)
    torch.testing.assert_close(gradients_of(sltt.SLTT(), model, x[:, :3], y[:3]), expected, rtol=1e-5, atol=1e-7)


def test_a_copy_is_a_network_of_its_own():
    """snnTorch's reset and detach reach what its constructors made, and a copy is made by none."""
    model, x, y = network_of(snn("Leaky"))
    twin = copy.deepcopy(model)
    for rule in (sltt.SLTT(), sltt.BPTT(), sltt.SLTT()):
        assert torch.equal(gradients_of(rule, twin, x, y), gradients_of(rule, model, x, y))


def test_an_exception_resets_the_model(library):
    model, x, y = network_of(library)
    expected = sltt.unroll(model, x)

    def fails(logits, target):
        raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        sltt.SLTT()(model, x, y, fails)
    with torch.no_grad():
        assert torch.equal(model(x[0]), expected[0])  # without a reset: the state is that of the start


def test_firing_rates_count_the_library_s_neurons(library):
    model, x, y = network_of(library)
    with sltt.analysis.firing_rates(model) as rates:
        spikes = []
        hook = model[1].register_forward_hook(lambda m, i, o: spikes.append(torch.count_nonzero(o)))
        sltt.SLTT()(model, x, y, LOSS)
        hook.remove()
    found = rates.by_layer()
    assert len(found) == 2
    assert next(iter(found.values())) == pytest.approx(sum(spikes).item() / (5 * 5 * 8))
    assert rates.mean() > 0


def test_the_networks_of_the_tests_spike(library):
    model, x, _ = network_of(library)
    with sltt.analysis.firing_rates(model) as rates:
        sltt.unroll(model, x)
    assert all(0.01 < rate < 0.99 for rate in rates.by_layer().values())


@pytest.mark.parametrize("rule", FOLDS_NOTHING.values(), ids=FOLDS_NOTHING.keys())
def test_every_rule_gives_the_gradient_that_it_gives_for_the_same_neuron_here(rule):
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    surrogate = pytest.importorskip("spikingjelly.activation_based.surrogate").PiecewiseQuadratic(alpha=1.0)
    theirs = [
        neuron.LIFNode(tau=2.0, decay_input=False, v_reset=None, surrogate_function=surrogate, detach_reset=False)
        for _ in range(2)
    ]
    model = network(*theirs).double()
    ours = copy.deepcopy(model)
    ours[1], ours[3] = sltt.LIF(tau=2.0), sltt.LIF(tau=2.0)
    x, y = batch()
    torch.manual_seed(1)
    expected, _ = gradients(ours, rule, x, y)
    torch.manual_seed(1)
    if isinstance(rule, sltt.RateBased):
        with pytest.raises(ValueError, match=r"not of 1 \(LIFNode\), which keeps a state in a way of its own"):
            gradients(model, rule, x, y)
        return
    torch.testing.assert_close(gradients(model, rule, x, y)[0], expected)


def test_neurons_of_several_libraries_and_ours_in_one_module():
    """Each library's neurons keep their state for themselves: the gradient of the loop that detaches each by hand."""
    first, second = jelly("LIFNode", tau=2.0), snn("Leaky")
    model = nn.Sequential(network(first.make(8), second.make(7)), sltt.LIF(tau=2.0), nn.Linear(3, 3)).double()
    x, y = batch()

    def reset(model):
        first.reset(model)
        second.reset(model)
        model[1].v = None

    def detach(model):
        first.detach(model)
        second.detach(model)
        model[1].v = model[1].v.detach()

    for rule, window in ((sltt.BPTT(), 9), (sltt.BPTT(segment=2), 9), (sltt.SLTT(), 1)):
        expected = by_hand(model, x, y, reset, detach, window)
        torch.testing.assert_close(gradients_of(rule, model, x, y), expected, rtol=1e-10, atol=1e-13)


class TestNorse:
    def sequential(self):
        torch_ = pytest.importorskip("norse.torch")
        p = torch_.LIFBoxParameters(v_th=torch.tensor(0.1))
        net = network(torch_.LIFBoxCell(p), torch_.LIFCell(torch_.LIFParameters(v_th=torch.tensor(0.1))))
        return torch_.SequentialState(*net).double()

    @pytest.mark.parametrize("rule", [sltt.BPTT(), sltt.BPTT(segment=2), sltt.SLTT()], ids=repr)
    def test_a_sequential_state_equals_its_own_loop(self, rule):
        model = self.sequential()
        x, y = batch(steps=5)
        state, total = None, 0
        for x_t in x:
            logits, state = model(x_t, state)
            total = total + LOSS(logits, y) / len(x)
            if isinstance(rule, sltt.SLTT):
                state = [s if s is None else type(s)(*(v.detach() for v in s)) for s in state]
        total.backward()
        expected = torch.cat([p.grad.flatten() for p in model.parameters()])
        kept = pytest.importorskip("sltt.interop.norse").KeepState(model)
        torch.testing.assert_close(gradients_of(rule, kept, x, y), expected, rtol=1e-10, atol=1e-13)

    def test_a_module_that_keeps_no_state_is_refused(self):
        model = self.sequential()
        with pytest.raises(ValueError, match=r"the model \(SequentialState\).*wrap it in sltt.interop.norse.KeepState"):
            sltt.SLTT()(model, *batch(), LOSS)

    def test_a_cell_that_emits_a_tuple_is_refused(self):
        torch_ = pytest.importorskip("norse.torch")
        model = nn.Sequential(nn.Linear(6, 3), torch_.LIFBoxCell()).double()
        with pytest.raises(ValueError, match=r"1 \(LIFBoxCell\) passes its state through its calls"):
            sltt.SLTT()(model, *batch(), LOSS)

    @pytest.mark.parametrize("name", ["LIF", "LI", "LIFRecurrent"])
    def test_modules_of_all_time_steps_are_refused(self, name):
        torch_ = pytest.importorskip("norse.torch")
        module = getattr(torch_, name)(*(3, 3) if "Recurrent" in name else ())
        kept = pytest.importorskip("sltt.interop.norse").KeepState(module)
        with pytest.raises(ValueError, match=rf"1.module \({name}\) takes all time steps in one call: use its cell"):
            sltt.SLTT()(nn.Sequential(nn.Linear(6, 3), kept).double(), *batch(), LOSS)

    @pytest.mark.parametrize(
        ("make", "message"), [(nn.Linear, "needs no KeepState"), (nn.Identity, "needs no KeepState")]
    )
    def test_a_module_without_a_state_is_refused(self, make, message):
        keep = pytest.importorskip("sltt.interop.norse").KeepState
        with pytest.raises(ValueError, match=message):
            keep(make(3, 3))

    def test_a_torch_rnn_inside_is_refused(self):
        torch_ = pytest.importorskip("norse.torch")
        keep = pytest.importorskip("sltt.interop.norse").KeepState
        with pytest.raises(ValueError, match=r"1 \(LSTM\) takes all time steps in one call"):
            keep(torch_.SequentialState(nn.Linear(3, 3), nn.LSTM(3, 3)))


def test_multi_step_modules_are_refused_by_name():
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    layer = pytest.importorskip("spikingjelly.activation_based.layer")
    model = nn.Sequential(
        layer.Linear(6, 3, step_mode="m"), neuron.LIFNode(step_mode="m"), neuron.NonSpikingLIFNode(tau=2.0)
    )
    message = (
        r"0 \(Linear\) is in multi-step mode: call functional.set_step_mode\(model, 's'\); "
        r"1 \(LIFNode\) is in multi-step mode.*2 \(NonSpikingLIFNode\) takes all time steps in one call"
    )
    with pytest.raises(ValueError, match=message):
        sltt.SLTT()(model.double(), *batch(), LOSS)


def test_a_neuron_with_a_rule_of_its_own_is_refused():
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    model = nn.Sequential(nn.Linear(6, 3), neuron.SLTTLIFNode()).double()
    with pytest.raises(ValueError, match=r"1 \(SLTTLIFNode\) has a learning rule of its own: use LIFNode"):
        sltt.BPTT()(model, *batch(), LOSS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s: s.Leaky(beta=0.5), "init_hidden=True"),
        (lambda s: s.DeltaLeaky(beta=0.5, init_hidden=True), "gives its state with its spikes"),
        (lambda s: s.StateLeaky(beta=0.5, channels=3), "takes all time steps in one call"),
        (lambda s: s.LeakyParallel(3, 3), "is recurrent and keeps no state itself"),
    ],
)
def test_neurons_of_snntorch_that_do_not_step_are_refused(make, message):
    snntorch = pytest.importorskip("snntorch")
    with pytest.raises(ValueError, match=message):
        sltt.SLTT()(nn.Sequential(nn.Linear(6, 3), make(snntorch)).double(), *batch(), LOSS)


def test_a_neuron_that_gives_a_tuple_at_the_end_is_refused():
    snntorch = pytest.importorskip("snntorch")
    model = nn.Sequential(nn.Linear(6, 3), snntorch.Leaky(beta=0.5, init_hidden=True, output=True)).double()
    with pytest.raises(ValueError, match=r"expected the model to return the logits \[B, C\].*got tuple"):
        sltt.SLTT()(model, *batch(), LOSS)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("LIF", {"tau_mem": 2.0}, r"1 \(LIF\) takes \[B, T, ...\]: use the squeezing layer"),
        (
            "LIFSqueeze",
            {"tau_mem": 2.0, "batch_size": 4},
            "has batch_size=4 and num_timesteps=-1, for a time step of 5",
        ),
        ("IAFSqueeze", {"num_timesteps": 5}, "has batch_size=-1 and num_timesteps=5"),
        ("LIFRecurrent", {"tau_mem": 2.0, "rec_connect": nn.Linear(3, 3)}, "use the squeezing layer"),
    ],
)
def test_layers_of_sinabs_that_take_several_steps_are_refused(name, kwargs, message):
    layers = pytest.importorskip("sinabs.layers")
    with pytest.raises(ValueError, match=message):
        sltt.SLTT()(nn.Sequential(nn.Linear(6, 3), getattr(layers, name)(**kwargs)), *batch(), LOSS)


def test_a_layer_of_sinabs_for_the_batch_size_that_comes_is_taken():
    layers = pytest.importorskip("sinabs.layers")
    model = nn.Sequential(nn.Linear(6, 3), layers.IAFSqueeze(batch_size=5))
    x, y = batch()
    twin = nn.Sequential(model[0], layers.IAFSqueeze(num_timesteps=1))
    expected = gradients_of(sltt.SLTT(), twin, x.float(), y)
    assert torch.equal(gradients_of(sltt.SLTT(), model, x.float(), y), expected)


def test_folding_names_what_it_cannot_fold(library):
    model, x, y = network_of(library)
    with pytest.raises(ValueError, match=r"fold needs layers.*keeps a state.*use fold=1"):
        sltt.SLTT(fold=2)(model, x, y, LOSS)


def test_ottt_refuses_hard_resets_and_weights_inside_of_neurons():
    model, x, y = network_of(jelly("LIFNode", tau=2.0))
    with pytest.raises(ValueError, match=r"1 \(LIFNode\) resets to v_reset = 0.0"):
        sltt.OTTT()(model, x, y, LOSS)
    model, x, y = network_of(snn("RLeaky", recurrent=True))
    with pytest.raises(ValueError, match=r"no traces for the weights of 1 \(RLeaky\)"):
        sltt.OTTT(decay=0.5)(model, x, y, LOSS)


def test_a_model_without_a_state_is_warned_about():
    with pytest.warns(UserWarning, match="no module of the model keeps a state between time steps.*sltt.register"):
        sltt.SLTT()(nn.Linear(6, 3).double(), *batch(), LOSS)


@pytest.mark.parametrize("make", [lambda: nn.RNN(6, 3), lambda: nn.LSTMCell(6, 3)])
def test_a_recurrent_layer_whose_state_nobody_keeps_is_refused(make):
    with pytest.raises(ValueError, match=r"is recurrent and keeps no state itself: put it into a sltt.Stateful"):
        sltt.SLTT()(nn.Sequential(make(), sltt.LIF()).double(), *batch(), LOSS)


class Recurrent(sltt.Stateful):
    """A recurrent cell with its hidden state kept, and logits on top."""

    states = ("hidden",)

    def __init__(self, cell):
        super().__init__()
        self.cell, self.out = cell, nn.Linear(8, 3)

    def forward(self, x):
        self.hidden = self.cell(x, self.hidden)
        return self.out(self.hidden[0] if isinstance(self.hidden, tuple) else self.hidden)


@pytest.mark.parametrize("cell", [nn.GRUCell, nn.LSTMCell])
@pytest.mark.parametrize("rule", [sltt.BPTT(), sltt.BPTT(segment=2), sltt.SLTT()], ids=repr)
def test_a_recurrent_cell_in_a_stateful_module_is_a_state_like_any_other(cell, rule):
    model = Recurrent(cell(6, 8)).double()
    x, y = batch()
    hidden, total = None, 0
    for x_t in x:
        hidden = model.cell(x_t, hidden)
        total = total + LOSS(model.out(hidden[0] if isinstance(hidden, tuple) else hidden), y) / len(x)
        if isinstance(rule, sltt.SLTT):
            hidden = tuple(h.detach() for h in hidden) if isinstance(hidden, tuple) else hidden.detach()
    total.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(gradients_of(rule, model, x, y), expected, rtol=1e-10, atol=1e-13)


class Theirs(nn.Module):
    """A neuron of a library that nobody knows."""

    def __init__(self):
        super().__init__()
        self.potential = None

    def forward(self, x):
        v = x if self.potential is None else 0.5 * self.potential + x
        s = sltt.surrogates.Triangle()(v - 1)
        self.potential = v - s
        return s


def test_a_registered_type_is_a_neuron_like_ours():
    class Unknown(Theirs):
        pass

    sltt.register(Unknown, states=["potential"], spikes=True)
    model, ours = network(Unknown(), Unknown()).double(), network(sltt.LIF(tau=2.0), sltt.LIF(tau=2.0)).double()
    ours.load_state_dict(model.state_dict())
    x, y = batch()
    for rule in (sltt.BPTT(), sltt.BPTT(segment=2), sltt.SLTT(), sltt.OTTT(decay=0.5)):
        torch.testing.assert_close(gradients(model, rule, x, y)[0], gradients(ours, rule, x, y)[0])
    rule(model, x, y, LOSS)
    assert model[1].potential is None


def test_a_type_of_two_libraries_says_how_it_keeps_its_state():
    class Other(nn.Module):
        pass

    class Both(Theirs, Other):
        pass

    sltt.register(Theirs, states=["potential"])
    sltt.register(Other, states=["u"])
    with pytest.raises(ValueError, match=r"Both is a Theirs and a Other.*sltt.register\(Both, states=…\)"):
        sltt.reset(Both())
    sltt.register(Both, states=["potential"])
    sltt.reset(Both())


def test_importing_sltt_imports_no_other_library():
    libraries = "spikingjelly snntorch norse sinabs nir nirtorch onnx onnxruntime"
    code = f"import sys, sltt, sltt.interop; print({{*'{libraries}'.split()}} & {{*sys.modules}})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_what_a_rule_refuses_is_not_evaluated_either():
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    model = nn.Sequential(nn.Linear(6, 8), neuron.LIFNode(step_mode="m"), nn.Linear(8, 3))
    with pytest.raises(ValueError, match=r"1 \(LIFNode\)"):
        sltt.unroll(model, torch.randn(4, 5, 6))
