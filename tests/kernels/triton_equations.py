"""The neuron step in Triton against the equations: in Triton's interpreter, or on a GPU.

TRITON_INTERPRET=1 pytest tests/kernels/triton_equations.py    on a CPU; test_triton.py runs this
pytest tests/kernels/triton_equations.py                       on a GPU
"""

import copy
import itertools

import numpy as np
import pytest
import torch
import triton.runtime.interpreter
from torch import nn

import sltt
from sltt import kernels
from sltt.kernels.neuron import step as step_of_kernels
from sltt.kernels.neuron import triton_step
from sltt.kernels.neuron.triton_step import TritonStep
from sltt.kernels.norm import normed, triton_norm
from sltt.kernels.spikes.bits import pack
from sltt.kernels.spikes.looks import BITS, PACK_FROM
from sltt.kernels.spikes.saved import tag_of
from sltt.neurons import leaky, lif_step
from tests.conftest import LOSS, NEURONS, RULES, SURROGATES, batch, gradients, small_network
from tests.kernels.steps import CONSTANTS, SIZES, Steep, both, layouts

INTERPRETED = triton.knobs.runtime.interpret
if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("PyTorch sees no CUDA device, and TRITON_INTERPRET=1 is not set", allow_module_level=True)
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
# gradients are rounded once, to x's type
TOLERANCES = {torch.float32: (2e-5, 2e-6), torch.bfloat16: (2**-7, 1e-5), torch.float16: (2**-10, 1e-5)}
_convert = triton.runtime.interpreter._convert_float


def rounding(x, source, target, mode):
    """Convert as a GPU does: the interpreter cuts float32 off to bfloat16."""
    if (source.name, target.name) == ("fp32", "bf16"):
        return torch.from_numpy(np.ascontiguousarray(x)).bfloat16().view(torch.uint16).numpy()
    return _convert(x, source, target, mode)


def take_form(monkeypatch, form):
    for module in (step_of_kernels, leaky):
        monkeypatch.setattr(module, "fast_step", lambda step, *_: form(step))


@pytest.fixture(autouse=True)
def in_triton(monkeypatch):
    """Run steps in Triton, and list the names of the kernels that ran."""
    if INTERPRETED:
        monkeypatch.setattr(triton.runtime.interpreter, "_convert_float", rounding)
        monkeypatch.setattr(triton_step, "WARPS", 16)  # fewer programs, one after the other
    monkeypatch.setattr(triton_step, "REPLAYED", 3)
    take_form(monkeypatch, TritonStep)
    ran, launch = [], TritonStep._launch

    def watched(self, kernel, *args, **kwargs):
        ran.append(kernel.fn.__name__)
        launch(self, kernel, *args, **kwargs)

    monkeypatch.setattr(TritonStep, "_launch", watched)
    return ran


def fused(v, x, decay, constants, steps, cut):
    learned = isinstance(decay, torch.Tensor)
    step = kernels.NeuronStep(None if learned else decay, **constants)
    return kernels.neuron_step(step, v, x, decay if learned else None, steps, cut)


def plain(v, x, decay, constants, steps, cut):
    spikes = []
    for t, x_t in enumerate(x.chunk(steps)):
        s, v = lif_step(v.detach() if cut and t else v, x_t.to(v.dtype), decay=decay, **constants)
        spikes.append(s.to(x.dtype))
    return torch.cat(spikes), v


F32 = torch.float32


def run(function, constants, n=1000, learned=False, dtype=F32, steps=1, cut=False, of=(True, True), state=F32):
    """Return spikes and the last membrane potential, and gradients of x, v and λ, through the results `of`."""
    torch.manual_seed(0)
    v, x = torch.randn(n, device=DEVICE).to(state), (1.5 * torch.randn(steps * n, device=DEVICE)).to(dtype)
    v[::5], x[::5] = 0, constants.get("v_threshold", 0.8)  # at the threshold
    decay = torch.tensor(0.6, dtype=state, device=DEVICE, requires_grad=True) if learned else 0.6
    leaves = [x.requires_grad_(), v.requires_grad_(), *([decay] if learned else [])]
    results = function(v, x, decay, {"v_threshold": 0.8, "surrogate": SURROGATES[0], **constants}, steps, cut)
    weights = [torch.randn(r.shape, device=DEVICE).to(r.dtype) for r in results]
    total = sum((r * w).float().sum() for r, w, has in zip(results, weights, of, strict=True) if has)
    return results, torch.autograd.grad(total, leaves, allow_unused=True)


def counted(spikes):
    """Return the number of spikes that the kernel counted."""
    return kernels.known_count(spikes).sum()


