import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sltt
from sltt.kernels.spikes import saved
from sltt.models.nfresnet import ScaledWSConv2d
from sltt.rules.trace_step import TraceStep
from sltt.sequence.run import Run
from sltt.sequence.steps import time_steps
from tests.conftest import LOSS, batch, gradients, small_network
from tests.references import measured


def published(model, x, y, decay, update=None):
    """The published equations for Linear, LIF, Linear, LIF, Linear: e from SLTT's graph of one step, and the traces."""
    first, lif1, second, lif2, third = model
    sltt.reset(model)
    traces = {second: 0, third: 0}
    for x_t in x:
        inputs, outputs = {}, {}
        z = first(x_t)
        s = lif1(z)
        for layer, neuron in ((second, lif2), (third, None)):
            inputs[layer], outputs[layer] = s.detach(), layer(s)
            s = outputs[layer] if neuron is None else neuron(outputs[layer])
        errors = torch.autograd.grad(LOSS(s, y) / len(x), [z, *outputs.values()])
        pairs = zip((first, second, third), errors, strict=True)
        for layer, e in pairs:
            if layer in traces:
                traces[layer] = decay * traces[layer] + inputs[layer]
            a = traces.get(layer, x_t)
            for p, grad in ((layer.weight, e.T @ a), (layer.bias, e.sum(0))):
                p.grad = grad if p.grad is None else p.grad + grad
        sltt.detach(model)
        if update:
            update()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None] or [torch.zeros(0)])


def network(tau=2.0):
    layers = [nn.Linear(6, 8), sltt.LIF(tau=tau), nn.Linear(8, 7), sltt.LIF(tau=tau), nn.Linear(7, 3)]
    for layer in layers[::2]:
        layer.weight.data.mul_(3)
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("fold", [1, "auto"])
@pytest.mark.parametrize("decay", [None, 0.3])
def test_without_inputs_it_is_the_published_equations(decay, fold):
    model = network()
    x, y = batch(steps=5)
    found, out = gradients(model, sltt.OTTT(decay, inputs=False, fold=fold), x, y)
    expected = published(copy.deepcopy(model), x, y, 0.5 if decay is None else decay)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(out.logits, sltt.unroll(model, x))
    assert not torch.allclose(found, gradients(model, sltt.SLTT(), x, y)[0])


def test_an_update_at_every_step():
    model = network()
    twin = copy.deepcopy(model)
    x, y = batch(steps=4)

    def updating(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return lambda: (optimizer.step(), optimizer.zero_grad())

    sltt.OTTT(online=True, inputs=False)(model, x, y, LOSS, update=updating(model))
    published(twin, x, y, 0.5, updating(twin))
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("norm", [False, True])
def test_without_a_trace_or_with_one_step_it_is_sltt(neurons, norm):
    model = small_network(neurons, norm=norm)
    x, y = batch()
    torch.testing.assert_close(gradients(model, sltt.OTTT(0.0), x, y)[0], gradients(model, sltt.SLTT(), x, y)[0])
    found, expected = (gradients(model, rule, x[:1], y)[0] for rule in (sltt.OTTT(0.9), sltt.SLTT()))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("dtype", "largest"), [(torch.bfloat16, 256), (torch.float16, 2048)])
def test_a_trace_adds_up_in_float32(dtype, largest):
    """The largest number that a one is not lost in, and ones after it."""
    surrogate = sltt.surrogates.Rectangle(gamma=1e5)  # a constant
    model = nn.Sequential(nn.Linear(1, 1), sltt.IF(v_threshold=1e4, surrogate=surrogate), nn.Linear(1, 2)).to(dtype)
    gradients = []
    x = torch.ones(100, 2, 1, dtype=dtype)
    x[0] = largest
    traces = TraceStep(None, True)
    with Run(model, time_steps(x, None), traces) as run:
        for x_t in x:
            model.zero_grad()
            value = run(x_t).sum()
            traces.traces.end(value, 1)
            value.backward()
            run.detach()
            gradients.append(model[0].weight.grad.item())
    assert gradients[-1] / gradients[0] == pytest.approx(1 + 99 / largest, rel=0.01)


