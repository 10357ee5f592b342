"""OTTT beside a literal transcription of its recursion: ∂u/∂θ is carried forward in time, and no graph is."""

import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import sltt
from sltt.rules.traces import Traces
from tests.conftest import LOSS, batch, gradient, gradients
from tests.references import Checkpointed, recorded


def blocks_of(model):
    """The layers before each neuron, with the neuron; at the end the readout, with None."""
    blocks, layers = [], []
    for module in model:
        if isinstance(module, sltt.LIF | sltt.IF | sltt.PLIF):
            blocks.append((nn.Sequential(*layers), module))
            layers = []
        else:
            layers.append(module)
    return [*blocks, (nn.Sequential(*layers), None)]


def jacobian(block, h):
    """∂block(h)/∂θ [B·n, θ] of all parameters of a block."""
    parameters = {name: p.detach() for name, p in block.named_parameters()}
    found = torch.func.jacrev(lambda p: torch.func.functional_call(block, p, (h,)).flatten())(parameters)
    return torch.cat([found[name].flatten(1) for name in parameters], dim=1) if parameters else None


def traced(block):
    """1 for each parameter of a block that has a trace, 0 for the weight of a normalisation."""
    return torch.cat(
        [
            p.new_full((p.numel(),), name == "bias" or not isinstance(m, nn.BatchNorm1d))
            for m in block
            for name, p in m.named_parameters()
        ]
    )


def forward_mode(model, x, y):
    """u[t] = λ v[t−1] + c z[t]; ∂u[t]/∂θ = λ ∂u[t−1]/∂θ + c ∂z[t]/∂θ; ∇θ = Σ_t ∂ℓ[t]/∂u[t] ∂u[t]/∂θ."""
    blocks = blocks_of(model)
    v, influence, of_decay = {}, {}, {}
    total = {block: 0 for block, _ in blocks} | {neuron: 0 for _, neuron in blocks}
    for x_t in x:
        h, us = x_t, []
        for block, neuron in blocks:
            z, dz = block(h), jacobian(block, h.detach())
            if neuron is None:
                us.append(z)
                influence[block] = dz
                continue
            decay = neuron.decay()
            decay = decay.detach() if isinstance(decay, torch.Tensor) else decay
            share = 1 - decay if neuron.decay_input else 1.0
            before = v.get(neuron, torch.zeros_like(z))
            us.append(u := decay * before + share * z)
            influence[block] = decay * traced(block) * influence.get(block, 0) + share * dz
            of_decay[neuron] = decay * of_decay.get(neuron, 0) + (before - (z.detach() if neuron.decay_input else 0))
            h = neuron.surrogate(u - neuron.v_threshold)
            v[neuron] = (u - neuron.v_threshold * h).detach()
        errors = torch.autograd.grad(LOSS(z, y) / len(x), us)
        for (block, neuron), e in zip(blocks, errors, strict=True):
            total[block] = total[block] + e.flatten() @ influence[block]
            if isinstance(neuron, sltt.PLIF):
                inner = torch.func.grad(lambda w: 1 - torch.sigmoid(w))(neuron.w.detach())
                total[neuron] = total[neuron] + (e * of_decay[neuron]).sum().view(1) * inner
    return torch.cat([part for pair in blocks for part in (total[m] for m in pair) if isinstance(part, torch.Tensor)])


def linear(*neurons, sizes=(6, 8, 7, 3)):
    layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    for layer in layers:
        layer.weight.data.mul_(3)
    return nn.Sequential(*(m for pair in zip(layers, [*neurons, None], strict=True) for m in pair if m)).double()


def convolutional(size=3, **settings):
    conv = nn.Conv2d(4, 4, size, **{"padding": 1, **settings})
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), sltt.LIF(tau=3.0), nn.AvgPool2d(2), conv, sltt.LIF(tau=1.5),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3),
    ).double()  # fmt: skip
    for layer in (model[0], conv):
        layer.weight.data.mul_(3)
    return model


def normalised():
    """With statistics that time does not change."""
    first, second = ((nn.BatchNorm1d(8), sltt.LIF(tau)) for tau in (2.0, 4.0))
    return nn.Sequential(nn.Linear(6, 8), *first, nn.Linear(8, 8), *second, nn.Linear(8, 3)).double().eval()


