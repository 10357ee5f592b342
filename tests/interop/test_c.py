"""Networks in C: compiled once, and compared with the networks that they were written of."""

import ctypes
import functools
import re
import shutil
import subprocess
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import sltt
from sltt.analysis import measure_energy
from sltt.commands import main
from sltt.commands.export import CORTEX, _measure
from sltt.interop import to_c
from sltt.interop.c import Exported, pixels_first
from sltt.models.resnet import Block

STRICT = ["-std=c11", "-O2", "-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-Werror", "-pedantic"]
NEURONS = {"LIF soft": sltt.LIF(tau=2.0), "LIF hard": sltt.LIF(tau=2.0, v_reset=0.1, decay_input=True, v_threshold=0.5)}
NEURONS |= {"LIF hard below 0": sltt.LIF(tau=3.0, v_reset=-0.3, v_init=0.2)}
NEURONS |= {"LIF above": sltt.LIF(tau=2.0, surrogate=sltt.surrogates.Above(sltt.surrogates.Triangle()))}
NEURONS |= {"IF soft": sltt.IF(v_init=0.5), "IF hard": sltt.IF(v_reset=0.0), "PLIF soft": sltt.PLIF(tau=3.0)}
NEURONS |= {"PLIF hard": sltt.PLIF(tau=3.0, v_reset=0.0, decay_input=True, v_threshold=0.3)}
NEURONS |= {"ChannelLIF": sltt.ChannelLIF(16), "CubaLIF soft": sltt.CubaLIF(tau=3.0, gain=0.5)}
NEURONS |= {"CubaLIF hard": sltt.CubaLIF(tau=None, v_reset=0.2), "ALIF": sltt.ALIF(tau=3.0, tau_a=4.0, beta=0.4)}


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        lif = functools.partial(sltt.LIF, tau=2.0)
        self.stem, self.head = nn.Conv2d(2, 8, 3, padding=1), nn.Linear(12, 4)
        self.blocks = nn.Sequential(Block(8, 8, 1, lif, 0.0), Block(8, 12, 2, lif, 0.1))
        self.norm, self.neuron = nn.BatchNorm2d(12), sltt.LIF()

    def forward(self, x):
        x = self.neuron(self.norm(self.blocks(sltt.once(self.stem, x))))
        return self.head(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1)) / 2


class Sums(nn.Module):
    """Sums of currents, of spikes, and of both."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 6, 1)
        self.three = nn.Conv2d(6, 6, 3, padding=1)
        self.first, self.second, self.third = sltt.IF(), sltt.LIF(v_threshold=0.5), sltt.LIF()
        self.head = nn.Linear(6 * 25, 4)

    def forward(self, x):
        s = self.first(self.one(x))
        y = self.second(self.two(s) + self.three(s)) + s
        return self.head((y + self.third(self.one(x) + y)).flatten(1))


class Written(nn.Module):
    """What people write instead of layers, with one output."""

    def __init__(self, image: bool):
        super().__init__()
        self.image, conv = image, nn.Conv2d if image else nn.Conv1d
        self.conv, self.pool = conv(3, 8, 3), (nn.MaxPool2d if image else nn.MaxPool1d)(2, ceil_mode=True)
        gains = torch.linspace(-2, 1, 6).view((6, 1, 1) if image else (6, 1))
        self.next, self.gains = conv(8, 6, 3, bias=False), nn.Parameter(gains)
        self.neuron, self.last = sltt.LIF(v_threshold=0.3), sltt.LIF(v_threshold=0.1)
        self.one, self.two = nn.Linear(6, 1), nn.Linear(6 * (9 if image else 3), 1, bias=False)

    def forward(self, x):
        x = self.pool(self.neuron(self.conv(1 - (-(x - 0.5) + 0.5))))
        x = self.last(nn.functional.dropout(self.next(x) / self.gains.exp(), training=self.training) * self.gains)
        mean = torch.mean(x, dim=(-1, 2)) if self.image else x.mean(-1, keepdim=True).squeeze(-1)
        return self.one(mean.view(mean.size(0), -1)) + self.two(x.reshape(x.shape[0], -1)) - 0.5


class Branches(nn.Module):
    """Branches that are joined: spikes; inputs, currents and spikes; a flattened image and a vector; two heads."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.next = nn.Conv2d(2, 33, 3, padding=1), nn.Conv2d(2, 6, 1), nn.Conv2d(39, 5, 1)
        self.neurons = nn.ModuleList(sltt.LIF(tau=2.0, v_threshold=v) for v in (0.6, 0.6, 0.4, 0.9, 0.1))
        self.vector, self.pool = nn.Linear(12 * 20, 9), nn.AvgPool2d(2)
        self.heads = nn.ModuleList([nn.Linear(12 * 4 + 9, 3), nn.Linear(12 * 4 + 9, 1)])

    def forward(self, x):
        one, two, three, joined, last = self.neurons
        y = self.next(torch.cat([one(self.one(x)), two(self.two(x))], dim=1))
        y = joined(torch.concat((x, y, three(y)), -3))
        y = torch.cat([self.pool(y).flatten(1), last(self.vector(y.flatten(1)))], 1)
        return torch.cat([head(y) for head in self.heads], 1)


