"""What the trace of an ANN shows: activations by all their names, changes in place, and what differs in training."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sltt
from sltt.interop import spiking
from tests.interop.test_twin import Forward, NormAct, network

ANALOG = {
    "clampmin": lambda y: y.clamp_min(0),
    "clampmax": lambda y: torch.clamp_max(y, 1),
    "max": lambda y: torch.max(y, torch.tensor(0.0)),
    "min": lambda y: y.min(other=2 * y),
    "fmax": lambda y: torch.fmax(y, -y),
    "fmin": lambda y: torch.fmin(y, -y),
    "heaviside": lambda y: torch.heaviside(y, torch.tensor(0.0)),
    "pow": lambda y: y**2,
    "square": lambda y: y.square(),
    "sqrt": lambda y: torch.sqrt(y),
    "rsqrt": lambda y: torch.rsqrt(y),
    "expm1": lambda y: y.expm1(),
    "log1p": lambda y: torch.log1p(y),
    "atan": lambda y: torch.atan(y),
    "arctan": lambda y: y.arctan(),
    "logaddexp": lambda y: torch.logaddexp(y, -y),
    "round": lambda y: torch.round(y),
    "floor": lambda y: y.floor_(),
    "ceil": lambda y: torch.ceil(y),
    "floordiv": lambda y: y // 0.5,
    "expit": lambda y: torch.special.expit(y),
}


@pytest.mark.parametrize(("name", "function"), ANALOG.items(), ids=ANALOG.keys())
def test_an_activation_is_refused_beside_a_relu(name, function):
    ann = Forward(lambda y: function(F.relu(y)))
    with pytest.raises(ValueError, match=rf'\({name}\): no spiking counterpart; .* or keep=\["{name}"\]'):
        spiking(ann)
    x = torch.rand(4, 6)
    torch.testing.assert_close(spiking(ann, neuron=nn.ReLU, keep=[name])(x), ann(x))


@pytest.mark.parametrize("name", ["gt", "lt", "ge", "le"])
def test_a_comparison_is_no_place_for_neurons(name):
    with pytest.raises(ValueError, match=rf'\({name}\): no spiking counterpart; write F.relu, or keep=\["{name}"\]$'):
        spiking(Forward(lambda y: F.relu(y) * getattr(torch, name)(y, 0)))


class Scaled(nn.Module):
    """An activation of a weight."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([2.0]))

    def forward(self, y):
        return F.relu(y) * F.relu(self.scale).sqrt()


