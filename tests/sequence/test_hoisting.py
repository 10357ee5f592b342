import copy
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sltt
from sltt.models.nfresnet import ScaledWSConv2d
from sltt.sequence.run import Run
from sltt.sequence.steps import time_steps
from tests.conftest import LOSS
from tests.references import recorded
from tests.rules.test_folding import assert_same, results


class Stem(nn.Module):
    """Marks a convolution and a BatchNorm before the first neuron; the convolution's output is used three times."""

    def __init__(self, once=sltt.once):
        super().__init__()
        self.once = once
        self.conv, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.lif1, self.conv2, self.lif2 = sltt.LIF(tau=1.5), nn.Conv2d(4, 4, 3, padding=1), sltt.LIF(tau=1.5)
        self.head = nn.Linear(4 * 16, 3)

    def forward(self, x):
        x = self.once(self.conv, x)
        y = torch.relu(self.once(self.norm, x)) + x
        y = F.avg_pool2d(2 * self.lif1(y), 1) + x
        return self.head(self.lif2(self.conv2(y)).flatten(1))


def each_step(function, *inputs):
    return function(*inputs)


def images():
    return torch.randn(4, 2, 4, 4, dtype=torch.float64), torch.randint(3, (4,))


def count(model, layer, rule, *args, **kwargs):
    """How often a rule runs a layer of the model."""
    calls = []
    hook = getattr(model, layer).register_forward_hook(lambda *args: calls.append(1))
    rule(model, *args, LOSS, **kwargs)
    hook.remove()
    return len(calls)


@pytest.mark.parametrize(
    "make",
    [
        lambda **kw: sltt.SLTT(**kw),
        lambda **kw: sltt.SLTT(k=2, **kw),
        lambda **kw: sltt.SLTT(recompute=True, **kw),
        lambda **kw: sltt.TBPTT(2, **kw),
        lambda **kw: sltt.BPTT(**kw),
    ],
    ids=["SLTT", "SLTT-K", "SLTT, recomputed", "TBPTT", "BPTT"],
)
def test_what_is_marked_runs_once_with_the_same_gradient(make):
    model, twin = Stem().double(), Stem(each_step).double()
    twin.load_state_dict(model.state_dict())
    x, y = images()
    expected = results(twin, make(), x, y, {"steps": 5})[: -len(list(model.buffers()))]
    found = results(model, make(hoist=True), x, y, {"steps": 5})[: len(expected)]
    assert_same(found, expected)
    assert count(model, "conv", make(hoist=True), x, y, steps=5) == 1
    assert count(model, "norm", make(hoist=True), x, y, steps=5) == 1
    assert count(model, "conv2", sltt.SLTT(hoist=True), x, y, steps=5) == 5


def test_a_compiled_network_is_one_graph_in_which_every_step_computes_all():
    torch.compiler.reset()  # other tests may have compiled as often as it compiles at most
    x, y = images()
    model = nn.Sequential(ScaledWSConv2d(2, 2, 3), Stem()).double()
    expected = results(model, sltt.SLTT(fold=1), x, y, {"steps": 3})
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_same(results(compiled, sltt.SLTT(fold=1), x, y, {"steps": 3}), expected)


def test_running_statistics_see_one_batch_a_sequence():
    model, twin = Stem().double(), Stem(each_step).double()
    twin.load_state_dict(model.state_dict())
    x, y = images()
    sltt.SLTT(hoist=True)(model, x, y, LOSS, steps=6)
    twin(x)
    assert model.norm.num_batches_tracked == 1
    torch.testing.assert_close(model.norm.running_mean, twin.norm.running_mean)


def test_a_sequence_or_a_rule_without_hoist_computes_every_step():
    x, y = images()
    model = Stem().double()
    assert count(model, "conv", sltt.SLTT(fold=1), x, y, steps=5) == 5
    assert count(model, "conv", sltt.SLTT(hoist=True), x.expand(5, 4, 2, 4, 4), y) == 5


