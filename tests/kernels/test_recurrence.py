"""A recurrent layer in one native call, beside a loop over the equations in float64."""

import itertools

import pytest
import torch
from torch import nn

import sltt
from sltt import kernels
from sltt.analysis import firing_rates
from sltt.kernels.neuron import recurrence
from sltt.neurons.leaky import kernel_step, lif_step
from tests.conftest import LOSS, gradients
from tests.kernels.exact import NATIVE
from tests.kernels.steps import threads
from tests.references import recorded

pytestmark = NATIVE
NEURONS = {
    "soft": lambda: sltt.LIF(tau=2.0),
    "hard": lambda: sltt.LIF(tau=2.0, v_reset=0.0),
    "hard, scaled": lambda: sltt.LIF(tau=2.0, v_reset=-0.25, decay_input=True),
    "detached": lambda: sltt.IF(detach_reset=True),
    "above": lambda: sltt.LIF(tau=2.0, surrogate=sltt.surrogates.Above(sltt.surrogates.Triangle())),
    "arctan": lambda: sltt.LIF(tau=2.0, surrogate=sltt.surrogates.ArcTan()),
    "learned": lambda: sltt.PLIF(tau=2.0),
    "learned, scaled": lambda: sltt.PLIF(tau=2.0, decay_input=True),
    "learned, hard, scaled": lambda: sltt.PLIF(tau=2.0, v_reset=-0.25, decay_input=True),
}


def exact(shape, parts=16):
    """Numbers whose sums are exact in float32, so that no rounding decides whether a neuron fires."""
    return torch.randint(-2 * parts, 2 * parts, shape) / parts


def plain(neuron, x, s, v, weight, bias, decay, steps, cut):
    spikes = []
    decay = neuron.decay() if decay is None else decay
    for x_t in x.chunk(steps):
        if cut and spikes:
            s, v = s.detach(), v.detach()
        current = x_t + (0 if s is None else s @ weight.T) + (0 if bias is None else bias)
        s, v = lif_step(v, current, decay=decay, **neuron.constants())
        spikes.append(s)
    return torch.cat(spikes), s, v


@pytest.mark.parametrize("neuron", NEURONS.values(), ids=NEURONS)
@pytest.mark.parametrize("cut", [True, False])
def test_forward_and_gradients(neuron, cut):
    torch.manual_seed(0)
    neuron = neuron()
    step = neuron.kernel_step()[0]
    decay = torch.tensor(0.5) if step.decay is None else None
    sizes = [(1, 16), (3, 37), (70, 40), (2, 300), (5, 520)]
    settings = itertools.cycle([(1, True, False), (1, False, True), (5, True, True), (5, False, False)])
    for (batch, width), (steps, given, biased) in zip(sizes, settings, strict=False):
        x, weight, v = exact((steps * batch, width)), exact((width, width)) / 4, exact((batch, width)) / 4
        s = (torch.rand(batch, width) < 0.3).float() if given else None
        bias = exact((width,)) / 4 if biased else None
        found, expected = [], []
        for dtype, results in ((torch.float32, found), (torch.float64, expected)):
            leaves = [None if t is None else t.to(dtype).requires_grad_() for t in (x, s, v, weight, bias, decay)]
            if dtype == torch.float32:
                with kernels.using(compile="on"):
                    out = kernels.recurrent_steps(step, *leaves, kernels.WeightCache(), steps, cut)
                assert out is not None
            else:
                out = plain(neuron, *leaves, steps, cut)
            torch.manual_seed(1)
            total = sum((torch.randn(o.shape).to(dtype) * o).sum() for o in out)
            learned = [t for t in leaves if t is not None]
            results += [*out, *torch.autograd.grad(total, learned, allow_unused=True, materialize_grads=True)]
        for a, b in zip(found[:3], expected[:3], strict=True):
            assert torch.equal(a.double(), b)
        for a, b in zip(found[3:], expected[3:], strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-4)