NETWORKS = {"two decays": lambda: linear(sltt.LIF(tau=2.0), sltt.LIF(tau=10.0))}
NETWORKS |= {"no leak": lambda: linear(sltt.IF(), sltt.LIF(detach_reset=True))}
NETWORKS |= {"decay_input": lambda: linear(sltt.LIF(tau=2.0, decay_input=True), sltt.LIF(tau=3.0, decay_input=True))}
NETWORKS |= {"PLIF": lambda: linear(sltt.PLIF(tau=2.0), sltt.PLIF(tau=4.0, decay_input=True))}
NETWORKS |= {"three layers": lambda: linear(sltt.LIF(2.0), sltt.LIF(3.0), sltt.LIF(4.0), sizes=(6, 8, 8, 8, 3))}
NETWORKS |= {"convolutions": convolutional, "strided": lambda: convolutional(stride=2)}
NETWORKS |= {"grouped": lambda: convolutional(groups=2), "dilated": lambda: convolutional(dilation=2, padding=2)}
NETWORKS |= {"circular": lambda: convolutional(padding_mode="circular")}
NETWORKS |= {"reflected": lambda: convolutional(padding_mode="reflect")}
NETWORKS |= {"same": lambda: convolutional(size=(3, 5), padding="same")}
NETWORKS |= {"same, of an even kernel": lambda: convolutional(size=4, padding="same")}
NETWORKS |= {"valid": lambda: convolutional(padding="valid"), "normalised": normalised}
NETWORKS |= {"without bias": lambda: convolutional(bias=False)}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_ottt_is_its_recursion(network):
    model = network()
    x, y = batch(steps=6)
    if isinstance(model[0], nn.Conv2d):
        x, y = 3 * torch.randn(4, 2, 1, 8, 8, dtype=torch.float64), y[:2]
    found, out = gradients(model, sltt.OTTT(), x, y)
    torch.testing.assert_close(found, forward_mode(copy.deepcopy(model), x, y), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(out.logits, sltt.unroll(model, x))
    assert not torch.allclose(found, gradients(model, sltt.SLTT(), x, y)[0])


class DetachedInteger(sltt.IntegerLIF):
    """Its spikes are constants in the reset: traces are exact along the membrane potential."""

    @staticmethod
    def step(x, v, *, decay, levels, v_threshold, surrogate):
        s, _ = sltt.IntegerLIF.step(x, v, decay=decay, levels=levels, v_threshold=v_threshold, surrogate=surrogate)
        return s, decay * v + x - v_threshold * s.detach()


SINGLE = {
    "LIF": lambda: sltt.LIF(detach_reset=True),
    "IF": lambda: sltt.IF(detach_reset=True),
    "PLIF": lambda: sltt.PLIF(detach_reset=True),
    "CubaLIF": lambda: sltt.CubaLIF(3.0, tau_syn=2.0, gain=0.7, detach_reset=True),
    "CubaLIF, no leak": lambda: sltt.CubaLIF(None, tau_syn=2.0, gain=0.7, detach_reset=True),
    "IntegerLIF": lambda: DetachedInteger(3, tau=3.0),
}


@pytest.mark.parametrize("neuron", SINGLE.values(), ids=SINGLE)
@pytest.mark.parametrize("static", [False, True], ids=["sequence", "static"])
def test_ottt_is_bptt_for_one_layer_of_neurons(neuron, static):
    readout = nn.Sequential(nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 3))
    model = nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 8), neuron(), readout).double()
    x, y = batch(steps=12)
    x, steps = (3 * x[0], {"steps": 12}) if static else (3 * x, {})
    found, expected = (gradients(model, rule, x, y, **steps)[0] for rule in (sltt.OTTT(), sltt.BPTT()))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("neuron", SINGLE.values(), ids=SINGLE)
