"""What would give wrong gradients, or keep memory, without a word."""

import copy
import gc
import threading

import pytest
import torch
from torch import nn

import sltt
from sltt import kernels
from sltt.analysis import peak_memory
from sltt.kernels.options import DEFAULT, Kernel, options
from tests.conftest import LOSS, RULES, SURROGATES, batch, each_kind, gradients, small_network


class Shared(nn.Module):
    """One neuron in two places, as torchvision's blocks use their ReLU."""

    def __init__(self, neuron):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.relu = neuron()

    def forward(self, x):
        return self.head(self.relu(self.second(self.relu(self.first(x)))))


class TheirNeuron(nn.Module):
    """A neuron of another library, made known by `register`."""

    v = None

    def forward(self, x):
        self.v = x if self.v is None else 0.5 * self.v + x
        return sltt.surrogates.Triangle()(self.v - 1)


sltt.register(TheirNeuron, states=["v"], spikes=True)


@each_kind
@pytest.mark.parametrize("own", [sltt.LIF, TheirNeuron])
def test_a_neuron_in_two_places_is_refused_by_every_rule(rule, own):
    x, y = batch()
    model = Shared(own).double()
    known = isinstance(rule, sltt.RateBased) and own is TheirNeuron  # which has no derivative of it
    fold = rule.fold != 1 and own is TheirNeuron
    message = "relu" if known or fold else rf"relu \({own.__name__}\) runs twice in a time step.* for each place"
    if isinstance(rule, sltt.Mixed):
        rule = sltt.Mixed({"relu": "all"})
    if isinstance(rule, sltt.OTTT):
        rule = sltt.OTTT(decay=0.5)
    with pytest.raises(ValueError, match=message):
        rule(model, x, y, LOSS)
    assert not model.relu._forward_pre_hooks


def test_a_neuron_in_two_places_is_refused_without_a_graph(tmp_path):
    model = Shared(sltt.LIF).double()
    with pytest.raises(ValueError, match="runs twice in a time step"):
        sltt.unroll(model, batch()[0])
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), Shared(sltt.LIF), nn.Linear(3, 10))
    with pytest.raises(ValueError, match="runs twice in a time step"):
        sltt.evaluate(flat, sltt.data.Digits(), device="cpu", steps=2)


@pytest.mark.parametrize("how", ["module", "in place"])
def test_a_neuron_in_two_places_of_a_compiled_network_is_refused(how):
    def compiled(network):
        if how == "module":
            return torch.compile(network, backend="eager")
        network.compile(backend="eager")
        return network

    model = nn.Sequential(Shared(sltt.LIF), nn.BatchNorm1d(3), nn.Dropout(0.5)).double()
    drawn = torch.get_rng_state()
    x, _ = batch()
    with pytest.raises(ValueError, match=r"relu \(LIF\) runs twice in a time step"):
        sltt.check(compiled(model), x)
    assert model.training
    assert model[1].num_batches_tracked == 0
    alone = nn.Sequential(nn.Sequential(nn.Linear(6, 6), sltt.LIF()), nn.BatchNorm1d(6), nn.Dropout(0.5)).double()
    torch.set_rng_state(drawn)
    expected = sltt.unroll(copy.deepcopy(alone), x)
    torch.set_rng_state(drawn)
    assert torch.equal(sltt.unroll(compiled(alone), x), expected)  # and draws no other random numbers


def test_a_neuron_of_a_network_within_the_network_may_run_in_every_inner_step():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.net = nn.Sequential(nn.Linear(6, 6), sltt.LIF()), small_network()

        def forward(self, x):
            return self.net(x + sltt.unroll(self.inner, x, steps=3).mean(0))

    sltt.SLTT()(Outer().double(), *batch(), LOSS)


@pytest.mark.parametrize("rule", [sltt.SLTT(), sltt.BPTT(segment=2)], ids=repr)
def test_no_garbage_is_collected_while_the_state_of_a_generator_is_read(rule, monkeypatch):
    """PyTorch holds the generator's lock then, and garbage lets another thread run, which may wait for that lock."""
    read, collects = torch.get_rng_state, []
    monkeypatch.setattr(torch, "get_rng_state", lambda: (collects.append(gc.isenabled()), read())[1])
    gradients(small_network(dropout=0.5), rule, *batch(steps=4))
    assert collects
    assert not any(collects)
    assert gc.isenabled()


def test_two_threads_get_the_gradients_of_each_alone():
    """One folds and saves no bits, the other does neither; each has a network and a rule of its own."""
    settings = [(sltt.SLTT(fold=2), {"bits": False}), (sltt.BPTT(), {"bits": True})]
    x, y = batch(steps=4)
    models = [small_network(norm=True), small_network(norm=True)]
    expected = [gradients(m, rule, x, y)[0] for m, (rule, _) in zip(models, settings, strict=True)]
    found = [[], []]
    start = threading.Barrier(2)

    def work(i):
        rule, options = settings[i]
        with kernels.using(**options):
            start.wait()
            for _ in range(20):
                found[i].append(gradients(models[i], rule, x, y)[0])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for several, alone in zip(found, expected, strict=True):
        assert len(several) == 20
        assert all(torch.equal(one, alone) for one in several)
    for model in models:
        assert model(x[0]).shape == (5, 3)  # nothing of a fold is left
        assert not any("forward" in vars(module) for module in model.modules())
    assert options() == DEFAULT


