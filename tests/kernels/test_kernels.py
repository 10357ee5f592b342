import copy
import itertools
import pickle
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sltt
import sltt.kernels.saved
from sltt import kernels
from sltt.analysis import peak_memory
from sltt.kernels.bits import pack, unpack
from sltt.kernels.options import COMPILE_FROM, Kernel
from sltt.kernels.saved import PACK_FROM, tag_of
from sltt.neurons import lif_step
from tests.conftest import SURROGATES, gradients

SIZES = [0, 1, 7, 8, 9, 1023, 4096, 5000]
CONSTANTS = [
    dict(zip(("v_reset", "decay_input", "detach_reset"), values, strict=True))
    for values in itertools.product([None, 0.0, -0.3], [False, True], [False, True])
]
LOSS = sltt.losses.CrossEntropyMSE()


@contextmanager
def compiling(mode):
    if mode == "on" and (problem := kernels.compiler_problem(torch.device("cpu"))):
        pytest.skip(problem)
    with kernels.using(compile=mode):
        yield


@pytest.fixture(params=["off", "on"])
def compile_mode(request):
    with compiling(request.param):
        yield request.param


def both(v, x, constants, decay, learnable=False, late=True):
    """Spikes, v and the gradients of a few fused steps, and of the plain ones."""
    results = []
    for fused in (True, False):
        leaves = [t.detach().clone().requires_grad_() for t in (v, x)]
        rate = torch.tensor(decay, dtype=v.dtype, device=v.device, requires_grad=True) if learnable else decay
        state, total, spikes = leaves[0], 0, []
        for t in range(3):
            if fused:
                step = kernels.NeuronStep(decay=None if learnable else decay, **constants)
                s, state = kernels.neuron_step(step, state, leaves[1] * (1 - 0.3 * t), rate if learnable else None)
            else:
                s, state = lif_step(state, (leaves[1] * (1 - 0.3 * t)).to(v.dtype), decay=rate, **constants)
                s = s.to(x.dtype)
            spikes.append(s)
            weight = torch.linspace(-1, 2, s.numel()).view(s.shape).to(s.device)
            total = total + (s.double() * weight).sum() + 0.1 * state.double().sum()
        total.backward()
        grads = [leaf.grad for leaf in leaves] + ([rate.grad] if learnable else [])
        results.append((spikes, state, grads))
    return results


@pytest.mark.parametrize("constants", CONSTANTS, ids=str)
@pytest.mark.parametrize("learnable", [False, True], ids=["constant", "learnable"])
def test_the_eager_step_equals_the_equations(constants, learnable):
    with kernels.using(compile="off"):
        check_step(constants, SURROGATES[0], learnable, 1023)


@pytest.mark.parametrize("surrogate", SURROGATES, ids=repr)
@pytest.mark.parametrize("n", SIZES)
def test_every_surrogate_at_odd_sizes(surrogate, n):
    with kernels.using(compile="off"):
        check_step(CONSTANTS[0], surrogate, False, n)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("constants", "learnable"), [(CONSTANTS[0], False), (CONSTANTS[7], False), (CONSTANTS[2], True)], ids=str
)
def test_the_compiled_step_equals_the_equations(constants, learnable):
    with compiling("on"):
        for n in SIZES:
            check_step(constants, SURROGATES[0], learnable, n)