def test_of_random_steps_ottt_is_the_gradient_of_their_losses(neuron):
    model = nn.Sequential(nn.Linear(6, 8), neuron(), nn.Linear(8, 3)).double()
    (x, y), rule = batch(steps=12), sltt.OTTT(k=3)
    found, _ = gradients(model, rule, 3 * x, y, seed=0)
    logits = [model(3 * x_t) for x_t in x]
    torch.stack([LOSS(logits[t], y) for t in rule.draw(12, 0)]).sum().div(12).backward()
    torch.testing.assert_close(found, gradient(model), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("fold", [1, "auto"])
def test_of_random_steps_what_is_pruned_has_the_trace_of_an_ordinary_one(fold):
    (x, y), found = batch(steps=12), []
    for pruned in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), sltt.LIF(tau=4.0), nn.Linear(8, 8), sltt.LIF(), nn.Linear(8, 3)).double()
        model.insert(1, nn.LayerNorm(8)).insert(2, sltt.PLIF(tau=4.0)).double()
        learned = [(model[4], "weight"), (model[1], "bias"), (model[2], "w")]
        parameters = [getattr(*one) for one in learned]
        for module, name in learned if pruned else ():
            prune.identity(module, name)
        sltt.OTTT(k=3, fold=fold)(model, 3 * x, y, LOSS, seed=0)
        found.append([p.grad for p in parameters])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("fold", [1, "auto"])
def test_an_activation_in_place_behind_a_convolution_leaves_it_its_trace(fold):
    x, y, found = (torch.randn(6, 4, 3, 12) > 1).float(), torch.randint(3, (4,)), []
    convolution, readout = nn.Conv1d(3, 8, 3, padding=1), nn.Linear(96, 3)
    for inplace in (False, True):
        model = nn.Sequential(convolution, nn.ReLU(inplace), sltt.LIF(tau=4.0), nn.Flatten(), readout)
        found.append(gradients(copy.deepcopy(model), sltt.OTTT(fold=fold), x, y)[0])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(("between", "exact"), [(nn.AvgPool1d(2), True), (nn.MaxPool1d(2), False), (nn.ReLU(), False)])
def test_what_stands_between_weights_and_neurons_is_exact_where_it_is_linear(between, exact):
    model = nn.Sequential(
        nn.Linear(6, 16), between, sltt.LIF(tau=4.0, detach_reset=True), nn.Flatten(), nn.LazyLinear(3)
    )
    model = model.double()
    x, y = batch(steps=12)
    model(3 * x[0])
    found, expected = (gradients(model, rule, 3 * x, y)[0][:112] for rule in (sltt.OTTT(), sltt.BPTT()))
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-12) == exact


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm1d(8), nn.LayerNorm(8), nn.GroupNorm(2, 8)], ids=lambda m: type(m).__name__
)
def test_the_bias_of_a_normalisation_has_a_trace_and_its_weight_none(norm):
    model = nn.Sequential(nn.Linear(6, 8), norm, sltt.LIF(tau=4.0, detach_reset=True), nn.Linear(8, 3)).double()
    x, y = batch(steps=12)
    rules = sltt.OTTT(), sltt.BPTT(), sltt.SLTT()
    found, exact, spatial = (gradients(model, rule, 3 * x, y)[0].split([56, 8, 8, 27]) for rule in rules)
    torch.testing.assert_close(found[1], spatial[1], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found[2:], exact[2:], rtol=1e-10, atol=1e-12)


class Tied(nn.Module):
    """Its loss calls a layer that the network has called before."""

    def __init__(self):
        super().__init__()
        self.layer, self.neuron = nn.Linear(6, 6), sltt.LIF(tau=2.0, detach_reset=True)

    def forward(self, x):
        return self.neuron(self.layer(x))


def test_a_layer_that_the_loss_calls_has_its_gradient_of_bptt():
    model, x, y = Tied().double(), torch.randn(5, 4, 6).double(), torch.randint(6, (4,))

    def loss(logits, target):
        return F.cross_entropy(model.layer(logits), target)

    found, expected = (gradients(model, rule, x, y, loss)[0] for rule in (sltt.OTTT(), sltt.BPTT()))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("neuron", [sltt.LIF, sltt.PLIF])
