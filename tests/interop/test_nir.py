"""Networks as NIR graphs, and back."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import sltt
from sltt.surrogates import Above, Triangle

nir = pytest.importorskip("nir")

from sltt.interop import from_nir, to_nir  # noqa: E402

DT = 1e-3
NEURONS = {
    "LIF": lambda: sltt.LIF(tau=3.0),
    "LIF, hard": lambda: sltt.LIF(tau=2.0, v_reset=-0.2, v_threshold=0.7, decay_input=True),
    "IF": lambda: sltt.IF(v_threshold=0.6),
    "IF, hard, above": lambda: sltt.IF(v_reset=0.1, surrogate=Above(Triangle())),
    "CubaLIF": lambda: sltt.CubaLIF(tau=3.0, tau_syn=2.0, gain=0.7),
    "CubaLIF, hard": lambda: sltt.CubaLIF(tau=3.0, tau_syn=2.0, v_reset=-0.2),
    "PLIF": lambda: sltt.PLIF(tau=2.5),
}


class Residual(nn.Module):
    def __init__(self, neuron):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), neuron())
        self.branch = nn.Sequential(nn.Conv2d(4, 4, 3, padding="same"), nn.BatchNorm2d(4))
        self.neuron = neuron()
        self.head = nn.Sequential(
            nn.Flatten(), nn.Dropout(0.5), nn.Linear(4 * 9, 5, bias=False), nn.BatchNorm1d(5), neuron()
        )

    def forward(self, x):
        x = self.stem(x)
        return self.head(nn.functional.avg_pool2d(self.neuron(self.branch(x) + x), 2))


def trained(model):
    """With statistics and weights of BatchNorm that are not those of the start, in evaluation mode."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.3)
            m.running_var.uniform_(0.3, 0.6)
            m.weight.data.uniform_(2, 4)
            m.bias.data.normal_(0.6, 0.3)
    return model.eval()


@pytest.mark.parametrize("neuron", NEURONS.values(), ids=NEURONS.keys())
@pytest.mark.parametrize("file", [False, True], ids=["graph", "file"])
def test_a_network_read_back_gives_the_same_outputs(neuron, file, tmp_path):
    model = trained(Residual(neuron)).double()
    x = torch.randn(7, 3, 2, 6, 6, dtype=torch.float64)
    graph = to_nir(model, x[0], dt=DT)
    if file:
        nir.write(tmp_path / "model.nir", graph)
        graph = tmp_path / "model.nir"
    back = from_nir(graph, dt=DT).double()
    expected = sltt.unroll(model, x)
    assert 0 < expected.mean() < 1
    torch.testing.assert_close(sltt.unroll(back, x), expected, rtol=1e-9, atol=1e-9)


class Joined(nn.Module):
    """Branches that `torch.cat` joins, as images and as vectors, and a readout."""

    def __init__(self, decay_input):
        super().__init__()
        self.one, self.two, self.next = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(9, 5, 1)
        self.pool, self.vector, self.head = nn.AvgPool2d(3), nn.Linear(72, 6), nn.Linear(9 * 4 + 5 * 4 + 6, 3)
        self.neurons = nn.ModuleList(sltt.LIF(tau=2.0, v_threshold=0.4) for _ in range(3))
        self.readout = sltt.LI(3.0, decay_input)

    def forward(self, x):
        first, second, third = self.neurons
        y = first(torch.cat([torch.cat([self.one(x), self.two(x)], 1), x], -3))
        images = [self.pool(y).flatten(1), self.pool(second(self.next(y))).flatten(1)]
        return self.readout(self.head(torch.cat((*images, third(self.vector(x.flatten(1)))), dim=1)))


@pytest.mark.parametrize("decay_input", [False, True])
def test_what_is_joined_is_a_node_for_each_part(decay_input):
    model, x = Joined(decay_input).double(), torch.randn(9, 3, 2, 6, 6, dtype=torch.float64)
    back, expected = from_nir(to_nir(model, x[0], dt=DT), dt=DT).double(), sltt.unroll(model, x)
    torch.testing.assert_close(sltt.unroll(back, x), expected, rtol=1e-9, atol=1e-9)
    model.head.weight.data[:, 30:50] = 0
    assert not torch.allclose(sltt.unroll(model, x), expected)


