"""BatchNorm and neuron in one pass, against their equations in float64, and in networks against each by itself."""

import itertools

import pytest
import torch
from torch import nn

import sltt
from sltt import kernels
from sltt.analysis import peak_memory
from sltt.kernels import native
from sltt.kernels.neuron import step as step_of_kernels
from sltt.kernels.norm import norm as norm_of_kernels
from sltt.kernels.norm import normed
from sltt.kernels.spikes import looks
from sltt.neurons import lif_step
from sltt.sequence.pairs import normalise_and_fire
from sltt.surrogates import Triangle
from tests.conftest import LOSS, gradient
from tests.kernels.exact import channels_last
from tests.kernels.steps import Steep, default_type, threads
from tests.neurons.plain import OwnLIF
from tests.references import by_hand, marked

pytestmark = pytest.mark.skipif(native.problem() is not None, reason=str(native.problem()))
FORMS = [(7, 24, 3, 5), (33, 65), (5, 700), (2, 1, 9, 1), (40, 48, 6, 12)]
STEPS = list(itertools.product([None, 0.0, -0.3], [False, True], [False, True]))
NEVER, FITS = 2**60, normed._fits


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Neurons normalise small tensors too."""
    native.library()
    monkeypatch.setattr(looks, "BITS_FROM", 0)
    fusing(monkeypatch, True)


def fusing(monkeypatch, on):
    monkeypatch.setattr(normed, "NORMED_FROM", 2)
    monkeypatch.setattr(normed, "_fits", FITS if on else lambda *args: False)
    monkeypatch.setattr(norm_of_kernels, "TAGGED_FROM", 2 if on else NEVER)


@pytest.fixture
def fused(monkeypatch):
    """The steps of BatchNorms and neurons that ran in one pass."""
    found, prepare = [], normed.prepare_norm

    def prepared(norm, x, bias, steps):
        found.extend([1] * steps if (one := prepare(norm, x, bias, steps)) else [])
        return one

    monkeypatch.setattr(step_of_kernels, "prepare_norm", prepared)
    return found


def drawn(shape, dtype=torch.float32, mean=0.0):
    torch.manual_seed(0)
    spread = torch.linspace(0.5, 2, shape[1]).view(-1, *[1] * (len(shape) - 2))
    return channels_last((spread * torch.randn(shape) + mean).to(dtype))


def norm_of(x, weight=None, bias=None, training=True, mean=0.2, var=1.5):
    """A BatchNorm of x."""
    norm = (nn.BatchNorm2d if x.ndim == 4 else nn.BatchNorm1d)(x.shape[1], momentum=0.3, affine=weight is not None)
    norm.running_mean.fill_(mean)
    norm.running_var.fill_(var)
    if weight is not None:
        norm.weight, norm.bias = nn.Parameter(weight), nn.Parameter(bias)
    return norm.train(training)


@pytest.mark.parametrize("shape", FORMS, ids=str)
@pytest.mark.parametrize(("dtype", "mean"), [(torch.float32, 0), (torch.float32, 3e3), (torch.bfloat16, 1)], ids=str)
def test_statistics(shape, dtype, mean):
    x, results = drawn(shape, dtype, mean), []
    for number in (1, 3):
        with threads(number):
            norm = norm_of(x)
            factors = normed.prepare_norm(norm, x).factors
            results.append((*factors, norm.running_mean, norm.running_var))
    assert all(map(torch.equal, *results))
    assert norm.num_batches_tracked == 1
    exact = norm_of(x).double()
    expected = exact(x.double())
    torch.testing.assert_close(norm.running_mean.double(), exact.running_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(norm.running_var.double(), exact.running_var, rtol=2e-6, atol=1e-6)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5 + 1e-6 * mean
    scale, shift, *_ = factors.double().view(4, -1, *[1] * (x.ndim - 2))
    torch.testing.assert_close(scale * x.double() + shift, expected, rtol=tolerance, atol=tolerance)


def time_steps(x, weight, bias, constants, training, steps, exact):
    """Spikes, v and gradients of BatchNorm and a neuron; by the equations in float64, or in one pass."""
    y, norm = x.detach(), norm_of(x, weight, bias, training)
    y, norm = (y.double(), norm.double()) if exact else (y, norm)
    y.requires_grad_()
    v = drawn((len(x) // steps, *x.shape[1:]))
    v = (v.double() if exact else v).requires_grad_()
    fixed = dict(zip(("v_reset", "decay_input", "detach_reset"), constants, strict=True))
    fixed |= {"v_threshold": 0.8, "surrogate": Triangle()}
    if exact:
        after, spikes = v, []
        for y_t in y.chunk(steps):
            s, after = lif_step(after, norm(y_t), decay=0.6, **fixed)
            spikes.append(s)
        s = torch.cat(spikes)
    else:
        step = kernels.NeuronStep(decay=0.6, **fixed)
        s, after = kernels.normed_step(step, v, y, norm, None, None, steps, False)
    torch.manual_seed(1)
    of_s, of_v = (torch.randn(z.shape).to(x.dtype).to(s.dtype) for z in (s, after))
    ((s * of_s).sum() + (after * of_v).sum()).backward()
    return [s, after, v.grad, y.grad, *norm.buffers(), *(p.grad for p in norm.parameters())]


@pytest.mark.parametrize("training", [True, False], ids=["batch", "running"])
@pytest.mark.parametrize("constants", STEPS, ids=str)
def test_the_neuron_normalises(constants, training):
    for i, shape in enumerate(FORMS, STEPS.index(constants)):
        dtype, learned = (torch.bfloat16 if i % 2 else torch.float32), (i // 2 + training) % 2  # in turn
        affine = (torch.linspace(0.5, 2, shape[1]), torch.linspace(-0.5, 1, shape[1])) if learned else (None, None)
        steps = 1 + i % 3
        x = drawn((steps * shape[0], *shape[1:]), dtype)
        fast, exact = (time_steps(x, *affine, constants, training, steps, e) for e in (False, True))
        assert torch.equal(fast[0].double(), exact[0])
        tolerance = 2e-2 if dtype == torch.bfloat16 else 2e-5
        for a, b in zip(fast[1:], exact[1:], strict=True):
            torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance * b.abs().max().item())


NEURONS = {
    "LIF": (sltt.LIF, True),
    "hard reset": (lambda: sltt.LIF(v_reset=0.0, decay_input=True), True),
    "IF": (sltt.IF, True),
    "PLIF": (sltt.PLIF, False),
    "no native gradient": (lambda: sltt.LIF(surrogate=Steep()), False),
    "own": (OwnLIF, False),
}
RULES = [sltt.SLTT(fold=1), sltt.SLTT(k=1, fold=1), sltt.SLTT(fold=2), sltt.SLTT(recompute=True, fold=1)]
RULES += [sltt.BPTT(fold=1), sltt.BPTT(segment=2, fold=1), sltt.TBPTT(2, fold=1), sltt.OTTT(fold=1)]
RULES += [sltt.OTTT(inputs=False, fold=1), sltt.RateBased(fold=1), sltt.Mixed({"2": 3})]


class Paired(nn.Sequential):
    """The same network by a forward of its own."""

    def forward(self, x):
        x = normalise_and_fire(self[1], self[2], self[0](x))
        return self[7](self[6](normalise_and_fire(self[4], self[5], self[3](x))))


class Written(Paired):
    """The same by calls alone; `also` reads what the first BatchNorm gives."""

    def forward(self, x):
        y = self[1](self[0](x))
        also = ALSO[0](y)
        return self[7](self[6](self[5](self[4](self[3](self[2](y) + also)))))


ALSO = {0: lambda y: 0}


def network(neuron=sltt.LIF, kind=nn.Sequential):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24), neuron(), nn.Conv2d(24, 16, 3, 2), nn.BatchNorm2d(16)
    return kind(*layers, neuron(), nn.Flatten(), nn.Linear(16 * 9, 10)).to(memory_format=torch.channels_last)


def batch():
    torch.manual_seed(1)
    return channels_last(torch.randn(8, 3, 8, 8)), torch.randint(10, (8,))


def trained(model, rule=sltt.SLTT(fold=1), dtype=torch.float32):
    x, y = batch()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = rule(model, x, y, nn.CrossEntropyLoss(), steps=4, seed=0)
    return [out.loss, out.logits, *(p.grad for p in model.parameters()), *model.buffers()]


def check(monkeypatch, run, tolerance=1e-5):
    results = []
    for on in (True, False):
        fusing(monkeypatch, on)
        results.append(run())
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", [nn.Sequential, Paired])
@pytest.mark.parametrize(("neuron", "fuses"), NEURONS.values(), ids=NEURONS)
def test_every_neuron(neuron, fuses, kind, monkeypatch, fused):
    check(monkeypatch, lambda: trained(network(neuron, kind)))
    assert len(fused) == 2 * 4 * fuses


@pytest.mark.parametrize("kind", [nn.Sequential, Paired])
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_every_rule(rule, kind, monkeypatch, fused):
    check(monkeypatch, lambda: trained(network(kind=kind), rule))
    assert (len(fused) >= 2 * 4) == (not isinstance(rule, sltt.RateBased))  # by kernels of its own


@pytest.mark.parametrize("rule", [sltt.SLTT(fold=2), sltt.BPTT(fold=4)], ids=repr)
@pytest.mark.parametrize(("also", "pairs"), [(lambda y: 0, 2), (lambda y: 0.1 * y.exp(), 1)], ids=["alone", "read"])
def test_operations_show_who_reads_a_norm(rule, also, pairs, monkeypatch, fused):
    monkeypatch.setitem(ALSO, 0, also)
    check(monkeypatch, lambda: trained(network(kind=Written), rule))
    assert len(fused) == 4 * pairs


def test_a_norm_that_others_read_later_is_named(monkeypatch):
    model = network(kind=Written)
    trained(model, sltt.SLTT(fold=2))
    monkeypatch.setitem(ALSO, 0, lambda y: model[5](y).sum())
    with pytest.raises(ValueError, match=r"2 \(LIF\) ran behind a BatchNorm before, and does not now: use fold=1"):
        trained(model, sltt.SLTT(fold=2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_types_and_inference(dtype, fused, monkeypatch):
    trained(network(), dtype=dtype)
    check(monkeypatch, lambda: [sltt.unroll(network().eval(), batch()[0], steps=3, fold=1)])
    assert len(fused) == 2 * (4 + 3)


class Scaled(nn.BatchNorm2d):
    def forward(self, x):
        return 1.5 * super().forward(x)


def doubled(neuron):
    neuron.forward = lambda x: type(neuron).forward(neuron, 2 * x)


HOOKS = {
    "of the norm": lambda norm, neuron: norm.register_forward_hook(lambda m, args, y: 1.5 * y),
    "before the norm": lambda norm, neuron: norm.register_forward_pre_hook(lambda m, args: (args[0] + args[0][:1],)),
    "before the neuron": lambda norm, neuron: neuron.register_forward_pre_hook(lambda m, args: (1.5 * args[0],)),
    "of the neuron": lambda norm, neuron: neuron.register_forward_hook(lambda m, args, y: 0.5 * y),
    "backward": lambda norm, neuron: norm.register_full_backward_hook(lambda m, grads, _: (2 * grads[0],)),
    "of all modules": lambda norm, neuron: nn.modules.module.register_module_forward_hook(
        lambda m, args, y: 1.5 * y if m is norm else None
    ),
    "its forward": lambda norm, neuron: setattr(norm, "forward", lambda x: 1.5 * nn.BatchNorm2d.forward(norm, x)),
    "its class": lambda norm, neuron: setattr(norm, "__class__", Scaled),
    "a neuron's forward": lambda norm, neuron: setattr(
        neuron, "forward", lambda x: type(neuron).forward(neuron, 2 * x)
    ),
    "observer": lambda norm, neuron: neuron.register_forward_hook(marked(lambda *call: None)),
}


@pytest.mark.parametrize("kind", [nn.Sequential, Paired])
@pytest.mark.parametrize("place", HOOKS)
def test_what_is_called_between_or_beside_the_two_has_its_effect(place, kind, fused):
    (x, y), model = batch(), network(kind=kind)
    handle = HOOKS[place](model[1], model[2])
    try:
        sltt.BPTT(fold=1)(model, x, y, LOSS, steps=4)
        found, steps = gradient(model), len(fused)
        expected, _ = by_hand(model, [x] * 4, y)
    finally:
        if handle:
            handle.remove()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert steps == {"of all modules": 0, "observer": 8}.get(place, 4)  # the other two run together


def test_what_is_not_prepared():
    fits, prepare = channels_last(torch.randn(3, 4, 5, 5)), normed.prepare_norm
    norm = norm_of(fits, training=False)
    assert prepare(norm, fits) is not None
    assert prepare(nn.BatchNorm2d(4, track_running_stats=False).eval(), fits) is not None
    for x in (fits.double(), fits.contiguous(), fits[:, :, ::2], fits.to("meta"), fits[:1, :, :1, :1]):
        assert prepare(norm, x) is None
    assert prepare(norm_of(fits, training=False).double(), fits) is None
    assert prepare(nn.BatchNorm2d(3).eval(), fits) is None
    norm.running_var = None
    assert prepare(norm, fits) is None
    with kernels.using(compile="off"):
        assert prepare(nn.BatchNorm2d(4), fits) is None


def peaks(monkeypatch, neuron, rule):
    for on in (True, False):
        fusing(monkeypatch, on)
        model = network(neuron)
        trained(model, rule)
        yield peak_memory(lambda model=model: trained(model, rule))


def test_memory_is_not_more(monkeypatch):
    fused, plain = peaks(monkeypatch, sltt.LIF, sltt.SLTT(fold=1))
    assert fused <= plain + 2 * 4 * (24 + 16)  # scale and shift


def test_a_neuron_of_ones_own_keeps_no_normalised_input(monkeypatch):
    fused, plain = peaks(monkeypatch, OwnLIF, sltt.BPTT(fold=1))
    # those of the first neurons in two time steps of four, beside the backward's; what normalises again is small
    assert fused < plain - 0.98 * 4 * 2 * 8 * 24 * 64


def test_the_default_type_changes_nothing(monkeypatch):
    fusing(monkeypatch, True)
    (x, y), networks = batch(), [network() for _ in range(2)]

    def gradients(model):
        sltt.SLTT(fold=1)(model, x, y, nn.CrossEntropyLoss(), steps=4)
        return [p.grad for p in model.parameters()]

    expected = gradients(networks[0])
    with default_type(torch.float64):
        torch.testing.assert_close(gradients(networks[1]), expected)
