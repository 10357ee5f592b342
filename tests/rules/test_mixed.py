import copy
import pickle
from itertools import pairwise

import pytest
import torch
from torch import nn

import sltt
from sltt import kernels
from sltt.rules.mixed import _Cut
from tests.conftest import LOSS, batch, gradient, gradients, small_network
from tests.references import by_hand, detach, measured


def windowed(windows):
    """Cuts the graph of each layer at the ends of its windows."""

    def cut(model, t):
        for name, window in windows.items():
            if window != "all" and t % window == 0:
                detach(model.get_submodule(name))

    return cut


def deep(neuron=lambda: sltt.LIF(tau=2.0), layers=4, width=7, norm=True):
    """`layers` times Linear, BatchNorm, neuron; neurons are called 2, 5, 8, …"""
    sizes = [6, *[width] * layers]
    modules = []
    for before, after in pairwise(sizes):
        modules += [nn.Linear(before, after), nn.BatchNorm1d(after) if norm else nn.Identity(), neuron()]
    return nn.Sequential(*modules, nn.Linear(width, 3)).double()


WINDOWS = [{"2": "all"}, {"5": "all"}, {"11": "all"}, {"2": 3}, {"2": "all", "8": 2}, {"5": 4, "11": "all"}]
WINDOWS += [{"2": 2, "5": 3, "8": 1}, {"2": 2, "5": 2, "8": 2, "11": 2}]


@pytest.mark.parametrize(("windows", "steps"), [(WINDOWS[0], 1), *((windows, 7) for windows in WINDOWS)], ids=str)
def test_the_gradient_is_that_of_the_graph_detached_by_hand(windows, steps):
    kinds = iter([sltt.PLIF, sltt.IF] * 2)
    model = deep(lambda: next(kinds)())
    x, y = batch(steps)
    found, out = gradients(model, sltt.Mixed(windows), x, y)
    expected, loss = by_hand(model, x, y, windowed(dict.fromkeys(["2", "5", "8", "11"], 1) | windows))
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(out.loss, loss)
    if steps > 1:
        assert not torch.allclose(found, gradients(model, sltt.SLTT(), x, y)[0])


@pytest.mark.parametrize(
    ("mixed", "twin"),
    [
        (sltt.Mixed({}), sltt.SLTT()),
        (sltt.Mixed({"2": 1, "5": 1}), sltt.SLTT()),
        (sltt.Mixed({"*": "all"}), sltt.BPTT()),
        (sltt.Mixed({}, default="all"), sltt.BPTT()),
        (sltt.Mixed({"2": 9}, default=8), sltt.BPTT()),
        (sltt.Mixed({"*": 2}), sltt.TBPTT(2)),
        (sltt.Mixed({"2": 3}, default=3), sltt.TBPTT(3)),
    ],
    ids=repr,
)
def test_with_one_window_for_all_it_is_its_relatives(mixed, twin, neurons):
    model = small_network(neurons, norm=True, dropout=0.3)
    x, y = batch(steps=5)
    results = []
    for rule in (mixed, twin):
        torch.manual_seed(1)
        results.append(gradients(model, rule, x, y))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-11, atol=1e-14)
    assert torch.equal(results[0][1].logits, results[1][1].logits)


def cuts_of(monkeypatch):
    """Where each time step that runs from now on was cut."""
    cuts = []
    real = _Cut.forward
    monkeypatch.setattr(_Cut, "forward", lambda self, *args: (real(self, *args), cuts.append(self.module))[0])
    return cuts


class Residual(nn.Module):
    """Its inner neurons do not part the network in two: a shortcut goes around them. Its last do."""

    def __init__(self):
        super().__init__()
        self.stem, self.lif1 = nn.Linear(6, 6), sltt.LIF(tau=2.0)
        self.inner, self.lif2 = nn.Linear(6, 6), sltt.LIF(tau=2.0)
        self.lif3, self.head, self.norm = sltt.LIF(tau=2.0), nn.Linear(6, 3), nn.BatchNorm1d(6)
        self.dropout, self.noise = sltt.Dropout(0.3), nn.Dropout(0.2)

    def forward(self, x):
        y = self.lif1(self.noise(self.stem(x)))
        return self.head(self.lif3(self.norm(self.dropout(self.lif2(self.inner(y))) + y)))