@pytest.mark.parametrize("taps", [[3, 0, 1], [2]], ids=str)
def test_taps_are_nodes_and_so_are_the_weights_behind_them(taps):
    k = len(taps)
    layers = [sltt.Delay(taps), nn.Conv2d(2 * k, 4, 3), sltt.LIF(), sltt.Delay(taps), nn.Flatten()][
        : 5 if k == 1 else 3
    ]
    layers += [nn.Flatten()] * (k > 1) + [sltt.Delay(taps), nn.Linear(64 * k, 5), nn.BatchNorm1d(5), sltt.IF()]
    model, x = trained(nn.Sequential(*layers)).double(), torch.randn(9, 3, 2, 6, 6, dtype=torch.float64)
    graph = to_nir(model, x[0], dt=DT)
    expected = sltt.unroll(model, x)
    assert 0 < expected.mean() < 1
    torch.testing.assert_close(sltt.unroll(from_nir(graph, dt=DT).double(), x), expected, rtol=1e-9, atol=1e-9)
    if k > 1:
        with pytest.raises(ValueError, match=r"the operation output in .*, which reads what is joined: only layers w"):
            to_nir(nn.Sequential(sltt.Delay(taps), sltt.LIF()), x[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_networks_of_the_package_are_exported(dtype):
    model, x = trained(sltt.models.DigitsNet()).to(dtype), torch.rand(4, 2, 1, 8, 8)
    back = from_nir(to_nir(model, x[0].to(dtype)))
    torch.testing.assert_close(sltt.unroll(back, x), sltt.unroll(model.float(), x), rtol=1e-4, atol=1e-4)


def test_what_is_read_back_is_trained_by_a_rule():
    model = nn.Sequential(nn.Linear(6, 8), sltt.LIF(tau=2.0), nn.Linear(8, 3)).double()
    x, y = torch.randn(4, 5, 6, dtype=torch.float64), torch.randint(3, (5,))
    back = from_nir(to_nir(model, x[0])).double()
    for network in (model, back):
        sltt.BPTT()(network, x, y, sltt.losses.CrossEntropyMSE())
    for p, q in zip(model.parameters(), back.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_the_units_are_those_of_nir():
    """One step of forward Euler of τ v̇ = (v_leak − v) + R I, and of v̇ = R I, is one of ours."""
    x, dt = torch.randn(1, 4, dtype=torch.float64), 2e-3
    for neuron in (sltt.LIF(tau=3.0), sltt.LIF(tau=3.0, v_reset=-0.5, decay_input=True), sltt.IF()):
        node = to_nir(nn.Sequential(neuron), x, dt=dt).nodes["0"]
        v, current = np.full(4, neuron.v_reset or 0.0), x[0].numpy()
        if isinstance(neuron, sltt.IF):
            v = v + dt * node.r * current
        else:
            v = v + dt / node.tau * (node.v_leak - v + node.r * current)
        silent = copy.copy(neuron)
        silent.v_threshold = 100.0
        silent(x)
        np.testing.assert_allclose(v, silent.v[0].numpy(), rtol=1e-12)


@pytest.mark.parametrize(("surrogate", "fires"), [(Triangle(), 1.0), (Above(Triangle()), 0.0)], ids=["at", "above"])
def test_a_neuron_at_its_threshold_does_what_it_did(surrogate, fires):
    x = torch.ones(1, 2)
    graph = to_nir(nn.Sequential(sltt.IF(surrogate=surrogate)), x)
    assert from_nir(graph)(x).tolist() == [[fires, fires]]
    graph.nodes["0"].metadata.clear()  # what another library wrote: NIR fires above the threshold
    assert from_nir(graph)(x).tolist() == [[0.0, 0.0]]


class Flattens(nn.Module):
    def __init__(self, flatten):
        super().__init__()
        self.flatten, self.head = flatten, nn.Linear(24, 3)

    def forward(self, x):
        return self.head(self.flatten(x))


@pytest.mark.parametrize(
    ("flatten", "expected"),
    [
        (lambda x: torch.flatten(x, 1, end_dim=2).flatten(start_dim=1), [(0, 1), (0, 1)]),
        (lambda x: torch.flatten(x, end_dim=-1, start_dim=1), [(0, 2)]),
    ],
    ids=["a part of them, by a function and by a method", "by name in any order"],
)
def test_the_dimensions_that_are_flattened_are_those_of_the_call(flatten, expected):
    graph = to_nir(Flattens(flatten), torch.randn(2, 2, 3, 4))
    assert [(n.start_dim, n.end_dim) for n in graph.nodes.values() if isinstance(n, nir.Flatten)] == expected
    assert from_nir(graph)(torch.randn(2, 2, 3, 4)).shape == (2, 3)


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.pool, self.lif = nn.BatchNorm2d(2), nn.MaxPool2d(2), sltt.LIF()
        self.conv, self.wide = nn.Conv2d(2, 2, 1, groups=2), nn.AdaptiveAvgPool2d(3)

    def forward(self, x):
        x = self.conv(self.pool(self.norm(self.wide(x))))
        return self.lif(x * 2) + self.lif(torch.relu(x))


class Own(sltt.LIF):
    """A subclass may do otherwise."""


WITHOUT = [sltt.ALIF(), sltt.CubaLIF(tau=None), Own(), sltt.IF(v_init=0.5), sltt.IntegerLIF(), sltt.TernaryLIF()]


@pytest.mark.parametrize("neuron", WITHOUT, ids=repr)
def test_neurons_without_a_counterpart_are_named(neuron):
    nearest = r" \(use LIF, PLIF, IF or CubaLIF\)$" * (type(neuron).__name__ in ("ALIF", "IntegerLIF", "TernaryLIF"))
    with pytest.raises(ValueError, match=rf"NIR has no counterpart for 1 \({type(neuron).__name__}\){nearest}"):
        to_nir(nn.Sequential(nn.Linear(6, 8), neuron), torch.randn(2, 6))


@pytest.mark.parametrize("names", [("fc", "output"), ("input", "fc"), ("keys", "values"), ("fc_1", "fc1")])
def test_layers_of_any_name_are_in_the_graph(names):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            first, last = (nn.Linear(6, 8), nn.Linear(8, 3))
            self.order = nn.ModuleDict()
            self.add_module(names[0], first)
            self.neuron = sltt.LIF(tau=2.0, v_threshold=0.3)
            self.add_module(names[1], last)

        def forward(self, x):
            return getattr(self, names[1])(self.neuron(getattr(self, names[0])(x)))

    model, x = Named().double(), torch.randn(5, 4, 6, dtype=torch.float64)
    graph = to_nir(model, x[0])
    assert len(graph.nodes) == 5
    torch.testing.assert_close(sltt.unroll(from_nir(graph).double(), x), sltt.unroll(model, x))


def test_names_that_differ_in_a_dot_are_two_layers():
    def weights(value):
        return nir.Linear(np.full((3, 3), value))

    ends = {"input": nir.Input({"input": np.array([3])}), "output": nir.Output({"output": np.array([3])})}
    edges = [("input", "fc.1"), ("fc.1", "fc_1"), ("fc_1", "output")]
    graph = nir.NIRGraph({**ends, "fc.1": weights(1.0), "fc_1": weights(10.0)}, edges)
    assert from_nir(graph)(torch.ones(1, 3)).tolist() == [[90.0] * 3]


def test_a_weight_that_is_computed_is_folded_as_an_ordinary_one():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), sltt.LIF(), sltt.Delay([0, 2]), nn.Linear(12, 3)).eval()
    expected = sltt.unroll(model, x := 3 * torch.randn(5, 4, 4))
    for layer in (model[0], model[4]):
        nn.utils.parametrizations.weight_norm(layer)
    back = from_nir(to_nir(model, x[0], dt=DT), dt=DT)
    torch.testing.assert_close(sltt.unroll(back, x), expected)


def test_numbers_stand_for_the_parameters_of_all_neurons():
    one = {name: np.array(value) for name, value in (("tau", 2e-3), ("r", 1.0), ("v_leak", 0.0), ("v_threshold", 1.0))}
    nodes = {"i": nir.Input(np.array([4])), "l": nir.LIF(**one), "o": nir.Output(np.array([4]))}
    network = from_nir(nir.NIRGraph(nodes, [("i", "l"), ("l", "o")]), dt=DT)
    assert sltt.unroll(network, 3 * torch.rand(5, 2, 4)).shape == (5, 2, 4)


def test_a_normalisation_is_not_folded_into_weights_that_others_read():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.dropout, self.norm = nn.Linear(6, 8), sltt.Dropout(0.2), nn.BatchNorm1d(8)
            self.plain, self.normal = sltt.LIF(), sltt.LIF()

        def forward(self, x):
            y = self.fc(x)
            return self.plain(y) + self.normal(self.norm(self.dropout(y)))

    with pytest.raises(ValueError, match=r"norm \(BatchNorm1d\), which is not behind a layer with weights of its own"):
        to_nir(Shared(), torch.randn(4, 6))


def test_all_that_nir_has_not_is_named_at_once():
    message = (
        r"NIR has no counterpart for wide \(A.*2d\) of windows of several sizes \(use an output size that .*\); "
        r"norm \(BatchNorm2d\), which is not behind a layer.*; pool \(MaxPool2d\); "
        r"conv \(Conv2d\), which has several groups.*; "
        r"the operation mul.*; the operation relu.*; lif \(LIF\), which is used twice"
    )
    model = Odd()
    with pytest.raises(ValueError, match=message):
        to_nir(model, torch.randn(2, 2, 4, 4))
    assert model.training
    assert model.lif.v is None


class Called(nn.Module):
    """Two linear layers, and what is made of them."""

    def __init__(self, function):
        super().__init__()
        self.a, self.b, self.lif, self.out = nn.Linear(6, 5), nn.Linear(6, 5), sltt.LIF(), nn.Linear(5, 3)
        self.function = function

    def forward(self, x):
        return self.out(self.lif(self.function(self.a(x), self.b(x))))


def added_in_place(a, b):
    kept = a
    a += b
    return kept


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda a, b: torch.add(a, b, alpha=2), "operation add"),
        (lambda a, b: [a, a.add_(b)][0], r"changes a tensor in place"),
        (added_in_place, r"changes a tensor in place.*write z = z \+ x"),
    ],
)
def test_sums_that_are_not_plain_are_named(function, message):
    with pytest.raises(ValueError, match=message):
        to_nir(Called(function), 5 * torch.randn(8, 6))