def test_results_do_not_depend_on_threads_or_on_the_number_of_calls():
    torch.manual_seed(0)
    neuron = sltt.LIF()
    step = kernel_step(sltt.LIF, neuron.decay(), **neuron.constants())
    x, weight, v = torch.randn(6 * 130, 300), torch.randn(300, 300) / 9, torch.zeros(130, 300)
    given = weight, None, None, kernels.WeightCache()
    with torch.no_grad(), kernels.using(compile="on"):
        whole = kernels.recurrent_steps(step, x, None, v, *given, 6, True)
        with threads(3):
            first, s, v = kernels.recurrent_steps(step, x[:260], None, v, *given, 2, True)
            last, s, v = kernels.recurrent_steps(step, x[260:], s, v, *given, 4, True)
    for a, b in zip(whole, (torch.cat([first, last]), s, v), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_16_bits_have_the_results_of_float32_on_their_numbers(half, autocast, cut):
    torch.manual_seed(0)
    kept, step = torch.float32 if autocast else half, sltt.LIF(tau=2.0).kernel_step()[0]
    numbers = torch.randn(4 * 20, 64), (torch.rand(20, 64) < 0.3).float(), torch.randn(64, 64) / 4, torch.randn(64)
    given = [t.to(dtype) for t, dtype in zip(numbers, (half, half, kept, kept), strict=True)]
    out_gradient, results = torch.randn(4 * 20, 64).to(half), []
    for dtype in (half, torch.float32):
        x, s, weight, bias = leaves = [(t if dtype == half else t.float()).requires_grad_() for t in given]
        arguments = torch.zeros(20, 64), weight, bias, None, kernels.WeightCache(), 4, cut
        with kernels.using(compile="on"), torch.autocast("cpu", half, enabled=dtype == half):
            spikes, last, v = kernels.recurrent_steps(step, x, s, *arguments)
            results.append([spikes, last, v, *torch.autograd.grad(spikes, leaves, out_gradient.to(dtype))])
        assert spikes.dtype == last.dtype == dtype
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected.to(found.dtype))


def network(layer=None, neuron=None):
    recurrent = sltt.Recurrent(neuron or sltt.LIF(tau=2.0), layer or nn.Linear(64, 64))
    return nn.Sequential(nn.Linear(20, 64), recurrent, nn.Linear(64, 3))


@pytest.fixture
def calls(monkeypatch):
    """The time steps of each native call."""
    with kernels.using(compile="on"):
        yield recorded(monkeypatch, recurrence, "_forward", lambda call, *_: call.steps)


@pytest.mark.parametrize(
    ("rule", "steps"),
    [
        (sltt.SLTT(), [8]),
        (sltt.BPTT(), [8]),
        (sltt.SLTT(fold=1), [1] * 8),
        (sltt.TBPTT(3), [3, 3, 2]),
        (sltt.BPTT(segment=4), [4, 4, 4]),
        (sltt.OTTT(), [1, 7]),
    ],
    ids=repr,
)
@pytest.mark.parametrize("neuron", [sltt.LIF, sltt.PLIF])
def test_rules_run_it_by_default(calls, rule, steps, neuron):
    model, x, y = network(neuron=neuron(tau=2.0)), torch.randn(8, 5, 20), torch.randint(3, (5,))
    if isinstance(rule, sltt.OTTT) and neuron is sltt.PLIF:
        steps = []  # the trace of a learned λ is that of the plain loop
    found, _ = gradients(model, rule, x, y)
    assert calls == steps
    with kernels.using(compile="off"):
        expected, _ = gradients(model.double(), rule, x.double(), y)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


class Own(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked(model):
    model[1].layer.register_forward_hook(lambda module, args, output: 2 * output)
    return model


@pytest.mark.parametrize(
    "make",
    [
        lambda: network(neuron=sltt.ALIF()),
        lambda: network(Own(64, 64)),
        lambda: network(nn.Sequential(nn.Linear(64, 64))),
        lambda: hooked(network()),
        lambda: network().double(),
    ],
)
def test_other_layers_run_step_by_step(calls, make):
    model = make()
    x, y = torch.randn(4, 5, 20).to(model[0].weight.dtype), torch.randint(3, (5,))
    sltt.SLTT()(model, x, y, LOSS)
    assert not calls


def test_its_spikes_are_seen(calls):
    model, x = network(), torch.randn(8, 5, 20)
    with firing_rates(model) as rates:
        sltt.unroll(model, x)
    assert calls == [8]
    (rate,) = rates.by_layer().values()
    assert rate == pytest.approx(sltt.unroll(model[:2], x).mean().item())


@pytest.mark.parametrize("rule", [sltt.SLTT(fold=1), sltt.BPTT(fold=1), sltt.OTTT(fold=1)], ids=repr)
def test_a_layer_that_runs_twice_in_a_time_step_is_refused(rule):
    layer = sltt.Recurrent(sltt.LIF(), nn.Linear(16, 16))
    model = nn.Sequential(nn.Linear(6, 16), layer, nn.Linear(16, 16), layer, nn.Linear(16, 3))
    with kernels.using(compile="on"), pytest.raises(ValueError, match=r"1 \(Recurrent\) runs twice in a time step"):
        rule(model, torch.rand(4, 5, 6), torch.randint(3, (5,)), LOSS)