@pytest.mark.parametrize("value", [*SURROGATES, *RULES.values()], ids=repr)
def test_surrogates_and_rules_are_values(value):
    for name, setting in vars(value).items():
        with pytest.raises(AttributeError, match="never changes: make another one"):
            setattr(value, name, setting)
    twin = copy.deepcopy(value)
    assert repr(twin) == repr(value)
    assert twin == value
    assert hash(twin) == hash(value)
    assert [other for other in [*SURROGATES, *RULES.values()] if other == value] == [value]


@pytest.mark.parametrize("rule", [sltt.SLTT(), sltt.BPTT(), sltt.SLTT(recompute=True), sltt.BPTT(fold=2)], ids=repr)
def test_a_batch_that_fails_before_its_backward_keeps_no_graph(rule):
    model = nn.Sequential(
        nn.Linear(8, 512), nn.BatchNorm1d(512), sltt.LIF(), nn.Linear(512, 512), nn.BatchNorm1d(512), sltt.LIF(),
        nn.ReLU(), nn.Linear(512, 3), nn.Sigmoid(),
    )  # fmt: skip
    x, y = torch.randn(4, 64, 8), torch.randint(3, (64,))

    def fails(logits, target):
        raise RuntimeError("planted")

    def run():
        with pytest.raises(RuntimeError, match="planted"):
            rule(model, x, y, fails)
        rule(model, x, y, LOSS, backward=lambda total: None)  # as a count of forward operations does

    def several():
        for _ in range(4):
            run()

    with kernels.using(compile="off"):
        run()
        assert peak_memory(several) < 1.3 * peak_memory(run)


def test_an_error_that_is_not_the_compilers_comes_through(monkeypatch):
    def forgets(out, x):
        raise MemoryError("planted")

    kernel = Kernel(forgets)
    monkeypatch.setattr(torch, "compile", lambda function, **kwargs: function)
    monkeypatch.setattr("sltt.kernels.options.compiler_problem", lambda device: None)
    with kernels.using(compile="on"), pytest.raises(MemoryError, match="planted"):
        kernel(torch.zeros(8), torch.zeros(8))
    assert not kernel._failed


def test_a_negated_view_is_what_it_shows():
    x = 2 * torch.randn(3, 64)
    assert torch.equal(sltt.LIF()(torch._neg_view(x)), sltt.LIF()(-x))
    results = []
    for negate in (torch._neg_view, torch.neg):
        leaf = x.clone().requires_grad_()
        sltt.LIF()(leaf).backward(negate(torch.ones_like(x)))
        results.append(leaf.grad)
    assert torch.equal(*results)


class Once(nn.Module):
    """Calls `once` in its forward, by a function of itself and its input."""

    def __init__(self, call):
        super().__init__()
        self.stem, self.head, self.call = nn.Sequential(nn.Linear(6, 6), sltt.LIF()), nn.Linear(6, 3), call

    def weight(self):
        return self.stem[0].weight - self.stem[0].weight.mean()

    def forward(self, x):
        return self.head(self.call(self, x))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda net, x: sltt.once(net.stem, x), r"once runs Sequential once .*, but 1 \(LIF\) keeps a state"),
        (lambda net, x: net.stem(x) + sltt.once(net.weight).sum(), r"\(LIF\) keeps a state .*: give it a module"),
        (lambda net, x: sltt.once(lambda z: net.stem(z), x), "once takes a module or a method of one, got <function"),
    ],
    ids=["module", "method", "function"],
)
def test_once_around_a_neuron_is_refused(call, message):
    x, y = batch()
    for rule, given, steps in ((sltt.SLTT(hoist=True), x[0], 2), (sltt.BPTT(), x, None)):
        with pytest.raises(ValueError, match=message):
            rule(Once(call).double(), given, y, LOSS, steps=steps)


def test_a_copy_in_the_middle_of_a_sequence_has_the_values():
    model = small_network()
    x, _ = batch()
    model(x[0])
    assert model[2].v.grad_fn is not None
    twin = copy.deepcopy(model)
    assert torch.equal(twin[2].v, model[2].v)
    assert twin[2].v.grad_fn is None
    assert torch.equal(twin(x[1]), model(x[1]))
    seen = []
    model[5].register_forward_hook(lambda *call: seen.append(copy.deepcopy(model)))
    sltt.BPTT()(model, *batch(), LOSS)
    assert torch.isfinite(seen[-1](x[0])).all()


@pytest.mark.parametrize("place", ["loss", "backward", "thread", "around", "part", "shared"])
def test_a_model_in_the_middle_of_a_sequence_is_refused(place):
    model, (x, y) = nn.Sequential(small_network()), batch()
    expected, _ = gradients(model, sltt.SLTT(fold=1), x, y)
    found = []
    other = {"around": nn.Sequential(model), "part": model[0], "shared": nn.Sequential(*model[0][:3])}.get(place, model)

    def again(value):
        with pytest.raises(ValueError, match=r"\(LIF\) is in the middle of another sequence.*deepcopy"):
            sltt.unroll(other, x)
        found.append(value)
        return value

    def in_thread(value):
        thread = threading.Thread(target=again, args=(value,))
        thread.start()
        thread.join()
        return value

    def backward(total):
        total.backward()
        if place == "backward":
            again(total)

    see = {"backward": lambda value: value, "thread": in_thread}.get(place, again)
    sltt.SLTT(fold=1)(model, x, y, lambda o, target: see(LOSS(o, target)), backward=backward)
    assert len(found) == len(x)
    assert torch.equal(torch.cat([p.grad.flatten() for p in model.parameters()]), expected)
    sltt.unroll(model, x)