HARMLESS = {
    "pooling": lambda y: F.relu(y).max(dim=1).values + torch.min(y, 1)[0] + y.amax(1) + torch.max(y),
    "shapes": lambda y: F.relu(y)[:, : y.shape[1] // 2] / y.size(1) ** 0.5,
    "weights": Scaled(),
    "replaced by name": lambda y: torch.relu(y.max(dim=1).values),
}


@pytest.mark.parametrize("function", HARMLESS.values(), ids=HARMLESS.keys())
def test_pooling_and_math_on_shapes_and_weights_stay(function):
    ann, x = Forward(function), torch.randn(4, 6)
    twin = spiking(ann, neuron=nn.ReLU, replace=["max"])
    torch.testing.assert_close(twin(x), ann(x))
    assert [type(m) for m in twin.modules()].count(nn.ReLU) == 1


def test_a_norm_by_hand_is_kept_on_request():
    def norm(y):
        return F.relu(y * torch.rsqrt((y**2).mean(1, keepdim=True) + 1e-5))

    with pytest.raises(ValueError, match=r'pow_1 \(pow\): .*keep=\["pow"\]; rsqrt \(rsqrt\)'):
        spiking(Forward(norm))
    assert isinstance(spiking(Forward(norm), keep=["pow", "rsqrt"]).get_submodule("relu"), sltt.IF)


class Flattened(nn.Module):
    """A view by a module."""

    def __init__(self):
        super().__init__()
        self.flatten, self.relu = nn.Flatten(), nn.ReLU(inplace=True)

    def forward(self, y):
        return self.relu(self.flatten(y)) + y


class Passed(nn.Module):
    """Its input itself in evaluation mode."""

    def forward(self, y):
        return 2 * y if self.training else y


class BehindPassed(Flattened):
    def __init__(self):
        super().__init__()
        self.flatten = Passed()


def adds(y):
    z = y = F.relu(y)
    z += 1
    return y + z


def scales_a_view(y):
    z = F.relu(y).view(2, -1)
    w = z[0]
    w *= 2
    return w + z[-1]


def view_from_before(y):
    z = y.view(2, -1)
    return F.relu_(y).sum() + z


def sums_up(y):
    z = torch.zeros(6)
    z += F.relu(y).sum(0)
    return z


IN_PLACE = {
    "flatten": lambda y: F.relu_(y.flatten(1)) + y,
    "view": lambda y: F.relu_(y.view(-1, 6)) + y,
    "reshape": lambda y: y.reshape(-1, 6).relu_() + y,
    "chunk": lambda y: F.relu_(y.chunk(2, 1)[0]) + y[:, :3],
    "transpose": lambda y: F.relu(y.transpose(0, 1), inplace=True).t() + y,
    "slice": lambda y: F.relu_(y[:, :3]) + y[:, 2:5],
    "attribute": lambda y: F.relu_(y.T).T + y,
    "module": Flattened(),
    "module that reads its mode": BehindPassed(),
    "another view": view_from_before,
    "+=": adds,
    "*= on a view": scales_a_view,
    "mul_": lambda y: F.relu(y).mul_(2) + y.add_(1) + y,
}


@pytest.mark.parametrize("function", IN_PLACE.values(), ids=IN_PLACE.keys())
def test_a_change_in_place_of_what_is_read_later_is_refused(function):
    with pytest.raises(
        ValueError, match=r"changes in place what .* reads afterwards; use inplace=False, or z = z \+ x"
    ):
        spiking(Forward(function))


def test_a_sum_over_time_steps_by_accident_is_refused():
    with pytest.raises(ValueError, match="changes in place what every time step reads"):
        spiking(Forward(sums_up))


def counts(y):
    n = y.shape[1]
    n += 1
    return F.relu(y) * n + y.shape[1]


def not_read_later(y):
    z = F.relu(y)
    z += y
    return z.view(2, -1).relu_()


ALLOWED = {
    "shapes are read": lambda y: F.relu_(y) * y.shape[1] + y.size(0),
    "a number": counts,
    "what nothing reads": not_read_later,
    "dropout": nn.Sequential(nn.ReLU(inplace=True), nn.Dropout(0.5, inplace=True)),
}


@pytest.mark.parametrize("function", ALLOWED.values(), ids=ALLOWED.keys())
def test_other_changes_in_place_are_taken(function):
    ann, x = Forward(function).eval(), torch.randn(4, 6)
    torch.testing.assert_close(spiking(ann, neuron=nn.ReLU)(x), ann(x))


def test_a_module_that_is_scripted_is_named():
    with pytest.raises(ValueError, match=r"no spiking twin of Sequential: 1 is of torch\.jit"):
        spiking(network(torch.jit.script(nn.Sequential(nn.ReLU())), nn.ReLU()))


class DropPath(nn.Module):
    """Leaves out its input for some samples in training, as timm's."""

    def forward(self, x):
        return x * self.mask(x)

    def mask(self, x):
        return torch.rand(64, 1).round() / 0.5 if self.training else 1


def test_a_module_that_reads_its_mode_stays_as_it_is():
    ann = network(nn.ReLU(), DropPath(), nn.Linear(6, 3))
    twin, x = spiking(ann, neuron=nn.ReLU), torch.randn(64, 6)
    outputs = []
    for mode in (False, True):
        for model in (ann, twin):
            torch.manual_seed(0)
            outputs.append(model.train(mode)(x))
    torch.testing.assert_close(outputs[0], outputs[1])
    torch.testing.assert_close(outputs[2], outputs[3])
    assert not torch.allclose(outputs[0], outputs[2])


def test_batchnorm_of_the_user_is_batchnorm():
    norm = NormAct(4)
    norm.act = nn.Identity()
    twin = spiking(nn.Sequential(nn.Conv2d(2, 4, 3), norm, nn.ReLU()))
    assert type(twin.get_submodule("1")) is nn.BatchNorm2d


class Reads(nn.Module):
    """Begins with a function of the image."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def moved(x):
    x -= 0.5
    return x


OF_THE_IMAGE = {
    "sub_": lambda x: x.sub_(0.5),
    "a view": lambda x: x.view(-1, 6).mul_(2),
    "out=": lambda x: torch.mul(x, 2, out=x),
}


@pytest.mark.parametrize("function", OF_THE_IMAGE.values(), ids=OF_THE_IMAGE.keys())
def test_a_change_in_place_of_the_image_is_refused(function):
    with pytest.raises(ValueError, match=r"changes in place what every time step|writes into another"):
        spiking(nn.Sequential(Reads(function), nn.Linear(6, 4), nn.ReLU()))


@pytest.mark.parametrize("first", [nn.ReLU(inplace=True), Reads(moved)], ids=["activation", "-="])
def test_balancing_leaves_the_images_as_they_are(first):
    x = torch.randn(5, 6)
    before = x.clone()
    spiking(nn.Sequential(first, nn.Linear(6, 4), nn.ReLU()), data=x)
    assert torch.equal(x, before)