def graph_of(*nodes):
    return nir.NIRGraph.from_list(nir.Input({"input": np.array([3])}), *nodes, nir.Output({"output": np.array([3])}))


def lif(**kwargs):
    ones = {name: np.ones(3) for name in ("tau", "r", "v_leak", "v_threshold")}
    return nir.LIF(**{**ones, "tau": np.full(3, 3e-4), "v_leak": np.zeros(3), **kwargs})


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (
            lambda: graph_of(nir.Threshold(np.ones(3)), nir.Delay(np.full(3, 1.5e-4))),
            r"threshold \(Threshold\); delay \(Delay\), whose delay is no whole number of time steps: 1.5",
        ),
        (lambda: graph_of(lif(tau=np.array([3e-4, 3e-4, 4e-4]))), "tau is not the same for all neurons"),
        (lambda: graph_of(lif(tau=np.full(3, 1e-5))), "tau is not longer than a time step"),
        (lambda: graph_of(lif(r=np.full(3, 2.0))), "r = 2 is neither 1 nor tau/dt = 3"),
        (lambda: graph_of(lif(v_leak=np.full(3, 0.5))), "v_leak = 0.5 is not the potential of its reset"),
        (lambda: graph_of(lif(metadata={"dt": 1e-3})), "written for time steps of 0.001 s: give dt=0.001"),
        (lambda: graph_of(nir.IF(np.ones(3), np.ones(3))), "r = 1 is not 1/dt"),
        (lambda: graph_of(nir.Linear(np.ones((4, 5)))), r"the input of linear has shape \[\[3\]\]|-> linear.input"),
        (
            lambda: graph_of(nir.Linear(np.ones((4, 3))), lif()),
            r"the input of lif has shape \[\[4\]\].*expected \[3\]|-> lif.input",
        ),
        (
            lambda: nir.NIRGraph({"a": lif(), "b": lif()}, [("a", "b"), ("b", "a")]),
            "expected one input and one output|No input nodes",
        ),
    ],
)
def test_graphs_that_do_not_fit_are_refused(graph, message):
    with pytest.raises(ValueError, match=message):
        from_nir(graph())