@pytest.mark.parametrize(
    ("padding", "neuron", "per_input", "per_neuron"),
    [("same", sltt.LIF, 1, 0), (1, sltt.CubaLIF, 2, 0), (1, sltt.PLIF, 1, 2)],
)
def test_memory_does_not_grow_with_time(padding, neuron, per_input, per_neuron):
    layers = [nn.Conv2d(1, 32, 3, padding=padding), nn.BatchNorm2d(32), neuron()]
    for _ in range(2):
        layers += [nn.Conv2d(32, 32, 3, padding=padding), nn.BatchNorm2d(32), neuron()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 64, 2)).to(memory_format=torch.channels_last)
    x, y = torch.randn(16, 1, 8, 8), torch.randint(2, (16,))
    short, plain = (measured(rule, model, x, y, steps=4) for rule in (sltt.OTTT(), sltt.SLTT()))
    logits = 4 * 16 * 2
    assert measured(sltt.OTTT(), model, x, y, steps=10) <= 1.01 * short + 6 * logits
    inputs, neurons = x.numel() + 3 * 16 * 32 * 64, 3 * 16 * 32 * 64
    assert short - plain <= 4 * (per_input * inputs + per_neuron * neurons)


def test_spikes_of_small_layers_are_packed_no_more_often_than_with_sltt(monkeypatch):
    model = nn.Sequential(nn.Linear(20, 64), sltt.LIF(), nn.Linear(64, 4))  # 8192 neurons in a batch
    x, y = torch.randn(6, 128, 20), torch.randint(4, (128,))
    found, look, counts = [], saved.look, []
    monkeypatch.setattr(saved, "look", lambda x: (found.append(look(x)), found[-1])[1])
    for rule in (sltt.SLTT(fold=1), sltt.OTTT(fold=1)):
        found.clear()
        rule(model, x, y, LOSS)
        counts.append(len([spikes for spikes in found if spikes]))
    assert counts[1] <= counts[0] <= 2  # in the first step, which knows no size: of the neuron and the layer behind it


class Twice(nn.Module):
    """One layer in two places of a time step, or two layers of the same weights."""

    def __init__(self):
        super().__init__()
        self.first, self.lif, self.again, self.out, self.head = (
            nn.Linear(6, 6), sltt.LIF(tau=2.0), nn.Linear(6, 6), sltt.LIF(tau=3.0), nn.Linear(6, 3)
        )  # fmt: skip
        self.again.load_state_dict(self.first.state_dict())

    def forward(self, x):
        return self.head(self.out(self.again(self.lif(self.first(x)))))


def test_a_layer_used_twice_in_a_step_has_a_trace_for_each_use():
    apart = Twice().double()
    apart.first.weight.data.mul_(3)
    apart.again.load_state_dict(apart.first.state_dict())
    shared = copy.deepcopy(apart)
    shared.again = shared.first
    x, y = batch(steps=8)
    sltt.OTTT()(apart, x, y, LOSS)
    sltt.OTTT()(shared, x, y, LOSS)
    torch.testing.assert_close(shared.first.weight.grad, apart.first.weight.grad + apart.again.weight.grad)
    torch.testing.assert_close(shared.first.bias.grad, apart.first.bias.grad + apart.again.bias.grad)


class Branches(nn.Module):
    """A sum that feeds neurons of two τ."""

    def __init__(self):
        super().__init__()
        self.stem, self.head, self.fast, self.slow = nn.Linear(6, 8), nn.Linear(8, 3), sltt.LIF(2.0), sltt.LIF(4.0)

    def forward(self, x):
        x = self.stem(3 * x)
        return self.head(self.fast(x) + self.slow(x))


def test_a_layer_that_feeds_neurons_of_several_decays_has_their_mean():
    model = Branches().double()
    x, y = batch(steps=8)
    found, expected = (gradients(model, rule, x, y)[0] for rule in (sltt.OTTT(), sltt.OTTT(decay=0.625)))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("deep", [False, True])
