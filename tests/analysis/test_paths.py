from collections import Counter

import pytest
import torch
from torch import nn

import sltt
from sltt import kernels
from sltt.analysis import layer_paths
from sltt.kernels import native
from sltt.kernels.layers import costs, layers

pytestmark = pytest.mark.skipif(native.problem() is not None, reason=str(native.problem()))


def network() -> nn.Sequential:
    """Spikes read by convolutions: plain, behind average pooling, circular and transposed; and by a linear layer."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 16, 3, padding=1), sltt.LIF(), nn.Conv2d(16, 32, 3, padding=1), sltt.LIF(),
        nn.AvgPool2d(2), nn.Conv2d(32, 32, 1), sltt.LIF(), nn.Conv2d(32, 32, 3, padding=1, padding_mode="circular"),
        sltt.LIF(), nn.ConvTranspose2d(32, 32, 3, padding=1), sltt.LIF(), nn.Flatten(), nn.Linear(32 * 64, 16),
        sltt.LIF(), nn.Linear(16, 3),
    )  # fmt: skip
    return model.to(memory_format=torch.channels_last)


def images(steps=3, batch=4) -> torch.Tensor:
    x = 3 * torch.randn(steps * batch, 2, 16, 16)
    return x.contiguous(memory_format=torch.channels_last).unflatten(0, (steps, batch))


@pytest.mark.parametrize("mode", ["on", "auto", "off"])
def test_the_paths_are_those_of_a_training(mode, monkeypatch):
    monkeypatch.setattr(costs, "PRODUCTS_FROM", 2**18)
    monkeypatch.setattr(costs, "break_even", lambda *args: costs.BreakEven(0.0, 1.0))
    model, x, ran = network(), images(), Counter()
    forward, gradient = layers.sparse.forward, layers.sparse.weight_gradient

    def counted(kind, function):
        return lambda layer, *args: (ran.update([(kind, layer.weight_shape)]), function(layer, *args))[1]

    monkeypatch.setattr(layers.sparse, "forward", counted("forward", forward))
    monkeypatch.setattr(layers.sparse, "weight_gradient", counted("gradient", gradient))
    with kernels.using(sparse=mode, compile="off"):
        paths = layer_paths(model, x)
        ran.clear()
        sltt.SLTT()(model, x, torch.randint(3, (4,)), sltt.losses.CrossEntropyMSE())
    shapes = {name: tuple(m.weight.shape) for name, m in model.named_modules() if hasattr(m, "weight")}
    assert [path.name for path in paths] == list(shapes)
    for path in paths:
        assert path.sparse_forward == ran["forward", shapes[path.name]], path
        assert path.sparse_gradient == ran["gradient", shapes[path.name]], path
    # in one call of three steps; not what is padded by hand or transposed
    expected = {"on": {"2": (1, 1), "12": (1, 1)}, "auto": {"2": (0, 1), "12": (0, 1)}, "off": {}}[mode]
    found = {path.name: (path.sparse_forward, path.sparse_gradient) for path in paths if path.sparse_gradient}
    found.pop("5", None)  # the averages of few spikes may all be 0 or 1/4
    assert found == expected
    assert paths[1].density == pytest.approx(spikes_of(model, x))


def spikes_of(model: nn.Sequential, x: torch.Tensor) -> float:
    """Firing rate of the first layer of neurons."""
    seen = []
    handle = model[1].register_forward_hook(lambda module, args, out: seen.append(out))
    sltt.unroll(model, x)
    handle.remove()
    return float(torch.stack(seen).mean())


class Named(nn.Module):
    """Calls its layer by a named argument."""

    def __init__(self):
        super().__init__()
        self.layer, self.neuron, self.head = nn.Linear(4, 6), sltt.LIF(), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(input=self.neuron(self.layer(input=x)))


def test_layers_that_are_called_by_name_are_measured():
    x = torch.randn(3, 5, 4)
    assert [path.name for path in sltt.analysis.layer_paths(Named(), x)] == ["layer", "head"]
    assert [one.name for one in sltt.analysis.measure_energy(Named(), x).layers] == ["layer", "head"]
