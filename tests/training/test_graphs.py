"""CUDA graphs of batches without a device: a stand-in records operations, and replays them on the same memory."""

import contextlib
import math
import random
import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sltt
from sltt.training import graphs
from sltt.training.settings import Settings
from tests.conftest import LOSS
from tests.test_waits import CAPTURE, assert_same_weights_and_gradients, example
from tests.test_waits import train as train_plain
from tests.training.blobs import Blobs, equal, network, rows, train, weights

FAMILY = [sltt.SLTT(), sltt.BPTT(), sltt.TBPTT(2), sltt.OTTT(), sltt.RateBased(), sltt.Mixed({"*2": 2})]
CPU = torch.device("cpu")


class Tape(TorchDispatchMode):
    """Records operations on tensors, and the values of those that were there before."""

    def __init__(self):
        super().__init__()
        self.operations, self.before, self.made = [], {}, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = {storage(t): t.untyped_storage() for t in tensors((args, kwargs))}
        for one in given.keys() - self.made - self.before.keys():
            self.before[one] = given[one], given[one].clone()
        out = func(*args, **kwargs)
        self.made |= {storage(t) for t in tensors(out)} - given.keys()
        self.operations.append((func, args, kwargs, out))
        return out


def storage(tensor):
    return tensor.untyped_storage()._cdata


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Recorded:
    """Stands in for `CudaGraph`: a replay runs the recorded operations on the tensors of the capture, and no Python."""

    log: list

    def __init__(self, device, beside=None):
        self.log.append("beside" if beside else "new")

    @staticmethod
    def runs_on(device):
        return True

    def warm(self, function):
        self.log.append("eager")
        return function()

    def capture(self, function):
        self.log.append("capture")
        self.tape = Tape()
        with torch.random.fork_rng([]), self.tape:
            result = function()
        with torch.no_grad():
            for memory, value in self.tape.before.values():
                memory.copy_(value)
            for *_, out in self.tape.operations:  # nothing has values before the first replay
                for tensor in tensors(out):
                    if storage(tensor) in self.tape.made and tensor.is_floating_point():
                        tensor.detach().fill_(math.nan)
        return result

    @torch.no_grad()
    def replay(self):
        self.log.append("replay")
        for func, args, kwargs, out in self.tape.operations:
            given = {storage(t) for t in tensors((args, kwargs))}
            for old, new in zip(tensors(out), tensors(func(*args, **kwargs)), strict=True):
                if storage(old) not in given:
                    old.detach().copy_(new)


@pytest.fixture(autouse=True)
def on_a_device(elsewhere):
    """No native code runs, and nobody looks at spikes."""


@pytest.fixture
def recorded(monkeypatch):
    """Graphs are recorded."""
    monkeypatch.setattr(graphs, "CudaGraph", Recorded)
    monkeypatch.setattr(Recorded, "log", [], raising=False)
    return Recorded


def watched_training(recorded, run, model=(), **settings):
    """A training whose graphs are recorded: its model, its result, the log, and the lines that it printed."""
    model = nn.Sequential(*(model or network()))
    report, lines = sltt.training.console.Console(quiet=True), []
    report.line = lines.append
    found = train(run, model, report=report, **settings)[1]
    return model, found, recorded.log, lines


@pytest.mark.parametrize("rule", [sltt.SLTT(), sltt.RateBased()], ids=repr)
def test_a_training_by_graphs_is_the_training_without_to_the_bit(rule, recorded, monkeypatch, tmp_path):
    settings = {"rule": rule, "epochs": 2, "clip_norm": 1.0, "accumulate": 2, "ema": 0.9}
    model, found, log, lines = watched_training(recorded, tmp_path / "graphs", **settings)
    assert log == ["new", *["eager"] * 3, "capture", *["replay"] * 3]  # and the fourth batch, of 12, without
    assert not [line for line in lines if "CUDA graph" in line]
    plain, expected = train(tmp_path / "plain", graph="off", **settings)
    assert rows(found) == rows(expected)
    assert all(row["firing_rate"] > 0 for row in rows(found))
    assert equal(model.state_dict(), plain.state_dict())
    assert equal(weights(found.run / "last.ckpt"), weights(expected.run / "last.ckpt"))