def test_a_checkpoint_runs_a_layer_again_with_the_trace_of_its_time_step(neuron):
    layers, rest = [nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)], [neuron(tau=2.0), nn.Linear(6, 3)]
    x, y = 3 * torch.randn(5, 4, 6), torch.randint(3, (4,))
    found, expected = (nn.Sequential(kind(*layers), *rest) for kind in (Checkpointed, nn.Sequential))
    torch.testing.assert_close(gradients(found, sltt.OTTT(), x, y)[0], gradients(expected, sltt.OTTT(), x, y)[0])


class Spike(nn.Module):
    """Neurons of another library, without a state."""

    def forward(self, x):
        return sltt.surrogates.Triangle()(x)


def test_neurons_and_readouts_in_checkpoints_leave_no_trace_in_the_next_time_step(monkeypatch):
    sltt.register(Spike, states=[], spikes=True, decay=lambda neuron: 0.5)
    layers, x, y = [nn.Linear(6, 6), Spike(), nn.Linear(6, 6)], 3 * torch.randn(5, 4, 6), torch.randint(3, (4,))
    neuron, head = sltt.LIF(tau=2.0), [nn.Linear(6, 3), nn.Tanh()]
    started = recorded(monkeypatch, Traces, "end", lambda self, *call: len(self.started))
    plain = nn.Sequential(*layers, neuron, *head)
    again = nn.Sequential(Checkpointed(*layers), neuron, Checkpointed(*head))
    for rule in (sltt.OTTT(fold=1), sltt.OTTT(inputs=False, fold=1)):
        expected, found = (gradients(model, rule, x, y)[0] for model in (plain, again))
        torch.testing.assert_close(found, expected)
    assert [any(started[i::5]) for i in range(5)] == [True, False, False, False, False]


def test_checkpoints_that_hide_a_trace_are_refused():
    first, x, y = nn.Linear(6, 6), torch.randn(5, 4, 6, requires_grad=True), torch.randint(3, (4,))
    twice = Checkpointed(first, nn.Linear(6, 6), first)
    reentrant = Checkpointed(first, reentrant=True)
    for hidden, message in (twice, "leave it out for OTTT"), (reentrant, "use_reentrant=False"):
        for before, rule in (([], sltt.OTTT()), ([nn.Linear(6, 6), sltt.LIF()], sltt.OTTT(inputs=False))):
            model = nn.Sequential(*before, hidden, sltt.LIF(), nn.Linear(6, 3))
            with pytest.raises(ValueError, match=rf"a checkpoint r[ua]n.* Linear.*{message}"):
                rule(model, x, y, LOSS)


def test_a_checkpoint_around_a_layer_without_a_trace():
    layer, rest = nn.Linear(6, 6), [sltt.LIF(tau=2.0), nn.Linear(6, 3)]
    x, y, rule = torch.randn(5, 4, 6, requires_grad=True), torch.randint(3, (4,)), sltt.OTTT(inputs=False)
    found, expected = (nn.Sequential(first, *rest) for first in (Checkpointed(layer, reentrant=True), layer))
    torch.testing.assert_close(gradients(found, rule, x, y)[0], gradients(expected, rule, x, y)[0])


class Around(nn.Module):
    """A layer that feeds neurons, and also the output."""

    def __init__(self):
        super().__init__()
        self.first, self.neuron = nn.Linear(6, 8), sltt.LIF(3.0)
        self.last, self.around = nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x):
        x = self.first(x)
        return self.last(self.neuron(x)) + self.around(x)


def test_a_layer_that_also_feeds_the_output_has_the_gradient_of_sltt():
    model, (x, y) = Around().double(), batch()
    torch.testing.assert_close(*(gradients(model, rule, x, y)[0] for rule in (sltt.OTTT(), sltt.SLTT())))


class Pausing(nn.Module):
    """A layer that runs in some time steps only, before neurons that run in every step, or before its own."""

    def __init__(self, own):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(6, 8)
        self.neuron, self.own = (sltt.LIF(tau=3.0, v_init=0.5, detach_reset=True) for _ in range(2))
        self.last = nn.Linear(8, 3)
        self.with_own, self.t = own, 0

    def forward(self, x):
        self.t += 1
        y, runs = self.first(x), self.t in (1, 2, 5)
        if self.with_own:
            return self.last(self.neuron(y) + (self.own(self.second(2 * x)) if runs else 0))
        return self.last(self.neuron(y + self.second(2 * x) if runs else y))


