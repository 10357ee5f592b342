import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

import sltt
from tests.test_folding import assert_same, results

LOSS = sltt.losses.CrossEntropyMSE()


class Stem(nn.Module):
    """Before the first neuron: a convolution, BatchNorm, an in-place ReLU and a sum; its output is used twice."""

    def __init__(self, inplace=True):
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=inplace)
        self.lif1, self.conv2, self.lif2 = sltt.LIF(tau=1.5), nn.Conv2d(4, 4, 3, padding=1), sltt.LIF(tau=1.5)
        self.head = nn.Linear(4 * 16, 3)

    def forward(self, x):
        x = self.conv(x)
        y = self.relu(self.norm(x)) + x
        y = F.avg_pool2d(2 * self.lif1(y), 1) + x
        return self.head(self.lif2(self.conv2(y)).flatten(1))


class Standardised(nn.Conv2d):
    """Weight standardisation with a gain."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1))

    def forward(self, x):
        var, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True)
        weight = (self.weight - mean) * torch.rsqrt(var + 1e-4) * self.gain
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


def standardised():
    return nn.Sequential(Standardised(2, 8, 3), sltt.LIF(), Standardised(8, 8, 2), sltt.PLIF(tau=1.5), nn.Flatten(),
                         nn.Linear(8, 3))  # fmt: skip


class Counter(TorchFunctionMode):
    """How often a function is called."""

    def __init__(self, function):
        super().__init__()
        self.function, self.calls = function, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls += func is self.function
        return func(*args, **(kwargs or {}))


def count(function, rule, *args, **kwargs):
    with Counter(function) as counter:
        rule(*args, LOSS, **kwargs)
    return counter.calls


@pytest.mark.parametrize("make", [lambda **kw: sltt.SLTT(**kw), lambda **kw: sltt.SLTT(k=2, **kw),
                                  lambda **kw: sltt.BPTT(**kw), lambda **kw: sltt.BPTT(recompute=2, **kw)],
                         ids=["SLTT", "SLTT-K", "BPTT", "BPTT, replayed"])  # fmt: skip
@pytest.mark.parametrize("fold", [1, 3])
def test_the_network_before_the_first_neuron_runs_once_with_the_same_gradient(make, fold):
    model = Stem().double()
    x, y = torch.randn(4, 2, 4, 4, dtype=torch.float64), torch.randint(3, (4,))
    expected = results(model, make(), x, y, {"steps": 5})
    assert_same(results(model, make(hoist=True, fold=fold), x, y, {"steps": 5}), expected)


def test_running_statistics_are_those_of_every_step():
    x, y = torch.randn(4, 2, 4, 4), torch.randint(3, (4,))
    models = [Stem() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, hoist in zip(models, (False, True), strict=True):
        model.norm.momentum = 0.3
        sltt.SLTT(hoist=hoist)(model, x, y, LOSS, steps=6)
    for a, b in zip(models[0].buffers(), models[1].buffers(), strict=True):
        torch.testing.assert_close(a, b)
    assert models[1].norm.num_batches_tracked == 6


def test_the_stem_runs_once_with_hoist_only():
    x, y = torch.randn(4, 2, 4, 4), torch.randint(3, (4,))
    assert count(F.conv2d, sltt.SLTT(), Stem(), x, y, steps=5) == 10
    assert count(F.conv2d, sltt.SLTT(hoist=True), Stem(), x, y, steps=5) == 6
    assert count(F.conv2d, sltt.SLTT(hoist=True), Stem(), x.expand(5, 4, 2, 4, 4), y) == 10  # a sequence may change
    assert count(F.batch_norm, sltt.SLTT(hoist=True), Stem(), x, y, steps=5) == 1


@pytest.mark.parametrize("rule", [sltt.SLTT(), sltt.BPTT(), sltt.SLTT(k=2), sltt.BPTT(recompute=2)], ids=repr)
def test_weights_are_standardised_once_with_the_same_gradient(rule):
    model = standardised().double()
    x, y = torch.randn(5, 4, 2, 4, 4, dtype=torch.float64), torch.randint(3, (4,))
    assert count(torch.var_mean, rule, copy.deepcopy(model), x, y) in (2, 4)  # without and with a graph
    found = results(model, rule, x, y, {})
    torch.manual_seed(1)
    twin = copy.deepcopy(model)
    twin.requires_grad_(False)
    weights = []
    for layer in (twin[0], twin[2]):  # by hand: one leaf for each standardised weight
        var, mean = torch.var_mean(layer.weight, dim=(1, 2, 3), keepdim=True)
        weights.append(((layer.weight - mean) * torch.rsqrt(var + 1e-4)).requires_grad_())
        layer.forward = lambda x, w=weights[-1], b=layer.bias: F.conv2d(x, w, b)
    out = rule(twin, x, y, LOSS)
    torch.testing.assert_close(found[-2 - len(list(model.buffers()))], out.logits)
    for i, (layer, weight) in enumerate(zip((model[0], model[2]), weights, strict=True)):
        var, mean = torch.var_mean(layer.weight, dim=(1, 2, 3), keepdim=True)
        standard = (layer.weight - mean) * torch.rsqrt(var + 1e-4)
        expected = torch.autograd.grad(standard, layer.weight, weight.grad)[0]
        names = [name for name, _ in model.named_parameters()]
        torch.testing.assert_close(found[names.index(f"{2 * i}.weight")], expected)


def test_evaluation_standardises_once_too():
    model = standardised()
    x = torch.randn(5, 4, 2, 4, 4)
    with torch.no_grad():
        expected = torch.stack([model(x_t) for x_t in x])
    sltt.reset(model)
    torch.testing.assert_close(sltt.unroll(model, x), expected)


def test_a_change_in_place_of_what_is_hoisted_is_refused():
    class Changing(Stem):
        def forward(self, x):
            x = self.conv(x)
            x.mul_(2)
            return self.head(self.lif1(x).flatten(1))

    with pytest.raises(RuntimeError, match="mul_ changes in place what was computed once"):
        sltt.SLTT(hoist=True)(Changing(), torch.randn(4, 2, 4, 4), torch.randint(3, (4,)), LOSS, steps=2)


def test_a_batch_size_taken_before_the_first_neuron_is_explained_with_fold():
    class Sized(Stem):
        def forward(self, x):
            x = self.conv(x)
            return super().forward(torch.zeros(x.shape[0], 4, 4, 4)[:, :2] + x[:, :2])

    x, y = torch.randn(4, 2, 4, 4), torch.randint(3, (4,))
    sltt.SLTT(hoist=True)(Sized(), x, y, LOSS, steps=2)
    with pytest.raises(RuntimeError) as caught:
        sltt.SLTT(hoist=True, fold=2)(Sized(), x, y, LOSS, steps=2)
    assert "with fold and hoist" in caught.value.__notes__[0]


def test_a_region_without_a_graph_stays_one():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.lif = nn.Parameter(torch.randn(3, 6)), sltt.LIF()

        def forward(self, x):
            with torch.no_grad():
                scale = self.weight.abs().mean() * 2
            return F.linear(self.lif(x), self.weight / scale)

    model = Scaled().double()
    x, y = torch.randn(4, 5, 6, dtype=torch.float64) * 2, torch.randint(3, (5,))
    found = results(model, sltt.SLTT(), x, y, {})[0]
    sltt.reset(model)
    total = sum(LOSS(model(x_t), y) / 4 for x_t in x)
    torch.testing.assert_close(found, torch.autograd.grad(total, model.weight)[0])


def test_a_hook_that_scales_the_loss_scales_what_is_hoisted():
    model = standardised().double()
    x, y = torch.randn(5, 4, 2, 4, 4, dtype=torch.float64), torch.randint(3, (4,))
    grads = []
    for scale in (1.0, 1024.0):
        twin = copy.deepcopy(model)
        sltt.SLTT()(twin, x, y, LOSS, backward=lambda loss, scale=scale: (scale * loss).backward())
        grads.append(torch.cat([p.grad.flatten() / scale for p in twin.parameters()]))
    torch.testing.assert_close(*grads)