def test_evaluation_of_a_static_image_computes_once_too():
    model = Stem().double().eval()
    x, _ = images()
    calls = []
    model.conv.register_forward_hook(lambda *args: calls.append(1))
    found = sltt.unroll(model, x, steps=5)
    assert len(calls) == 1
    with torch.inference_mode():
        torch.testing.assert_close(sltt.unroll(model, x, steps=5), found)
    model.once = each_step
    torch.testing.assert_close(sltt.unroll(model, x, steps=5), found)


@pytest.mark.parametrize(
    "rule",
    [sltt.SLTT(fold=1), sltt.BPTT(fold=1), sltt.SLTT(k=2, fold=1), sltt.BPTT(segment=2, fold=1), sltt.SLTT(fold=2)],
    ids=repr,
)
def test_weights_are_standardised_once_with_the_same_gradient(rule, monkeypatch):
    layers = ScaledWSConv2d(2, 8, 3), sltt.LIF(), ScaledWSConv2d(8, 8, 3, 2), sltt.PLIF(tau=1.5)
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 3)).double()
    x, y = torch.randn(5, 4, 2, 4, 4, dtype=torch.float64), torch.randint(3, (4,))
    calls = recorded(monkeypatch, ScaledWSConv2d, "standardised_weight")
    found = results(model, rule, x, y, {})
    assert len(calls) == 2
    monkeypatch.setattr("sltt.models.nfresnet.once", each_step)
    assert_same(found, results(model, rule, x, y, {}))


class Masked(nn.Linear):
    """Its weight goes through a mask, a buffer."""

    def __init__(self, inputs, outputs, once=sltt.once):
        super().__init__(inputs, outputs)
        self.once = once
        self.register_buffer("mask", torch.rand(outputs, inputs) > 0.3)

    def masked(self):
        return self.weight * self.mask

    def forward(self, x):
        return F.linear(x, self.once(self.masked), self.bias)


@pytest.mark.parametrize(
    "rule", [sltt.SLTT(fold=1), sltt.BPTT(segment=2, fold=1), sltt.BPTT(segment=9, fold=1), sltt.RateBased()], ids=repr
)
def test_a_rule_that_sets_buffers_back_leaves_those_that_once_reads(rule):
    model = nn.Sequential(Masked(6, 8), nn.BatchNorm1d(8), sltt.LIF(), nn.Linear(8, 3)).double()
    x, y = torch.randn(5, 4, 6, dtype=torch.float64), torch.randint(3, (4,))
    twin = copy.deepcopy(model)
    twin[0].once = each_step
    assert_same(results(model, rule, x, y, {}), results(twin, rule, x, y, {}))


@pytest.mark.parametrize("fold", [1, 64])
@pytest.mark.parametrize("pooled", [False, True])
def test_gradients_of_many_steps_in_16_bits_add_up_in_32(fold, pooled):
    pool = nn.AvgPool2d(2 if pooled else 1)
    model = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), pool, sltt.LIF(), nn.Flatten(), nn.LazyLinear(10))
    x, y = 3 * torch.rand(8, 1, 8, 8), torch.randint(10, (8,))
    model(x), sltt.reset(model)
    with torch.autocast("cpu", torch.bfloat16):
        sltt.SLTT(fold=fold)(model, x, y, nn.CrossEntropyLoss(), steps=512)
        found, model[0].weight.grad = model[0].weight.grad, None
        for _ in range(512):
            sltt.detach(model)
            (nn.functional.cross_entropy(model(x), y) / 512).backward()
    assert (found - model[0].weight.grad).norm() < 0.008 * found.norm()