def check(*args, n=1000, dtype=torch.float32, tolerances=None, **kwargs):
    """Compare with the equations, and return the spikes."""
    (results, grads), (expected, of) = (run(f, *args, n=n, dtype=dtype, **kwargs) for f in (fused, plain))
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    assert counted(results[0]) == expected[0].count_nonzero()
    rtol, atol = tolerances or TOLERANCES[dtype]
    for got, exact in zip(grads, of, strict=True):
        if exact is None:
            assert got is None or not got.any()
        else:  # of λ, a sum over all neurons, in another order
            torch.testing.assert_close(got, exact, rtol=rtol, atol=atol * (1 if got.ndim else n))
    return results[0]


@pytest.mark.parametrize("learned", [False, True], ids=["constant", "learned"])
@pytest.mark.parametrize("constants", CONSTANTS, ids=str)
def test_every_reset_and_where_gradients_flow(constants, learned, in_triton):
    """Soft and hard, steps of each kernel have each of the flows, which take turns."""
    flows = [*itertools.product([(True, True), (True, False), (False, True)], [False, True])]
    for turn, steps in enumerate((1, 3, 4), CONSTANTS.index(constants) + 3 * learned):
        of, cut = flows[turn % 6]
        check(constants, learned=learned, steps=steps, cut=cut, of=of)
    assert {*in_triton} == {"steps_forward", "steps_backward", "steps_replayed"}


@pytest.mark.parametrize("state", [torch.bfloat16, torch.float16], ids=str)
def test_a_membrane_potential_of_16_bits(state, in_triton):
    """PyTorch rounds each operation of a gradient to 16 bits too, the kernel does not.

    Constants are those that 16 bits hold: PyTorch rounds others before it adds them on a CPU, and not on CUDA.
    """
    tolerances = 8 * torch.finfo(state).eps, 8 * torch.finfo(state).eps
    runs = itertools.cycle([(1, False, True), (3, True, True), (3, False, False), (4, True, True)])
    for constants, (steps, cut, learned) in zip(CONSTANTS[state == torch.float16 :: 2], runs, strict=False):
        constants = constants | {"v_threshold": 0.75, "v_reset": constants["v_reset"] and -0.25}
        check(constants, learned=learned, dtype=state, steps=steps, cut=cut, state=state, tolerances=tolerances)
    check(CONSTANTS[0] | {"v_threshold": 0.75}, dtype=torch.float32, state=state, tolerances=tolerances)
    assert {*in_triton} == {"steps_forward", "steps_backward", "steps_replayed"}


@pytest.mark.parametrize("surrogate", [*SURROGATES, sltt.surrogates.FastSigmoid(5.0, scale=1.5)], ids=repr)
def test_every_surrogate(surrogate):
    check(CONSTANTS[0] | {"surrogate": surrogate}, steps=1)
    check(CONSTANTS[8] | {"surrogate": sltt.surrogates.Above(surrogate)}, steps=3)


@pytest.mark.parametrize("n", SIZES)
def test_every_size(n):
    check(CONSTANTS[0], n=n, steps=1)
    check(CONSTANTS[8], n=n, steps=3, dtype=torch.bfloat16)
    check(CONSTANTS[0], n=n, steps=4, dtype=torch.float16)


@pytest.mark.parametrize("n", [PACK_FROM + 8, PACK_FROM + 4])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_bits_are_the_spikes(n, steps):
    s = check(CONSTANTS[0], n=n, steps=steps)
    if INTERPRETED:
        bits = getattr(s.untyped_storage(), BITS, None)
        assert (bits is None) == (s.numel() % 8 > 0)
        assert bits is None or torch.equal(bits, pack(s.detach()))
    elif s.numel() % 8 == 0:
        assert torch.equal(tag_of(s).make(), s)


def test_every_memory_format():
    for x in layouts().values():
        settings = {"v_threshold": 0.8, "surrogate": SURROGATES[0], **CONSTANTS[0]}
        (spikes, v, grads), (expected, v_expected, of) = both(
            torch.randn(x.shape, device=DEVICE), x.to(DEVICE), settings, 0.6, learnable=True
        )
        assert all(torch.equal(a, b) for a, b in zip([*spikes, v], [*expected, v_expected], strict=True))
        torch.testing.assert_close(grads[:2], of[:2], rtol=2e-5, atol=2e-6)
        torch.testing.assert_close(grads[2], of[2], rtol=2e-5, atol=1e-3)


@pytest.fixture
def bits_of_few(monkeypatch):
    """Pack few spikes too."""
    monkeypatch.setattr(step_of_kernels, "PACK_FROM", 8)
    monkeypatch.setattr(step_of_kernels, "can_pack", lambda s: s.numel() % 8 == 0)