@pytest.mark.parametrize(
    ("windows", "whole"), [({"lif1": "all"}, False), ({"lif2": "all"}, True), ({"lif3": 2}, False)]
)
def test_where_a_shortcut_goes_around_the_graph_stays_whole(windows, whole, monkeypatch):
    cuts = cuts_of(monkeypatch)
    model = Residual().double()
    x, y = batch(steps=5)
    results = []
    for run in (gradients, by_hand):
        torch.manual_seed(1)
        rule = sltt.Mixed(windows) if run is gradients else None
        twin = copy.deepcopy(model)
        args = (rule, x, y) if rule else (x, y, windowed(dict.fromkeys(["lif1", "lif2", "lif3"], 1) | windows))
        results.append((run(twin, *args)[0], torch.get_rng_state()))
    torch.testing.assert_close(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])  # also where the first step ran twice
    assert len(cuts) == 5
    assert all((cut is None) == whole for cut in cuts)
    twin = copy.deepcopy(model)
    sltt.Mixed(windows)(twin, x, y, LOSS)
    assert twin.norm.num_batches_tracked == 5


def test_the_last_layer_is_the_one_that_runs_last_whatever_its_name(monkeypatch):
    model = Reversed(*reversed(deep(layers=3)))
    names = [name for name, m in model.named_modules() if isinstance(m, sltt.LIF)]
    x, y = batch(steps=6)
    windows = {names[2]: "all", names[1]: 3, names[0]: 1}
    cuts = cuts_of(monkeypatch)
    sltt.Mixed(windows)(model, x, y, LOSS)
    found = gradient(model)
    model.zero_grad()
    torch.testing.assert_close(found, by_hand(model, x, y, windowed(windows))[0])
    assert cuts == [model.get_submodule(names[1])] * 6


class Leak(sltt.Stateful):
    """A state that may serve two places, since it is no neuron's."""

    states = ("y",)

    def forward(self, x):
        self.y = x if self.y is None else torch.tanh(0.5 * self.y + x)
        return self.y


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.layer, self.lif, self.head = nn.Linear(6, 6), nn.Linear(6, 6), Leak(), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.lif(self.layer(self.lif(self.stem(x)))))


def test_a_layer_that_runs_twice():
    model = Twice().double()
    x, y = batch(steps=5)
    found, _ = gradients(model, sltt.Mixed({"lif": 2}), x, y)
    torch.testing.assert_close(found, by_hand(model, x, y, windowed({"lif": 2}))[0])


class Reversed(nn.Sequential):
    def forward(self, x):
        for layer in reversed(self):
            x = layer(x)
        return x


@pytest.mark.parametrize(
    ("model", "cut"),
    [
        (deep(), {"2": True, "5": True, "8": True, "11": True}),
        (Residual().double(), {"lif1": True, "lif2": False, "lif3": True}),
        (Twice().double(), {"lif": False}),
        (Reversed(*reversed(deep(layers=2))), {"4": True, "1": True}),
    ],
    ids=["deep", "residual", "twice", "reversed"],
)
def test_where_the_network_is_cut(model, cut, monkeypatch):
    x, y = batch(steps=2)
    for name, parts in cut.items():
        cuts = cuts_of(monkeypatch)
        sltt.Mixed({name: "all"})(model, x, y, LOSS)
        assert cuts == [model.get_submodule(name) if parts else None] * 2


