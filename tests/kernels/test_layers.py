"""Networks whose layers run sparse on spikes: the same gradients as dense, from the same spikes."""

import copy
from itertools import chain, pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sltt
from sltt import kernels
from sltt.kernels import native
from sltt.kernels.layers import layers
from tests.conftest import LOSS, each_kind, gradients
from tests.references import measured, recorded

pytestmark = pytest.mark.skipif(native.problem() is not None, reason=str(native.problem()))


class Net(nn.Module):
    """Spikes read by convolutions with stride, max-pooled, scaled, dropped and by linear layers."""

    def __init__(self, neuron=lambda: sltt.LIF(tau=1.5), norm=True):
        super().__init__()
        widths = [2, 16, 24, 32, 32]
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=2 if b == 24 else 1, padding=1) for a, b in pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) if norm else nn.Identity() for b in widths[1:])
        self.neurons = nn.ModuleList(neuron() for _ in range(5))
        self.dropout, self.hidden, self.head = sltt.Dropout(0.3), nn.Linear(32 * 16, 64), nn.Linear(64, 5)

    def block(self, i, x):
        return self.neurons[i](self.norms[i](self.convs[i](x)))

    def forward(self, x):
        x = self.block(1, self.block(0, x))
        x = F.max_pool2d(self.block(2, 2.74 * x), 2)
        x = self.block(3, self.dropout(x))
        x = x.permute(0, 2, 3, 1).reshape(len(x), -1)
        return self.head(self.neurons[4](self.hidden(x)))


@pytest.fixture
def model():
    return Net().to(memory_format=torch.channels_last)


def data(steps=3, batch=8, dtype=torch.float32):
    x = torch.randn(steps, batch, 2, 16, 16, dtype=dtype)
    return x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (steps, batch)), torch.randint(
        5, (batch,)
    )


def run(model, rule, x, y, mode, compile="off", **kwargs):
    torch.manual_seed(1)
    model = copy.deepcopy(model)
    extra = {"update": lambda: None} if rule.online else {}
    with kernels.using(sparse=mode, compile=compile):
        out = rule(model, x, y, LOSS, seed=3, **extra, **kwargs)
    return {name: p.grad for name, p in model.named_parameters()}, out


def assert_close(found, expected, tolerance):
    for name, grad in expected.items():
        # that of a bias before a normalisation is 0 but for rounding
        torch.testing.assert_close(found[name], grad, rtol=tolerance, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@each_kind
def test_gradients_are_those_of_dense_layers(rule, sparse_calls, model):
    if isinstance(rule, sltt.Mixed):
        rule = sltt.Mixed({"neurons.0": "all"})
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
        assert kinds == {"forward", "grad"}


def test_every_layer_behind_a_neuron_is_sparse(sparse_calls, model):
    x, y = data()
    run(model, sltt.SLTT(fold=1), x, y, "on")
    shapes = {(kind, layer.weight_shape) for kind, layer in sparse_calls}
    expected = [tuple(m.weight.shape) for m in [*model.convs[1:], model.hidden]]
    assert shapes == {(kind, shape) for kind in ("forward", "grad") for shape in expected}


class Use(nn.Module):
    """A network whose spikes have a worth, which is learned, and are read by `use(self, spikes)`."""

    def __init__(self, use, worth):
        super().__init__()
        self.use, self.worth = use, nn.Parameter(worth)
        self.neuron, self.pool = sltt.LIF(v_threshold=0.5), nn.MaxPool2d(2)
        self.conv, self.linear, self.wide = nn.Conv2d(16, 16, 3), nn.Linear(16, 16), nn.Linear(2304, 16)

    def forward(self, x):
        return self.use(self, self.neuron(x) * self.worth)


USES = {
    "convolution": lambda net, y: net.conv(y),
    "max pooling": lambda net, y: net.conv(net.pool(y)),
    "pixels": lambda net, y: net.linear(y.movedim(1, -1)),
    "features": lambda net, y: net.wide(y.flatten(1)),
    "tokens": lambda net, y: net.linear(y),
    "changed in place": lambda net, y: net.conv(y).add_(y[:, :, 1:-1, 1:-1]),
}


@pytest.mark.parametrize("name", USES)
def test_a_worth_of_spikes_goes_into_the_weights_of_a_layer_that_reads_them(name, sparse_calls):
    x, found = torch.rand(8, 16, 12, 12).contiguous(memory_format=torch.channels_last), []
    if name == "tokens":
        x = x.flatten(2).transpose(1, 2).contiguous()
    first = Use(USES[name], torch.tensor(1.5))
    for mode in ("off", "on"):
        given, model = x.clone().requires_grad_(), copy.deepcopy(first)
        with kernels.using(sparse=mode, compile="off"):
            out = sltt.BPTT(fold=1)(model, given, torch.zeros(8), lambda y, _: y.square().sum(), steps=1)
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append({"y": out.logits, "x": given.grad, **grads})
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-3)
    assert len(sparse_calls) == 2