def test_each_draw_of_slttk_has_a_graph_and_the_training_is_the_one_without(recorded, monkeypatch, tmp_path):
    settings = {"rule": sltt.SLTT(k=1), "epochs": 8, "ema": 0.9}
    model, found, log, _ = watched_training(recorded, tmp_path / "graphs", **settings)
    assert log.count("new") == 1
    assert log.count("capture") == log.count("beside") + 1 > 2  # of several draws, whose first batch runs without
    assert log.count("replay") > log.count("capture")
    assert log.count("replay") + log.count("eager") == 8 * 3  # and the fourth batch, of 12, without
    plain, expected = train(tmp_path / "plain", graph="off", **settings)
    assert rows(found) == rows(expected)
    assert equal(model.state_dict(), plain.state_dict())


def test_each_phase_has_a_graph_of_its_own(recorded, monkeypatch, tmp_path):
    phases = [sltt.Phase(2, steps=3, rule=sltt.RateBased()), sltt.Phase(2, steps=4, freeze_norm=True)]
    settings = {"phases": phases, "precision": "bf16-mixed"}
    model, _, log, _ = watched_training(recorded, tmp_path / "graphs", **settings)
    assert log == ["new", *["eager"] * 3, "capture", *["replay"] * 3] * 2
    assert equal(model.state_dict(), train(tmp_path / "plain", graph="off", **settings)[0].state_dict())


def test_a_resumed_training_by_graphs_ends_as_one_that_never_stopped(recorded, monkeypatch, tmp_path):
    settings = {"schedule": sltt.schedules.Constant(), "batch_size": 12}
    model = watched_training(recorded, tmp_path / "whole", epochs=2, **settings)[0]
    watched_training(recorded, tmp_path / "run", epochs=1, **settings)
    resumed = watched_training(recorded, tmp_path / "run", epochs=2, resume=True, **settings)[0]
    assert equal(model.state_dict(), resumed.state_dict())


def test_a_graph_is_of_one_shape_and_another_begins_anew(recorded, monkeypatch):
    model = network()
    run = graphs.Graphs(model, CPU)
    small, large = ((torch.randn(n, 4), torch.randint(3, (n,))) for n in (5, 8))
    for pairs in ([small] * 2, [large] * 5, [small] * 4):
        recorded.log.clear()
        for x, y in pairs:
            for p in model.parameters():
                p.grad = None
            loss = run(partial(sltt.SLTT(), model, loss=LOSS, steps=2), x, y).loss
            assert loss.isfinite()
        expected = ["new", *["eager"] * min(len(pairs), 3), *["capture"] * (len(pairs) > 3)]
        assert recorded.log == expected + ["replay"] * (len(pairs) - 3)


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x


class Draws(nn.Module):
    def forward(self, x):
        return x * random.random()


class Copies(nn.Module):
    def forward(self, x):
        torch.empty_like(x, device="meta").copy_(x)
        return x


class Assigns(nn.Module):
    """Keeps a mean of its inputs, in a way."""

    def __init__(self, way):
        super().__init__()
        self.way, self.mean, self.kept = way, torch.zeros(4), {"calls": 1, "means": [torch.zeros(4)]}

    def forward(self, x):
        if self.way == "in place":
            return x - self.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
        if self.way == "counts":
            self.kept["calls"] += 1
            return x / self.kept["calls"]
        mean = (0.9 * (self.kept["means"][0] if self.way == "list" else self.mean) + 0.1 * x.detach().mean(0)).detach()
        if self.way == "attribute":
            self.mean = mean
        elif self.way == "data":
            self.mean.data = mean
        else:
            self.kept["means"][0] = mean
        return x - mean


@pytest.mark.parametrize(
    ("layer", "problem"),
    [
        (Counts(), "changes calls of 0"),
        (Draws(), "draws random numbers"),
        (Copies(), "copies a tensor from the host"),
        (Assigns("attribute"), "changes mean of 0"),
        (Assigns("data"), "changes mean of 0"),
        (Assigns("list"), "changes kept of 0"),
        (Assigns("counts"), "changes kept of 0"),
    ],
    ids=["counts", "draws", "copies", "attribute", "data", "list", "counts in a dictionary"],
)
def test_what_a_graph_would_not_repeat_is_seen_in_the_second_batch(layer, problem, recorded):
    model = nn.Sequential(layer, *network())
    run, x, y = graphs.Graphs(model, CPU), torch.randn(8, 4), torch.randint(3, (8,))
    for _ in range(5):
        run(partial(sltt.SLTT(fold=1), model, loss=LOSS, steps=2), x, y)
    assert problem in run.problem
    assert recorded.log == ["new", "eager", "eager"]
    with pytest.raises(ValueError, match="call the rule itself"):
        sltt.graphed(sltt.SLTT(fold=1), model, LOSS, x, y, steps=2)


