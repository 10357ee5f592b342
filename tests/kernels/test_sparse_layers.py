"""A layer that reads given spikes: sparse it gives what dense PyTorch does, or the layer is PyTorch's."""

import copy

import pytest
import torch
from torch import nn

import sltt
from sltt import kernels
from tests.conftest import LOSS
from tests.kernels.exact import NATIVE, applied

pytestmark = NATIVE
LAYERS = {
    "conv2d": (lambda: nn.Conv2d(32, 48, 3, padding=1), (5, 32, 17, 9)),
    "conv2d of blocks": (lambda: nn.Conv2d(32, 64, 3, padding=1), (3, 32, 8, 8)),
    "conv2d with stride": (lambda: nn.Conv2d(24, 40, (5, 3), (2, 1), (0, 2)), (3, 24, 17, 33)),
    "conv2d of pixels": (lambda: nn.Conv2d(16, 128, 1, bias=False), (1, 16, 33, 17)),
    "conv1d": (lambda: nn.Conv1d(48, 16, 7, 2, 3), (3, 48, 101)),
    "linear": (lambda: nn.Linear(264, 40), (33, 264)),
    "linear of tokens": (lambda: nn.Linear(72, 96, bias=False), (4, 17, 72)),
}
OTHERS = {
    "15 output channels": (lambda: nn.Conv2d(16, 15, 3), (3, 16, 17, 9)),
    "15 input channels": (lambda: nn.Conv2d(15, 16, 3), (8, 15, 17, 9)),
    "8 channels": (lambda: nn.Conv2d(8, 8, 3), (8, 8, 17, 9)),
    "groups": (lambda: nn.Conv2d(24, 24, 3, groups=2), (3, 24, 17, 9)),
    "dilation": (lambda: nn.Conv2d(24, 24, 3, dilation=2), (3, 24, 17, 9)),
    "groups and dilation": (lambda: nn.Conv2d(24, 24, 3, padding=2, groups=2, dilation=2), (3, 24, 17, 9)),
    "conv1d with dilation": (lambda: nn.Conv1d(24, 48, 3, dilation=2), (3, 24, 101)),
    "padding by name": (lambda: nn.Conv2d(24, 24, 3, padding="same"), (3, 24, 17, 9)),
    "other padding": (lambda: nn.Conv2d(24, 24, 3, padding=1, padding_mode="reflect"), (3, 24, 17, 9)),
    "15 features": (lambda: nn.Linear(64, 15), (3, 24, 64)),
}