def test_small_layers_and_other_memory_formats_run_dense(sparse_calls):
    x, y = data()
    run(Net().to(memory_format=torch.channels_last), sltt.SLTT(fold=1), x[:, :1], y[:1], "auto")
    run(Net().double().to(memory_format=torch.channels_last), sltt.SLTT(fold=1), x.double(), y, "on")
    assert not sparse_calls
    run(Net(), sltt.SLTT(fold=1), x.contiguous(), y, "on")
    assert {layer.weight_shape for _, layer in sparse_calls} == {(64, 512)}


@pytest.mark.parametrize("mode", ["on", "auto"])
def test_inference_is_sparse_too(mode, sparse_calls, monkeypatch):
    asked = []
    monkeypatch.setattr(
        layers.costs, "break_even", lambda *args: (asked.append(args[2]), layers.costs.BreakEven(1.1, 1.1))[1]
    )
    monkeypatch.setattr(layers.costs, "PRODUCTS_FROM", 0)
    model = Net().to(memory_format=torch.channels_last).eval()
    x, _ = data()
    with kernels.using(sparse="off", compile="off"):
        expected = sltt.unroll(model, x, fold=1)
    assert not sparse_calls
    with kernels.using(sparse=mode, compile="off"):
        torch.testing.assert_close(sltt.unroll(model, x, fold=1), expected, rtol=1e-4, atol=1e-4)
    assert {kind for kind, _ in sparse_calls} == {"forward"}
    assert len(sparse_calls) == 3 * 4
    # calls that share weights, which its forward does not change, as the first evaluation showed
    assert {*asked} == ({3} if mode == "auto" else set())


def test_an_evaluation_packs_each_weight_once_and_a_training_at_every_step(monkeypatch, model):
    packed = recorded(monkeypatch, layers.sparse, "pack_weight")
    x, y = data()
    known = nn.Sequential(*chain(*zip(model.convs, model.norms, model.neurons, strict=False)), nn.Flatten())
    with kernels.using(sparse="on", compile="off"):
        for evaluated, calls in ((known, 3), (model, 3 * 4)):  # a forward of its own may change weights in each call
            sltt.unroll(evaluated, x, fold=1)
            assert len(packed) == calls
            packed.clear()
        sltt.SLTT(fold=1)(model, x, y, LOSS)
    assert len(packed) == 3 * 4