@pytest.mark.parametrize("way", ["in place", "attribute", "list", "counts"])
def test_a_replay_repeats_what_is_done_in_place_and_not_what_is_assigned(way, recorded, monkeypatch, tmp_path):
    if way != "in place":
        monkeypatch.setattr(graphs, "watch", lambda model, run, device: (run(), None))
    settings = {"rule": sltt.SLTT(fold=1), "epochs": 2}
    model, _, log, _ = watched_training(recorded, tmp_path / "a", model=[Assigns(way), *network()], **settings)
    assert log.count("replay") == 3
    plain, _ = train(tmp_path / "b", nn.Sequential(Assigns(way), *network()), graph="off", **settings)
    assert equal(model.state_dict(), plain.state_dict()) == (way == "in place")


def test_lines_that_wait_for_a_device_are_found_by_its_warnings(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def run():
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("of the user", DeprecationWarning, stacklevel=1)

    with pytest.warns(DeprecationWarning, match="of the user"):
        _, problem = graphs.watch(network(), run, torch.device("cuda"))
    assert problem.startswith(f"a batch waits for the device in {__file__}:")
    assert modes == ["warn", 0]


@pytest.mark.parametrize(
    ("look", "problem"),
    [
        (lambda x: x.sum().item(), "reads values"),
        (lambda x: x.nonzero(), "reads values"),
        (lambda x: x[x > 0], "reads values"),
        (lambda x: x.index_put_((x > 0,), x), "reads values"),
        (lambda x: x.index_put_((x > 0,), x.new_zeros(())), None),
        (lambda x: torch.linalg.inv(x.diag()), "reads values"),
        (lambda x: x.cpu(), "copies a tensor"),
        (lambda x: x.copy_(torch.ones(3)), "copies a tensor"),
        (lambda x: x[torch.zeros(2, dtype=torch.long, device="meta")], None),
        (lambda x: x.to(torch.float64).copy_(x), None),
        (lambda x: torch.ones(3)[torch.ones(3) > 0].sum().item(), None),  # on the host, where it may look
    ],
    ids=["item", "nonzero", "mask", "fill", "fill by one", "inverse", "to", "from", "index", "on device", "on host"],
)
def test_looks_at_a_device_are_seen(look, problem):
    with graphs._HostTraffic() as seen, contextlib.suppress(NotImplementedError, RuntimeError):
        look(torch.ones(3, device="meta"))
    assert (seen.problem is None) if problem is None else problem in seen.problem


class Own(sltt.callbacks.Callback):
    def on_batch(self, now):
        pass


HOOKED = network()
HOOKED[0].register_forward_hook(lambda *_: None)
COMPILED = network()
COMPILED[0].compile()


@pytest.mark.parametrize(
    ("given", "problem", "demanded"),
    [
        ({}, None, None),
        ({"rule": sltt.SLTT(k=1)}, None, None),
        ({"rule": sltt.SLTT(k=6)}, "has 924 draws of 6 of 12 steps", "924"),
        ({"rule": sltt.BPTT(segment=2)}, "restores random generators", "restores"),
        ({"rule": sltt.Mixed({"2": 2})}, None, None),
        ({"rule": sltt.OTTT(online=True)}, "updates the weights at every time step", "updates"),
        ({"precision": "16-mixed"}, "use bf16-mixed", "bf16"),
        ({"precision": "bf16-mixed"}, None, None),
        ({"model": nn.SyncBatchNorm(1), "count": 2}, "processes exchange tensors", "exchange"),
        ({"count": 2}, None, None),
        ({"callbacks": [sltt.callbacks.EarlyStopping(), Own()]}, "Own may do what a graph does not", None),
        ({"rule": type("Drawing", (sltt.SLTT,), {})()}, "Drawing may do what a graph does not", None),
        ({"callbacks": [sltt.callbacks.EarlyStopping()]}, None, None),
        ({"model": HOOKED}, r"0 \(Linear\) has hooks", None),
        ({"model": COMPILED}, r"0 \(Linear\) has compiled code", None),
    ],
)
def test_what_runs_without_a_graph_says_why(given, problem, demanded, recorded):
    given = {"model": network(), "data": Blobs(), "count": 1, **given}
    processes = SimpleNamespace(count=given.pop("count"))
    for mode, expected in (("auto", problem), ("on", demanded)):
        here = SimpleNamespace(fabric=SimpleNamespace(device=CPU), processes=processes)
        settings = Settings(graph=mode, **given)
        made = graphs.make_graphs(here, settings, settings.rule, 12)
        assert (made.problem is None) if expected is None else made.problem
        if expected:
            with pytest.raises(AssertionError, match=expected):
                raise AssertionError(made.problem)


SEVERAL = [(torch.randn(2 + i % 3, 4), i % 3) for i in range(60)]


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"rule": sltt.BPTT(segment=2)}, "BPTT(segment=2) saves and restores random generators"),
        ({"data": sltt.data.from_datasets(SEVERAL, static=False, pad=True)}, "sequences have several lengths"),
    ],
    ids=["restores", "lengths"],
)
def test_the_log_of_a_run_says_why_there_is_no_graph(settings, why, recorded, monkeypatch, tmp_path):
    *_, log, lines = watched_training(recorded, tmp_path / "run", epochs=2, **settings)
    assert log == []
    (said,) = (line for line in lines if "CUDA graph" in line)
    assert said.startswith(f"batches run without a CUDA graph, since {why}")