class Flat(nn.Module):
    """What reads a flattened image with channels of its own, and a readout that integrates."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.neuron = nn.Conv2d(2, 3, 3), nn.BatchNorm1d(18), sltt.ChannelLIF(18, v_threshold=0.3)
        self.back = sltt.Recurrent(sltt.LIF(v_threshold=0.4), nn.Linear(18, 18))
        self.other, self.head, self.readout = nn.Linear(40, 18), nn.Linear(18, 4), sltt.LI(4.0)

    def forward(self, x):
        y = self.conv(x).flatten(1)
        return self.readout(self.head(self.neuron(self.norm(y + self.other(x.flatten(1)))) + self.back(y)))


class Unsqueezed(nn.Sequential):
    def forward(self, x):
        return super().forward(x.unsqueeze(1))


def networks() -> dict[str, tuple[nn.Module, tuple[int, ...], int | None]]:
    """Networks by name, with the shape of an input and T of a static one."""
    torch.manual_seed(0)
    found: dict[str, Any] = {
        name: (nn.Sequential(nn.Linear(12, 16), neuron, nn.Linear(16, 3)), (8, 4, 12), None)
        for name, neuron in NEURONS.items()
    }
    above = nn.Sequential(nn.Linear(12, 16), NEURONS["LIF above"], nn.Linear(16, 3))
    for parameter in above[0].parameters():
        parameter.data = (16 * parameter.data).round() / 8  # with whole inputs, potentials meet the threshold often
    found["LIF above"] = above, (8, 4, 12), None
    conv = functools.partial(nn.Conv2d, bias=False)
    grouped = [nn.Conv2d(2, 8, 3, stride=2, padding=1, groups=2), nn.MaxPool2d(3, 2, padding=1), nn.BatchNorm2d(8)]
    grouped += [sltt.LIF(tau=2.0, decay_input=True, v_threshold=0.3), conv(8, 16, (3, 2), padding=(0, 1), groups=8)]
    grouped += [sltt.LIF(v_threshold=0.2), nn.AvgPool2d(2, 1, 1), nn.Flatten(), nn.Linear(160, 5)]
    one = [nn.Conv1d(3, 8, 3, padding="same"), nn.BatchNorm1d(8), sltt.LIF(tau=2.0), nn.AvgPool1d(2), nn.Dropout(0.2)]
    one += [nn.Conv1d(8, 8, 2, stride=2), sltt.PLIF(v_threshold=0.3), nn.MaxPool1d(2), nn.Flatten()]
    one += [nn.Linear(16, 4), sltt.IF(v_threshold=0.2)]
    back = sltt.Recurrent(sltt.ALIF(tau=2.0), nn.Conv2d(4, 4, 3, padding=1))
    back = nn.Sequential(nn.Conv2d(1, 4, 3), back, nn.Flatten(), nn.Linear(64, 4))
    found |= {
        "MLP": (sltt.models.MLP([64, 32, 32, 10]), (4, 1, 8, 8), 5),
        "DigitsNet": (sltt.models.DigitsNet(width=4), (4, 1, 8, 8), 4),
        "events": (sltt.models.DigitsNet(2, width=4), (5, 4, 2, 12, 9), None),
        "groups": (nn.Sequential(*grouped), (4, 4, 2, 12, 9), None),
        "one dimension": (nn.Sequential(*one), (6, 4, 3, 18), None),
        "odd pooling": (sltt.models.VGG(((8,), (8, 12)), 2, 4), (4, 4, 2, 11, 8), None),
        "Residual": (Residual(), (5, 4, 2, 6, 7), None),
        "ShallowResNet": (sltt.models.ShallowResNet((6, 8), stem=4), (4, 3, 12, 12), 4),
        "Sums": (Sums(), (5, 4, 2, 5, 5), None),
        "recurrent MLP": (sltt.models.MLP([20, 24, 24, 5], sltt.PLIF, recurrent=True), (6, 4, 20), None),
        "recurrent convolution": (back, (6, 4, 1, 6, 6), None),
    }
    far = nn.Sequential(nn.Linear(4096, 4, bias=False), sltt.IF(), nn.Linear(4, 3))
    far[0].weight.data = torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None] * (torch.arange(4096) < 16)
    found["potentials that reach the limit"] = far, (40, 1, 4096), None
    with torch.random.fork_rng():  # the numbers that the others draw stay as they are
        found |= more_networks()
    return found


def more_networks() -> dict[str, Any]:
    """Networks of dilated convolutions, and of neurons with states of 16 bits."""
    dilated = [nn.Conv2d(2, 8, 3, stride=2, padding=3, dilation=(2, 3)), sltt.LIF(v_threshold=0.3)]
    dilated += [nn.Conv2d(8, 8, (2, 3), padding="same", dilation=2, groups=2), sltt.LIF(v_threshold=0.3), nn.Flatten()]
    found: dict[str, Any] = {"dilated": (nn.Sequential(*dilated, nn.Linear(8 * 7 * 5, 5)), (4, 4, 2, 12, 9), None)}
    neurons = [sltt.IF(), sltt.CubaLIF(tau=3.0), sltt.ALIF(tau=3.0, tau_a=4.0, beta=0.4)]
    neurons += [sltt.LIF(v_reset=-0.3, v_init=0.2)]
    chain = [module for neuron in neurons for module in (nn.Linear(12, 12), neuron)]
    for layer in chain[::2]:
        layer.weight.data *= 3
    found["small neurons of each kind"] = nn.Sequential(*chain, nn.Linear(12, 3)), (8, 4, 12), None
    grey = [nn.Conv2d(1, 8, 3), sltt.LIF(v_threshold=0.3), nn.Flatten(), nn.Linear(8 * 12, 3)]
    found["without channels"] = Unsqueezed(*grey), (6, 4, 8, 4), None
    found["branches"], found["flattened"] = (Branches(), (6, 4, 2, 4, 5), None), (Flat(), (6, 4, 2, 4, 5), None)
    pixels = [sltt.LI(2.0, decay_input=True), nn.Conv2d(2, 9, 3, padding=1), sltt.LIF(v_threshold=0.3)]
    pixels += [nn.Conv2d(9, 3, 3)]
    found["logits of pixels"] = nn.Sequential(*pixels, sltt.LI(3.0)), (6, 4, 2, 4, 5), None
    found["spikes of pixels"] = nn.Sequential(nn.Conv1d(2, 3, 2), sltt.LI(), sltt.LIF(v_threshold=0.3)), (4, 2, 6), 5
    found["one output"] = Written(True), (6, 4, 3, 11, 11), None
    found["one output of a signal"] = Written(False), (6, 4, 3, 11), None
    found["kept sums"] = Sums(), (4, 2, 5, 5), 5
    found["kept where there is room"] = sltt.models.MLP([16, 64, 10]), (4, 16), 5
    delayed = nn.Sequential(sltt.Delay([1, 0]), *dilated[2:], nn.Linear(8 * 12 * 9, 5))
    found["kept for a delay"] = delayed, (4, 4, 12, 9), 5
    late = [sltt.Delay([0, 3]), nn.Conv2d(4, 12, 3, padding=1), sltt.LIF(v_threshold=0.3), sltt.Delay([2, 0, 5])]
    late += [nn.Conv2d(36, 40, 3, groups=4), sltt.LIF(v_threshold=0.2), sltt.Delay([0]), sltt.Delay([1, 4])]
    late += [nn.AvgPool2d(2), sltt.Delay([0, 1]), nn.Flatten(), sltt.Delay([0, 2]), nn.Linear(1280, 33)]
    late += [sltt.LIF(v_threshold=0.3), sltt.Delay([0, 1]), nn.Linear(66, 3)]
    found["delays"] = nn.Sequential(*late), (12, 4, 2, 6, 7), None
    fine = [nn.AvgPool2d(2), nn.Identity(), sltt.LIF(tau=4.0, v_threshold=5.1), nn.BatchNorm2d(2)]
    fine += [nn.Conv2d(2, 8, 3), sltt.LIF(v_threshold=0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)]
    taken = ("NULL", "no", "exp_gain", "exp", "größe", "gr__e", "int8_t", "flat", "main")  # by C, gcc, each other
    found["finer units"] = nn.Sequential(OrderedDict(zip(taken, fine, strict=True))), (16, 16, 2, 12, 9), None
    less = [nn.Linear(12, 16), sltt.LIF(tau=2.0, v_threshold=0.3, subtract=0.2), nn.Linear(16, 16)]
    less += [sltt.LIF(tau=2.0, v_reset=0.0, v_threshold=0.1), nn.Linear(16, 3)]
    found["another reset"] = nn.Sequential(*less), (8, 4, 12), None
    row = [nn.Linear(64, 512), nn.Linear(512, 32), sltt.LIF(v_threshold=0.1), nn.Linear(32, 32), nn.Linear(32, 3)]
    found["linear layers in a row"] = nn.Sequential(*row), (8, 4, 64), None
    constant, small = nn.BatchNorm1d(12), nn.BatchNorm1d(12)
    constant.weight.data, small.weight.data = 10.0 ** -torch.arange(12), 10.0 ** -(torch.arange(12) % 4)
    found["small channels"] = nn.Sequential(small, nn.Linear(12, 3), sltt.LI(2.0)), (8, 16, 12), None
    deep = [constant, nn.Linear(12, 64), sltt.LIF(v_threshold=0.3), *[nn.Linear(64, 64) for _ in range(4)]]
    found["constant channels, deep"] = nn.Sequential(*deep, nn.Linear(64, 3)), (8, 16, 12), None
    graded = [nn.Conv2d(2, 33, 3, padding=1), sltt.IntegerLIF(v_threshold=0.3), nn.MaxPool2d(2), sltt.TernaryLIF()]
    graded += [sltt.Delay([1, 0]), nn.BatchNorm2d(66), sltt.LIF(), nn.AvgPool2d(2, 1), sltt.IntegerLIF(v_threshold=0.5)]
    back = sltt.Recurrent(sltt.TernaryLIF(v_threshold=0.4), nn.Linear(9, 9))
    graded += [nn.Flatten(), nn.Linear(132, 9), back, nn.Linear(9, 3)]
    found["graded spikes"] = nn.Sequential(*graded), (8, 4, 2, 4, 6), None
    return found


SIZES = {
    "digits": (sltt.models.DigitsNet, torch.randn(4, 1, 8, 8), 4, 21_000),
    "digits-events": (lambda: sltt.models.DigitsNet(2, width=16), torch.ones(2, 4, 2, 16, 16), None, 34_000),
    "nmnist": (lambda: sltt.models.VGG(((32,), (64,), (128,)), 2, 10), torch.ones(2, 4, 2, 34, 34), None, 150_000),
}


def settle(model: nn.Module, x: torch.Tensor, steps: int | None = None) -> None:
    """Run a network until all BatchNorms have statistics with which the neurons behind them fire."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 0.5
        nn.init.uniform_(norm.bias, -0.3, 0.3)
        norm.weight.data[::4] *= -1
    for _ in range(20 if norms else 0):
        sltt.unroll(model.train(), x, steps=steps)


