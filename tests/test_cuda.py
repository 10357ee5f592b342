"""What runs on a CUDA device only."""

import itertools
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sltt
from sltt import kernels
from sltt.kernels.spikes.bits import pack, unpack
from sltt.rules import segments
from sltt.training import graphs
from sltt.training.console import Console
from tests.conftest import LOSS, SURROGATES, batch, small_network
from tests.kernels.steps import CONSTANTS, SIZES, both
from tests.test_waits import CAPTURE, assert_same_weights_and_gradients, example, train
from tests.training.blobs import network
from tests.training.blobs import train as train_blobs
from tests.training.test_graphs import FAMILY

if not torch.cuda.is_available():
    pytest.skip("PyTorch sees no CUDA device", allow_module_level=True)


class Reads(nn.Module):
    def forward(self, x):
        return x * (x.sum().item() > -1e9)


class Copies(nn.Module):
    def forward(self, x):
        return x * torch.tensor([1.0] * 4, device=x.device)


@pytest.mark.parametrize("mode", ["off", "on"])
@pytest.mark.parametrize("captured", [sltt.SLTT(fold=2), *FAMILY], ids=repr)
def test_a_captured_iteration_trains_as_without(captured, mode):
    if mode == "on" and (problem := kernels.compiler_problem(torch.device("cuda"))):
        pytest.skip(problem)
    names = example("cuda", captured)
    with kernels.using(compile=mode):
        exec(compile(CAPTURE, "gpu.md", "exec"), names)
    assert_same_weights_and_gradients(names["model"], train(**example("cuda", captured)))


def test_a_captured_iteration_draws_as_without_in_mixed_precision():
    batches = [(torch.randn(3, 8, 4).cuda(), torch.randint(3, (8,)).cuda()) for _ in range(3)]
    results = []
    for by_graph in (True, False):
        model, out = network().cuda(), None
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        torch.manual_seed(3)
        step = partial(sltt.SLTT(), model, loss=LOSS)
        with torch.autocast("cuda", torch.bfloat16):
            if by_graph:
                step = sltt.graphed(sltt.SLTT(), model, LOSS, *batches[0])
            for x, y in batches:
                if not by_graph:
                    optimizer.zero_grad()
                    torch.clear_autocast_cache()  # of casts: the weights have changed
                out = step(x, y)
                optimizer.step()
        results.append([*out, *model.state_dict().values()])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("precision", [32, "bf16-mixed"])