def test_a_recurrent_graph_is_refused():
    graph = graph_of(lif(), nir.Linear(np.ones((3, 3))))
    graph.edges.append(("linear", "lif"))
    with pytest.raises(ValueError, match="the graph is recurrent, around"):
        from_nir(graph)


def linear_network(recurrent=False, **kwargs):
    """With layers in layers, whose names have dots."""
    first, last = sltt.LIF(tau=3.0, **kwargs), sltt.LIF(tau=2.0, **kwargs)
    first = sltt.Recurrent(first, nn.Linear(8, 8, bias=False)) if recurrent else first
    model = nn.Sequential(nn.Sequential(nn.Linear(6, 8), first), nn.Sequential(nn.Linear(8, 7), last))
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data.mul_(6)
    return model, torch.randn(12, 5, 6)


@pytest.mark.parametrize("conv", [False, True], ids=["linear", "conv"])
def test_recurrent_layers_are_cycles_of_the_graph(conv, tmp_path):
    if conv:
        recurrent = sltt.Recurrent(sltt.LIF(tau=2.0), nn.Conv2d(4, 4, 3, padding=1))
        model, x = nn.Sequential(nn.Conv2d(2, 4, 3), recurrent), 3 * torch.randn(7, 3, 2, 6, 6)
    else:
        (model, x), recurrent = linear_network(recurrent=True), None
    nir.write(tmp_path / "model.nir", to_nir(model, x[0], dt=DT))
    back = from_nir(tmp_path / "model.nir", dt=DT)
    expected = sltt.unroll(model, x)
    assert 0.02 < expected.mean() < 0.9
    assert torch.equal(sltt.unroll(back, x), expected)
    recurrent = recurrent or model[0][1]
    recurrent.layer.weight.data.zero_()
    assert not torch.equal(sltt.unroll(model, x), expected)  # what comes back matters