def test_without_inputs_recurrent_weights_have_the_trace_of_their_own_neurons(deep):
    torch.manual_seed(0)
    first = [nn.Linear(6, 6), sltt.LIF(tau=1.5, v_threshold=0.3)] if deep else []
    recurrent = sltt.Recurrent(sltt.LIF(tau=10.0, v_threshold=0.4), nn.Linear(6, 6, bias=False))
    model = nn.Sequential(*first, nn.Linear(6, 6), recurrent, nn.Linear(6, 3)).double()
    x, y = batch(steps=6)
    weights = []
    for rule in (sltt.OTTT(), sltt.OTTT(inputs=False)):
        model.zero_grad()
        rule(model, 3 * x, y, LOSS)
        weights.append(recurrent.layer.weight.grad)
    assert weights[0].norm() > 0
    torch.testing.assert_close(weights[1], weights[0])


def test_standardised_weights():
    conv = ScaledWSConv2d(2, 4, 3)
    model = nn.Sequential(conv, sltt.LIF(tau=3.0, detach_reset=True), nn.Flatten(), nn.Linear(64, 3)).double()
    x, y = 2 * torch.randn(6, 3, 2, 4, 4, dtype=torch.float64), torch.randint(3, (3,))
    found, expected = (gradients(model, rule, x, y)[0] for rule in (sltt.OTTT(), sltt.BPTT()))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("frozen", ["0", "weight", "bias"])
@pytest.mark.parametrize("convolution", [False, True])
def test_what_does_not_learn_is_left_as_it_is_and_the_rest_has_the_same_trace(frozen, convolution):
    first = nn.Conv2d(1, 8, (1, 6)) if convolution else nn.Linear(6, 8)
    model = nn.Sequential(first, nn.Flatten(), sltt.LIF(tau=2.0), nn.Linear(8, 6), sltt.LIF(), nn.Linear(6, 3)).double()
    x, y = batch()
    x = x[:, :, None, None] if convolution else x
    expected, found = copy.deepcopy(model), {name: p for name, p in model.named_parameters() if frozen in name}
    for p in found.values():
        p.requires_grad_(False)
    for one in (model, expected):
        sltt.OTTT()(one, x, y, LOSS)
    for (name, p), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p.grad, None if name in found else other.grad)


class Named(nn.Linear):
    def forward(self, input):
        return F.linear(input=input, weight=self.weight, bias=self.bias)


class NamedConv(nn.Conv1d):
    def forward(self, input):
        return F.conv1d(input, self.weight, self.bias, 2, dilation=self.dilation)


class Product(nn.Linear):
    def forward(self, input):
        return input @ self.weight.T + self.bias


def test_layers_that_name_their_arguments():
    def made(linear, conv):
        layers = nn.Unflatten(1, (1, 6)), conv(1, 4, 2, stride=2, dilation=2), sltt.LIF(), nn.Flatten()
        return nn.Sequential(*layers, linear(8, 6), sltt.LIF(), nn.Linear(6, 3)).double()

    model, named = made(nn.Linear, nn.Conv1d), made(Named, NamedConv)
    named.load_state_dict(model.state_dict())
    x, y = batch()
    torch.testing.assert_close(*(gradients(m, sltt.OTTT(), x, y)[0] for m in (model, named)))


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.ones(6, 6))

    def forward(self, x):
        return x @ self.matrix


class Neurons(sltt.Stateful):
    states = ("v",)
    spikes = True

    def forward(self, x):
        self.v = x if self.v is None else self.v / 2 + x
        return (self.v > 1).to(x.dtype)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: nn.Sequential(nn.Linear(6, 6), sltt.LIF(v_reset=0.0), nn.Linear(6, 3)),
            r"1 \(LIF\) resets to v_reset = 0.0.* use the soft reset, v_reset=None, or an estimate, OTTT\(decay=…\)",
        ),
        (lambda: nn.Sequential(nn.Linear(6, 6), Neurons(), nn.Linear(6, 3)), r"the λ of 1 \(Neurons\) is not known"),
        (lambda: nn.Sequential(Scale(), sltt.LIF(), nn.Linear(6, 3)), r"no traces for the weights of 0 \(Scale\)"),
        (lambda: nn.Sequential(Product(6, 6), sltt.LIF(), nn.Linear(6, 3)), r"no trace for the weights of Product"),
    ],
    ids=["hard reset", "unknown", "weights of another kind", "a product"],
)
def test_networks_that_ottt_does_not_know_are_refused(model, message):
    x, y = torch.randn(2, 4, 6), torch.randint(3, (4,))
    with pytest.raises(ValueError, match=message):
        sltt.OTTT()(model(), x, y, LOSS)
