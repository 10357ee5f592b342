"""What autograd saves of spikes takes a bit each, and changes no gradient."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sltt
from sltt import kernels
from sltt.kernels.neuron import step
from sltt.kernels.spikes import saved
from sltt.kernels.spikes.saved import tag_of
from sltt.models.resnet import Block
from tests.conftest import LOSS, gradients
from tests.neurons.plain import OwnLIF
from tests.references import marked, measured, recorded


class Pooled(nn.Module):
    """Spikes read by a convolution, a linear layer, after dropout, scaled, and average-pooled."""

    def __init__(self):
        super().__init__()
        self.conv1, self.lif1 = nn.Conv2d(2, 16, 3, padding=1), sltt.LIF(tau=1.5)
        self.dropout, self.conv2, self.lif2 = sltt.Dropout(0.3), nn.Conv2d(16, 16, 3, padding=1), sltt.LIF(tau=1.5)
        self.pool, self.conv3, self.lif3 = nn.AvgPool2d(2), nn.Conv2d(16, 16, 3, padding=1), sltt.LIF(tau=1.5)
        self.head = nn.Linear(16 * 16 * 16, 5)

    def forward(self, x):
        x = self.dropout(self.lif1(self.conv1(x)))
        x = self.pool(2.74 * self.lif2(self.conv2(x)))
        return self.head(self.lif3(self.conv3(x)).flatten(1))


def residual():
    """A small ResNet, one of whose shortcuts is a convolution."""
    blocks = Block(16, 16, 1, sltt.LIF, 0.2), Block(16, 32, 2, sltt.LIF, 0.2), nn.BatchNorm2d(32), sltt.LIF()
    return nn.Sequential(
        nn.Conv2d(2, 16, 3, padding=1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5)
    )


@pytest.fixture(params=["pooled", "resnet", "vgg", "plif+hard"])
def model(request):
    return {
        "pooled": Pooled,
        "resnet": residual,
        "vgg": lambda: sltt.models.VGG([[16], [32]], in_channels=2, classes=5, dropout=0.2),
        "plif+hard": lambda: sltt.models.DigitsNet(2, 5, neuron=lambda: sltt.PLIF(v_reset=0.0)),
    }[request.param]()


@pytest.mark.parametrize(
    ("rule", "memory_format"),
    [
        (sltt.SLTT(fold=1), torch.channels_last),
        (sltt.BPTT(fold=1), torch.contiguous_format),
        (sltt.SLTT(k=1, fold=1), torch.contiguous_format),
    ],
    ids=["SLTT NHWC", "BPTT NCHW", "SLTT-1 NCHW"],
)
def test_gradients_are_bit_identical_with_bits_and_without(model, rule, memory_format):
    model = model.to(memory_format=memory_format)
    x, y = torch.randn(2, 2, 32, 32).to(memory_format=memory_format), torch.randint(5, (2,))
    results = []
    for on in (True, False):
        torch.manual_seed(1)
        with kernels.using(bits=on, sparse="off", compile="off"):  # what else needs bits differs by rounding
            results.append(gradients(model, rule, x, y, steps=3)[0])
    assert torch.equal(results[0], results[1])
    assert results[0].abs().max() > 0


@pytest.mark.parametrize(("rule", "form"), [(sltt.SLTT, "NHWC"), (sltt.BPTT, "NCHW"), (sltt.SLTT, "bfloat16")], ids=str)
def test_gradients_are_bit_identical_with_layers_recomputed(model, rule, form):
    rule, again = rule(fold=1), rule(recompute=True)
    model = model.to(memory_format=torch.channels_last if form == "NHWC" else torch.contiguous_format)
    x, y = torch.randn(2, 2, 32, 32), torch.randint(5, (2,))
    x = x.contiguous(memory_format=torch.channels_last) if form == "NHWC" else x
    results = []
    for r in (rule, again):
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=form == "bfloat16"):
            results.append(gradients(model, r, x, y, steps=3))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1].logits, results[1][1].logits)


def test_recomputing_saves_the_inputs_of_normalisation():
    layers = [layer for _ in range(6) for layer in (sltt.LIF(), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))]
    model = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), *layers, nn.Flatten(), nn.Linear(8 * 256, 3))
    x, y = torch.randn(32, 2, 16, 16), torch.randint(3, (32,))
    layer = 32 * 8 * 256 * 4  # bytes of a float for each neuron and sample

    rules = sltt.SLTT(fold=1), sltt.SLTT(recompute=True, fold=1)
    plain, recomputed = (measured(r, model, x, y, steps=2, backward=lambda loss: None) for r in rules)
    assert plain - recomputed >= 4.9 * layer


@pytest.mark.parametrize("sparse", ["on", "off"])
@pytest.mark.parametrize(("channels", "recomputed"), [(64, True), (256, False)])
def test_outputs_of_wide_layers_are_kept(channels, recomputed, sparse):
    outputs = []
    model = nn.Sequential(sltt.LIF(), nn.Conv2d(channels, 16, 3, padding=1))
    model[1].register_forward_hook(lambda *call: outputs.append(tag_of(call[-1])))
    x = torch.randn(8, channels, 8, 8).contiguous(memory_format=torch.channels_last)
    with kernels.using(sparse=sparse):
        sltt.BPTT(recompute=True, fold=1)(model, x, torch.zeros(8), lambda y, _: y.sum(), steps=1)
    assert [tag is not None for tag in outputs] == [recomputed]


@pytest.mark.parametrize(("recompute", "sparse"), [(True, "off"), (True, "on"), (False, "on")])
def test_a_weight_that_changed_before_its_backward_is_noticed(recompute, sparse):
    conv = nn.Conv2d(16, 16, 3)
    model = nn.Sequential(sltt.LIF(), conv, nn.BatchNorm2d(16), sltt.LIF()).to(memory_format=torch.channels_last)
    x = torch.randn(8, 16, 16, 16).contiguous(memory_format=torch.channels_last).requires_grad_()

    def backward(total):
        with torch.no_grad():
            conv.weight.add_(1)
        total.backward()

    rule = sltt.SLTT(recompute=recompute, fold=1)
    with kernels.using(sparse=sparse), pytest.raises((RuntimeError, ValueError), match=r"in-?\s?place"):
        rule(model, x, torch.zeros(8), lambda y, _: y.sum(), steps=1, backward=backward)


def test_recomputing_without_bits_is_refused():
    with kernels.using(bits=False), pytest.raises(ValueError, match="recompute needs spikes as bits"):
        sltt.SLTT(recompute=True, fold=1)(
            sltt.models.DigitsNet(), torch.randn(2, 1, 8, 8), torch.zeros(2).long(), LOSS, steps=1
        )


class Between(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, s):
        return self.function(s)


class Halved(torch.autograd.Function):
    """Half of it, and the gradient as it is: what a change of `.data` does."""

    @staticmethod
    def forward(ctx, s):
        return s * 0.5

    @staticmethod
    def backward(ctx, grad):
        return grad


FRONTS = {
    "LIF": sltt.LIF,
    "a neuron of one's own": OwnLIF,
    "dropped": lambda: nn.Sequential(sltt.LIF(), sltt.Dropout(0.2)),
    "pooled": lambda: nn.Sequential(sltt.LIF(), nn.MaxPool2d(3, 1, 1)),
}


def between(function, front=sltt.LIF, recompute=False, **options):
    """The gradients of a network in which `function` of spikes [4, 16, 16, 16] feeds a convolution."""
    torch.manual_seed(0)
    layers = nn.Conv2d(16, 16, 3, padding=1), sltt.LIF(), nn.Conv2d(16, 4, 3)
    model = nn.Sequential(front(), Between(function), *layers).to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 16, 16, 16).movedim(-1, 2).requires_grad_()
    with kernels.using(**options):
        sltt.BPTT(recompute=recompute, fold=1)(model, x, torch.zeros(4), lambda y, _: y.square().sum())
    return torch.cat([x.grad.flatten(), *(p.grad.flatten() for p in model.parameters())])


CHANNELS = torch.linspace(0.5, 1.5, 16)[:, None, None]
FUNCTIONS = {
    "pooling after dropout": lambda s: F.avg_pool2d(sltt.Dropout(0.3)(s), 2),
    "a slice, scaled": lambda s: (s[2:].detach() * 0.5 + s[2:] * 0.25).repeat(2, 1, 1, 1),
    "permuted and scaled": lambda s: s.permute(0, 1, 3, 2) * 0.5,
    "expanded": lambda s: s[:, :1].expand(4, 16, 16, 16) * 2,
    "another type": lambda s: torch.view_as_real(torch.view_as_complex(s.unflatten(-1, (8, 2)).contiguous()) * 1j)[
        ..., 1
    ],
    "negated": lambda s: -s * s.abs(),
    "in place": lambda s: (1 * s).mul_(3),
    "set to 0": lambda s: (1 * s).index_fill_(1, torch.arange(3), 0),
    "one element changed": lambda s: (1 * s).index_put_((torch.tensor(3),) * 4, torch.tensor(0.3)),
    "every second row": lambda s: s[:, :, ::2],
    "half the batch, then all": lambda s: s[:2].mean() + s,
    "a gate": lambda s: s * s[:, 8:9],
    "by channel": lambda s: CHANNELS * s,
}
OTHER_FRONTS = [(front, name) for front in [*FRONTS][1:] for name in [*FUNCTIONS][-8::2]]


@pytest.mark.parametrize(("front", "function"), [("LIF", name) for name in FUNCTIONS] + OTHER_FRONTS)
def test_whatever_is_done_with_spikes_the_gradient_stays(front, function):
    given = FUNCTIONS[function], FRONTS[front]
    expected = between(*given, bits=False, compile="off")
    assert torch.equal(between(*given, sparse="off", compile="off"), expected)
    for recompute, options in ((False, {"sparse": "on"}), (True, {})):
        found = between(*given, recompute, **options)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max())


@pytest.mark.parametrize("change", [lambda s: s.data, lambda s: s.detach().numpy()], ids=["data", "numpy"])
@pytest.mark.parametrize("sparse", ["off", "on"])
def test_changes_that_have_no_version_are_seen(change, sparse):
    def halve(s):
        memory = change(s)
        memory *= 0.5
        return s

    expected = between(Halved.apply, bits=False, compile="off")
    found = between(halve, sparse=sparse, compile="off")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max())


class Straight(sltt.Stateful):
    """A neuron that knows nothing of this library but where its state is."""

    states = ("v",)

    def forward(self, x):
        u = x if self.v is None else self.v / 2 + x
        through = u.clamp(0, 2)
        s = (u > 1).float() + (through - through.detach())
        self.v = u - s
        return s


def test_spikes_of_any_surrogate_are_bits(sparse_calls):
    layers = [layer for _ in range(3) for layer in (nn.Conv2d(16, 16, 3, padding=1), Straight())]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 64, 3)).to(memory_format=torch.channels_last)
    x = 3 * torch.randn(6, 32, 8, 8, 16).movedim(-1, 2)
    y, found, peaks = torch.randint(3, (32,)), [], []
    for options in ({"sparse": "on"}, {"bits": False}):
        with kernels.using(**options):
            found.append(gradients(model, sltt.BPTT(fold=1), x, y)[0])
            peaks.append(measured(sltt.BPTT(fold=1), model, x, y))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)
    assert {kind for kind, _ in sparse_calls} == {"forward", "grad"}
    spikes = 6 * 32 * 1024 * 4  # bytes as floats of a layer in all time steps
    assert peaks[1] - peaks[0] > 1.8 * spikes  # of two layers that convolutions read


def test_hooks_of_the_user_stay_in_force():
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (seen.append(t.shape), t)[1], lambda t: t):
        sltt.SLTT(fold=1)(sltt.models.DigitsNet(), torch.randn(8, 1, 8, 8), torch.randint(10, (8,)), LOSS, steps=1)
    assert (8, 32, 8, 8) in [tuple(shape) for shape in seen]


def test_retained_graphs_give_the_same_gradient_twice():
    x = torch.randn(4, 8, 16, 16, requires_grad=True)
    conv = nn.Conv2d(8, 4, 3)
    with kernels.save_as_bits():
        loss = conv(sltt.LIF()(x)).square().sum()
    first = torch.autograd.grad(loss, [x, conv.weight], retain_graph=True)
    second = torch.autograd.grad(loss, [x, conv.weight])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


MEMORY = {
    "digits": (sltt.models.DigitsNet, 1, 32 * 1024 + 64 * 1024 + 64 * 256, "cpu"),
    "digits elsewhere": (sltt.models.DigitsNet, 1, 32 * 1024 + 64 * 1024 + 64 * 256, "elsewhere"),
    "pooled": (Pooled, 2, 16 * (1024 + 1024 + 256) + 16 * (1024 + 1024), "cpu"),  # neurons; dropped and scaled spikes
}


@pytest.mark.parametrize(("model", "channels", "spikes", "place"), MEMORY.values(), ids=MEMORY)
def test_bits_save_memory(model, channels, spikes, place, request):
    if place == "elsewhere":
        request.getfixturevalue(place)
    model, x, y = model(), torch.randn(4, channels, 32, 32), torch.randint(5, (4,))
    peaks = []
    for on in (True, False):
        with kernels.using(bits=on, sparse="off"):
            peaks.append(measured(sltt.BPTT(fold=1), model, x, y, steps=6))
    assert peaks[1] - peaks[0] > 0.8 * 6 * 4 * 4 * spikes  # T × B × 4 bytes


@pytest.mark.parametrize(
    "rule",
    [
        sltt.BPTT(fold=1),
        sltt.BPTT(recompute=True, fold=1),
        sltt.SLTT(recompute=True, fold=1),
        sltt.BPTT(fold=3),
        sltt.TBPTT(2, fold=1),
    ],
    ids=repr,
)
def test_another_device_saves_what_neurons_tagged(model, rule, elsewhere, monkeypatch):
    made = recorded(monkeypatch, saved.Tag, "__init__")
    x, y, results = torch.randn(2, 2, 32, 32), torch.randint(5, (2,)), []
    for options in ({}, {"bits": False}):
        torch.manual_seed(1)
        one = type(rule)() if options and rule.recompute else rule
        with kernels.using(compile="off", **options):
            results.append(gradients(model, one, x, y, steps=3)[0])
        assert made
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)


def test_a_saved_tensor_changed_in_place_is_still_noticed():
    x = torch.randn(3, 3, requires_grad=True)
    with kernels.save_as_bits():
        y = x.exp()
    y.add_(1)
    with pytest.raises(RuntimeError, match="changed by an in-place operation"):
        y.sum().backward()


@pytest.mark.parametrize(
    ("rule", "batch", "packs"),
    [
        (sltt.SLTT(fold=1), 16, False),  # but for the first step, before which sizes are not known
        (sltt.SLTT(fold=1), 32, True),
        (sltt.SLTT(k=2, fold=1), 16, False),
        (sltt.SLTT(fold=4), 16, True),
        (sltt.SLTT(recompute=True, fold=1), 16, True),
        (sltt.BPTT(fold=1), 16, True),
    ],
    ids=str,
)
def test_small_layers_keep_their_spikes_where_a_graph_lives_for_one_step(rule, batch, packs, monkeypatch):
    found, look = [], saved.look
    monkeypatch.setattr(saved, "look", lambda x: (found.append(look(x)), found[-1])[1])
    model = nn.Sequential(nn.Linear(8, 1024), sltt.LIF(), nn.Linear(1024, 3))
    x, y = 3 * torch.randn(4, batch, 8), torch.randint(3, (batch,))
    grads, _ = gradients(model, rule, x, y, seed=1)
    calls = 4 // rule.fold
    assert (len([spikes for spikes in found if spikes]) >= calls) == packs
    with kernels.using(bits=rule.recompute):
        expected, _ = gradients(model, rule, x, y, seed=1)
    assert torch.equal(grads, expected)


@pytest.mark.parametrize(
    ("layer", "rule"),
    [
        (nn.AvgPool2d(2), sltt.SLTT(fold=1)),
        (nn.AvgPool2d(2), sltt.BPTT(fold=1)),
        (nn.Conv2d(16, 16, 2, 2), sltt.BPTT(recompute=True, fold=1)),
        (nn.BatchNorm2d(16), sltt.BPTT(fold=3)),
    ],
    ids=["SLTT", "BPTT", "recompute", "fold"],
)
def test_what_is_made_again_is_not_what_was_changed_without_a_version(layer, rule):
    def halve(module, args, output):
        output.data.mul_(0.5)

    torch.manual_seed(0)
    side = 16 if isinstance(layer, nn.BatchNorm2d) else 8
    layers = nn.Conv2d(2, 16, 3, 1, 1), sltt.LIF(), copy.deepcopy(layer), nn.Conv2d(16, 16, 3, 1, 1), sltt.LIF()
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * side * side, 3))
    model[2].register_forward_hook(marked(halve))
    x, y = 2 * torch.randn(3, 4, 2, 16, 16), torch.randint(3, (4,))
    found, _ = gradients(model, rule, x, y)
    with kernels.using(bits=False, compile="off"):
        plain = sltt.SLTT(fold=1) if isinstance(rule, sltt.SLTT) else sltt.BPTT(fold=1)
        expected, _ = gradients(model, plain, x, y)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("neurons", "packed"), [(2**15, True), (2**14 + 4, False)])
def test_a_gpu_packs_spikes_of_a_cut_graph_in_the_neurons_pass_or_not_at_all(neurons, packed, elsewhere, monkeypatch):
    monkeypatch.delattr(step, "pack")
    fast = SimpleNamespace(forward=lambda *tensors: None)
    constants = kernels.NeuronStep(0.5, 1.0, None, False, False, sltt.surrogates.Triangle())
    x = torch.zeros(2 * neurons)
    *_, bits = step._run(step._StepCall(constants, fast, 2, True), x[:neurons].clone(), x, None, keep=True, packs=True)
    assert (bits is not None) is packed