def test_a_change_in_place_of_what_is_kept_is_refused():
    class Changing(Stem):
        def forward(self, x):
            x = self.once(self.conv, x)
            with torch.no_grad():
                x.mul_(2)
            return self.head(self.lif1(x).flatten(1))

    with pytest.raises(RuntimeError, match="was changed in place, and serves all steps"):
        sltt.SLTT(hoist=True)(Changing().double(), *images(), LOSS, steps=2)


def test_weights_that_a_rule_changes_in_the_middle_are_computed_anew():
    conv = ScaledWSConv2d(2, 3, 3)
    with Run(nn.Sequential(conv, sltt.LIF()), time_steps(torch.zeros(3, 1, 2, 4, 4), None), sltt.Step(), grad=False):
        first = sltt.once(conv.standardised_weight)
        assert sltt.once(conv.standardised_weight) is first
        with torch.no_grad():
            conv.weight[0].mul_(torch.rand(2, 3, 3))
        assert not torch.equal(sltt.once(conv.standardised_weight), first)
    assert sltt.once(conv.standardised_weight) is not sltt.once(conv.standardised_weight)  # no sequence


def test_a_hook_that_scales_the_loss_scales_what_is_kept():
    model = Stem().double()
    x, y = images()
    grads = []
    for scale in (1.0, 1024.0):
        twin = copy.deepcopy(model)
        rule = sltt.SLTT(hoist=True)
        rule(twin, x, y, LOSS, steps=3, backward=lambda loss, scale=scale: (scale * loss).backward())
        grads.append(torch.cat([p.grad.flatten() / scale for p in twin.parameters()]))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    "make",
    [partial(sltt.models.ResNet, (1, 1, 1, 1)), partial(sltt.models.VGG, [[16], [16]]), sltt.models.DigitsNet],
    ids=["ResNet", "VGG", "DigitsNet"],
)
def test_the_networks_mark_their_layers_before_the_first_neuron(make):
    model = make(in_channels=2).double()
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    calls = []
    first.register_forward_hook(lambda *args: calls.append(1))
    x, y = torch.randn(2, 2, 8, 8, dtype=torch.float64), torch.tensor([0, 1])
    rules, weights = (sltt.SLTT(), sltt.SLTT(hoist=True)), len(list(model.parameters()))
    grads = [results(model, rule, x, y, {"steps": 3})[:weights] for rule in rules]
    assert len(calls) == 3 + 1
    assert_same(*grads)


class Frozen(nn.Module):
    """The same layer twice: without a graph, and with one."""

    def __init__(self):
        super().__init__()
        self.stem, self.trained = nn.Linear(4, 6), nn.Linear(4, 6)
        self.neuron, self.head = sltt.LIF(), nn.Linear(6, 3)

    def forward(self, x):
        with torch.no_grad():
            current = sltt.once(self.stem, x)
        return self.head(self.neuron(current + sltt.once(self.trained, x)))


@pytest.mark.parametrize("hoist", [False, True])
@pytest.mark.parametrize("k", [None, 2])
def test_what_the_network_computes_without_a_graph_stays_without(hoist, k):
    torch.manual_seed(0)
    model, x, y = Frozen(), 3 * torch.randn(5, 4), torch.arange(5) % 3
    sltt.SLTT(k=k, hoist=hoist)(model, x, y, nn.CrossEntropyLoss(), steps=4, seed=0)
    assert model.stem.weight.grad is None
    assert model.trained.weight.grad is not None


class InThread(sltt.Rule):
    """SLTT, whose forward runs in a thread."""

    def run(self, batch):
        with ThreadPoolExecutor(1) as pool:
            for t in range(batch.steps):
                batch.backward(pool.submit(batch.forward, range(t, t + 1)).result())
                batch.detach()
        return batch.output()


def test_a_rule_may_run_its_steps_in_a_thread():
    model, x, y = Stem(), torch.randn(3, 4, 2, 4, 4), torch.randint(3, (4,))
    found, expected = (results(model, rule, x, y, {}) for rule in (InThread(), sltt.SLTT(fold=1)))
    assert_same(found, expected)