@pytest.mark.parametrize("rule", FAMILY, ids=repr)
def test_a_training_by_graphs_is_the_training_without(rule, precision, tmp_path, monkeypatch):
    replays, replay = [], graphs.CudaGraph.replay
    monkeypatch.setattr(graphs.CudaGraph, "replay", lambda self: (replays.append(1), replay(self)))
    phases = [sltt.Phase(2, steps=3), sltt.Phase(2, steps=4)]
    settings = {"rule": rule, "precision": precision, "phases": phases, "device": "cuda", "workers": 1}
    by_graph, _ = train_blobs(tmp_path / "graphs", **settings)
    assert len(replays) == 2 * 3  # of each phase, all but the first three batches, and the last of an epoch
    plain, _ = train_blobs(tmp_path / "plain", graph="off", **settings)
    assert len(replays) == 2 * 3
    for got, expected in zip(by_graph.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("layer", [Reads(), Copies()], ids=["reads", "copies"])
def test_a_network_that_a_graph_would_not_repeat_trains_without(layer, tmp_path):
    report, lines = Console(quiet=True), []
    report.line = lines.append
    train_blobs(
        tmp_path / "run", nn.Sequential(layer, *network()), device="cuda", report=report, rule=sltt.SLTT(fold=1)
    )
    assert any("batches run without a CUDA graph" in line for line in lines)


@pytest.fixture
def errors_of_waiting():
    """Turns CUDA's errors for waiting operations on."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def test_on_cuda_rules_do_not_wait_and_give_the_gradient_of_the_cpu(rule, neuron, errors_of_waiting, monkeypatch):
    monkeypatch.setattr(segments, "_check_same", lambda same: None)  # after the time loop it waits, once
    x, y = batch(steps=6)
    results = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = small_network(neuron, norm=True).to(device)
        x, y = x.to(device), y.to(device)
        rule(model, x, y, LOSS)  # makes what is made once
        model.zero_grad()
        torch.manual_seed(1)
        if device == "cuda":
            torch.cuda.synchronize()
            errors_of_waiting()
        out = rule(model, x, y, LOSS)
        torch.cuda.set_sync_debug_mode("default")
        results.append([t.cpu() for t in (out.loss, out.logits, *(p.grad for p in model.parameters()))])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("rule", "plain"),
    [(sltt.SLTT(), sltt.SLTT()), (sltt.BPTT(), sltt.BPTT()), (sltt.SLTT(recompute=True), sltt.SLTT())],
    ids=repr,
)
def test_on_cuda_saving_spikes_as_bits_does_not_wait_and_changes_nothing(rule, plain, errors_of_waiting):
    results = []
    for on, one in ((True, rule), (False, plain)):
        torch.manual_seed(0)
        model = sltt.models.DigitsNet(width=64).double().cuda()
        x, y = torch.randn(8, 1, 8, 8).double().cuda(), torch.randint(10, (8,)).cuda()
        with kernels.using(bits=on, sparse="off"):
            one(model, x, y, LOSS, steps=2)
            errors_of_waiting()
            one(model, x, y, LOSS, steps=2)
        torch.cuda.set_sync_debug_mode("default")
        results.append([p.grad for p in model.parameters()])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


def test_on_cuda_a_damaged_input_gives_a_loss_that_is_nan():
    model, (x, y) = small_network().cuda(), batch()
    x[0, 0, 0] = float("inf")
    assert sltt.SLTT()(model, x.cuda(), y.cuda(), LOSS).loss.isnan()
    assert sltt.unroll(model, x.cuda()).isnan().all()


@pytest.mark.parametrize("mode", ["off", "on"])
@pytest.mark.parametrize("constants", CONSTANTS, ids=str)
def test_the_fused_step_on_cuda_equals_the_equations_on_the_cpu(constants, mode):
    if mode == "on" and (problem := kernels.compiler_problem(torch.device("cuda"))):
        pytest.skip(problem)
    surrogates = SURROGATES if mode == "off" else SURROGATES[:1]
    tolerances = {torch.float32: (1e-4, 1e-5), torch.float64: (1e-10, 1e-12)}
    for surrogate, learnable, dtype, n in itertools.product(surrogates, (False, True), tolerances, SIZES):
        v, x = torch.randn(n, dtype=dtype), 1.5 * torch.randn(n, dtype=dtype)
        settings = {"v_threshold": 0.8, "surrogate": surrogate, **constants}
        with kernels.using(compile=mode):
            (spikes, state, grads), _ = both(v.cuda(), x.cuda(), settings, 0.6, learnable)
        _, (expected_spikes, expected_state, expected_grads) = both(v, x, settings, 0.6, learnable)
        rtol, atol = tolerances[dtype]
        if learnable:  # a sum over all neurons, in another order
            atol = atol * max(n, 1)
        for got, expected in zip(
            [*spikes, state, *grads], [*expected_spikes, expected_state, *expected_grads], strict=True
        ):
            torch.testing.assert_close(got.cpu(), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("n", [8, 16, 1024, 8 * 999])
@pytest.mark.parametrize("mode", ["off", "on"])
def test_bits_on_cuda(n, dtype, mode):
    if mode == "on" and (problem := kernels.compiler_problem(torch.device("cuda"))):
        pytest.skip(problem)
    x = (torch.rand(n) < 0.3).to(dtype) * 2.5
    with kernels.using(compile=mode):
        packed = pack(x.cuda())
    assert torch.equal(packed.cpu(), pack(x))
    assert torch.equal(unpack(packed, 2.5, dtype).cpu(), x)


def test_mixed_precision_on_cuda():
    model = nn.Sequential(nn.Linear(6, 4096), sltt.LIF(), nn.Linear(4096, 3)).cuda()
    x, y = torch.randn(3, 4, 6).cuda(), torch.randint(3, (4,)).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        sltt.SLTT()(model, x, y, LOSS)
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in model.parameters())


def test_a_twin_is_balanced_where_its_network_is():
    ann = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)).cuda()
    twin = sltt.interop.spiking(ann, partial(sltt.PLIF, tau=2.0), data=sltt.data.Digits())
    assert {tensor.device.type for tensor in [*twin.parameters(), *twin.buffers()]} == {"cuda"}
    x, y = torch.rand(4, 1, 8, 8).cuda(), torch.randint(10, (4,)).cuda()
    sltt.SLTT()(twin, x, y, LOSS, steps=2)


def test_data_on_the_device_trains(tmp_path):
    samples = TensorDataset(torch.rand(12, 6).cuda(), (torch.arange(12) % 3).cuda())
    loader = DataLoader(samples, batch_size=4, shuffle=True)
    model = nn.Sequential(nn.Linear(6, 8), sltt.LIF(), nn.Linear(8, 3))
    generator = torch.cuda.get_rng_state()
    found = sltt.fit(model, loader, loss=LOSS, epochs=1, device="cuda", run=tmp_path / "run")
    assert len(found.history) == 1
    assert torch.equal(torch.cuda.get_rng_state(), generator)
