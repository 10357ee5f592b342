import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sltt
from sltt import kernels
from sltt.commands import main
from sltt.interop import QCFS, spiking
from sltt.interop.activations import Balanced, percentiles
from tests.conftest import KINDS, RULES, gradients
from tests.kernels.exact import NATIVE


class Block(nn.Module):
    """An activation module called twice, a function, a method, and a residual sum, as torchvision's blocks have."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.relu(self.norm(self.conv1(x)))
        y = self.conv2(y)
        y += x
        return F.relu(self.relu(y) - 0.1).sub(0.1).relu_()


class ANN(nn.Module):
    def __init__(self, pool=nn.MaxPool2d, norm=nn.LayerNorm):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU6(), pool(2), nn.Dropout(0.1))
        self.block = Block()
        self.norm, self.head = norm(4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.norm(self.block(self.stem(x)).flatten(2).mean(2)).relu())


PLACES = ["stem.1", "block.relu", "block.relu_2", "block.relu_3", "block.relu_4", "relu"]


@pytest.fixture
def images():
    return torch.randn(8, 2, 10, 10)


@pytest.mark.parametrize("balanced", [False, True])
def test_a_neuron_at_every_call_and_the_weights_as_they_were(images, balanced):
    ann = ANN()
    before = copy.deepcopy(ann.state_dict())
    twin = spiking(ann, data=images if balanced else None)
    neurons = [name.removesuffix(".neuron") for name, m in twin.named_modules() if isinstance(m, sltt.IF)]
    assert sorted(neurons) == sorted(PLACES)
    assert not any(isinstance(m, nn.ReLU | nn.ReLU6) for m in twin.modules())
    assert {sltt.Dropout, sltt.RunningMax, nn.LayerNorm} < {type(m) for m in twin.modules()}
    after = twin.state_dict()
    assert all(torch.equal(ann.state_dict()[name], value) for name, value in before.items())
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert {name.removesuffix(".threshold") for name in after.keys() - before.keys()} == {*(PLACES if balanced else [])}


def test_the_mean_over_time_is_the_activation():
    ann = nn.Sequential(nn.Linear(6, 50), nn.ReLU())
    x = torch.randn(20, 6)
    twin = spiking(ann, data=x, percentile=100)
    threshold = ann(x).amax(0)
    error = (sltt.unroll(twin, x, steps=64).mean(0) - ann(x)).abs()
    assert (error <= threshold * (0.5 / 64 + 1e-5)).all()


@pytest.mark.parametrize("pool", [nn.AvgPool2d, nn.MaxPool2d])
def test_the_logits_of_a_balanced_twin_come_near_those_of_the_ann(images, pool):
    ann = ANN(pool, nn.Identity).eval()  # LayerNorm of spikes is another than of their means
    with torch.no_grad():
        expected = ann(images)
    twin = spiking(ann, data=images, percentile=100)
    assert not twin.training
    errors = [(sltt.unroll(twin, images, steps=steps).mean(0) - expected).std() for steps in (2, 256)]
    assert errors[1] < errors[0] / 3
    assert errors[1] < 0.1 * expected.std()


class Pooled(nn.Module):
    """Max pooling as a module that is called twice, and as functions."""

    def __init__(self):
        super().__init__()
        self.pool, self.conv = nn.MaxPool2d(3, 1, padding=1), nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x):
        x = self.pool(self.conv(self.pool(F.relu(x))).relu())
        x = F.max_pool2d(x, 3, stride=1, ceil_mode=True) + torch.max_pool2d(x, 2, 1, dilation=2)
        return F.adaptive_max_pool2d(x, (2, 1)).flatten(1)


def test_every_max_pooling_is_one_over_time(images):
    ann = Pooled().eval()
    twin = spiking(ann, data=images, percentile=100)
    assert sum(isinstance(m, sltt.RunningMax) for m in twin.modules()) == 5
    expected, logits = ann(images), sltt.unroll(twin, images, steps=256).mean(0)
    assert (logits - expected).std() < 0.05 * expected.std()


def test_max_pooling_with_indices_stays(images):
    class Indices(nn.Module):
        def forward(self, x):
            return F.max_pool2d(F.relu(x), 2, return_indices=True)[0].flatten(1)

    twin = spiking(Indices())
    assert not any(isinstance(m, sltt.RunningMax) for m in twin.modules())
    assert sltt.unroll(twin, images, steps=2).shape == (2, 8, 50)


@pytest.mark.parametrize("levels", [1, 4, 8])
def test_qcfs_is_its_equation_and_what_its_neurons_give(levels):
    layer, x = QCFS(levels, clip=0.75), torch.linspace(-1, 2, 300)[:, None].requires_grad_()
    expected = 0.75 * ((x * levels / 0.75 + 0.5).floor() / levels).clamp(0, 1)
    y = layer(x)
    torch.testing.assert_close(y, expected)
    (slope,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    torch.testing.assert_close(slope, ((x > 0) & (x < 0.75)).float())
    twin = spiking(nn.Sequential(layer))
    torch.testing.assert_close(sltt.unroll(twin, x.detach(), steps=levels).mean(0), y.detach())


def test_thresholds_are_a_percentile_of_each_channel():
    activations = torch.arange(100.0).view(1, 1, 10, 10) * torch.tensor([1.0, 3.0, 0.0]).view(1, 3, 1, 1)
    torch.testing.assert_close(percentiles(activations, 1, 90).flatten(), torch.tensor([89.0, 267.0, 178.0]))
    torch.testing.assert_close(percentiles(activations[:, 2:], 1, 90).flatten(), torch.ones(1))


@NATIVE
@pytest.mark.parametrize("shape", [(), (16, 1, 1)])
@pytest.mark.parametrize("form", [torch.channels_last, torch.contiguous_format])
def test_spikes_times_their_threshold_are_bits(shape, form):
    y = Balanced(sltt.IF(), torch.full(shape, 2.5))(2 * torch.rand(8, 16, 8, 8).contiguous(memory_format=form))
    assert torch.equal(kernels.look(y).dense(), y)


def test_channels_behind_a_linear_layer_are_the_last_dimension():
    tokens = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    assert spiking(tokens, data=torch.randn(4, 5, 6)).get_submodule("1").threshold.shape == (1, 1, 8)
    signals = nn.Sequential(nn.Conv1d(6, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3))
    assert spiking(signals, data=torch.randn(4, 6, 5)).get_submodule("1").threshold.shape == (1, 8, 1)


@pytest.mark.parametrize("name", KINDS)
def test_gradients_of_a_twin_are_those_of_the_network_built_by_hand(name):
    rule = RULES[name]
    ann = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    layers = list(copy.deepcopy(ann))
    layers[1], layers[3] = sltt.IF(v_init=0.5), sltt.IF(v_init=0.5)
    x, y = 2 * torch.randn(4, 5, 6, dtype=torch.float64), torch.randint(3, (5,))
    of_twin, _ = gradients(spiking(ann), rule, x, y, seed=0)
    by_hand, _ = gradients(nn.Sequential(*layers), rule, x, y, seed=0)
    assert by_hand.abs().sum() > 0
    torch.testing.assert_close(of_twin, by_hand)


def network(*layers):
    return nn.Sequential(nn.Linear(6, 6), *layers)


class Forward(nn.Module):
    """A network that is a function."""

    def __init__(self, function):
        super().__init__()
        self.layer, self.function = nn.Linear(6, 6), function

    def forward(self, x):
        return self.function(self.layer(x))


def reads_afterwards(y):
    return F.relu(y, inplace=True) + y


def changes_a_part(y):
    y[:, :4].relu_()
    return y


BAD = {
    "a lambda": (Forward(lambda y: y * (y > 0)), r"gt \(gt\): no spiking counterpart"),
    "no activation": (network(), "no activation was found"),
    "GELU": (network(nn.GELU(), nn.ReLU(), nn.GELU()), r'1 \(gelu\), 3 \(gelu\): no .*train with ReLU, .*\["gelu"\]'),
    "SiLU as a function": (Forward(lambda y: F.silu(y).relu()), r"silu \(silu\): no spiking counterpart"),
    "in place": (Forward(reads_afterwards), r"changes in place what add \(add\) reads afterwards; use inplace=False"),
    "in place on a view": (Forward(changes_a_part), "changes a part of a tensor in place, which no trace shows"),
    "control flow": (Forward(lambda y: y.relu() if y.sum() > 0 else y), "cannot be traced.*control flow"),
    "dropout as a function": (Forward(lambda y: F.dropout(y.relu(), 0.1)), "`training` would be fixed"),
    "dropout of channels": (network(nn.ReLU(), nn.Dropout1d()), "another mask at every time step; use nn.Dropout"),
    "hidden": (network(nn.TransformerEncoderLayer(6, 2, batch_first=True)), "an activation hidden inside"),
    "neurons": (network(nn.ReLU(), sltt.LIF()), r"2 \(lif\): spiking neurons already"),
}


@pytest.mark.parametrize(("ann", "message"), BAD.values(), ids=BAD.keys())
def test_what_stands_in_the_way_is_named(ann, message):
    with pytest.raises(ValueError, match=message):
        spiking(ann)


def test_thresholds_are_of_images_without_augmentation():
    ann = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 10))
    generator = torch.get_rng_state()
    thresholds = [spiking(ann, data=sltt.data.Digits()).get_submodule("2").threshold for _ in range(2)]
    assert torch.equal(*thresholds)
    assert torch.equal(generator, torch.get_rng_state())


def test_other_arguments_that_do_not_fit(tmp_path):
    ann = network(nn.ReLU(), nn.Linear(6, 3))
    with pytest.raises(ValueError, match="images, and SequentialDigits has sequences"):
        spiking(ann, data=sltt.data.SequentialDigits())
    with pytest.raises(ValueError, match="NaN or infinite"):
        spiking(ann, data=torch.full((8, 6), torch.nan))
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "other.pt")
    with pytest.raises(RuntimeError, match="loading state_dict for Sequential"):
        spiking(ann, weights=str(tmp_path / "other.pt"))


def test_other_activations_on_request():
    ann = network(nn.GELU(), nn.Sigmoid(), nn.Linear(6, 3))
    twin = spiking(ann, replace=["gelu"], keep=["sigmoid"])
    assert [type(twin.get_submodule(name)) for name in "12"] == [sltt.IF, nn.Sigmoid]


class NormAct(nn.BatchNorm2d):
    """BatchNorm and activation in one, as timm has it."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x):
        statistics = self.running_mean, self.running_var
        return self.act(F.batch_norm(x, *statistics, self.weight, self.bias, self.training, self.momentum, self.eps))


