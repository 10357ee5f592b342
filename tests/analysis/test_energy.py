"""Energy beside sums by hand, and beside NeuroBench: what layers read, padding, real lengths, `once`, folds."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sltt
from sltt.analysis import Energy, LayerOperations, firing_rates, measure_energy, neurobench


class Reads(nn.Module):
    """A linear layer of 4 outputs behind neurons that emit given spikes, and a function."""

    def __init__(self, spikes, function):
        super().__init__()
        self.function, self.neuron, self.head = function, sltt.IntegerLIF(), nn.LazyLinear(4)
        self.neuron.forward = lambda x: spikes.expand(len(x), *spikes.shape).clone()

    def forward(self, x):
        return self.head(self.function(self.neuron(x)).flatten(1))


ALL = torch.ones(2, 4, 4)  # 32 spikes
COUNTS = torch.tensor([[[3.0, 0.0], [0.0, 2.0]]])


READS = [
    (ALL, nn.AvgPool2d(2), 32),
    (ALL, lambda x: F.avg_pool2d(x, kernel_size=2), 32),
    (ALL, lambda x: F.avg_pool1d(x.flatten(1, 2), 2), 32),
    (ALL, nn.AdaptiveAvgPool2d(1), 32),
    (ALL, lambda x: x.mean((2, 3)), 32),
    (ALL, nn.AvgPool2d(3, stride=1), 2 * 4 * 9),  # each of 4 windows has 9 spikes
    (ALL, nn.MaxPool2d(2), 8),
    (ALL, lambda x: x + F.avg_pool2d(x, 3, 1, 1), 32 + 2 * 100),
    (ALL, lambda x: torch.cat([x.flatten(1), F.avg_pool2d(x, 2).flatten(1)], 1), 64),
    (COUNTS, nn.AvgPool2d(2), 5),
    (0.7 * (COUNTS > 0), nn.AvgPool2d(2), 2),  # thresholds, as in a twin
    (COUNTS, lambda x: x * 0.3, 5),
    (COUNTS, lambda x: x.sum(1) / 4, 5),
    (COUNTS * torch.tensor([1.0, -1.0]), nn.AvgPool2d(2), 5),
    (ALL, nn.AvgPool2d(2, 2, 1, count_include_pad=False), 32),
    (ALL, nn.AvgPool2d(3, ceil_mode=True), 32),
    (torch.ones(2, 7, 7), nn.AdaptiveAvgPool2d(3), 2 * 81),  # windows of 3 × 3
    (COUNTS, lambda x: x.add_(torch.tensor(0.25)), None),  # in place
    (COUNTS, lambda x: _write(torch.zeros_like(x), torch.randn(x.shape)), None),
]


def _write(x, data):
    x[:, :] = data
    return x


@pytest.mark.parametrize(("spikes", "function", "expected"), READS)
def test_spikes_keep_their_number_through_pooling(spikes, function, expected):
    model, x = Reads(spikes, function).eval(), torch.zeros(1, 3, *spikes.shape)
    model(x[0])
    (found,) = measure_energy(model, x).layers
    assert (found.macs, found.acs) == ((found.dense, 0) if expected is None else (0, 4 * expected))
    assert found.spiking or expected is None


W = nn.Parameter(torch.arange(24.0).view(6, 4))
PRODUCTS = [
    lambda x: x @ W,
    lambda x: (W.T @ x.T).T,
    lambda x: torch.stack([torch.mv(W.T, row) for row in x]),
    lambda x: torch.addmm(torch.ones(4), x, W),
    lambda x: torch.einsum("bi,ij->bj", [x, W]),
    lambda x: torch.bmm(x.view(2, 1, 6), W.expand(2, 6, 4))[:, 0],
    lambda x: F.linear(x, (W * 1).T),
]


@pytest.mark.parametrize("function", PRODUCTS)
def test_products_with_weights_are_layers_however_they_are_written(function):
    model = Reads(torch.tensor([1.0, 0, 1, 1, 0, 1]), function)
    model.head, model.w = nn.Identity(), W
    energy, expected = measure_energy(model, torch.ones(3, 2, 6)), 3 * 4 * 4
    (found,) = (one for one in energy.layers if one.acs == expected)
    assert (found.macs, found.dense, found.effective_acs, found.spiking) == (0, 3 * 24, expected - 3, True)
    assert (energy.weights, energy.zeros) == (24, 1)


def test_each_call_of_a_function_has_its_own_connections_and_tied_weights_count_once():
    class Parallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.neuron = nn.Parameter(torch.ones(3, 2, 3, 3)), sltt.LIF()
            self.tied, self.attention = self.a, nn.MultiheadAttention(4, 2, bias=False)

        def forward(self, x):
            x = self.attention(*[x.view(-1, 4)] * 3)[0].view(-1, 2, 6, 6)
            a, b = (F.conv2d(x, w, padding=p, dilation=p) for w, p in ((self.a, 1), (self.tied, 2)))
            return self.neuron(a + b).flatten(1)

    energy = measure_energy(Parallel().eval(), torch.randn(1, 1, 2, 6, 6))
    convolutions, projections, tokens = 6 * (16 * 16 + 14 * 14), 18 * 4 * 16, 2 * 18 * 18 * 4
    assert energy.total("macs") == convolutions + projections + tokens
    assert energy.weights == 54 + 64


def test_work_on_weights_alone_does_not_depend_on_the_batch():
    class Low(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.rand(8, 2)), nn.Parameter(torch.rand(2, 8))

        def forward(self, weight):
            return weight + self.a @ self.b

    layer = nn.utils.parametrize.register_parametrization(nn.Linear(8, 8), "weight", Low())
    found = [measure_energy(nn.Sequential(layer, sltt.LIF()), torch.randn(3, size, 8)) for size in (1, 5)]
    assert [one.total("macs") for one in found] == [3 * (8 * 8 + 8 * 2 * 8)] * 2


INPUTS = [
    ([0.0, 1.0, 0.0, -1.0], 0, 2),
    ([0.0, 0.3, 0.3, 0.3], 0, 3),  # one size
    ([0.0, 2.0, 0.0, 0.0], 0, 1),
    ([0.0, 3.0, 0.0, 0.0, 1.0], 0, 4),
    ([0.0, 3.0, 1.0, 2.0, 1.0], 5, 0),  # whole numbers that are mostly not zero are data
    ([0.0, 200.0, 0.0, 0.0, 100.0], 5, 0),  # pixels
    ([0.0, 0.5, 0.0, 0.0, 0.1], 5, 0),
]


@pytest.mark.parametrize(("x", "macs", "acs"), INPUTS)
def test_inputs_are_events_or_data(x, macs, acs):
    model = nn.Sequential(nn.Linear(len(x), 3), sltt.LIF())
    (found,) = measure_energy(model, torch.tensor(x).expand(2, 5, -1)).layers
    assert (found.macs, found.acs, found.spiking) == (2 * 3 * macs, 2 * 3 * acs, False)


def test_a_second_branch_reads_the_data_and_recurrent_weights_spikes():
    model = Reads(None, None)
    a, n, b = nn.Linear(5, 6), sltt.Recurrent(sltt.LIF(), nn.Linear(6, 6)), nn.Linear(5, 6)
    model.neuron, model.head, model.b = nn.Sequential(a, n), nn.Identity(), b
    model.forward = lambda x: model.neuron(x) + model.b(x)
    found = {one.name: one for one in measure_energy(model, 3 * torch.randn(4, 2, 5)).layers}
    assert found["neuron.0"].picojoules == found["b"].picojoules == pytest.approx(4 * 30 * 4.6)
    assert [one.spiking for one in found.values()] == [False, True, False]


def test_each_tap_of_a_delay_is_a_synapse():
    layers = [nn.Conv2d(2, 4, 3), sltt.LIF(), nn.AvgPool2d(2), sltt.Delay([3, 0, 2]), nn.Conv2d(12, 5, 1)]
    model, x = nn.Sequential(*layers), 2 * torch.randn(7, 4, 2, 6, 6)
    *_, found = measure_energy(model, x).layers
    spikes = sltt.unroll(model[:2], x).sum(tuple(range(1, 5)))
    assert spikes.all()
    assert (found.macs, found.acs) == (0, sum(5 * spikes[: 7 - n].sum().item() / 4 for n in (0, 2, 3)))


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.a, self.conv, self.b = nn.Conv2d(1, 4, 3, padding=1), sltt.LIF(), nn.Conv2d(4, 6, 3), sltt.LIF()
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = F.avg_pool2d(self.a(3 * sltt.once(self.stem, x)), 2)
        return self.head(self.b(3 * self.conv(x)).flatten(1))


@pytest.mark.parametrize("steps", [4, None])
@torch.no_grad()
def test_energies_are_those_by_hand(steps):
    """Formulas and constants of docs/energy.md, for 2 images of 6 × 6 pixels, shown as they are or as 4 frames."""
    torch.manual_seed(0)
    model, x = Small(), torch.randn(2, 1, 6, 6)
    T, passes, frames, first, second = 4, 1 if steps else 4, x.expand(4, *x.shape), 0.0, 0.0
    for x_t in frames:
        a = model.a(3 * model.stem(x_t))
        first += float(a.sum()) / 2
        second += float(model.b(3 * model.conv(F.avg_pool2d(a, 2))).sum()) / 2
    sltt.reset(model)
    stem, conv, head = 16 * 16 * 4, 9 * 4 * 6, 6 * 3  # 3 × 3 windows reach 16 × 16 pixels that are no padding
    N, P, U, S = stem + conv + head, 4 * 9 + 9 * 4 * 6 + 18, T * (144 + 6), first + second
    M, A = (stem if steps else T * stem), first * 6 + second * 3  # each pixel of 3 × 3 has 6 connections

    def snn(mac, ac, update, w):
        held = 2.5 * (2 * (M + A) + 12 * U + 4 * S)
        memory = held + 2.5 * (M + A) * w, held + P * w * T * 160
        return M * mac + A * ac, U * update + S * ac, *memory

    def ann(mac, w, a):
        held = passes * 2.5 * a * (N / 2 + 150)
        return passes * N * mac, 0, held + passes * 2.5 * w * N / 2, held + passes * P * w * 160

    hand = {
        "SNN 32 bits": snn(4.6, 0.9, 5.5, 4), "ANN 32 bits": ann(4.6, 4, 4),
        "SNN 8 bits": snn(0.3, 0.1, 3.3, 1), "ANN w8a3": ann(0.2 * 3 / 8 + 0.1, 1, 3 / 8),
    }  # fmt: skip
    found = measure_energy(model, x if steps else frames, steps=steps)
    assert {name: pytest.approx(row) for name, row in hand.items()} == found.picojoules()
    ratio = found.tables()["ratios"][1]
    assert ratio["matched bits"] == pytest.approx(sum(hand["ANN w8a3"][:2]) / sum(hand["SNN 8 bits"][:2]))
    with firing_rates(model) as rates:
        sltt.unroll(model, x if steps else frames, steps=steps, fold=4)
    assert found.rate == pytest.approx(rates.mean())
    for image in (x, x.sign()):  # data, and what is read as spikes
        metrics = neurobench(model, [(image, x)], steps=4), neurobench(model, [(image.expand(4, *x.shape), x)])
        assert metrics[0]["SynapticOperations"] == pytest.approx(metrics[1]["SynapticOperations"])


def test_at_the_rate_of_the_last_column_both_take_the_same():
    def ratios(rate):
        stem, layer = LayerOperations("0", macs=50), LayerOperations("2", acs=4e4 * rate, ann_macs=1e4, spiking=True)
        return Energy([stem, layer], 4, 1, 400, 400 * rate, 0, 10_050, 0, 40_200).tables()["ratios"]

    *even, dram = (row["equal at a firing rate of"] for row in ratios(0.2))
    assert [ratios(rate)[i]["matched bits"] for i, rate in enumerate(even)] == pytest.approx([1, 1, 1])
    assert dram is None  # since weights come four times, and not once


def test_padding_of_sequences_does_not_count():
    torch.manual_seed(0)
    layers = nn.Linear(4, 9), sltt.LIF(), nn.Unflatten(1, (3, 3)), nn.Linear(3, 2), nn.Flatten()
    model, x, lengths = nn.Sequential(*layers), 3 * torch.randn(5, 3, 4), [2, 5, 3]
    together = measure_energy(model, x, lengths=lengths)
    alone = [measure_energy(model, x[:n, i : i + 1]) for i, n in enumerate(lengths)]
    for name in ("steps", "updates", "spikes", "active"):
        assert getattr(together, name) == pytest.approx(sum(getattr(one, name) for one in alone) / 3)
    for name in ("dense", "effective_macs", "effective_acs", "macs", "acs", "ann_macs"):
        assert together.total(name) == pytest.approx(sum(one.total(name) for one in alone) / 3)
    metrics = neurobench(model, [(x, sltt.Padded(torch.tensor([0, 1, 2]), lengths))])
    assert metrics["SynapticOperations"]["Dense"] == together.total("dense")
    classes = sltt.predict(model, x, lengths=lengths).argmax(1)
    padded = x + (torch.arange(5)[:, None] >= torch.tensor(lengths))[..., None] * 100 * torch.randn(4)
    assert neurobench(model, [(padded, sltt.Padded(classes, lengths))])["ClassificationAccuracy"] == 1


def spiking_layers_of_snntorch():
    snn = pytest.importorskip("snntorch")
    neurons = [snn.Leaky(beta=0.9, init_hidden=True) for _ in range(2)]
    model = nn.Sequential(nn.Linear(20, 30), neurons[0], nn.Linear(30, 5), neurons[1])
    nn.init.sparse_(model[0].weight, 0.5)
    return model, (torch.rand(6, 16, 20) < 0.3).float() * 2, snn.SpikingNeuron


NETWORKS = {
    "images": lambda: (sltt.models.DigitsNet(width=4), torch.rand(16, 1, 8, 8).expand(4, 16, 1, 8, 8), sltt.Neuron),
    "events": lambda: (sltt.models.DigitsNet(2, width=4), (3 * torch.rand(5, 16, 2, 12, 12) ** 3).floor(), sltt.Neuron),
    "snnTorch": spiking_layers_of_snntorch,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_neurobench_measures_the_same(name):
    benchmarks = pytest.importorskip("neurobench.benchmarks", reason="needs NeuroBench: pip install neurobench")
    from neurobench.metrics import static, workload  # pyright: ignore[reportMissingImports]
    from neurobench.models import TorchModel  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    model, x, kind = NETWORKS[name]()
    y = torch.randint(5, (16,))

    class Steps(TorchModel):
        def __call__(self, batch):
            sltt.reset(model)
            return torch.stack([model(x_t) for x_t in batch.transpose(0, 1)]).mean(0)

    harness = Steps(model)
    harness.add_activation_module(kind)
    samples = torch.utils.data.TensorDataset(x.transpose(0, 1).contiguous(), y)
    metrics = [static.Footprint, static.ParameterCount, static.ConnectionSparsity], [
        workload.ActivationSparsity, workload.SynapticOperations, workload.ClassificationAccuracy,
        *([workload.MembraneUpdates] if name == "snnTorch" else []),  # it does not see those of other neurons
    ]  # fmt: skip
    loader = torch.utils.data.DataLoader(samples, batch_size=8)
    with torch.no_grad():
        run = benchmarks.Benchmark(harness, loader, [], [lambda logits: logits.argmax(1)], metrics).run(quiet=True)
    found = neurobench(model, [(x[:, :8], y[:8]), (x[:, 8:], y[8:])])
    assert {key: pytest.approx(found[key]) for key in run} == run