class Times(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x


def results(make, shape, density, one=1.0, **options):
    """The output of a layer on spikes of this share, and the gradients of the neuron's input, weight and bias."""
    torch.manual_seed(0)
    layer, seen = make(), []
    fires = torch.rand(shape) < density
    if not isinstance(layer, nn.Linear):
        fires = fires.movedim(1, -1).contiguous().movedim(-1, 1)
    x = (0.5 + fires).requires_grad_()  # where the surrogate has a slope
    model = nn.Sequential(sltt.LIF(), Times(one), layer)
    model[0].register_forward_hook(lambda *call: seen.append(call[-1].detach().clone()))

    def loss(y, _):
        torch.manual_seed(1)
        return (y * torch.randn(y.shape)).sum()

    with kernels.using(**options):
        out = sltt.BPTT(fold=1)(model, x, torch.zeros(len(x)), loss, steps=1)
    assert torch.equal(seen[0], fires.float())
    return {"y": out.logits[0], "x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}


def assert_equal(found, expected, tolerance):
    """By the norm of each tensor."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        difference = (found[name] - value).norm().item()
        assert difference <= tolerance * value.norm().item(), name


@pytest.mark.parametrize(("density", "one"), [(0.0, 1.0), (0.16, 2.74), (1.0, 1.0)])
@pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS.keys())
def test_gradients_on_the_same_spikes_are_those_of_the_dense_layer(make, shape, density, one, sparse_calls):
    dense = results(make, shape, density, one, sparse="off")
    assert not sparse_calls
    sparse = results(make, shape, density, one, sparse="on")
    assert [kind for kind, _ in sparse_calls] == ["forward", "grad"]
    assert_equal(sparse, dense, 1e-5)


@pytest.mark.parametrize(("make", "shape"), OTHERS.values(), ids=OTHERS.keys())
def test_what_only_the_dense_layer_can_do_is_done_by_pytorch(make, shape, sparse_calls):
    plain = results(make, shape, 0.3, bits=False)
    assert_equal(results(make, shape, 0.3, sparse="on"), plain, 1e-6)
    assert not sparse_calls


class Shared(nn.Module):
    """Two convolutions with one weight, in layers of different sizes, one of which runs in two places."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Conv2d(2, 32, 3, padding=1), nn.Linear(32 * 16, 5)
        self.convs = nn.ModuleList(nn.Conv2d(32, 32, 3, stride, 1) for stride in (1, 2))
        self.convs[0].weight.data.mul_(4)  # so that all neurons fire
        self.convs[1].weight = self.convs[0].weight
        self.neurons = nn.ModuleList(sltt.LIF(tau=1.5) for _ in range(4))

    def forward(self, x):
        x = self.first(x)
        for conv, neuron in zip([*self.convs, self.convs[0]], self.neurons, strict=False):
            x = conv(neuron(x))
        return self.head(self.neurons[3](x).flatten(1))


@pytest.mark.parametrize("rule", [sltt.SLTT(fold=1), sltt.BPTT(fold=1), sltt.SLTT(recompute=True, fold=1)], ids=repr)
def test_a_weight_that_several_layers_share(rule, sparse_calls):
    x, y = 2 * torch.randn(8, 2, 8, 8).contiguous(memory_format=torch.channels_last), torch.arange(8) % 5
    first, found = Shared().to(memory_format=torch.channels_last), []
    for mode in ("off", "on"):
        model = copy.deepcopy(first)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with kernels.using(sparse=mode):
            grads = []
            for _ in range(2):
                optimizer.zero_grad()
                rule(model, x, y, LOSS, steps=3)
                grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
                optimizer.step()
            found.append((*grads, {"y": sltt.unroll(model, x, steps=3, fold=1)}))
    for dense, sparse in zip(*found, strict=True):
        assert_equal(sparse, dense, 1e-4)
    assert len(sparse_calls) >= 3 * 3 * (2 + 2 + 1)


def penalised(loss):
    """A rule's gradients, of the loss and of the squares of its gradients."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 512), sltt.LIF(), nn.Linear(512, 16))

    def backward(value):
        first = torch.autograd.grad(value, list(model.parameters()), create_graph=True)
        (value + sum(g.square().sum() for g in first)).backward()

    with kernels.using(sparse="on"):
        sltt.SLTT(fold=1)(model, 2 * torch.randn(16, 20), torch.arange(16), loss, steps=2, backward=backward)


def twice(of):
    def differentiate(loss):
        conv, x = nn.Conv2d(16, 16, 3), torch.randn(8, 16, 16, 16).contiguous(memory_format=torch.channels_last)
        with kernels.using(sparse="on"):
            spikes = sltt.LIF()(x.requires_grad_())
            y = applied(conv, spikes)
        wanted = {"weight": conv.weight, "spikes": spikes}[of]
        (grad,) = torch.autograd.grad(loss(y, None), wanted, create_graph=True)
        (grad.square().sum() + y.sum()).backward()

    return differentiate


def penalised_by_grad(loss):
    """As a penalty that asks for the gradients of some parameters."""
    model = nn.Sequential(nn.Linear(20, 512), sltt.LIF(), nn.Linear(512, 16))
    value = loss(model(2 * torch.randn(16, 20)), None)
    first = torch.autograd.grad(value, list(model[0].parameters()), create_graph=True)
    torch.autograd.grad(value + sum(g.square().sum() for g in first), list(model.parameters()))


@pytest.mark.parametrize(
    "run",
    [penalised, twice("weight"), twice("spikes"), penalised_by_grad],
    ids=["rule", "weight", "spikes", "neurons by autograd.grad"],
)
@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(lambda y, _: y.square().mean(), id="square"),
        pytest.param(lambda y, _: y.mean(), id="linear"),  # whose gradient is a constant
    ],
)
def test_a_second_derivative_is_refused(run, loss, sparse_calls):
    with pytest.raises(RuntimeError, match="twice"):
        run(loss)
    assert sparse_calls or run is penalised_by_grad