def test_a_layer_that_pauses_with_its_neurons_has_a_trace_that_pauses_too():
    model, (x, y) = Pausing(own=True).double(), batch(steps=6)
    found, expected = (gradients(model, rule, x, y)[0] for rule in (sltt.OTTT(), sltt.BPTT()))
    torch.testing.assert_close(found, expected)


def test_the_trace_of_a_layer_that_pauses_decays_as_its_neurons_do():
    model, (x, y) = Pausing(own=False).double(), batch(steps=6)
    neuron, v, traces, expected = model.neuron, torch.tensor(0.5).double(), 0, 0
    for t, x_t in enumerate(x, 1):
        runs = t in (1, 2, 5)
        u = neuron.decay() * v + model.first(x_t) + (model.second(2 * x_t) if runs else 0)
        s = neuron.surrogate(u - 1)
        (e,) = torch.autograd.grad(LOSS(model.last(s), y) / len(x), u)
        v, traces = (u - s).detach(), neuron.decay() * traces + 2 * x_t * runs
        expected = expected + e.T @ traces * runs
    sltt.OTTT()(model, x, y, LOSS)
    torch.testing.assert_close(model.second.weight.grad, expected)


class Forked(nn.Module):
    """Two layers that read the same spikes, or, in time step `apart`, a copy; the second runs from step `since` on."""

    def __init__(self, neurons, apart=(), since=0):
        super().__init__()
        self.first, self.left, self.right, self.last = (nn.Linear(n, m) for n, m in ((6, 8), (8, 8), (8, 8), (8, 3)))
        self.neuron, self.one, self.other = neurons
        self.apart, self.since, self.t = apart, since, 0

    def forward(self, x):
        x = self.neuron(self.first(x))
        y = self.one(self.left(x))
        if self.t >= self.since:
            y = y + self.other(self.right(x.clone() if self.t in self.apart else x))
        self.t += 1
        return self.last(y)


@pytest.mark.parametrize("other", [lambda: sltt.LIF(tau=2.0), lambda: sltt.LIF(tau=5.0), lambda: sltt.PLIF(tau=2.0)])
@pytest.mark.parametrize("since", [0, 2])
@pytest.mark.parametrize("online", [False, True])
def test_layers_that_read_the_same_have_the_gradients_of_traces_of_their_own(other, online, since):
    neurons, x, y = (sltt.LIF(tau=3.0), sltt.LIF(tau=2.0), other()), 3 * torch.randn(5, 4, 6), torch.randint(3, (4,))
    model = Forked(neurons, since=since).double()
    apart = copy.deepcopy(model)
    apart.apart = range(5)
    for network in (model, apart):
        step = torch.optim.SGD(network.parameters(), lr=0.1).step if online else None
        sltt.OTTT(online=online)(network, x.double(), y, LOSS, update=step)
    for found, expected in zip(model.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(found.grad, expected.grad)


@pytest.mark.parametrize(("apart", "count"), [((), 2), (range(5), 3)])
def test_one_trace_serves_all_layers_that_read_the_same(apart, count, monkeypatch):
    part, found = Traces._part, set()
    monkeypatch.setattr(Traces, "_part", lambda self: (part(self), found.update(t.read for t in self.traces.values())))
    x, y = 3 * torch.randn(5, 4, 6), torch.randint(3, (4,))
    sltt.OTTT(fold=1)(Forked([sltt.LIF(tau=2.0) for _ in range(3)], apart), x, y, LOSS)
    assert len(found - {None}) == count


def test_layers_that_no_longer_read_the_same_are_refused():
    x, y = 3 * torch.randn(5, 4, 6), torch.randint(3, (4,))
    with pytest.raises(ValueError, match="layers read one input in the first time step, and not in others"):
        sltt.OTTT()(Forked([sltt.LIF(tau=2.0) for _ in range(3)], apart=(2,)), x, y, LOSS)