def check_step(constants, surrogate, learnable, n):
    v, x = torch.randn(n, dtype=torch.float64), 1.5 * torch.randn(n, dtype=torch.float64)
    constants = {"v_threshold": 0.8, "surrogate": surrogate, **constants}
    (spikes, state, grads), (expected_spikes, expected_state, expected_grads) = both(v, x, constants, 0.6, learnable)
    for a, b in zip([*spikes, state, *grads], [*expected_spikes, expected_state, *expected_grads], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_types(dtype, compile_mode):
    x = (1.5 * torch.randn(4, 2048)).to(dtype)
    constants = {"v_threshold": 1.0, "surrogate": SURROGATES[0], **CONSTANTS[0]}
    (spikes, state, grads), (expected_spikes, expected_state, expected_grads) = both(
        torch.zeros(4, 2048), x, constants, 0.5
    )
    assert all(s.dtype == dtype for s in spikes)
    assert state.dtype == torch.float32
    assert grads[1].dtype == dtype
    for a, b in zip(spikes, expected_spikes, strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(state, expected_state)
    torch.testing.assert_close(grads[1], expected_grads[1], rtol=3e-2, atol=3e-2 if dtype != torch.float32 else 1e-5)


def layouts():
    x = 1.5 * torch.randn(4, 8, 6, 5)
    return {
        "contiguous": x,
        "channels-last": x.to(memory_format=torch.channels_last),
        "permuted": x.permute(3, 1, 0, 2),
        "gaps": (1.5 * torch.randn(4, 8, 6, 10))[..., ::2],
        "expanded": x[:, :1].expand(4, 8, 6, 5),
    }


@pytest.mark.parametrize("layout", layouts())
def test_any_memory_format(layout, compile_mode):
    x = layouts()[layout]
    spikes, grads = [], []
    for data in (x, x.contiguous()):
        leaf = data.detach().requires_grad_()
        neuron = sltt.LIF(tau=2.0)
        s = [neuron(leaf) for _ in range(3)]
        (torch.stack(s) * torch.linspace(0, 1, x.numel()).view(x.shape)).sum().backward()
        spikes.append(torch.stack(s))
        grads.append(leaf.grad)
    assert torch.equal(spikes[0], spikes[1])
    assert torch.equal(grads[0], grads[1])
    if layout in ("channels-last", "permuted"):
        assert s[0].is_contiguous()
        neuron = sltt.LIF()
        assert neuron(x).stride() == x.stride() == neuron.v.stride()


@pytest.mark.parametrize("size", [0, 1, 7, 8, 1023])
@pytest.mark.parametrize("learnable", [False, True], ids=["constant", "learnable"])
@pytest.mark.parametrize("constants", [CONSTANTS[0], CONSTANTS[-2]], ids=str)
@pytest.mark.parametrize("cut", [False, True], ids=["through time", "cut"])
def test_several_steps_in_a_call_equal_single_ones(size, learnable, constants, cut, compile_mode):
    step = kernels.NeuronStep(None if learnable else 0.6, 1.0, surrogate=SURROGATES[0], **constants)
    results = []
    for together in (True, False):
        torch.manual_seed(0)
        v, x = torch.randn(size, 3, requires_grad=True), (2 * torch.randn(4 * size, 3)).requires_grad_()
        rate = torch.tensor(0.6, requires_grad=True)
        decay = rate if learnable else None
        if together:
            s, last = kernels.neuron_step(step, v, x, decay, steps=4, cut=cut)
        else:
            last, spikes = v, []
            for t in range(4):
                before = last.detach() if cut and t else last
                s_t, last = kernels.neuron_step(step, before, x[t * size : (t + 1) * size], decay)
                spikes.append(s_t)
            s = torch.cat(spikes)
        weight = torch.randn(s.shape)
        (s * weight).sum().backward(retain_graph=True)
        last.sum().backward()
        results.append([s, last, x.grad, v.grad, rate.grad])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("steps", [1, 3, 4, 11])
@pytest.mark.parametrize("learnable", [False, True], ids=["constant", "learnable"])
@pytest.mark.parametrize("constants", CONSTANTS, ids=str)
def test_steps_under_a_steady_current_equal_the_plain_ones(constants, learnable, steps):
    with kernels.using(compile="off"):
        check_steady(constants, learnable, steps)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("constants", "learnable"), [(CONSTANTS[0], True), (CONSTANTS[1], False), (CONSTANTS[7], False)], ids=str
)
def test_compiled_steps_under_a_steady_current_equal_the_plain_ones(constants, learnable):
    with compiling("on"):
        check_steady(constants, learnable, 9)


def check_steady(constants, learnable, steps):
    """Each neuron's derivative of its count of spikes is the gradient, through time, of their sum."""
    constants = {"v_threshold": 0.8, "surrogate": SURROGATES[0], **constants}
    for n in SIZES:
        x = (1.5 * torch.randn(n, dtype=torch.float64)).requires_grad_()
        decay = torch.full_like(x, 0.6).requires_grad_()
        v, spikes = torch.full_like(x, 0.3), []
        for _ in range(steps):
            s, v = lif_step(v, x, decay=decay, **constants)
            spikes.append(s)
        count = sum(spikes)
        by_input, by_decay = torch.autograd.grad(count.sum(), (x, decay))
        step = kernels.NeuronStep(decay=None if learnable else 0.6, **constants)
        rate = torch.tensor(0.6, dtype=torch.float64) if learnable else None
        seen = []
        found = kernels.steady_steps(step, x.detach(), steps, torch.float64, 0.3, rate, seen.append)
        assert torch.equal(found.count, count)
        assert torch.equal(torch.cat(seen), torch.cat(spikes))
        torch.testing.assert_close(found.by_input, by_input, rtol=1e-10, atol=1e-12)
        assert (found.by_decay is None) != learnable
        if learnable:
            torch.testing.assert_close(found.by_decay, by_decay, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("layout", layouts())
def test_steps_under_a_steady_current_in_any_memory_format(layout, compile_mode):
    step = kernels.NeuronStep(decay=0.5, v_threshold=1.0, surrogate=SURROGATES[0], **CONSTANTS[0])
    x = layouts()[layout]
    seen = []
    found, expected = (
        kernels.steady_steps(step, c, 3, torch.float32, 0.0, see=seen.append) for c in (x, x.contiguous())
    )
    torch.testing.assert_close(found.count, expected.count)
    torch.testing.assert_close(found.by_input, expected.by_input)
    assert torch.equal(*seen)


def test_without_a_graph_nothing_is_saved_or_packed():
    neuron = sltt.LIF()
    x = torch.randn(4, 4096, requires_grad=True)
    with torch.no_grad():
        s = neuron(x)
    assert s.grad_fn is None
    assert tag_of(s)._bits is None
    assert tag_of(sltt.LIF()(x.detach()))._bits is None
    assert tag_of(sltt.LIF()(x)) is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("n", [8, 16, 1024, 8 * 999])
def test_unpacking_gives_back_what_was_packed(n, dtype):
    x = (torch.rand(n) < 0.3).to(dtype) * 2.5
    packed = pack(x)
    assert packed.numel() == n // 8
    assert torch.equal(unpack(packed, 2.5, dtype), x)


def saved(call):
    """Bytes that autograd saves of activations during call(), and the distinct types."""
    seen = []
    real = sltt.kernels.saved._save

    def save(tensor):
        seen.append(real(tensor))
        return seen[-1]

    sltt.kernels.saved._save, before = save, sltt.kernels.saved._save
    try:
        call()
    finally:
        sltt.kernels.saved._save = before
    return seen


class Pooled(nn.Module):
    """Spikes read by a convolution, a linear layer, after dropout, scaled, and average-pooled."""

    def __init__(self):
        super().__init__()
        self.conv1, self.lif1 = nn.Conv2d(2, 16, 3, padding=1), sltt.LIF(tau=1.5)
        self.dropout, self.conv2, self.lif2 = sltt.Dropout(0.3), nn.Conv2d(16, 16, 3, padding=1), sltt.LIF(tau=1.5)
        self.conv3, self.lif3 = nn.Conv2d(16, 16, 3, padding=1), sltt.LIF(tau=1.5)
        self.head = nn.Linear(16 * 16 * 16, 5)

    def forward(self, x):
        x = self.dropout(self.lif1(self.conv1(x)))
        x = F.avg_pool2d(2.74 * self.lif2(self.conv2(x)), 2) * 0.5
        return self.head(self.lif3(self.conv3(x)).flatten(1))


@pytest.fixture(params=["pooled", "resnet", "vgg", "plif+hard"])
def model(request):
    torch.manual_seed(0)
    return {
        "pooled": Pooled,
        "resnet": lambda: sltt.models.resnet18(in_channels=2, classes=5, dropout=0.2),
        "vgg": lambda: sltt.models.vgg11(in_channels=2, classes=5, dropout=0.2),
        "plif+hard": lambda: sltt.models.DigitsNet(2, 5, neuron=lambda: sltt.PLIF(v_reset=0.0)),
    }[request.param]()


@pytest.mark.parametrize("rule", [sltt.SLTT(), sltt.BPTT(), sltt.SLTT(k=1)], ids=repr)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_gradients_are_bit_identical_with_bits_and_without(model, rule, memory_format):
    model = model.to(memory_format=memory_format)
    x, y = torch.randn(4, 2, 32, 32).to(memory_format=memory_format), torch.randint(5, (4,))
    results = []
    for on in (True, False):
        torch.manual_seed(1)
        with kernels.using(bits=on, sparse="off"):
            results.append(gradients(model, rule, x, y, steps=3)[0])
    assert torch.equal(results[0], results[1])
    assert results[0].abs().max() > 0


@pytest.mark.parametrize(
    ("rule", "again"),
    [(sltt.SLTT(), sltt.SLTT(recompute=True)), (sltt.BPTT(), sltt.BPTT(recompute=True))],
    ids=["SLTT", "BPTT"],
)
@pytest.mark.parametrize("form", ["NCHW", "NHWC", "bfloat16"])
def test_gradients_are_bit_identical_with_layers_recomputed(model, rule, again, form):
    model = model.to(memory_format=torch.channels_last if form == "NHWC" else torch.contiguous_format)
    x, y = torch.randn(4, 2, 32, 32), torch.randint(5, (4,))
    x = x.contiguous(memory_format=torch.channels_last) if form == "NHWC" else x
    results = []
    for r in (rule, again):
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=form == "bfloat16"):
            results.append(gradients(model, r, x, y, steps=3))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1].logits, results[1][1].logits)


