"""Networks whose layers run sparse on spikes: the same gradients as dense, from the same spikes."""

import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sltt
from sltt import kernels
from sltt.kernels import layers, native, values
from tests.conftest import LOSS, RULES
from tests.references import measured

pytestmark = pytest.mark.skipif(native.problem() is not None, reason=str(native.problem()))


class Net(nn.Module):
    """Spikes read by convolutions with stride, max-pooled, scaled (by channel too), dropped and by linear layers."""

    def __init__(self, neuron=lambda: sltt.LIF(tau=1.5), norm=True):
        super().__init__()
        widths = [2, 16, 24, 32, 32]
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=2 if b == 24 else 1, padding=1) for a, b in pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) if norm else nn.Identity() for b in widths[1:])
        self.neurons = nn.ModuleList(neuron() for _ in range(5))
        self.register_buffer("worth", torch.linspace(0.5, 1.5, 16).view(16, 1, 1))
        self.dropout, self.hidden, self.head = sltt.Dropout(0.3), nn.Linear(32 * 16, 64), nn.Linear(64, 5)

    def block(self, i, x):
        return self.neurons[i](self.norms[i](self.convs[i](x)))

    def forward(self, x):
        x = self.block(1, self.worth * self.block(0, x))
        x = F.max_pool2d(self.block(2, 2.74 * x), 2)
        x = self.block(3, self.dropout(x))
        x = x.permute(0, 2, 3, 1).reshape(len(x), -1)
        return self.head(self.neurons[4](self.hidden(x)))


def data(steps=3, batch=8, dtype=torch.float32):
    x = torch.randn(steps, batch, 2, 16, 16, dtype=dtype)
    return x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (steps, batch)), torch.randint(
        5, (batch,)
    )


def run(model, rule, x, y, mode, **kwargs):
    torch.manual_seed(1)
    model = copy.deepcopy(model)
    extra = {"update": lambda: None} if rule.online else {}
    with kernels.using(sparse=mode, compile="off"):
        out = rule(model, x, y, LOSS, seed=3, **extra, **kwargs)
    return {name: p.grad for name, p in model.named_parameters()}, out