def test_names_of_nodes_have_no_dots_and_stay_apart():
    model = nn.Sequential()
    model.add_module("a", nn.Sequential(nn.Linear(3, 3)))
    model.add_module("a_0", nn.Linear(3, 3))
    x = torch.randn(2, 3)
    graph = to_nir(model, x)
    assert [*graph.nodes] == ["input", "a_0", "a_0_", "output"]
    names = {"a_0": 'x")\r', "a_0_": "x*/\\"}  # which would be code where a name is written as text
    edges = [tuple(names.get(node, node) for node in edge) for edge in graph.edges]
    back = from_nir(nir.NIRGraph({names.get(name, name): node for name, node in graph.nodes.items()}, edges))
    assert [*back.layers] == ["input", "x___", "x____", "output"]
    torch.testing.assert_close(back(x), model(x))


def assert_equal_spikes(theirs, model, x):
    expected, state = sltt.unroll(model, x), None
    assert 0.02 < expected.mean() < 0.9
    for x_t, spikes in zip(x, expected, strict=True):
        out = theirs(x_t, state)
        out, state = out if isinstance(out, tuple) else (out, None)
        assert torch.equal(out, spikes)


# the networks of linear layers and convolutions that other libraries read with equal spikes, in the settings of theirs
READ = {
    "LIF": (lambda lif: [nn.Linear(6, 8), lif()], (6,), "norse snntorch"),
    "IF": (lambda lif: [nn.Linear(6, 8), sltt.IF(v_reset=0.0)], (6,), "norse"),
    "CubaLIF": (lambda lif: [nn.Linear(6, 8), sltt.CubaLIF(2.0, 3.0, v_reset=0.0)], (6,), "norse snntorch"),
    "Recurrent": (lambda lif: [sltt.Recurrent(lif(), nn.Linear(6, 6, bias=False))], (6,), "norse"),
    "Conv1d": (lambda lif: [nn.Conv1d(2, 3, 3), lif()], (2, 6), "snntorch"),
    "Conv2d": (lambda lif: [nn.Conv2d(2, 3, 3), lif()], (2, 6, 6), "norse snntorch"),
    "AvgPool2d": (lambda lif: [nn.AvgPool2d(2), nn.Conv2d(2, 4, 2), lif()], (2, 6, 6), "snntorch"),
    "Flatten": (lambda lif: [nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(64, 5), lif()], (2, 6, 6), ""),
    "Delay": (lambda lif: [sltt.Delay([2]), nn.Linear(6, 8), lif()], (6,), ""),
    "LI": (lambda lif: [nn.Linear(6, 8), lif(), sltt.LI(2.0, decay_input=True)], (6,), ""),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("library", ["norse", "snntorch"])
@pytest.mark.parametrize("layer", READ)
def test_other_libraries_read_the_layers_of_the_table(layer, library):
    pytest.importorskip(library)
    layers, shape, expected = READ[layer]
    model = nn.Sequential(*layers(lambda: sltt.LIF(tau=2.0, v_reset=0.0, decay_input=library == "norse")))
    x, equal = 8 * torch.randn(9, 3, *shape), False
    assert layer == "LI" or 0.02 < sltt.unroll(model, x).mean() < 0.9
    try:
        graph = to_nir(model, x[0])
        if library == "norse":
            theirs = pytest.importorskip("norse.torch").from_nir(graph, dt=1e-4)
        else:
            theirs = pytest.importorskip("snntorch.import_nir").import_from_nir(graph)
        assert_equal_spikes(theirs, model, x)
        equal = True
    except (AssertionError, RuntimeError, ValueError, KeyError, TypeError):
        pass
    assert equal == (library in expected)
    row = " | ".join("yes" if one in expected else "no" for one in ("norse", "snntorch"))
    assert f"| `{layer}` | {row} |" in Path("docs/interop.md").read_text()


def test_spikingjelly_reads_equal_spikes():
    exchange = pytest.importorskip("spikingjelly.activation_based.nir_exchange")
    functional = pytest.importorskip("spikingjelly.activation_based.functional")
    if "v_reset" not in nir.LIF.__dataclass_fields__:
        pytest.skip("SpikingJelly needs nir 1.0.7 or newer")
    model, x = linear_network(v_reset=-0.1, decay_input=True)
    theirs = exchange.import_from_nir(to_nir(model, x[0], dt=DT), dt=DT)
    functional.reset_net(theirs)
    assert_equal_spikes(theirs, model, x)


class Mean(nn.Sequential):
    def forward(self, x):
        return super().forward(x).mean((2, -1)).view(x.size(0), -1)


def test_means_and_views_are_pooling_and_flatten(tmp_path):
    model, x = Mean(nn.Conv2d(2, 4, 3), sltt.LIF(v_threshold=0.2)), torch.rand(6, 3, 2, 6, 6)
    nir.write(tmp_path / "mean.nir", to_nir(model, x[0]))
    torch.testing.assert_close(sltt.unroll(from_nir(tmp_path / "mean.nir"), x), sltt.unroll(model, x))
