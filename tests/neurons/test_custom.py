"""A neuron of one's own beside the same function under autograd, in a module that is no `Neuron`."""

import copy

import pytest
import torch
from torch import nn

import sltt
from sltt import kernels
from tests.conftest import batch, gradients, small_network
from tests.kernels.steps import compiling
from tests.neurons.plain import Plain, plain

TRIANGLE = sltt.surrogates.Triangle()


class Adaptive(sltt.Neuron):
    states = ("v", "a")

    def __init__(self, decay=0.6, rise=0.2):
        super().__init__()
        self.decay, self.surrogate = decay, TRIANGLE
        self.rise = nn.Parameter(torch.as_tensor(rise))

    @staticmethod
    def step(x, v, a, *, decay, rise, surrogate):
        u = decay * v + x
        s = surrogate(u - 1 - rise * a)
        return s, u - s, 0.9 * a + s


class Graded(sltt.Neuron):
    """Up to two spikes in a step; a decay that is learned through a method; states that start elsewhere."""

    states = ("u", "i")

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.4))
        self.start = {"u": 0.3, "i": -0.1}

    def leak(self):
        return torch.sigmoid(self.w)

    @staticmethod
    def step(x, u, i, *, leak):
        i = 0.5 * i + x
        u = leak * u + i
        s = TRIANGLE(u - 1) + TRIANGLE(u - 2)
        return s, torch.where(s > 0, 0.1 * u, u), i


class PerChannel(Adaptive):
    def __init__(self):
        super().__init__(rise=torch.linspace(0.1, 0.4, 8))


KINDS = [Adaptive, Graded, PerChannel]


def run(neuron, x, steps=3):
    """Spikes, states and gradients of a few steps."""
    neuron, x = copy.deepcopy(neuron), x.detach().clone().requires_grad_()
    spikes = [neuron(x * (1 - 0.2 * t)) for t in range(steps)]
    states = [getattr(neuron, name) for name in neuron.states]
    total = sum((s.double() * torch.linspace(-1, 2, s.numel()).view(s.shape)).sum() for s in spikes)
    (total + 0.1 * sum(s.double().sum() for s in states)).backward()
    return spikes, states, [x.grad, *(p.grad for p in neuron.parameters())]


def layouts(channels):
    yield 1.5 * torch.randn(5, channels)
    yield 1.5 * torch.randn(3, channels, 2, 5)
    yield (1.5 * torch.randn(3, channels, 2, 5)).to(memory_format=torch.channels_last)
    yield 1.5 * torch.randn(2, 5, 3, channels).permute(0, 3, 1, 2)[:, :, ::2]
    yield torch.randn(0, channels)


def check_fused(neuron, x):
    found, expected = run(neuron, x), run(Plain(neuron), x)
    torch.testing.assert_close(found, expected)
    assert found[0][0].stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("kind", KINDS)
def test_the_fused_step_equals_the_function(kind):
    with kernels.using(compile="off"):
        for x in layouts(8):
            check_fused(kind(), x)


@pytest.mark.slow
@pytest.mark.parametrize("last", [True, False])  # each compiles anew
def test_the_compiled_step_equals_the_function(last):
    with compiling("on"):
        for x in [*layouts(8)][2:3] if last else [*layouts(8)][::4]:
            check_fused(PerChannel(), x)


def test_sixteen_bits_keep_states_in_thirty_two():
    neuron = Adaptive()
    x = (1.5 * torch.randn(4, 64)).to(torch.bfloat16)
    spikes, states, (grad, of_rise) = run(neuron, x)
    expected = run(Plain(neuron), x.float())
    assert {s.dtype for s in states} == {of_rise.dtype} == {torch.float32}
    assert {s.dtype for s in spikes} == {grad.dtype} == {torch.bfloat16}
    # the factors of the steps are rounded to 16 bits, so a neuron near its threshold may differ
    assert (torch.stack(spikes).float() == torch.stack(expected[0])).float().mean() > 0.95


def test_layers_read_spikes_as_bits_and_graded_ones_as_they_are(sparse_calls):
    x, y = 2 * torch.randn(3, 32, 64), torch.arange(32) % 16
    for kind, runs in ((Adaptive, {"forward", "grad"}), (Graded, set())):
        model, found = nn.Sequential(nn.Linear(64, 256), kind(), nn.Linear(256, 16)), []
        for options in ({"sparse": "on"}, {"bits": False}):
            with kernels.using(**options):
                found.append(gradients(model, sltt.BPTT(), x, y)[0])
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
        assert {call for call, _ in sparse_calls} == runs
        sparse_calls.clear()


class Config:
    alpha = 1.0


class Scaled(sltt.Neuron):
    """Reads a class, and learns a number."""

    def __init__(self, surrogate):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.9, dtype=torch.float64))

    @staticmethod
    def step(x, v, *, w):
        s = sltt.surrogates.FastSigmoid(Config.alpha)(w * v + x - 1)
        return s, w * v + x - s


@pytest.mark.parametrize("make", [sltt.ALIF, lambda **kwargs: sltt.IntegerLIF(levels=2, **kwargs), Scaled])
def test_a_step_reads_what_classes_have_now(make):
    class Annealed(sltt.surrogates.Surrogate):
        alpha = 1.0

        def derivative(self, x):
            return self.alpha / (1 + (self.alpha * x) ** 2)

    found, neuron, Config.alpha = [], make(surrogate=Annealed()), 1.0
    for mode in ("on", "on", "off"):
        x = torch.linspace(-1, 3, 64, dtype=torch.float64).requires_grad_()
        with kernels.using(compile=mode):
            (neuron(x) + neuron(x)).sum().backward()
        sltt.reset(neuron)
        found.append([x.grad, *(p.grad for p in neuron.parameters())])
        neuron.zero_grad()
        Annealed.alpha = Config.alpha = 4.0
    assert not torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[1], found[2])


def test_a_function_of_ones_own_that_is_called_like_that_of_surrogates_gives_no_bits():
    class _Spike(torch.autograd.Function):
        @staticmethod
        def forward(ctx, u):
            return u.clamp(0, 2).floor()

        @staticmethod
        def backward(ctx, grad):
            return grad

    class Named(sltt.Neuron):
        @staticmethod
        def step(x, v):
            s = _Spike.apply(0.5 * v + x)
            return s, 0.5 * v + x - s

    model = nn.Sequential(Named(), nn.Linear(512, 16))
    x, y = 4 * torch.rand(3, 8, 512), torch.arange(8)
    found, _ = gradients(model, sltt.SLTT(), x, y)
    torch.testing.assert_close(found, gradients(plain(model), sltt.SLTT(), x, y)[0])


def test_a_neuron_that_says_its_decay_has_traces():
    model = small_network(Adaptive)
    x, y = batch()
    assert torch.equal(gradients(model, sltt.OTTT(), x, y)[0], gradients(model, sltt.OTTT(decay=0.6), x, y)[0])
    with pytest.raises(ValueError, match=r"the λ of 2 \(Graded\) is not known.*`decay`.*OTTT\(decay=…\)"):
        sltt.OTTT()(small_network(Graded), x, y, nn.CrossEntropyLoss())