def residual_network(blocks=6):
    class Block(nn.Sequential):
        def forward(self, x):
            return super().forward(x) + x

    layers = [Block(nn.BatchNorm2d(8), sltt.LIF(), nn.Conv2d(8, 8, 3, padding=1)) for _ in range(blocks)]
    return nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), *layers, sltt.LIF(), nn.Flatten(), nn.Linear(8 * 256, 3))


def test_recomputing_saves_the_inputs_of_normalisation():
    model = residual_network()
    x, y = torch.randn(32, 2, 16, 16), torch.randint(3, (32,))
    layer = 32 * 8 * 256 * 4  # bytes of a float for each neuron and sample

    def measured(rule):
        with kernels.using(compile="off"):
            rule(model, x, y, LOSS, steps=2)
            return peak_memory(lambda: rule(model, x, y, LOSS, steps=2, backward=lambda loss: None))

    # a sum of residual blocks is saved once in a few blocks
    assert measured(sltt.SLTT()) - measured(sltt.SLTT(recompute=True)) >= 3.9 * layer


def test_a_weight_that_changed_before_it_is_used_again_is_noticed():
    conv = nn.Conv2d(4, 4, 3)
    with kernels.saving(recompute=True):
        y = nn.BatchNorm2d(4)(conv(sltt.LIF()(torch.randn(2, 4, 32, 34, requires_grad=True))))
    with torch.no_grad():
        conv.weight.add_(1)
    with pytest.raises(RuntimeError, match=r"changed by an in-place operation|modified by an inplace operation"):
        y.sum().backward()


