import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sltt
import sltt.kernels.saved_tensors
from sltt import kernels
from sltt.kernels.bits import pack, unpack
from sltt.kernels.restoring import PACK_FROM, tag_of
from tests.conftest import LOSS, gradients
from tests.references import measured


def test_without_a_graph_nothing_is_saved_or_packed():
    neuron = sltt.LIF()
    x = torch.randn(4, 4096, requires_grad=True)
    with kernels.using(compile="off"):  # native code writes the bits with the spikes
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
    real = sltt.kernels.saved_tensors.save

    def save(tensor):
        seen.append(real(tensor))
        return seen[-1]

    sltt.kernels.saved_tensors.save, before = save, sltt.kernels.saved_tensors.save
    try:
        call()
    finally:
        sltt.kernels.saved_tensors.save = before
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


@pytest.mark.parametrize(
    ("rule", "memory_format"),
    [
        (sltt.SLTT(), torch.channels_last),
        (sltt.BPTT(), torch.contiguous_format),
        (sltt.SLTT(k=1), torch.contiguous_format),
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
    rule, again = rule(), rule(recompute=True)
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

    rules = sltt.SLTT(), sltt.SLTT(recompute=True)
    plain, recomputed = (measured(r, model, x, y, steps=2, backward=lambda loss: None) for r in rules)
    assert plain - recomputed >= 3.9 * layer  # a sum of residual blocks is saved once in a few blocks


@pytest.mark.parametrize("sparse", ["on", "off"])
@pytest.mark.parametrize(("channels", "recomputed"), [(64, True), (256, False)])
def test_outputs_of_wide_layers_are_kept(channels, recomputed, sparse):
    model = nn.Sequential(sltt.LIF(), nn.Conv2d(channels, 16, 3, padding=1))
    x = torch.randn(8, channels, 8, 8).contiguous(memory_format=torch.channels_last)
    with kernels.using(sparse=sparse), kernels.saving(recompute=True):
        y = model(x)
    assert (tag_of(y) is not None) == recomputed


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
    floats = [k[0] for k in kept if not isinstance(k[0], sltt.kernels.restoring.Tag)]
    assert len(kept) - len(floats) >= 4  # dropped spikes, 2.74 spikes, pooled, pooled and scaled or spikes of the head
    states = [m.v for m in model.modules() if isinstance(m, sltt.LIF)]
    allowed = [x, model.dropout.mask, *states, *model.parameters()]
    pointers = {t.untyped_storage().data_ptr() for t in allowed}
    assert not [t.shape for t in floats if t.untyped_storage().data_ptr() not in pointers and t.numel() >= PACK_FROM]


def test_bits_save_memory():
    model = sltt.models.DigitsNet()
    x, y = torch.randn(16, 1, 16, 16), torch.randint(10, (16,))

    peaks = []
    for on in (True, False):
        with kernels.using(bits=on, sparse="off"):
            peaks.append(measured(sltt.BPTT(), model, x, y, steps=12))
    spikes = 12 * 4 * 16 * (32 * 256 + 64 * 256 + 64 * 64)  # T × 4 bytes × B × neurons
    assert peaks[0] < peaks[1] - 0.9 * spikes


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


def test_checkpoint_around_a_neuron_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), sltt.LIF())
    y = torch.utils.checkpoint.checkpoint(model, torch.randn(2, 4, requires_grad=True), use_reentrant=False)
    with pytest.raises(RuntimeError, match=r"torch\.utils\.checkpoint repeats a forward whose state has moved on"):
        y.sum().backward()


class PartRunsAgain(nn.Module):
    """A convolution on spikes and its BatchNorm are in a checkpoint, unless `reentrant` is None."""

    def __init__(self, reentrant):
        super().__init__()
        self.conv1, self.lif1, self.lif2 = nn.Conv2d(2, 16, 3, padding=1), sltt.LIF(tau=1.5), sltt.LIF(tau=1.5)
        self.part = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16, momentum=1.0))
        self.head, self.reentrant = nn.Linear(16, 3), reentrant

    def forward(self, x):
        x = self.lif1(self.conv1(x))
        if self.reentrant is None:
            x = self.part(x)
        else:
            x = torch.utils.checkpoint.checkpoint(self.part, x, use_reentrant=self.reentrant)
        return self.head(self.lif2(x).mean((2, 3)))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # in steps without a graph
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "rule",
    [sltt.SLTT(), sltt.BPTT(), sltt.BPTT(recompute=True), sltt.RateBased(), sltt.RateBased(steady=True)],
    ids=repr,
)
def test_a_checkpoint_around_a_convolution_on_spikes(rule, reentrant):
    plain, again = (PartRunsAgain(how).to(memory_format=torch.channels_last) for how in (None, reentrant))
    again.load_state_dict(plain.state_dict())
    x, y = 3 * torch.randn(3, 8, 2, 16, 16), torch.randint(3, (8,))
    with kernels.using(sparse="on", compile="on"):
        found, expected = (gradients(model, rule, x, y)[0] for model in (again, plain))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("rule", "batch", "tags"),
    [
        (sltt.SLTT(), 16, 1),  # the first step, before which sizes are not known
        (sltt.SLTT(), 32, 4),
        (sltt.SLTT(k=2), 16, 1),
        (sltt.SLTT(fold=2), 16, 2),
        (sltt.SLTT(recompute=True), 16, 4),
        (sltt.BPTT(), 16, 4),
    ],
    ids=str,
)
def test_small_layers_keep_their_spikes_where_a_graph_lives_for_one_step(rule, batch, tags, monkeypatch):
    made = []
    init = sltt.kernels.restoring.SpikeTag.__init__
    monkeypatch.setattr(
        sltt.kernels.restoring.SpikeTag, "__init__", lambda self, *a, **k: (made.append(self), init(self, *a, **k))[1]
    )
    model = nn.Sequential(nn.Linear(8, 1024), sltt.LIF(), nn.Linear(1024, 3))
    x, y = 3 * torch.randn(4, batch, 8), torch.randint(3, (batch,))
    found, _ = gradients(model, rule, x, y, seed=1)
    assert len(made) == tags
    with kernels.using(bits=rule.recompute):
        expected, _ = gradients(model, rule, x, y, seed=1)
    assert torch.equal(found, expected)