def test_a_graph_that_changes_in_the_middle_is_noticed():
    class Changing(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.steps = deep(layers=2), 0

        def forward(self, x):
            self.steps += 1
            first = self.net[0](x)
            y = self.net[3:](self.net[1:3](first))
            return y if self.steps < 3 else y + first[:, :3]

    x, y = batch(steps=5)
    with pytest.raises(RuntimeError, match="time step 2 has another graph than the first"):
        sltt.Mixed({"net.2": "all"})(Changing().double(), x, y, LOSS)


def test_frozen_layers_below():
    model = deep()
    model[0].requires_grad_(False)
    model[1].requires_grad_(False)
    x, y = batch(steps=5)
    model[2].detach_reset = True
    twin = copy.deepcopy(model)
    sltt.Mixed({"2": "all"})(twin, x, y, LOSS)
    found = gradient(twin)
    torch.testing.assert_close(found, by_hand(model, x, y, windowed({"2": "all", "5": 1, "8": 1, "11": 1}))[0])


def peak(rule, steps):
    return measured(rule, deep(layers=6, width=64).float(), torch.randn(64, 6), torch.randint(3, (64,)), steps=steps)


def growth(rule):
    """Bytes for each further time step."""
    return (peak(rule, 8) - peak(rule, 4)) / 4


def test_memory_grows_with_the_layers_below_the_last_window_only():
    bptt = growth(sltt.BPTT())
    assert growth(sltt.Mixed({"2": "all"})) < 0.3 * bptt
    assert growth(sltt.Mixed({"8": "all"})) < 0.75 * bptt
    assert growth(sltt.Mixed({"2": 4})) < 0.01 * bptt
    assert peak(sltt.Mixed({"2": 4}), 8) < 0.65 * peak(sltt.TBPTT(4), 8)


def test_names_and_windows_that_are_wrong():
    x, y = batch()
    with pytest.raises(ValueError, match=r"no layer of neurons is called '3'; there are 2, 5"):
        sltt.Mixed({"3": "all"})(small_network(), x, y, LOSS)
    inner = nn.Sequential(nn.Linear(6, 8), sltt.Recurrent(sltt.LIF(), nn.Linear(8, 8)), nn.Linear(8, 3)).double()
    for pattern in ("1.neuron", "*.neuron"):
        with pytest.raises(ValueError, match=r"no layer of neurons is called .*neuron'; there are 1$"):
            sltt.Mixed({pattern: "all"})(inner, x, y, LOSS)


def test_the_first_pattern_that_matches_counts_wrappers_have_no_name_and_brackets_are_a_name():
    model = small_network()
    first, second = model[2], model[5]
    lengths = sltt.Mixed({"5": 2, "?": "all"}).window_lengths
    assert lengths(model, 9) == {first: 9, second: 2}
    wrapped = nn.Module()
    wrapped.module = nn.Module()
    wrapped.module._orig_mod = model
    assert lengths(wrapped, 9) == {first: 9, second: 2}
    assert sltt.Mixed({"module._orig_mod.5": 3}).window_lengths(wrapped, 9) == {first: 1, second: 3}
    brackets = nn.ModuleDict({"n[0]": sltt.LIF(), "n[1]": sltt.LIF()})
    lengths = sltt.Mixed({"n[0]": "all"}, default=2).window_lengths(brackets, 4)
    assert lengths == {brackets["n[0]"]: 4, brackets["n[1]"]: 2}


def test_spikes_saved_as_bits_change_no_gradient():
    model, rule = deep(width=128, layers=3).float(), sltt.Mixed({"2": "all", "5": 2})
    x, y = torch.randn(4, 64, 6), torch.randint(3, (64,))
    found, _ = gradients(model, rule, x, y)
    with kernels.using(bits=False):
        assert torch.equal(gradients(model, rule, x, y)[0], found)


class Delayed(sltt.Stateful):
    """Spikes arrive a step later: a state holds what is above the cut."""

    states = ("buffer",)

    def __init__(self):
        super().__init__()
        self.neuron = sltt.LIF(tau=2.0)

    def forward(self, x):
        spikes = self.neuron(x)
        out = torch.zeros_like(spikes) if self.buffer is None else self.buffer
        self.buffer = spikes
        return out


class Listed(nn.Module):
    """A state that grows in place, and around which the graph goes."""

    def __init__(self):
        super().__init__()
        self.past = []

    def forward(self, x):
        self.past.append(x)
        return torch.tanh(sum(h * 0.5**k for k, h in enumerate(reversed(self.past)))) + 0.5 * x


class Learned(nn.Module):
    """A learnable first membrane potential, with a path around it."""

    def __init__(self):
        super().__init__()
        self.first, self.v = nn.Parameter(torch.full((8,), 0.4)), None

    def forward(self, x):
        u = 0.5 * self.v + x
        spikes = sltt.surrogates.Triangle()(u - 1)
        self.v = u - spikes
        return spikes + 0.5 * x


sltt.register(Listed, ["past"], reset=lambda m: setattr(m, "past", []))
sltt.register(Learned, ["v"], reset=lambda m: setattr(m, "v", m.first * 1.0))


@pytest.mark.parametrize("rule", [sltt.Mixed({"1*": "all"}), sltt.Mixed({}, "all"), sltt.BPTT(segment=2)], ids=repr)
@pytest.mark.parametrize("layer", [Delayed, Listed, Learned])
def test_states_of_other_forms_keep_the_exact_gradient(layer, rule):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), layer(), nn.Linear(8, 3)).double()
    x, y = batch(steps=6)
    expected = gradients(model, sltt.BPTT(), x, y)[0]
    torch.testing.assert_close(gradients(model, rule, x, y)[0], expected)


def test_windows_are_a_value_too():
    given = {1: "all", "4": 2}
    rule = sltt.Mixed(given)
    given["4"] = 3
    for twin in (rule, copy.deepcopy(rule), pickle.loads(pickle.dumps(rule))):
        assert twin.windows == {"1": "all", "4": 2}
        assert repr(twin) == "Mixed(windows={'1': 'all', '4': 2})"
        assert {rule: 1}[twin] == 1
    assert rule != sltt.Mixed({"4": 2, "1": "all"})  # the first that fits a name counts


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("windows", [{"*": 2}, {"1": "all"}])
def test_a_compiled_network_has_the_same_gradient(windows):
    model = nn.Sequential(nn.Linear(6, 8), sltt.LIF(2.0), nn.Linear(8, 8), sltt.LIF(2.0), nn.Linear(8, 3)).double()
    (x, y), rule = batch(), sltt.Mixed(windows)
    expected, _ = gradients(model, rule, x, y)
    rule(torch.compile(model, backend="eager"), x, y, LOSS)
    torch.testing.assert_close(gradient(model), expected)