def forms(dtype):
    """Inputs [n·6, C, ...] whose channels are in order, last in memory, and neither."""
    shapes = [(6, 24, 3, 5), (36, 33), (6, 16, 8, 8), (6, 3, 40, 1), (24, 16, 2, 2), (6, 12, 2, 2)]
    orders = ["in order", "in order", "in order", "last", "last", "neither"]
    for shape, order in zip(shapes, orders, strict=True):
        x = (1.5 * torch.randn(shape, device=DEVICE)).to(dtype)
        to, back = {"in order": (0, 0), "last": (1, -1), "neither": (1, 0)}[order]
        yield x.movedim(to, back).contiguous().movedim(back, to)


def close(got, exact, dtype, sums):
    """Compare gradients; the last ones are `sums` over neurons, of many terms."""
    rtol, atol = TOLERANCES[dtype]
    for i, (a, b) in enumerate(zip(got, exact, strict=True)):
        is_sum = i >= len(got) - sums
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-3 if is_sum else atol)


@pytest.mark.parametrize("steps", [1, 2, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_constants_of_each_channel(dtype, steps, in_triton, bits_of_few):
    for x, cut in zip(forms(dtype), itertools.cycle([False, True]), strict=False):
        neuron, results = sltt.ChannelLIF(x.shape[1]).to(DEVICE), []
        torch.nn.init.uniform_(neuron.w, -1, 1)
        torch.nn.init.uniform_(neuron.k, -0.5, 0.5)
        of_s, of_v = torch.randn_like(x), torch.randn(len(x) // steps, *x.shape[1:], device=DEVICE)
        for in_one in (True, False):
            sltt.reset(neuron)
            leaf = x.detach().requires_grad_()
            dtype_of_v = neuron._prepare_states(leaf, steps)
            s = neuron.fused_steps(leaf, steps, cut) if in_one else neuron._plain_steps(leaf, dtype_of_v, steps, cut)
            grads = torch.autograd.grad((s * of_s).sum() + (neuron.v * of_v).sum(), [leaf, neuron.w, neuron.k])
            results.append((s, neuron.v, grads))
        (s, v, grads), (expected, v_expected, exact) = results
        assert torch.equal(s, expected)
        assert torch.equal(v, v_expected)
        assert counted(s) == s.count_nonzero()
        close(grads, exact, dtype, sums=2)
    assert {*in_triton} == {"steps_forward", {1: "steps_backward", 2: "steps_replayed", 6: "steps_backward"}[steps]}


@pytest.mark.parametrize("steps", [1, 2])
def test_constants_of_each_channel_in_16_bits(steps, in_triton):
    neuron, results = sltt.ChannelLIF(24).to(DEVICE, torch.bfloat16), []
    neuron.half_state = True
    torch.nn.init.uniform_(neuron.w, -1, 1)
    for in_one in (True, False):
        sltt.reset(neuron)
        leaf = next(forms(torch.bfloat16)) if in_one else results[0][0].detach()
        leaf.requires_grad_()
        dtype = neuron._prepare_states(leaf, steps)
        s = neuron.fused_steps(leaf, steps, False) if in_one else neuron._plain_steps(leaf, dtype, steps, False)
        of_s = torch.linspace(-1, 1, s.numel(), device=DEVICE).view(s.shape)
        grads = torch.autograd.grad((s * of_s).sum(), [leaf, neuron.w, neuron.k])
        results.append((leaf, s, neuron.v, *grads))
    assert len(in_triton) == 2
    (_, s, v, *grads), (_, expected, v_expected, *exact) = results
    assert torch.equal(s, expected)
    assert torch.equal(v, v_expected)
    torch.testing.assert_close(grads[0], exact[0], rtol=2**-5, atol=2**-5)
    torch.testing.assert_close(grads[1:], exact[1:], rtol=2**-4, atol=1.0)


def norm_of(x, training, affine=True):
    """A BatchNorm of x, with statistics of its own."""
    norm = (nn.BatchNorm2d if x.ndim == 4 else nn.BatchNorm1d)(x.shape[1], momentum=0.3, affine=affine).to(DEVICE)
    for vector, first in ((norm.running_mean, 0.2), (norm.running_var, 1.5), (norm.weight, 0.5), (norm.bias, -0.5)):
        if vector is not None:
            torch.nn.init.uniform_(vector, first, first + 1)
    return norm.train(training)


def norm_and_neuron(norm, neuron, x, steps, cut, exact):
    """Spikes, v, the running statistics, and gradients; by the equations in float64, or in Triton."""
    norm, neuron = copy.deepcopy(norm), copy.deepcopy(neuron)
    if exact:
        norm, neuron, x = norm.double(), neuron.double(), x.double()
    leaf = x.detach().requires_grad_()
    if exact:
        y = torch.cat([norm(x_t) for x_t in leaf.chunk(steps)])
        s = neuron._plain_steps(y, neuron._prepare_states(y, steps), steps, cut)
    else:
        s = neuron.advance_normalised(norm, leaf, None, steps, cut)
        assert counted(s) == s.count_nonzero()
    weights = [torch.randn(r.shape, device=DEVICE) for r in (s, neuron.v)]
    total = sum((r.double() * w).sum() for r, w in zip((s, neuron.v), weights, strict=True))
    learned = [leaf, *neuron.parameters(), *norm.parameters()]
    return s, neuron.v, norm.running_mean, norm.running_var, *torch.autograd.grad(total, learned)


NORMED = {
    "LIF": lambda channels: sltt.LIF(tau=1.5),
    "hard reset": lambda channels: sltt.LIF(tau=1.5, v_reset=-0.3, decay_input=True),
    "PLIF": lambda channels: sltt.PLIF(tau=1.5, decay_input=True),
    "ChannelLIF": sltt.ChannelLIF,
}


@pytest.fixture
def norms_in_triton(bits_of_few, monkeypatch):
    monkeypatch.setattr(normed, "in_triton", lambda x: True)
    monkeypatch.setattr(triton_norm, "WARPS", triton_step.WARPS)


def check_norm(norm, neuron, x, steps, cut, tolerance):
    results = []
    for exact in (False, True):
        torch.manual_seed(1)
        results.append(norm_and_neuron(norm, neuron, x, steps, cut, exact))
    (s, *found), (expected, *of) = results
    assert torch.equal(s.double(), expected)
    for a, b in zip(found, of, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance * max(1.0, b.abs().max().item()))


@pytest.mark.parametrize("steps", [1, 2, 6])
@pytest.mark.parametrize("kind", NORMED)
def test_a_norm_in_front(kind, steps, norms_in_triton):
    settings = itertools.cycle([(False, True, True), (True, True, True), (True, False, True), (False, True, False)])
    for x, (cut, training, affine) in zip([*forms(torch.float32)][:-1], settings, strict=False):
        check_norm(norm_of(x, training, affine), NORMED[kind](x.shape[1]).to(DEVICE), x + 3, steps, cut, 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_norm_of_16_bits(dtype, norms_in_triton):
    for x in [*forms(dtype)][:-1]:
        check_norm(norm_of(x, True), sltt.LIF(tau=1.5), x, 2, False, 2e-2)


def test_not_a_number_and_infinity():
    x = torch.tensor([float("nan"), float("inf"), float("-inf"), 1.0, -0.0], device=DEVICE)
    results = []
    for function in (fused, plain):
        leaf = x.clone().requires_grad_()
        settings = {"v_threshold": 0.8, "surrogate": SURROGATES[0], **CONSTANTS[0]}
        s, v = function(torch.zeros_like(x), leaf, 0.5, settings, 1, False)
        (s.sum() + v.sum()).backward()
        results.append([s, v, leaf.grad])
    torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)


def test_a_derivative_that_triton_does_not_have(in_triton):
    for steps in (1, 3):
        check(CONSTANTS[0] | {"surrogate": Steep()}, steps=steps)
    assert {*in_triton} == {"steps_forward"}


@pytest.mark.parametrize("neuron", ["LIF", "PLIF"])
@pytest.mark.parametrize("name", RULES)
def test_every_rule(name, neuron, monkeypatch):
    x, y = (part.to(DEVICE) for part in batch(steps=5))
    model, found = small_network(NEURONS[neuron], norm=True).float().to(DEVICE), []
    for fast in (True, False):
        take_form(monkeypatch, TritonStep if fast else lambda step: None)
        monkeypatch.setattr(normed, "in_triton", lambda x, on=fast: on)
        with kernels.using(compile="auto" if fast else "off"):
            torch.manual_seed(1)
            found.append(gradients(model, RULES[name], x.float(), y))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rule", [sltt.SLTT(fold=1), sltt.BPTT(fold=4), sltt.OTTT(decay=0.5)], ids=repr)
def test_firing_rates_take_the_numbers_that_kernels_counted(rule, monkeypatch):
    x, y = (part.to(DEVICE) for part in batch(steps=5))
    model, found = small_network().float().to(DEVICE), []
    for fast in (True, False):
        take_form(monkeypatch, TritonStep if fast else lambda step: None)
        with sltt.analysis.firing_rates(model) as rates:
            rule(model, x.float(), y, LOSS)
        parts = [part for of_layer in rates._parts.values() for part in of_layer if part.dtype == torch.int32]
        assert bool(parts) == fast
        found.append(rates.by_layer())
    assert found[0] == found[1]
    assert all(0 < rate < 1 for rate in found[0].values())
