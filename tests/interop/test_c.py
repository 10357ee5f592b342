"""Networks in C: compiled once, and compared with the networks that they were written of."""

import ctypes
import functools
import subprocess
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import sltt
from sltt.interop import to_c
from sltt.interop.c import Exported, pixels_first
from sltt.models.resnet import Block

STRICT = ["-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-pedantic"]
NEURONS = {
    "LIF soft": sltt.LIF(tau=2.0),
    "LIF hard": sltt.LIF(tau=2.0, v_reset=0.1, decay_input=True, v_threshold=0.5),
    "LIF hard below 0": sltt.LIF(tau=3.0, v_reset=-0.3, v_init=0.2),
    "LIF above": sltt.LIF(tau=2.0, surrogate=sltt.surrogates.Above(sltt.surrogates.Triangle())),
    "IF soft": sltt.IF(v_init=0.5),
    "IF hard": sltt.IF(v_reset=0.0),
    "PLIF soft": sltt.PLIF(tau=3.0),
    "PLIF hard": sltt.PLIF(tau=3.0, v_reset=0.0, decay_input=True, v_threshold=0.3),
    "ChannelLIF": sltt.ChannelLIF(16),
    "CubaLIF soft": sltt.CubaLIF(tau=3.0, gain=0.5),
    "CubaLIF hard": sltt.CubaLIF(tau=None, v_reset=0.2),
    "ALIF": sltt.ALIF(tau=3.0, tau_a=4.0, beta=0.4),
}


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
        self.one, self.two, self.three = (
            nn.Conv2d(2, 6, 3, padding=1),
            nn.Conv2d(6, 6, 1),
            nn.Conv2d(6, 6, 3, padding=1),
        )
        self.first, self.second, self.third = sltt.IF(), sltt.LIF(v_threshold=0.5), sltt.LIF()
        self.head = nn.Linear(6 * 25, 4)

    def forward(self, x):
        s = self.first(self.one(x))
        y = self.second(self.two(s) + self.three(s)) + s
        return self.head((y + self.third(self.one(x) + y)).flatten(1))


def networks() -> dict[str, tuple[nn.Module, tuple[int, ...], int | None]]:
    """Networks by name, with the shape of an input and T of a static one."""
    torch.manual_seed(0)
    found: dict[str, Any] = {
        name: (nn.Sequential(nn.Linear(12, 16), neuron, nn.Linear(16, 3)), (8, 4, 12), None)
        for name, neuron in NEURONS.items()
    }
    conv = functools.partial(nn.Conv2d, bias=False)
    grouped = [nn.Conv2d(2, 8, 3, stride=2, padding=1, groups=2), nn.MaxPool2d(3, 2, padding=1), nn.BatchNorm2d(8)]
    grouped += [
        sltt.ChannelLIF(8),
        conv(8, 16, (3, 2), padding=(0, 1), groups=8),
        sltt.LIF(v_threshold=0.2),
        nn.AvgPool2d(2, 1, 1),
    ]
    one = [nn.Conv1d(3, 8, 3, padding="same"), nn.BatchNorm1d(8), sltt.LIF(tau=2.0), nn.AvgPool1d(2), nn.Dropout(0.2)]
    one += [nn.Conv1d(8, 8, 2, stride=2), sltt.PLIF(v_threshold=0.3), nn.MaxPool1d(2), nn.Flatten()]
    one += [nn.Linear(16, 4), sltt.IF(v_threshold=0.2)]
    back = sltt.Recurrent(sltt.ALIF(tau=2.0), nn.Conv2d(4, 4, 3, padding=1))
    found |= {
        "MLP": (sltt.models.MLP([64, 32, 32, 10]), (4, 1, 8, 8), 5),
        "DigitsNet": (sltt.models.DigitsNet(width=4), (4, 1, 8, 8), 4),
        "events": (sltt.models.DigitsNet(2, width=4), (5, 4, 2, 12, 9), None),
        "groups": (nn.Sequential(*grouped, nn.Flatten(), nn.Linear(160, 5)), (4, 4, 2, 12, 9), None),
        "one dimension": (nn.Sequential(*one), (6, 4, 3, 18), None),
        "odd pooling": (sltt.models.VGG(((8,), (8, 12)), 2, 4), (4, 4, 2, 11, 8), None),
        "Residual": (Residual(), (5, 4, 2, 6, 7), None),
        "ShallowResNet": (sltt.models.ShallowResNet((6, 8), stem=4), (4, 3, 12, 12), 4),
        "Sums": (Sums(), (5, 4, 2, 5, 5), None),
        "recurrent MLP": (sltt.models.MLP([20, 24, 24, 5], sltt.PLIF, recurrent=True), (6, 4, 20), None),
        "recurrent convolution": (
            nn.Sequential(nn.Conv2d(1, 4, 3), back, nn.Flatten(), nn.Linear(64, 4)),
            (6, 4, 1, 6, 6),
            None,
        ),
    }
    return found


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
        x = 2 * torch.rand(shape) if "events" not in key else torch.randint(0, 4, shape).float()
        for _ in range(20):
            sltt.unroll(model.train(), x, steps=steps)  # statistics of BatchNorm with which neurons fire
        whole = x if steps is None else x.expand(steps, *x.shape)
        for weights in ("float32", "int8"):
            name = f"n{i}_{weights}"
            exported = to_c(model, x, folder / name, name=name, steps=steps, weights=weights)
            cases[key, weights] = Case(model.eval(), whole, exported, name)
    names = [case.name for case in cases.values()]
    sizes = "".join(
        f'#include "{n}/{n}.h"\nextern const int {n}_size;\nconst int {n}_size = sizeof({n}_net);\n' for n in names
    )
    (folder / "sizes.c").write_text(sizes)
    sources = [f"{name}/{name}.c" for name in names]
    library = folder / "networks.so"
    subprocess.run(["gcc", *STRICT, "-fPIC", "-shared", "-o", library, "sizes.c", *sources], cwd=folder, check=True)
    return cases, ctypes.CDLL(str(library))


def run(case: Case, library: Any) -> torch.Tensor:
    """The logits [T, B, classes] of C on the samples of a case, in numbers of the network."""
    network, name = case.exported.network, case.name
    assert case.exported.ram == ctypes.c_int.in_dll(library, f"{name}_size").value
    given, kind = (network.whole(case.x), np.int8) if network.integers else (case.x, np.float32)
    inputs = np.ascontiguousarray(pixels_first(network, given).numpy().astype(kind))
    net = np.full(case.exported.ram // 4, 1 << 30, dtype=np.int32)
    logits = np.zeros((*case.x.shape[:2], network.output.size), np.int32 if network.integers else np.float32)
    for b in range(logits.shape[1]):
        getattr(library, f"{name}_reset")(net.ctypes.data_as(ctypes.c_void_p))
        for t in range(len(logits)):
            places = [a.ctypes.data_as(ctypes.c_void_p) for a in (net, inputs[b, t], logits[t, b])]
            getattr(library, f"{name}_step")(*places)
    return torch.from_numpy(logits)


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
    got = run(case, library)
    assert torch.equal(got.double(), case.exported.network.unroll(case.x))
    expected = sltt.unroll(case.model, case.x).mean(0)
    apart = (got.mean(0, dtype=torch.float64) * case.exported.network.logit_scale - expected).std()
    assert apart < 0.5 * expected.std()
