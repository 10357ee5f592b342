"""What runs on a device: on CUDA, or without a GPU on the one that `tests/test_standin.py` gives."""

import contextlib
import copy
import itertools
import os
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sltt
from sltt import kernels
from sltt.kernels.neuron import triton_step
from sltt.kernels.spikes.bits import pack, unpack
from sltt.rules import segments
from sltt.training import evaluation, graphs
from sltt.training.batch_loop import BatchLoop
from sltt.training.console import Console
from tests.conftest import LOSS, RULES, SURROGATES, batch, small_network
from tests.kernels.steps import CONSTANTS, SIZES, both
from tests.test_waits import CAPTURE, assert_same_weights_and_gradients, example, train
from tests.training.blobs import Images, equal, network
from tests.training.blobs import train as train_blobs
from tests.training.test_graphs import FAMILY

STANDIN = "STANDIN" in os.environ
if STANDIN:
    from tests.standin.device import LIBRARY
elif not torch.cuda.is_available():
    pytest.skip("PyTorch sees no CUDA device", allow_module_level=True)
DEVICE = torch.device("gpu" if STANDIN else "cuda", 0)
# which a fallback of the CPU's operations does
pytestmark = pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")


class Reads(nn.Module):
    def forward(self, x):
        return x * (x.sum().item() > -1e9)


class Copies(nn.Module):
    def forward(self, x):
        return x * torch.tensor([1.0] * 4, device=x.device)


@pytest.mark.parametrize("mode", ["off", "on"])
@pytest.mark.parametrize("captured", [sltt.SLTT(fold=2), *FAMILY], ids=repr)
def test_a_captured_iteration_trains_as_without(captured, mode):
    if mode == "on" and (problem := kernels.compiler_problem(DEVICE)):
        pytest.skip(problem)
    names = example(DEVICE, captured)
    with kernels.using(compile=mode):
        exec(compile(CAPTURE, "gpu.md", "exec"), names)
    assert_same_weights_and_gradients(names["model"], train(**example(DEVICE, captured)))


def test_a_captured_iteration_draws_as_without_in_mixed_precision():
    batches = [(torch.randn(3, 8, 4).to(DEVICE), torch.randint(3, (8,)).to(DEVICE)) for _ in range(3)]
    results = []
    for by_graph in (True, False):
        model, out = network().to(DEVICE), None
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        torch.manual_seed(3)
        step = partial(sltt.SLTT(), model, loss=LOSS)
        with torch.autocast(DEVICE.type, torch.bfloat16):
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


@contextlib.contextmanager
def no_waits():
    """Operations for which the host waits are errors."""
    if STANDIN:
        LIBRARY.waits()
        yield
        assert LIBRARY.waits() == []
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def compare(rule, make, x, y, interpreted=False, **kwargs):
    """Compare the second batch of a rule on the device, in which nothing waits, with that on a CPU."""
    results = []
    for device in (torch.device("cpu"), DEVICE):
        torch.manual_seed(0)
        model, x, y = make().to(device), x.to(device), y.to(device)
        rule(model, x, y, LOSS, **kwargs)  # makes what is made once
        model.zero_grad()
        torch.manual_seed(1)
        with contextlib.nullcontext() if device.type == "cpu" or interpreted else no_waits():
            out = rule(model, x, y, LOSS, **kwargs)
        results.append([t.cpu() for t in (*out, *(p.grad for p in model.parameters()), *model.buffers())])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("norm", [False, True])
def test_rules_do_not_wait_and_give_the_gradient_of_the_cpu(rule, neuron, norm, monkeypatch):
    monkeypatch.setattr(segments, "_check_same", lambda same: None)  # after the time loop it waits, once
    compare(rule, lambda: small_network(neuron, norm), *batch(steps=6))


def images():
    torch.manual_seed(0)
    block = [nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), sltt.LIF()]
    head = [nn.Conv2d(8, 4, 3, bias=False), nn.BatchNorm2d(4), sltt.PLIF(), nn.Flatten(), nn.Linear(16, 3)]
    return nn.Sequential(*block, nn.AvgPool2d(2), *head)


@pytest.mark.parametrize("name", ["SLTT", "SLTT(fold=3)", "BPTT(fold=4)", "OTTT", "RateBased", "SLTT(k=2, fold=4)"])
@pytest.mark.parametrize(
    "form", [torch.contiguous_format, torch.channels_last], ids=["channels first", "channels last"]
)
def test_kernels_of_the_device_give_what_a_cpu_gives(name, form, monkeypatch):
    if STANDIN:
        monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda t: t.device.type == "gpu"))
        monkeypatch.setattr(torch.cuda, "device_of", lambda t: contextlib.nullcontext())
        monkeypatch.setattr(triton_step, "problem", lambda device: None)
    x = torch.randn(4, 2, 8, 8).to(memory_format=form)
    compare(RULES[name], lambda: images().to(memory_format=form), x, torch.randint(3, (4,)), STANDIN, steps=4, seed=5)