def test_recomputing_without_bits_is_refused():
    with kernels.using(bits=False), pytest.raises(ValueError, match="recompute starts from spikes saved as bits"):
        sltt.SLTT(recompute=True)(
            sltt.models.DigitsNet(), torch.randn(2, 1, 8, 8), torch.zeros(2).long(), LOSS, steps=1
        )


def leaf_gradient(tail, on):
    """The gradient behind spikes [4, 8, 16, 16] that go through `tail` and a layer."""
    torch.manual_seed(0)
    x = torch.randn(4, 8, 16, 16, requires_grad=True)
    with kernels.using(bits=on, sparse="off", compile="off"), kernels.saving():
        s = sltt.LIF()(x)
        y = tail(s)
        weight = torch.randn(y.shape, requires_grad=True)
        (y * weight).square().sum().backward()
    return torch.cat([x.grad.flatten(), weight.grad.flatten()])


TAILS = {
    "dropout after pooling": lambda s: sltt.Dropout(0.3)(F.avg_pool2d(s, 2)),
    "dropout after a factor": lambda s: sltt.Dropout(0.3)(0.3 * s),
    "dropout twice": lambda s: sltt.Dropout(0.3)(sltt.Dropout(0.5)(s)),
    "pooling after dropout": lambda s: F.avg_pool2d(sltt.Dropout(0.3)(s), 2),
    "pooled twice and scaled": lambda s: 2 * F.adaptive_avg_pool2d(F.avg_pool2d(s, 2) * 0.5, 4),
    "a slice, scaled": lambda s: s[2:].detach() * 0.5 + s[2:] * 0.25,
    "permuted and scaled": lambda s: s.permute(1, 0, 3, 2) * 0.5,
    "concatenated": lambda s: torch.cat([s, 2 * s]),
    "expanded": lambda s: s[:, :1].expand(4, 8, 16, 16) * 2,
    "keywords": lambda s: torch.mul(F.avg_pool2d(input=s, kernel_size=2), other=2.0),
    "another type": lambda s: torch.view_as_real(torch.view_as_complex(s.view(4, 8, 16, 8, 2)) * (1 + 2j)),
    "negated": lambda s: -s * s.abs(),
}


@pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS)
def test_whatever_is_done_with_spikes_the_gradient_stays(tail):
    assert torch.equal(leaf_gradient(tail, True), leaf_gradient(tail, False))


@pytest.mark.parametrize("lesion", [lambda s: s.data, lambda s: s.detach().numpy()], ids=["data", "numpy"])
def test_changes_that_have_no_version_are_seen(lesion):
    def tail(s, out_of_place):
        if out_of_place:
            return s * torch.cat([torch.zeros(4, 4, 16, 16), torch.ones(4, 4, 16, 16)], 1)
        s = 1.0 * s  # spikes of which the neuron saved its own copy
        lesion(s)[:, :4] = 0
        return s

    results = []
    for out_of_place in (True, False):
        torch.manual_seed(0)
        conv = nn.Conv2d(8, 4, 3)
        with kernels.saving():
            spikes = sltt.LIF()(torch.randn(4, 8, 16, 16, requires_grad=True))
            conv(tail(spikes, out_of_place)).square().sum().backward()
        results.append(conv.weight.grad)
    torch.testing.assert_close(*results)


def test_hooks_of_the_user_stay_in_force():
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (seen.append(t.shape), t)[1], lambda t: t):
        sltt.SLTT()(sltt.models.DigitsNet(), torch.randn(8, 1, 8, 8), torch.randint(10, (8,)), LOSS, steps=1)
    assert (8, 32, 8, 8) in [tuple(shape) for shape in seen]


def test_retained_graphs_give_the_same_gradient_twice():
    x = torch.randn(4, 8, 16, 16, requires_grad=True)
    conv = nn.Conv2d(8, 4, 3)
    with kernels.saving():
        loss = conv(sltt.LIF()(x)).square().sum()
    first = torch.autograd.grad(loss, [x, conv.weight], retain_graph=True)
    second = torch.autograd.grad(loss, [x, conv.weight])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_what_layers_read_is_saved_as_bits():
    model = Pooled()
    x = torch.randn(4, 2, 32, 32)

    def call():
        with kernels.saving():
            model(x)

    kept = saved(call)
    floats = [k[0] for k in kept if not isinstance(k[0], sltt.kernels.saved.Tag)]
    assert len(kept) - len(floats) >= 4  # dropped spikes, 2.74 spikes, pooled, pooled and scaled or spikes of the head
    states = [m.v for m in model.modules() if isinstance(m, sltt.LIF)]
    allowed = [x, model.dropout.mask, *states, *model.parameters()]
    pointers = {t.untyped_storage().data_ptr() for t in allowed}
    assert not [t.shape for t in floats if t.untyped_storage().data_ptr() not in pointers and t.numel() >= PACK_FROM]


def test_bits_save_memory():
    model = sltt.models.DigitsNet()
    x, y = torch.randn(64, 1, 16, 16), torch.randint(10, (64,))

    def measured(on):
        with kernels.using(bits=on, sparse="off", compile="off"):
            sltt.BPTT()(model, x, y, LOSS, steps=12)
            return peak_memory(lambda: sltt.BPTT()(model, x, y, LOSS, steps=12))

    spikes = 12 * 4 * 64 * (32 * 256 + 64 * 256 + 64 * 64)  # T × 4 bytes × B × neurons
    assert measured(True) < measured(False) - 0.9 * spikes


def test_a_tensor_changed_in_place_is_saved_as_it_is():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    grads = []
    for in_place in (True, False):
        torch.manual_seed(0)
        with kernels.saving():
            s = sltt.LIF()(torch.randn(2, 4, 32, 32, requires_grad=True))
            conv(s.mul_(3) if in_place else 3 * s).square().sum().backward()
        grads.append(conv.weight.grad)
        conv.weight.grad = None
    assert torch.equal(*grads)