def test_batchnorm_that_activates_is_batchnorm_and_neurons(images):
    ann = nn.Sequential(nn.Conv2d(2, 4, 3), NormAct(4), nn.Flatten(), nn.Linear(256, 3))
    twin = spiking(ann)
    assert type(twin.get_submodule("1")) is nn.BatchNorm2d
    assert type(twin.get_submodule("1.act")) is sltt.IF
    assert twin.state_dict().keys() == ann.state_dict().keys()
    sltt.SLTT()(twin, images, torch.zeros(8, dtype=torch.long), F.cross_entropy, steps=2)
    assert twin.get_submodule("1").num_batches_tracked == 2


def test_an_ann_and_its_twin_from_the_digits_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = "--epochs 1 --batch_size 512 --device cpu"
    main(f"train digits --run ann --model.neuron torch.nn.ReLU --steps 1 --model.width 4 {short}".split())
    words = "--model sltt.interop.spiking --model.neuron sltt.IF --model.ann DigitsNet --model.ann.neuron torch.nn.ReLU"
    words += " --model.ann.width 4 --model.weights ann/best.ckpt --model.data Digits --steps 2"
    assert main(f"train digits --run twin {words} {short}".split()) == 0
    assert main(["eval", "twin"]) == 0
    state = torch.load("twin/best.ckpt", weights_only=True)["model"]
    assert {"features.2.threshold", "head.weight"} <= state.keys()


class TwiceDropped(nn.Module):
    """One dropout at two widths."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 16), nn.Linear(16, 8), nn.Linear(8, 3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.last(self.dropout(F.relu(self.second(self.dropout(F.relu(self.first(x)))))))


def test_a_dropout_that_is_used_twice_draws_two_masks():
    twin = spiking(TwiceDropped()).train()
    assert [type(m) for m in twin.modules()].count(sltt.Dropout) == 2
    sltt.SLTT()(twin, torch.randn(6, 4), torch.arange(6) % 3, nn.CrossEntropyLoss(), steps=3)