@pytest.mark.parametrize("change", ["in place", "data", "load", "replaced", "copied"])
def test_weights_that_change_between_batches_are_read_anew(change, model):
    x, y = data()
    with kernels.using(sparse="on", compile="off"):
        sltt.SLTT(fold=1)(model, x, y, LOSS)
        weight = model.convs[1].weight
        with torch.no_grad():
            if change == "in place":
                weight.mul_(-0.5)
            elif change == "data":
                weight.data.mul_(-0.5)
            elif change == "load":
                state = model.state_dict()
                model.load_state_dict({k: 0.7 * v if v.is_floating_point() else v for k, v in state.items()})
            elif change == "replaced":
                model.convs[3].weight = nn.Parameter(torch.randn_like(model.convs[3].weight))
            else:
                model = copy.deepcopy(model)
        model.eval()
        found = sltt.unroll(model, x, fold=1)
    with kernels.using(sparse="off", compile="off"):
        torch.testing.assert_close(found, sltt.unroll(model, x, fold=1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_sums_in_float32(dtype, sparse_calls, model):
    x, y = data()
    exact, _ = run(model, sltt.SLTT(fold=1), x, y, "off")
    with torch.autocast("cpu", dtype=dtype):
        found = [run(model, sltt.SLTT(fold=1), x, y, mode)[0] for mode in ("off", "on")]
    assert sparse_calls
    for name in ("convs.2.weight", "convs.3.weight"):
        assert found[1][name].dtype == torch.float32
        dense, sparse = (
            torch.cosine_similarity(grads[name].flatten(), exact[name].flatten(), dim=0) for grads in found
        )
        assert sparse > dense - 0.05  # some neurons near their threshold fire in one and not in the other


def test_frozen_weights_and_inputs(model):
    model.convs[2].requires_grad_(False)
    model.convs[1].bias.requires_grad_(False)
    x, y = data()
    dense, sparse = (run(model, sltt.SLTT(fold=1), x, y, mode)[0] for mode in ("off", "on"))
    assert sparse["convs.2.weight"] is None
    assert sparse["convs.1.bias"] is None
    assert_close(*({k: v for k, v in grads.items() if v is not None} for grads in (sparse, dense)), 2e-4)


def test_memory_is_not_above_that_of_dense_layers(model):
    x, y = data(batch=64)

    def peak(mode):
        with kernels.using(sparse=mode):
            return measured(sltt.SLTT(fold=1), model, x, y)

    weights = sum(p.nbytes for p in model.parameters())
    assert peak("on") <= peak("off") + 1.1 * weights  # which are packed


def test_recomputed_layers_are_sparse_and_change_nothing(sparse_calls, model):
    x, y = data()
    plain, again = (run(model, sltt.SLTT(recompute=r, fold=1), x, y, "on")[0] for r in (False, True))
    assert all(torch.equal(again[name], grad) for name, grad in plain.items())
    forwards = [layer.weight_shape for kind, layer in sparse_calls if kind == "forward"]
    assert len(forwards) > 2 * 3 * 3


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
    rule = sltt.OTTT(decay=0.5, online=True) if kind == "online" else sltt.SLTT(fold=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    kwargs = {"update": lambda: (optimizer.step(), optimizer.zero_grad())} if rule.online else {}

    def peak(steps):
        x, y = 2 * torch.randn(steps, 16, 64), torch.randint(16, (16,))
        return measured(rule, model, x, y, **kwargs)

    with kernels.using(sparse="on"):
        assert peak(12) < 1.2 * peak(3)


def test_inference_mode(sparse_calls):
    """Its tensors have no version, by which a changed weight is known."""
    model, (x, _) = Net().to(memory_format=torch.channels_last).eval(), data()
    expected = sltt.unroll(model, x, fold=1)
    with torch.inference_mode(), kernels.using(sparse="on"):
        torch.testing.assert_close(sltt.unroll(model, x, fold=1), expected, rtol=1e-4, atol=1e-4)
        model(x[0])
        sltt.reset(model)
    with torch.inference_mode():
        model = Net().to(memory_format=torch.channels_last).eval()
    with kernels.using(sparse="on"):
        sltt.unroll(model, x, fold=1)


MISFITS = {
    "channels of a linear layer": (nn.Linear(32, 16), "shapes cannot be multiplied"),
    "bias of a linear layer": (nn.Linear(64, 16), "expanded size"),
    "channels": (nn.Conv1d(32, 16, 1), "expected input"),
    "bias": (nn.Conv1d(64, 16, 1), "bias of size"),
    "stride": (nn.Conv1d(64, 16, 1, stride=0), "stride"),
    "padding": (nn.Conv1d(64, 16, 1, padding=-1), "padding"),
    "axes": (nn.Conv1d(64, 16, 1, stride=(1, 2)), "stride"),
}


@pytest.mark.parametrize(("layer", "message"), MISFITS.values(), ids=MISFITS.keys())
def test_what_does_not_fit_is_refused_by_pytorch(layer, message, sparse_calls):
    """Native code would read memory that is not the tensor's."""
    linear = isinstance(layer, nn.Linear)
    model = nn.Sequential(sltt.LIF(), nn.Identity() if linear else nn.Unflatten(1, (64, 1)), copy.deepcopy(layer))
    if "bias" in message or "expanded" in message:
        model[2].bias = nn.Parameter(torch.ones(3))
    with kernels.using(sparse="on"), pytest.raises(RuntimeError, match=message):
        sltt.unroll(model, 2 * torch.randn(64, 64), steps=1)
    assert not sparse_calls


def test_steps_without_a_graph_do_not_look_for_a_layer_that_never_runs_sparse(monkeypatch):
    looks = recorded(monkeypatch, layers, "look")
    monkeypatch.setattr(layers.costs, "PRODUCTS_FROM", 0)
    model, (x, _) = Net().to(memory_format=torch.channels_last), data()
    for forward, pays in ((0.0, False), (1.1, True)):
        even = layers.costs.BreakEven(forward, 1.1)
        monkeypatch.setattr(layers.costs, "break_even", lambda *args, even=even: even)
        with kernels.using(compile="off"):
            sltt.unroll(model, x, fold=1)
        assert bool(looks) == pays


class Called(nn.Module):
    """Layers that are called with their input by its name, or by its position."""

    def __init__(self, pool, neuron):
        super().__init__()
        self.conv, self.norm, self.neuron = nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), neuron()
        self.pool, self.head, self.by_name = pool, nn.Linear(8 * 16, 3), False

    def forward(self, x):
        for layer in (self.conv, self.norm, self.neuron, self.pool):
            x = layer(**{"x" if layer is self.neuron else "input": x}) if self.by_name else layer(x)
        return self.head(input=x.flatten(1))


@pytest.mark.parametrize(("pool", "neuron"), [(nn.AvgPool2d(2), sltt.PLIF), (nn.MaxPool2d(2), sltt.LIF)])
@pytest.mark.parametrize("rule", [sltt.SLTT(fold=1), sltt.SLTT(fold=2), sltt.OTTT()], ids=repr)
def test_layers_that_are_called_by_name(rule, pool, neuron):
    model, x, y = Called(pool, neuron), 3 * torch.randn(4, 8, 2, 8, 8), torch.randint(3, (8,))
    expected, _ = gradients(model, rule, x, y)
    model.by_name = True
    torch.testing.assert_close(gradients(model, rule, x, y)[0], expected, rtol=1e-5, atol=1e-7)