@pytest.mark.parametrize(
    "settings",
    [
        {"rule": sltt.SLTT(fold=2), "clip_norm": 1.0, "accumulate": 2, "ema": 0.9},
        {"rule": sltt.SLTT(k=1), "phases": [sltt.Phase(2, steps=2), sltt.Phase(2, steps=4, freeze_norm=True)]},
        {"rule": sltt.OTTT(online=True), "precision": "bf16-mixed"},
    ],
    ids=["in parts", "phases", "online"],
)
def test_images_are_trained_evaluated_and_exported(settings, tmp_path):
    settings = {"batch_size": 10, "device": "cuda", **settings}
    model, _ = train_blobs(tmp_path / "graphs", images(), Images(), **settings)
    plain, _ = train_blobs(tmp_path / "plain", images(), Images(), graph="off", **settings)
    assert equal(model.state_dict(), plain.state_dict())
    assert {p.device for p in model.parameters()} == {DEVICE}
    score = sltt.evaluate(model, Images(), device="cuda").score
    x = torch.stack([x for x, _ in Images().load(1).test]).to(DEVICE)
    logits = sltt.unroll(model.eval(), x, steps=4).cpu()
    torch.testing.assert_close(logits, sltt.unroll(copy.deepcopy(model).cpu(), x.cpu(), steps=4), rtol=1e-4, atol=1e-4)
    assert 0 <= score <= 1
    sltt.interop.to_nir(model, x[:1])
    sltt.interop.to_c(model, x, tmp_path / "c", steps=2)


@pytest.mark.parametrize("rule", [sltt.SLTT(), sltt.BPTT(), sltt.SLTT(recompute=True)], ids=repr)
def test_saving_spikes_as_bits_does_not_wait_and_changes_nothing(rule):
    with kernels.using(sparse="off"):
        x, y = torch.randn(8, 1, 8, 8).double(), torch.randint(10, (8,))
        compare(rule, lambda: sltt.models.DigitsNet(width=64).double(), x, y, steps=2)


@pytest.mark.parametrize("more", [{"graph": "off"}, {"clip_norm": 1.0, "ema": 0.9}, {"accumulate": 2}], ids=str)
def test_a_batch_of_a_training_waits_for_nothing_and_the_next_one_is_copied_beside(more, tmp_path, monkeypatch):
    plain, copies = BatchLoop.run, LIBRARY.copies if STANDIN else lambda: {1}

    def run(self, loader, state):
        copies()
        with no_waits() if state.epoch else contextlib.nullcontext():
            yield from plain(self, loader, state)
        assert {*copies()} == {1}

    monkeypatch.setattr(BatchLoop, "run", run)
    train_blobs(tmp_path / "run", images(), Images(), batch_size=10, epochs=2, device="cuda", **more)


def test_a_batch_of_an_evaluation_waits_for_nothing(monkeypatch):
    plain = evaluation.whole_epoch

    def batches(loader):
        found = plain(loader)
        yield from itertools.islice(found, 3)  # of which the memory is measured
        with no_waits():
            yield from found

    monkeypatch.setattr(evaluation, "whole_epoch", batches)
    settings = {"batch_size": 2, "steps": 3, "loss": LOSS, "metric": [sltt.metrics.Accuracy(), nn.CrossEntropyLoss()]}
    metrics = [sltt.evaluate(images(), Images(), device=device, **settings) for device in ("cuda", "cpu")]
    for got, expected in zip(*(one.scores.values() for one in metrics), strict=True):
        assert got == pytest.approx(expected)


def test_on_cuda_a_damaged_input_gives_a_loss_that_is_nan():
    model, (x, y) = small_network().to(DEVICE), batch()
    x[0, 0, 0] = float("inf")
    assert sltt.SLTT()(model, x.to(DEVICE), y.to(DEVICE), LOSS).loss.isnan()
    assert sltt.unroll(model, x.to(DEVICE)).isnan().all()


@pytest.mark.parametrize("mode", ["off", "on"])
@pytest.mark.parametrize("constants", CONSTANTS, ids=str)
def test_the_fused_step_on_cuda_equals_the_equations_on_the_cpu(constants, mode):
    if mode == "on" and (problem := kernels.compiler_problem(DEVICE)):
        pytest.skip(problem)
    surrogates = SURROGATES if mode == "off" and not STANDIN else SURROGATES[:1]
    tolerances = {torch.float32: (1e-4, 1e-5), torch.float64: (1e-10, 1e-12)}
    for surrogate, learnable, dtype, n in itertools.product(surrogates, (False, True), tolerances, SIZES):
        v, x = torch.randn(n, dtype=dtype), 1.5 * torch.randn(n, dtype=dtype)
        settings = {"v_threshold": 0.8, "surrogate": surrogate, **constants}
        with kernels.using(compile=mode):
            (spikes, state, grads), _ = both(v.to(DEVICE), x.to(DEVICE), settings, 0.6, learnable)
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
    if mode == "on" and (problem := kernels.compiler_problem(DEVICE)):
        pytest.skip(problem)
    x = (torch.rand(n) < 0.3).to(dtype) * 2.5
    with kernels.using(compile=mode):
        packed = pack(x.to(DEVICE))
    assert torch.equal(packed.cpu(), pack(x))
    assert torch.equal(unpack(packed, 2.5, dtype).cpu(), x)


def test_data_on_the_device_trains(tmp_path):
    samples = TensorDataset(torch.rand(12, 6).to(DEVICE), (torch.arange(12) % 3).to(DEVICE))
    loader = DataLoader(samples, batch_size=4, shuffle=True)
    model = nn.Sequential(nn.Linear(6, 8), sltt.LIF(), nn.Linear(8, 3))
    generator = torch.get_device_module(DEVICE).get_rng_state()
    found = sltt.fit(model, loader, loss=LOSS, epochs=1, device="cuda", run=tmp_path / "run")
    assert len(found.history) == 1
    assert torch.equal(torch.get_device_module(DEVICE).get_rng_state(), generator)