def test_a_cpu_has_no_graphs():
    here = SimpleNamespace(fabric=SimpleNamespace(device=CPU))
    assert graphs.make_graphs(here, Settings(network(), Blobs()), sltt.SLTT(), 4) is None


@pytest.mark.parametrize("mode", ["auto", "on"])
def test_a_capture_that_fails_ends_a_training_only_if_graphs_are_demanded(mode, recorded, monkeypatch, tmp_path):
    def fail(self, function):
        torch.rand(3)
        try:
            raise RuntimeError("operation not permitted")
        finally:
            raise RuntimeError("invalid capture")

    monkeypatch.setattr(recorded, "capture", fail)
    monkeypatch.setattr(sltt.training.fit, "CudaGraph", Recorded)
    settings = {"epochs": 3, "graph": mode}
    if mode == "on":
        with pytest.raises(RuntimeError, match="invalid") as error:
            watched_training(recorded, tmp_path / "run", **settings)
        assert any("graph='off'" in note for note in error.value.__notes__)
        return
    model, found, log, lines = watched_training(recorded, tmp_path / "run", **settings)
    assert log == ["new", *["eager"] * 3]
    (line,) = (line for line in lines if "CUDA graph" in line)
    assert line.endswith("since its capture failed (RuntimeError: operation not permitted)")
    plain, expected = train(tmp_path / "plain", **settings | {"graph": "off"})
    assert rows(found) == rows(expected)
    assert equal(model.state_dict(), plain.state_dict())


@pytest.mark.parametrize("rule", FAMILY, ids=repr)
@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "bf16"])
def test_a_graphed_rule_is_the_rule_to_the_bit(rule, mixed, recorded, monkeypatch):
    batches = [(torch.randn(3, 8, 4), torch.randint(3, (8,))) for _ in range(3)]
    results = []
    for by_graph in (True, False):
        model, found = network(), []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        torch.manual_seed(3)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        step = partial(rule, model, loss=LOSS)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            if by_graph:
                step = sltt.graphed(rule, model, LOSS, *batches[0])
                assert equal(model.state_dict(), before)
                assert all(p.grad is None for p in model.parameters())
            for x, y in batches:
                if not by_graph:
                    optimizer.zero_grad()
                    torch.clear_autocast_cache()  # of casts: the weights have changed
                found.append(step(x, y))
                optimizer.step()
        results.append([*(t for out in found for t in out), *model.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_graphed_rule_refuses_what_it_cannot_repeat(recorded, monkeypatch):
    model, x, y = network(), torch.randn(8, 4), torch.randint(3, (8,))
    with pytest.raises(ValueError, match=r"SLTT\(k=1\) draws its steps anew for each batch: call the rule itself"):
        sltt.graphed(sltt.SLTT(k=1), model, LOSS, x, y, steps=2)
    step = sltt.graphed(sltt.SLTT(), model, LOSS, x, y, steps=2)
    with pytest.raises(ValueError, match=r"takes x \[8, 4\], got \[1, 4\]: use DataLoader\(…, drop_last"):
        step(x[:1], y)
    with pytest.raises(ValueError, match=r"takes y \[8\], got \[1\]"):
        step(x, y[:1])


def test_the_example_of_the_documentation_trains_as_without(recorded, monkeypatch):
    names = example("cpu")
    exec(compile(CAPTURE, "gpu.md", "exec"), names)
    assert recorded.log == ["new", *["eager"] * 3, "capture", *["replay"] * 3]
    assert_same_weights_and_gradients(names["model"], train_plain(**example("cpu")))


def test_a_graphed_rule_needs_a_gpu():
    with pytest.raises(ValueError, match="needs x on a CUDA device, got cpu: call the rule itself"):
        sltt.graphed(sltt.SLTT(), network(), LOSS, torch.randn(8, 4), torch.randint(3, (8,)), steps=2)