def assert_close(found, expected, tolerance):
    for name, grad in expected.items():
        # that of a bias before a normalisation is 0 but for rounding
        torch.testing.assert_close(found[name], grad, rtol=tolerance, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_gradients_are_those_of_dense_layers(rule, sparse_calls):
    if isinstance(rule, sltt.Mixed):
        rule = sltt.Mixed({"neurons.0": "all"})
    model = Net().to(memory_format=torch.channels_last)
    x, y = data()
    dense, out = run(model, rule, x, y, "off")
    assert not sparse_calls
    sparse, other = run(model, rule, x, y, "on")
    torch.testing.assert_close(other.logits, out.logits, rtol=1e-4, atol=1e-4)
    assert_close(sparse, dense, 2e-4)
    kinds = {kind for kind, _ in sparse_calls}
    if isinstance(rule, sltt.RateBased):  # its pass with a graph runs on rates
        assert kinds == (set() if rule.steady else {"forward"})
    else:
        assert kinds == {"forward", "grad"} or isinstance(rule, sltt.OTTT)  # which has traces in place of spikes


def test_every_layer_behind_a_neuron_is_sparse(sparse_calls):
    model = Net().to(memory_format=torch.channels_last)
    x, y = data()
    run(model, sltt.SLTT(), x, y, "on")
    shapes = {(kind, layer.weight_shape) for kind, layer in sparse_calls}
    expected = [tuple(m.weight.shape) for m in [*model.convs[1:], model.hidden]]
    assert shapes == {(kind, shape) for kind in ("forward", "grad") for shape in expected}


def test_a_learned_worth_of_each_channel_goes_into_the_weights_of_a_layer_that_reads_it(sparse_calls):
    conv, linear = nn.Conv2d(16, 16, 3), nn.Linear(16, 16)
    x = torch.rand(8, 16, 12, 12).contiguous(memory_format=torch.channels_last)
    uses = {
        "convolution": lambda y: conv(y),
        "max pooling": lambda y: conv(F.max_pool2d(y, 2)),
        "channels last": lambda y: linear(y.movedim(1, -1).flatten(0, 2)),
        "tokens": lambda y: linear(y),
        "other features": lambda y: F.linear(y.flatten(1), torch.ones(16, 2304)),
        "other channels": lambda y: conv(y.reshape(8, 12, 12, 16).movedim(-1, 1)),
    }
    for name, use in uses.items():
        tokens = name == "tokens"
        found = []
        for mode in ("off", "on"):
            worth = torch.linspace(0.5, 1.5, 16).view(16 if tokens else (16, 1, 1)).requires_grad_()
            given = x.contiguous() if name == "other channels" else x
            given = (x.movedim(1, -1).flatten(1, 2) if tokens else given).clone().requires_grad_()
            with kernels.using(sparse=mode, compile="off"), kernels.saving():
                y = use(sltt.LIF(v_threshold=0.5)(given) * worth)
            found.append(
                [
                    y,
                    *torch.autograd.grad(
                        y.square().sum(), (given, worth, *conv.parameters(), *linear.parameters()), allow_unused=True
                    ),
                ]
            )
        for off, on in zip(*found, strict=True):
            torch.testing.assert_close(on, off, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
        assert len(sparse_calls) == (2 if name in ("convolution", "max pooling", "tokens") else 0), name
        sparse_calls.clear()


def test_a_worth_that_is_not_finite_and_one_that_changes(sparse_calls):
    conv = nn.Conv2d(16, 16, 3)
    x = torch.rand(8, 16, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    with kernels.using(sparse="on", compile="off"), kernels.saving():
        infinite = conv(sltt.LIF()(x) * torch.full((16, 1, 1), torch.inf))
        assert infinite.isnan().any()
        assert not sparse_calls
        worth = torch.ones(16, 1, 1)
        y = conv(sltt.LIF()(x) * worth)
    worth.mul_(2)
    with pytest.raises(RuntimeError, match="was changed by an in-place operation"):
        y.sum().backward()


def test_small_layers_and_other_memory_formats_run_dense(sparse_calls):
    x, y = data()
    run(Net().to(memory_format=torch.channels_last), sltt.SLTT(), x[:, :1], y[:1], "auto")
    run(Net(), sltt.SLTT(), x.contiguous(), y, "on")
    run(Net().double().to(memory_format=torch.channels_last), sltt.SLTT(), x.double(), y, "on")
    assert not sparse_calls


@pytest.mark.parametrize("mode", ["on", "auto"])
def test_inference_is_sparse_too(mode, sparse_calls, monkeypatch):
    monkeypatch.setattr(layers.costs, "break_even", lambda *args: layers.costs.BreakEven(1.1, 1.1))
    monkeypatch.setattr(layers.costs, "PRODUCTS_FROM", 0)
    model = Net().to(memory_format=torch.channels_last).eval()
    x, _ = data()
    with kernels.using(sparse="off", compile="off"):
        expected = sltt.unroll(model, x)
    assert not sparse_calls
    with kernels.using(sparse=mode, compile="off"):
        torch.testing.assert_close(sltt.unroll(model, x), expected, rtol=1e-4, atol=1e-4)
    assert {kind for kind, _ in sparse_calls} == {"forward"}
    assert len(sparse_calls) == 3 * 4


def test_an_evaluation_packs_each_weight_once_and_a_training_at_every_step(monkeypatch):
    packed = []
    pack_weight = layers.sparse.pack_weight
    monkeypatch.setattr(layers.sparse, "pack_weight", lambda *args: (packed.append(args[1]), pack_weight(*args))[1])
    model = Net().to(memory_format=torch.channels_last)
    x, y = data()
    with kernels.using(sparse="on", compile="off"):
        sltt.unroll(model, x)
        assert len(packed) == 4
        sltt.SLTT()(model, x, y, LOSS)
        assert len(packed) == 4 + 3 * 4


@pytest.mark.parametrize("change", ["in place", "optimizer", "data", "load", "ema", "replaced", "copied"])
def test_weights_that_change_between_batches_are_read_anew(change):
    model = Net().to(memory_format=torch.channels_last)
    x, y = data()
    with kernels.using(sparse="on", compile="off"):
        sltt.SLTT()(model, x, y, LOSS)
        weight = model.convs[1].weight
        with torch.no_grad():
            if change == "in place":
                weight.mul_(-0.5)
            elif change == "optimizer":
                torch.optim.SGD(model.parameters(), lr=1.0).step()
            elif change == "data":
                weight.data.mul_(-0.5)
            elif change == "load":
                model.load_state_dict(
                    {k: 0.7 * v if v.is_floating_point() else v for k, v in model.state_dict().items()}
                )
            elif change == "ema":
                weight.lerp_(torch.ones_like(weight), 0.3)
            elif change == "replaced":
                model.convs[3].weight = nn.Parameter(torch.randn_like(model.convs[3].weight))
            else:
                model = copy.deepcopy(model)
        model.eval()
        found = sltt.unroll(model, x)
    with kernels.using(sparse="off", compile="off"):
        torch.testing.assert_close(found, sltt.unroll(model, x), rtol=1e-4, atol=1e-4)


def test_weights_updated_in_every_step_are_read_anew():
    x, y = data()
    results = []
    for mode in ("off", "on"):
        torch.manual_seed(1)
        model = Net(norm=False).to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        with kernels.using(sparse=mode, compile="off"):
            sltt.OTTT(decay=0.3, online=True)(model, x, y, LOSS, update=lambda o=optimizer: (o.step(), o.zero_grad()))
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_sums_in_float32(dtype, sparse_calls):
    model = Net().to(memory_format=torch.channels_last)
    x, y = data()
    with torch.autocast("cpu", dtype=dtype):
        dense, _ = run(model, sltt.SLTT(), x, y, "off")
        sparse, _ = run(model, sltt.SLTT(), x, y, "on")
    assert sparse_calls
    for name in ("convs.2.weight", "convs.3.weight"):
        assert sparse[name].dtype == torch.float32
        assert torch.cosine_similarity(sparse[name].flatten(), dense[name].flatten(), dim=0) > 0.9


def test_frozen_weights_and_inputs():
    model = Net().to(memory_format=torch.channels_last)
    model.convs[2].requires_grad_(False)
    model.convs[1].bias.requires_grad_(False)
    x, y = data()
    dense, sparse = (run(model, sltt.SLTT(), x, y, mode)[0] for mode in ("off", "on"))
    assert sparse["convs.2.weight"] is None
    assert sparse["convs.1.bias"] is None
    assert_close(*({k: v for k, v in grads.items() if v is not None} for grads in (sparse, dense)), 2e-4)


def test_a_weight_changed_before_its_backward_is_noticed():
    conv, x = nn.Conv2d(16, 16, 3).to(memory_format=torch.channels_last), torch.randn(8, 16, 16, 16)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    with kernels.using(sparse="on"), kernels.saving():
        y = conv(sltt.LIF()(x))
    with torch.no_grad():
        conv.weight.add_(1)
    with pytest.raises(RuntimeError, match="in-place"):
        y.sum().backward()


def test_memory_is_not_above_that_of_dense_layers():
    model = Net().to(memory_format=torch.channels_last)
    x, y = data(batch=64)

    def peak(mode):
        with kernels.using(sparse=mode):
            return measured(sltt.SLTT(), model, x, y)

    weights = sum(p.nbytes for p in model.parameters())
    assert peak("on") <= peak("off") + 1.1 * weights  # which are packed


def test_recomputed_layers_are_sparse_and_change_nothing(sparse_calls):
    model = Net().to(memory_format=torch.channels_last)
    x, y = data()
    plain, again = (run(model, sltt.SLTT(recompute=r), x, y, "on")[0] for r in (False, True))
    assert all(torch.equal(again[name], grad) for name, grad in plain.items())
    forwards = [layer.weight_shape for kind, layer in sparse_calls if kind == "forward"]
    assert len(forwards) > 2 * 3 * 3


def test_threads_change_nothing():
    model = Net().to(memory_format=torch.channels_last)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            with kernels.using(sparse="on"), torch.no_grad():
                spikes = F.relu(torch.randn(8, 16, 16, 16, generator=torch.Generator().manual_seed(0))).sign()
                spikes = spikes.contiguous(memory_format=torch.channels_last)
                with kernels.saving(graph=False):
                    results.append(model.convs[1](sltt.LIF(v_threshold=0.5)(spikes)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, results[0]) for one in results)


class UnderAutocast(nn.Sequential):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x).float()


@pytest.mark.parametrize("kind", ["plain", "parametrised", "autocast", "online"])
def test_forms_of_weights_do_not_add_up_over_time(kind):
    middle = nn.Linear(512, 512)
    if kind == "parametrised":  # a new tensor at every step
        middle = nn.utils.parametrizations.weight_norm(middle)
    network = UnderAutocast if kind == "autocast" else nn.Sequential
    model = network(nn.Linear(64, 512), sltt.LIF(), middle, sltt.LIF(), nn.Linear(512, 16))
    rule = sltt.OTTT(decay=0.5, online=True) if kind == "online" else sltt.SLTT()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    kwargs = {"update": lambda: (optimizer.step(), optimizer.zero_grad())} if rule.online else {}

    def peak(steps):
        x, y = 2 * torch.randn(steps, 16, 64), torch.randint(16, (16,))
        return measured(rule, model, x, y, **kwargs)

    with kernels.using(sparse="on"):
        assert peak(12) < 1.2 * peak(3)


def test_inference_mode(sparse_calls):
    """Its tensors have no version, by which a tag or a changed weight is known."""
    model, (x, _) = Net().to(memory_format=torch.channels_last).eval(), data()
    expected = sltt.unroll(model, x)
    with torch.inference_mode(), kernels.using(sparse="on"):
        torch.testing.assert_close(sltt.unroll(model, x), expected, rtol=1e-4, atol=1e-4)
        model(x[0])
        sltt.reset(model)
    with torch.inference_mode():
        model = Net().to(memory_format=torch.channels_last).eval()
    with kernels.using(sparse="on"):
        sltt.unroll(model, x)


MISFITS = {
    "channels of a linear layer": (lambda s: F.linear(s, torch.ones(16, 32)), "shapes cannot be multiplied"),
    "bias of a linear layer": (lambda s: F.linear(s, torch.ones(16, 64), torch.ones(3)), "expanded size"),
    "channels": (lambda s: F.conv1d(s[..., None], torch.ones(16, 32, 1)), "expected input"),
    "bias": (lambda s: F.conv1d(s[..., None], torch.ones(16, 64, 1), torch.ones(3)), "bias of size"),
    "stride": (lambda s: F.conv1d(s[..., None], torch.ones(16, 64, 1), stride=0), "stride"),
    "padding": (lambda s: F.conv1d(s[..., None], torch.ones(16, 64, 1), padding=-1), "padding"),
    "axes": (lambda s: F.conv1d(s[..., None], torch.ones(16, 64, 1), stride=(1, 2)), "stride"),
}


@pytest.mark.parametrize(("function", "message"), MISFITS.values(), ids=MISFITS.keys())
def test_what_does_not_fit_is_refused_by_pytorch(function, message, sparse_calls):
    """Native code would read memory that is not the tensor's."""
    spikes = sltt.LIF()(2 * torch.randn(64, 64))
    with torch.no_grad(), kernels.using(sparse="on"), kernels.saving():
        assert F.linear(spikes, torch.ones(16, 64)).shape == (64, 16)
        assert len(sparse_calls) == 1
        with pytest.raises(RuntimeError, match=message):
            function(spikes)
    assert len(sparse_calls) == 1


@pytest.mark.parametrize(("size", "stride", "padding"), [((4, 4), 1, 1), ((7, 5), 2, (0, 2)), ((3, 6), (1, 3), (2, 1))])
def test_weight_gradients_of_small_images_in_bfloat16_are_products(size, stride, padding, monkeypatch):
    conv = nn.Conv2d(16, 24, 3, stride, padding).to(memory_format=torch.channels_last)
    x = (torch.randn(16, 16, *size).sign() + 1).contiguous(memory_format=torch.channels_last)
    products = []
    multiply = values._multiplied_weight_gradient
    monkeypatch.setattr(values, "_multiplied_weight_gradient", lambda *a: (products.append(1), multiply(*a))[1])
    monkeypatch.setattr(layers.costs, "break_even", lambda *args: layers.costs.BreakEven(0.0, 0.0))
    monkeypatch.setattr(layers.costs, "PRODUCTS_FROM", 0)
    with torch.autocast("cpu", torch.bfloat16), kernels.saving():
        y = conv(sltt.LIF()(x))
    grad = torch.randn(y.shape).bfloat16()
    y.backward(grad)
    assert products
    spikes, exact = (x > 0).double(), conv.weight.detach().double().requires_grad_()
    expected = nn.grad.conv2d_weight(spikes, exact.shape, grad.double(), conv.stride, conv.padding)
    torch.testing.assert_close(conv.weight.grad.double(), expected, rtol=1e-2, atol=1e-2)
    axes = list(conv.stride), list(conv.padding), [1, 1]
    weight = conv.weight.detach().bfloat16()
    _, found, _ = kernels.convolution_gradients(grad, spikes.bfloat16(), weight, axes, 1, [False, True, False])
    torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1e-2)


def test_steps_without_a_graph_do_not_pack_spikes_for_a_layer_that_never_runs_sparse(monkeypatch):
    packed, density = [], layers.SpikeTag.density
    monkeypatch.setattr(layers.SpikeTag, "density", lambda *a: (packed.append(1), density(*a))[1])
    monkeypatch.setattr(layers.costs, "PRODUCTS_FROM", 0)
    model, (x, _) = Net().to(memory_format=torch.channels_last), data()
    for forward, packs in ((0.0, False), (1.1, True)):
        even = layers.costs.BreakEven(forward, 1.1)
        monkeypatch.setattr(layers.costs, "break_even", lambda *args, even=even: even)
        with torch.no_grad(), kernels.using(compile="off"):
            sltt.unroll(model, x)
        assert bool(packed) == packs