def test_a_saved_tensor_changed_in_place_is_still_noticed():
    x = torch.randn(3, 3, requires_grad=True)
    with kernels.saving():
        y = x.exp()
    y.add_(1)
    with pytest.raises(RuntimeError, match="changed by an in-place operation"):
        y.sum().backward()


def test_memory_that_is_reused_is_not_taken_for_spikes():
    x = torch.randn(4, 4096, requires_grad=True)
    for _ in range(20):
        s = sltt.LIF()(x)
        del s
        assert tag_of(torch.empty(4, 4096)) is None


def test_small_or_odd_tensors_are_left_alone():
    for shape in [(PACK_FROM - 8,), (PACK_FROM + 1,)]:
        assert tag_of(sltt.LIF()(torch.randn(shape, requires_grad=True))) is None


def test_options_are_restored():
    with pytest.raises(RuntimeError, match="planted"), kernels.using(compile="off", bits=False):
        raise RuntimeError("planted")
    from sltt.kernels.options import options

    assert options().bits
    assert options().compile == "auto"


def test_a_kernel_that_does_not_compile_runs_eagerly_with_a_warning():
    class Breaks(sltt.surrogates.Surrogate):
        def derivative(self, x):
            torch._dynamo.graph_break()
            return torch.ones_like(x)

    x = torch.randn(COMPILE_FROM, requires_grad=True)
    neuron = sltt.LIF(surrogate=Breaks())
    spikes = neuron(x)
    with pytest.warns(UserWarning, match="compiling a kernel failed"):
        spikes.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    sltt.reset(neuron)
    neuron(x).sum().backward()  # silently from now on


@pytest.mark.slow
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="needs two widths of vectors")
def test_code_for_other_vectors_is_not_taken_from_the_compilers_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    x = torch.randn(4096)

    def add(out, x):
        out.copy_(x + 1)

    for name in ("AVX512", "AVX2"):  # as in processes with these limits, one after the other
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", name.lower())
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda name=name: name)
        out = torch.full_like(x, torch.nan)
        with kernels.using(compile="on"):
            Kernel(add)(out, x)
        assert torch.equal(out, x + 1)


def test_checkpoint_around_a_neuron_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), sltt.LIF())
    y = torch.utils.checkpoint.checkpoint(model, torch.randn(2, 4, requires_grad=True), use_reentrant=False)
    with pytest.raises(RuntimeError, match=r"torch\.utils\.checkpoint repeats a forward whose state has moved on"):
        y.sum().backward()


def test_torch_func_through_a_neuron(neuron):
    layer = neuron()
    layer = layer.double()
    x = torch.randn(5, 3, dtype=torch.float64)

    def total(x):
        sltt.reset(layer)
        return (layer(x) + 2 * layer(0.5 * x)).sum()

    expected = torch.autograd.grad(total(leaf := x.clone().requires_grad_()), leaf)[0]
    torch.testing.assert_close(torch.func.grad(total)(x), expected)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(total))(x), expected)
    sltt.reset(layer)


@pytest.mark.slow
def test_inside_a_compiled_model_without_a_graph_break():
    model = nn.Sequential(nn.Linear(6, 32), sltt.LIF(tau=1.7), nn.Linear(32, 3))
    x, y = 2 * torch.randn(3, 4, 6), torch.randint(3, (4,))
    expected, out = gradients(model, sltt.SLTT(), x, y)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True)
    got = sltt.SLTT()(compiled, x, y, LOSS)
    torch.testing.assert_close(got.logits, out.logits)
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in compiled.parameters()]), expected)


def test_a_model_that_has_run_can_be_copied_and_pickled(neuron, compile_mode):
    model = nn.Sequential(nn.Linear(6, 5000), neuron(), nn.Linear(5000, 3))
    x, y = torch.randn(2, 4, 6), torch.randint(3, (4,))
    expected, _ = gradients(model, sltt.SLTT(), x, y)
    sltt.SLTT()(model, x, y, LOSS)
    model.zero_grad()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(gradients(other, sltt.SLTT(), x, y)[0], expected)