@dataclass
class Case:
    model: nn.Module
    x: torch.Tensor  # [T, B, ...]
    exported: Exported
    name: str


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The networks in both arithmetics, and a library of all, from one call of the compiler."""
    folder = tmp_path_factory.mktemp("c")
    cases = {}
    for i, (key, (model, shape, steps)) in enumerate(networks().items()):
        counts = key in ("events", "LIF above", "finer units")
        x = torch.randint(0, 4, shape).float() if counts else 2 * torch.rand(shape)
        x = torch.full(shape, 1.5) if "limit" in key else x
        settle(model, x, steps)
        whole = x if steps is None else x.expand(steps, *x.shape)
        for weights in ("float32", "int8"):
            name, ram = f"n{i}_{weights}", {"float32": 650, "int8": 500}[weights] if "room" in key else None
            exported = to_c(model, x, folder / name, name=name, steps=steps, weights=weights, ram=ram)
            assert len(repr(exported)) < 200 + len(str(folder))
            cases[key, weights] = Case(model.eval(), whole, exported, name)
    names = [case.name for case in cases.values()]
    sizes = "".join(
        f'#include "{n}/{n}.h"\nextern const int {n}_size;\nconst int {n}_size = sizeof({n}_net);\n' for n in names
    )
    (folder / "sizes.c").write_text(sizes)
    sources = [f"{name}/{name}.c" for name in names]
    library = folder / "networks.so"
    subprocess.run(
        ["gcc", *STRICT, "-O0", "-fPIC", "-shared", "-o", library, "sizes.c", *sources], cwd=folder, check=True
    )
    return cases, ctypes.CDLL(str(library))


def run(case: Case, library: Any) -> torch.Tensor:
    """The logits [T, B, classes] of C on the samples of a case, in numbers of the network."""
    network, name = case.exported.network, case.name
    assert case.exported.ram == ctypes.c_int.in_dll(library, f"{name}_size").value
    rows = re.findall(r"^\| `.* \| ([\d,]+) \| ([\d,]+) \|$", (case.exported.folder / "README.md").read_text(), re.M)
    ram, flash = (sum(int(row[i].replace(",", "")) for row in rows) for i in range(2))
    assert (-(-ram // 4) * 4, flash) == (case.exported.ram, case.exported.flash)  # whole words
    given, kind = (network.to_integers(case.x), np.int8) if network.integers else (case.x, np.float32)
    inputs = np.ascontiguousarray(pixels_first(network, given).numpy().astype(kind))
    net = np.full(case.exported.ram // 4, 1 << 30, dtype=np.int32)
    logits = np.zeros((*case.x.shape[:2], network.output.size), np.int32 if network.integers else np.float32)
    for b in range(logits.shape[1]):
        for t in range(len(logits)):
            at, given, out = (a.ctypes.data_as(ctypes.c_void_p) for a in (net, inputs[b, t], logits[t, b]))
            if t == 0:
                getattr(library, f"{name}_reset")(at, *[given] * bool(network.once))
            getattr(library, f"{name}_step")(at, *[given] * (not network.once), out)
    channels, height, width = network.output.shape
    images = torch.from_numpy(logits).unflatten(2, (height, width, channels)).permute(0, 1, 4, 2, 3)
    return images.reshape(*logits.shape[:2], *network.shape)


@pytest.mark.parametrize("key", networks())
def test_c_gives_the_logits_of_the_network(key, compiled):
    cases, library = compiled
    case = cases[key, "float32"]
    with sltt.analysis.firing_rates(case.model) as rates:
        expected = sltt.unroll(case.model, case.x)
    assert all(0.01 < rate < 0.95 for rate in rates.by_layer().values())
    torch.testing.assert_close(run(case, library), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("key", networks())
def test_c_in_integers_is_the_reference_to_the_last_bit(key, compiled):
    cases, library = compiled
    case = cases[key, "int8"]
    got, network = run(case, library), case.exported.network
    assert torch.equal(got.double(), network.unroll(case.x[0] if network.once else case.x))
    expected = sltt.unroll(case.model, case.x).mean(0)
    apart = (got.mean(0, dtype=torch.float64) * network.logit_scale - expected).std()
    fine = ("linear layers in a row", "finer units", "branches", "flattened", "logits of pixels", "spikes of pixels")
    fine += ("constant channels, deep", "small channels")
    assert apart < (0.06 if "deep" in key else 0.15 if key in fine else 0.5) * expected.std()


def test_graded_spikes_at_their_levels_are_those_of_the_network(tmp_path):
    neuron = sltt.IntegerLIF(8, surrogate=sltt.surrogates.Above(sltt.surrogates.Rectangle()))
    model = nn.Sequential(nn.Linear(9, 9, bias=False), neuron, nn.Linear(9, 9, bias=False))
    for layer in model[::2]:
        layer.weight.data = torch.eye(9)
    x = torch.arange(9.0)[None, None] + 0.5
    exported = to_c(model, x, tmp_path / "c", name="net")
    assert exported.network.unroll(x).flatten().tolist() == sltt.unroll(model, x).flatten().tolist() == [*range(9)]


ONCE = {
    "DigitsNet": ["features.0 (Conv2d)", "the output of features.0 (Conv2d)"],
    "kept sums": ["one (Conv2d)", "the output of one (Conv2d)"] * 2,
    "kept where there is room": ["the input"],
    "kept for a delay": ["the input"],
    "events": [],
}


@pytest.mark.parametrize("weights", ["float32", "int8"])
@pytest.mark.parametrize("key", ONCE)
def test_layers_before_the_first_states_of_a_static_input_run_once(key, weights, compiled):
    case = compiled[0][key, weights]
    network, folder = case.exported.network, case.exported.folder
    assert [op.name for op in network.operations[: network.once]] == ONCE[key]
    assert "{N}" not in (folder / f"{case.name}.h").read_text()
    step = (folder / f"{case.name}.c").read_text().partition(f"{case.name}_step(")[2].partition("}")[0]
    assert ("input" in step) == (not ONCE[key])


def test_no_sum_of_integers_leaves_32_bits(tmp_path):
    wide, steps = nn.Sequential(nn.BatchNorm1d(700, affine=False), nn.Linear(700, 4), sltt.IF(), nn.Linear(4, 3)), 600
    wide[1].weight.data.fill_(1.0)  # with 64 units for an event, sums of 700 · 127 · 127 · 64
    wide[0].running_mean.fill_(0.3)
    wide[3].weight.data *= 1e-5  # beside a bias of 2²² units, for 600 steps
    network = to_c(wide.eval(), torch.ones(2, 700), tmp_path / "a", steps=steps, weights="int8").network
    assert {bound < 2**29 for bound in network.bounds.values()} == {True}
    assert 2**29 < network.bounds[network.output] * steps < 2**31
    assert [op.gain.unique().tolist() for op in network.operations if hasattr(op, "gain")] == [[8.0]]


def test_weights_behind_large_biases_keep_their_8_bits(tmp_path):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64), sltt.LIF(), nn.Linear(64, 5))
    for layer in (model[0], model[1], model[2]):
        layer.bias.data.normal_(0, 0.3)
    network = to_c(model, torch.randn(6, 8, 64), tmp_path / "a", weights="int8").network
    assert {op.weight.abs().max().item() for op in network.operations if hasattr(op, "weight")} == {127}


def test_in_int8_a_neuron_that_fires_above_its_threshold_does_not_at_it(tmp_path):
    neuron = sltt.IF(0.5, surrogate=sltt.surrogates.Above(sltt.surrogates.Triangle()))
    model, x = nn.Sequential(nn.AvgPool2d(2), neuron, nn.Flatten(), nn.Linear(16, 3)), torch.rand(6, 8, 1, 8, 8).round()
    network = to_c(model, x, tmp_path / "a", weights="int8").network
    expected = sltt.unroll(model, x)
    torch.testing.assert_close((network.unroll(x) * network.logit_scale).float(), expected, rtol=0, atol=0.01)


@pytest.mark.parametrize("recipe", SIZES)
def test_what_the_recipes_take_in_memory(recipe, tmp_path):
    make, x, steps, most = SIZES[recipe]
    exported = to_c(make().eval(), x, tmp_path / "a", steps=steps, weights="int8")
    assert exported.ram < most
    assert sum(op.output.size for op in exported.network.neurons) * 2 < exported.ram  # states of 16 bits


@pytest.mark.parametrize(
    ("key", "weights"), [("events", "float32"), ("Residual", "int8"), ("recurrent MLP", "float32"), ("delays", "int8")]
)
def test_the_exported_test_passes_under_sanitizers_and_finds_a_wrong_weight(key, weights, compiled):
    """The folder is whole: Makefile, test and vectors."""
    case = compiled[0][key, weights]
    folder, name = case.exported.folder, case.name
    flags = " ".join([*STRICT, "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"])
    make = ["make", "-s", f"CFLAGS={flags}", "LDFLAGS=-fsanitize=address,undefined"]
    passed = subprocess.run(make, cwd=folder, capture_output=True, text=True, check=False)
    assert passed.returncode == 0, passed.stderr
    assert "0 of" in passed.stdout
    if (key, weights) == ("events", "float32"):
        source = folder / f"{name}.c"
        head, begin, rest = source.read_text().partition("head_bias[10] = {\n")
        source.write_text(f"{head}{begin}    9.0f, {rest.split(', ', 1)[1]}")
        failed = subprocess.run(["make", "-s", "-B"], cwd=folder, capture_output=True, text=True, check=False)
        assert "logits differ" in failed.stdout
        assert failed.returncode


@pytest.mark.parametrize(("most", "there"), [(100, True), (200, False)])
def test_in_int8_there_are_events_where_one_is_1_in_the_input(most, there, tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(8, 16), sltt.LIF(v_threshold=50.0), nn.Linear(16, 3))
    x = torch.randint(most + 1, (4, 3, 2, 2, 2)).float()
    x[0, 0] = most
    sltt.interop.to_c(model, x, tmp_path / "net", name="net", weights="int8")
    assert ("net_event(" in (tmp_path / "net" / "net.h").read_text()) == there


def test_events_count_as_the_frame_does(compiled):
    cases, library = compiled
    for weights, kind, given in (("float32", np.float32, np.float32), ("int8", np.int32, np.int8)):
        case = cases["events", weights]
        frame = pixels_first(case.exported.network, case.x)[0, 0].reshape(12, 9, 2)  # [H, W, C] of the first step
        net, logits = np.zeros(case.exported.ram // 4, np.int32), np.zeros((3, 10), kind)
        frames = np.stack([frame.numpy(), 0 * frame.numpy()]).astype(given)
        places = [a.ctypes.data_as(ctypes.c_void_p) for a in (net, *logits, *frames)]
        getattr(library, f"{case.name}_reset")(places[0])
        for y, x, polarity in frame.nonzero().tolist():
            for _ in range(int(frame[y, x, polarity])):
                getattr(library, f"{case.name}_event")(places[0], x, y, polarity)
        for outside in ((9, 0, 0), (-1, 0, 0), (0, 12, 0), (0, 0, 2)):
            getattr(library, f"{case.name}_event")(places[0], *outside)
        getattr(library, f"{case.name}_tick")(places[0], places[1])
        assert np.array_equal(logits[0], run(case, library)[0, 0].numpy())
        getattr(library, f"{case.name}_tick")(places[0], places[2])
        getattr(library, f"{case.name}_reset")(places[0])
        for place in places[4:]:
            getattr(library, f"{case.name}_step")(places[0], place, places[3])
        assert np.array_equal(logits[1], logits[2])  # the events of the first step are gone in the second


def test_inputs_beyond_the_range_saturate(compiled):
    cases, library = compiled
    for key in ("MLP", "events"):
        case = cases[key, "int8"]
        network, quantise = case.exported.network, getattr(library, f"{case.name}_quantise")
        quantise.restype, quantise.argtypes = ctypes.c_int8, [ctypes.c_float]
        values = torch.tensor([0, 0.49, 0.51, 1.5, -1.5, 126.4, 126.6, 128, 300, -128, -1e30, torch.inf, -torch.inf])
        values = torch.cat([values * network.input_scale, 300 * torch.randn(100)])
        assert [quantise(value) for value in values.tolist()] == network.to_integers(values).tolist()
        assert quantise(torch.nan) in range(-127, 128)
    net, logits, frame = np.zeros(case.exported.ram // 4, np.int32), np.zeros((2, 10), np.int32), np.zeros(216, np.int8)
    frame[2 * (9 * 3 + 5)] = 127
    places = [a.ctypes.data_as(ctypes.c_void_p) for a in (net, *logits, frame)]
    for _ in range(300):
        getattr(library, f"{case.name}_event")(places[0], 5, 3, 0)
    getattr(library, f"{case.name}_tick")(places[0], places[1])
    getattr(library, f"{case.name}_reset")(places[0])
    getattr(library, f"{case.name}_step")(places[0], places[3], places[2])
    assert np.array_equal(*logits)


SMALL = ["--model.width", "4", "--epochs", "2", "--device", "cpu"]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["digits", "digits-events"])
def test_the_command_exports_a_run_and_says_what_it_costs(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", recipe, *SMALL]) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    capsys.readouterr()
    assert main(["export", str(folder), "--to", "c"]) == 0
    assert main(["export", str(folder), "--to", "c", "--out", "int8", "--name", "small", "--weights", "int8"]) == 0
    shown = capsys.readouterr().out
    for place, name in ((folder / "c", recipe.replace("-", "_")), (tmp_path / "int8", "small")):
        assert re.search(
            rf"RAM +[\d,]+ bytes, sizeof\({name}_net\), .*stack\noperations .* sums and .*\ninstructions", shown
        )
        subprocess.run(["make", "-s"], cwd=place, check=True)
        assert ("_event(" in (place / f"{name}.h").read_text()) == (recipe != "digits")
    floats, integers = re.findall(r"accuracy +([\d.]+)% in C, ([\d.]+)% in PyTorch, on 143 validation samples", shown)
    assert floats[0] == floats[1]
    assert abs(float(integers[0]) - float(integers[1])) < 10  # two epochs of training: one sample is 0.7
    assert main(["export", str(folder), "--to", "c", "--out", "large", "--ram", "1k"]) == 1
    assert "make it smaller" in capsys.readouterr().err
    assert main(["export", str(folder), "--to", "c"]) == 1
    assert "exists: choose another folder" in capsys.readouterr().err


BIG = {
    "vgg11": (lambda: sltt.models.vgg11(3, 10), (2, 6, 3, 32, 32)),
    "resnet18": (lambda: sltt.models.resnet18(3, 10), (2, 8, 3, 16, 16)),
    "nmnist": (lambda: sltt.models.VGG(((32,), (64,), (128,)), 2, 10, dropout=0.2), (3, 8, 2, 34, 34)),
    "shd": (lambda: sltt.models.MLP([700, 256, 256, 20], lambda: sltt.PLIF(tau=10.0), 0.3), (10, 8, 700)),
    "shd-recurrent": (
        lambda: sltt.models.MLP([700, 256, 256, 20], lambda: sltt.PLIF(tau=10.0), 0.3, recurrent=True),
        (10, 8, 700),
    ),
}


@pytest.mark.slow
@pytest.mark.timeout(900)  # the compiler takes a minute for ten million weights
@pytest.mark.parametrize("key", BIG)
def test_big_networks_give_the_same_logits_in_c(key, tmp_path):
    make, shape = BIG[key]
    model, x = make(), 2 * torch.rand(shape)
    settle(model, x)
    with sltt.analysis.firing_rates(model.eval()) as rates:
        sltt.unroll(model, x)
    assert all(0.05 < rate < 0.5 for rate in rates.by_layer().values())
    for weights in ("float32", "int8"):
        exported = to_c(model, x, tmp_path / weights, name="big", weights=weights)
        flags = " ".join([*STRICT, "-O3"])
        subprocess.run(["make", "-s", f"CFLAGS={flags}"], cwd=exported.folder, check=True)


DRIVER = r"""
#define main test_main
#include "digits_test.c"
#undef main
#include <string.h>
int main(void)
{
    for (int t = 0; t < SAMPLES * DIGITS_STEPS; t++) {
        digits_logit got[DIGITS_CLASSES];
        step(t / DIGITS_STEPS, t % DIGITS_STEPS, got);
        for (int k = 0; k < DIGITS_CLASSES; k++) {
            uint32_t bits;
            memcpy(&bits, got + k, 4);
            printf("%08lx\n", (unsigned long)bits);
        }
    }
    return test_main();
}
"""
START = r"""
#include <stdint.h>
extern void _start(void);
void start(void);
void start(void)
{
    *(volatile uint32_t *)0xE000ED88 |= 0xF << 20; /* the floating-point unit */
    _start();
}
__attribute__((section(".vectors"), used)) static const void *vectors[] = {(void *)0x20400000, (void *)start};
"""


PROCESSORS = {
    "Cortex-M4": (
        ["arm-none-eabi-gcc", *CORTEX, "start.c"],
        ["qemu-system-arm", "-M", "mps2-an386", "-nographic", "-semihosting", "-kernel"],
    ),
    "s390x, big-endian": (["s390x-linux-gnu-gcc", *STRICT, "-static"], ["qemu-s390x"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["float32", "int8"])
@pytest.mark.parametrize("processor", PROCESSORS)
def test_the_digits_run_on_other_processors_with_the_same_bits(processor, weights, tmp_path):
    compiler, emulator = PROCESSORS[processor]
    for program in (compiler[0], emulator[0]):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    model, x = sltt.models.DigitsNet(width=16), torch.randn(8, 1, 8, 8)
    settle(model, x, 4)
    exported = to_c(model, x, tmp_path / "digits", name="digits", steps=4, weights=weights)
    folder = exported.folder
    (folder / "driver.c").write_text(DRIVER)
    (folder / "start.c").write_text(START)
    here, there, files = ["./here"], [*emulator, "./there"], ["driver.c", "digits.c"]
    subprocess.run(["gcc", *STRICT, "-o", "here", *files], cwd=folder, check=True)
    subprocess.run([*compiler, "-o", "there", *files], cwd=folder, check=True, capture_output=True)
    shown = [
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=120).stdout
        for command in (here, there)
    ]
    assert shown[0] == shown[1]
    assert "digits: 4 samples, 0 of 160 logits differ" in shown[0]
    assert len(set(shown[0].splitlines())) > 20
    if processor != "Cortex-M4":
        return
    energy, measured = measure_energy(model, x, steps=4), _measure(folder, "digits")
    flash, stack, counted = (int(re.sub(r"\D", "", one.partition(" a sample")[0])) for one in measured)
    operations = energy.total("effective_acs") + energy.total("effective_macs")
    assert 2 < counted / operations < 12
    assert 1500 < flash - exported.flash < 5000
    frames = ["arm-none-eabi-gcc", *CORTEX, "-fstack-usage", "-c", "-o", "digits.o", "digits.c"]
    subprocess.run(frames, cwd=folder, check=True)
    frames = dict(re.findall(r":(\w+)[.\w]*\t(\d+)", (folder / "digits.su").read_text()))
    of_step, of_conv, of_rows = (
        int(frames[one]) for one in ("digits_step", f"conv{'_8' * (weights == 'int8')}", "add_rows")
    )
    assert of_step + of_rows <= stack <= of_step + of_conv + of_rows + 8
