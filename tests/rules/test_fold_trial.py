"""Which networks share calls among time steps by default: those whose results stay the same."""

import copy
import itertools
import random
from collections import Counter, defaultdict
from operator import attrgetter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import sltt
from tests.conftest import LOSS, batch, gradients, small_network
from tests.rules.test_fold_chosen import CALLS, Net, called

COUNT = [0]


class Through(nn.Module):
    """A layer of one function, which gets it and its input."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.function(self, x)


class ByStep(nn.Module):
    """A layer for each time step, and all are the same at first."""

    def __init__(self):
        super().__init__()
        self.layers, self.log = nn.ModuleList(nn.Linear(16, 16) for _ in range(2)), []
        self.layers[1].load_state_dict(self.layers[0].state_dict())

    def forward(self, x):
        self.log.append(len(x))
        return self.layers[(len(self.log) - 1) % 2](x)


class ByCall(ByStep):
    """Counts where nobody looks."""

    def forward(self, x):
        COUNT[0] += 1
        return self.layers[COUNT[0] % 2](x)


class OfBatch(torch.autograd.Function):
    """Its backward divides by the size of the gradient of all samples."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad / (grad.norm() + 1)


def count(layer, x):
    layer.seen["steps"] += 1
    return layer.seen["steps"]


def keep_input(layer, x):
    before, layer.before = layer.before, x.detach()
    return x if before is None or before.shape != x.shape else x + before


def move_mean(layer, x):
    layer.mean.mul_(0.5).add_(x.detach().mean(0))
    return x


def move_mean_unseen(layer, x):
    """Change running statistics where autograd does not count it."""
    layer.mean.data.mul_(0.5).add_(x.detach().mean(0))
    return x


def hook_gradient(layer, x):
    x = x * 1
    x.register_hook(lambda grad: grad - grad.mean(0))
    return x


def hook_graph(layer, x):
    x = x * 1
    if x.requires_grad:
        x.grad_fn.register_prehook(lambda grads: (grads[0] - grads[0].mean(0),))
    return x


def shrink(layer, x):
    layer.mean.data = layer.mean.data * 0.9
    return x * layer.mean


def pairs(x):
    return x.view(-1, 2, 16).flip(1).flatten(0, 1)


def hooked(layer, register, hook):
    attrgetter(register)(layer)(hook)
    return layer


def look(module, args, output):
    if len(output) > 5:
        CALLS.append(len(output))


WEIGHT = {"w": nn.Parameter(torch.rand(16, 16))}
FUNCTIONS = {
    "mixes samples": (lambda layer, x: x - 0.1 * x.mean(0), {}),
    "counts its calls": (lambda layer, x: x * (1 + count(layer, x) % 3), {"seen": {"steps": 0}}),
    "does something else after some steps": (
        lambda layer, x: x if count(layer, x) < 4 else -x,
        {"seen": {"steps": 0}, "mean": torch.zeros(16)},
    ),
    "has statistics of its own": (move_mean, {"mean": nn.Buffer(torch.zeros(16))}),
    "has statistics that autograd does not count": (move_mean_unseen, {"mean": nn.Buffer(torch.zeros(16))}),
    "changes a plain tensor": (move_mean, {"mean": torch.zeros(16)}),
    "keeps its input": (keep_input, {"before": None}),
    "draws noise": (lambda layer, x: x + 0.1 * torch.randn_like(x), {}),
    "decides by a value, seldom": (lambda layer, x: -x if x.max() > 1e9 else x, {}),
    "knows the batch": (lambda layer, x: x.view(5, 16), {}),
    "has a checkpoint with a norm": (
        lambda layer, x: checkpoint(layer.norm, x, use_reentrant=False),
        {"norm": nn.BatchNorm1d(16)},
    ),
    "has a hook on what it computes": (hook_gradient, {}),
    "normalises gradients over the batch": (lambda layer, x: OfBatch.apply(x), {}),
    "draws from Python's generator": (lambda layer, x: x if random.random() < 0.5 else x.relu(), {}),
    "has one mask for the batch": (lambda layer, x: x * (torch.rand(x.shape[1]) > 0.5), {}),
    "takes few samples otherwise": (lambda layer, x: x if len(x) < 20 else 2 * x, {}),
    "normalises parts of the batch": (
        lambda layer, x: torch.cat([layer.norm(part) for part in x.split(6)]),
        {"norm": nn.BatchNorm1d(16)},
    ),
    "divides a gradient by how often its row is read": (
        lambda layer, x: x + layer.table((x > 0).long()).sum(2),
        {"table": nn.Embedding(2, 4, scale_grad_by_freq=True)},
    ),
    "reads its memory in another order": (lambda layer, x: x.contiguous().as_strided(x.shape, (1, len(x))), {}),
    "normalises a weight": (lambda layer, x: F.linear(x, layer.norm(layer.w)), {"norm": nn.BatchNorm1d(16), **WEIGHT}),
    "has neurons behind a weight": (lambda layer, x: x + layer.neuron(layer.w[0]), {"neuron": sltt.LIF(), **WEIGHT}),
    "drops weights": (lambda layer, x: F.linear(x, layer.drop(layer.w)), {"drop": nn.Dropout(), **WEIGHT}),
    "drops weights over time": (lambda layer, x: F.linear(x, layer.drop(layer.w)), {"drop": sltt.Dropout(), **WEIGHT}),
    "puts another tensor into its buffer": (shrink, {"mean": nn.Buffer(torch.ones(16))}),
    "puts another tensor into its weight": (shrink, {"mean": nn.Parameter(torch.ones(16))}),
    "selects by the size of the batch": (lambda layer, x: x + x[:, len(x) % 16, None], {}),
    "makes numbers by the size of the batch": (lambda layer, x: x / torch.ones(len(x)).sum(), {}),
    "has a hook on the graph": (hook_graph, {}),
    "pads the batch": (lambda layer, x: layer.pad(x), {"pad": nn.ConstantPad2d((0, 0, 1, -1), 0.0)}),
    "draws from a generator of its own": (
        lambda layer, x: -x if layer.drawn.random() < 0.15 else x,
        {"drawn": np.random.default_rng(1)},
    ),
    "counts in a counter": (lambda layer, x: x if count(layer, x) < 4 else -x, {"seen": Counter(steps=0)}),
    "counts by an iterator": (lambda layer, x: x if next(layer.seen) < 4 else -x, {"seen": itertools.count()}),
    "asks for the first step": (lambda layer, x: layer.lif(x if layer.lif.v is None else -x), {"lif": sltt.LIF()}),
    "mixes pairs of samples": (lambda layer, x: x if len(x) % 2 else x - 0.1 * pairs(x), {}),
}
SINGLE = {name: lambda given=given: Through(given[0], **copy.deepcopy(given[1])) for name, given in FUNCTIONS.items()}
MASKED = {"forward": lambda layer, x: x * (torch.rand(x.shape[1]) > 0.5) if layer.training else x}
SINGLE |= {
    "has a dropout of one mask": type("Masks", (nn.Dropout,), MASKED),
    "has a layer for each step": ByStep,
    "has a hook that looks": lambda: hooked(nn.Identity(), "register_forward_hook", look),
    "has a hook": lambda: hooked(nn.Identity(), "register_forward_hook", lambda module, args, y: y + y.mean(0)),
    "has a hook on a gradient": lambda: hooked(
        nn.Linear(16, 16), "weight.register_hook", lambda grad: grad.clamp(-1e-3, 1e-3)
    ),
    "has a hook behind a gradient": lambda: hooked(
        nn.Linear(16, 16), "weight.register_post_accumulate_grad_hook", lambda p: None
    ),
    "has a hook before a backward": lambda: hooked(
        nn.Linear(16, 16), "register_full_backward_pre_hook", lambda module, grads: None
    ),
    "is scripted": lambda: torch.jit.script(nn.Identity()),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning", "ignore:.*keeps a tensor of the batch")
@pytest.mark.parametrize("make", SINGLE.values(), ids=SINGLE)
@pytest.mark.parametrize("silent", [False, True])
def test_a_network_that_would_give_other_results_takes_one(make, silent):
    """Also where no neuron fires, so that its layers show nothing, and others hide what is behind them."""
    hide = [sltt.LIF()] if silent else []
    first = sltt.LIF(v_threshold=1e3 if silent else 1.0)
    model = Net(nn.Linear(6, 16), first, make(), *hide, nn.Linear(16, 3)).double()
    assert called(sltt.SLTT(), model, torch.randn(6, 5, 6, dtype=torch.float64)) == [5] * 6


def test_a_network_that_reads_what_moves_outside_of_it_is_named():
    model, x = Net(nn.Linear(6, 16), sltt.LIF(), ByCall(), nn.Linear(16, 3)).double(), torch.randn(6, 5, 6).double()
    with torch.no_grad():
        model[2].layers[1].bias += 1
    with pytest.raises(ValueError, match="reads something outside of it that moves, such as a clock"):
        sltt.unroll(model, x)
    assert sltt.unroll(model, x, fold=1).shape == (6, 5, 3)


class Accumulated(sltt.Stateful):
    """Gives its state, and changes it in place in the next step."""

    states = ("total",)

    def forward(self, x):
        self.total = torch.zeros_like(x) if self.total is None else self.total
        with torch.no_grad():
            self.total += x
        return x + self.total


class Given(Accumulated):
    def forward(self, x):
        super().forward(x)
        return self.total


FOLDED = {
    "a function": lambda: Through(lambda layer, x: 2 * x),
    "a state that changes in place": Accumulated,
    "a table": lambda: Through(lambda layer, x: x + layer.table((x > 0).long()).sum(2), table=nn.Embedding(2, 4)),
    "dropout": lambda: nn.Dropout(0.3),
    "batch norm": lambda: nn.BatchNorm1d(16),
    "group norm": lambda: nn.GroupNorm(4, 16),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)),
    "dropout over time": lambda: sltt.Dropout(0.3),
    "recurrence": lambda: sltt.Recurrent(sltt.IF(), nn.Linear(16, 16)),
    "another network": lambda: nn.Sequential(nn.Linear(16, 16), sltt.ALIF()),
}


@pytest.mark.parametrize("make", FOLDED.values(), ids=FOLDED)
def test_a_network_that_gives_the_same_results_takes_several(make):
    model, x = Net(nn.Linear(6, 16), sltt.LIF(), make(), nn.Linear(16, 3)).double(), torch.randn(6, 5, 6).double()
    assert called(sltt.BPTT(), model, x) == [30]
    if make is not Accumulated:  # whose steps cannot run again
        assert called(sltt.BPTT(segment="auto"), copy.deepcopy(model), x) == [30]
    model.eval()
    y = torch.randint(3, (5,))
    for rule, plain in ((sltt.SLTT(), sltt.SLTT(fold=1)), (sltt.BPTT(), sltt.BPTT(fold=1))):
        torch.testing.assert_close(gradients(model, rule, x, y)[0], gradients(model, plain, x, y)[0])


def test_a_state_that_is_given_and_changed_in_place_is_that_of_each_step():
    model, (x, y) = Net(nn.Linear(6, 16), Given(), nn.Linear(16, 3)).double(), batch()
    found, expected = (gradients(model, sltt.SLTT(fold=n), x, y)[0] for n in (4, 1))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("make", [lambda: nn.BatchNorm1d(16), nn.Dropout, sltt.Dropout])
def test_a_weight_that_layers_with_steps_compute_is_that_of_each_step(make):
    model, (x, y) = nn.Sequential(nn.Linear(6, 16), sltt.LIF(), nn.Linear(16, 3)).double(), batch()
    parametrize.register_parametrization(model[2], "weight", make().double(), unsafe=True)
    found, expected = [], []
    for fold, made in (("auto", found), (1, expected)):
        torch.manual_seed(0)
        made += gradients(copy.deepcopy(model), sltt.SLTT(fold=fold), x, y)[0]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mixes", True),
        ("helper", lambda _, x: x - x.mean(0)),
        ("forward", lambda self, x: Net.forward(self, x - x.mean(0))),
    ],
)
def test_what_changes_in_a_class_between_batches_is_tried_again(name, value, monkeypatch):
    class Own(Net):
        mixes = False

        def helper(self, x):
            return x - x.mean(0) if self.mixes else x

        def forward(self, x):
            return super().forward(self.helper(x))

    model, x = Own().double(), torch.randn(6, 5, 6, dtype=torch.float64)
    assert called(sltt.SLTT(), model, x) == [30]
    monkeypatch.setattr(Own, name, value)
    assert called(sltt.SLTT(), model, x) == [5] * 6


class Slots:
    __slots__ = ("on",)
    on: bool


class Config:
    on = False


INNER = [[[[False]]]]
KEPT = {  # what a forward reads, how, and what changes it
    "a dictionary with defaults": (defaultdict(bool), lambda kept: kept.get("on"), lambda kept: kept.update(on=True)),
    "slots": (Slots(), lambda kept: getattr(kept, "on", False), lambda kept: setattr(kept, "on", True)),
    "a class": (Config, lambda kept: kept.on, lambda kept: setattr(kept, "on", True)),
    "a list in lists": ([INNER], lambda kept: kept[0][0][0][0][0], lambda kept: INNER[0][0][0].__setitem__(0, True)),
    "a layer in a list": ([nn.BatchNorm1d(6).eval()], lambda kept: kept[0].training, lambda kept: kept[0].train()),
}


@pytest.mark.parametrize(("kept", "reads", "change"), KEPT.values(), ids=KEPT)
def test_what_changes_in_an_attribute_between_batches_is_tried_again(kept, reads, change):
    class Own(Net):
        def forward(self, x):
            return super().forward(x - x.mean(0) if reads(self.watched) else x)

    model, x = Own().double(), torch.randn(6, 5, 6, dtype=torch.float64)
    model.watched = kept
    assert called(sltt.SLTT(), model, x) == [30]
    change(kept)
    assert called(sltt.SLTT(), model, x) == [5] * 6


@pytest.mark.parametrize("hook", [None, lambda grad: grad.clamp(-1e-4, 1e-4)])
def test_what_numpy_reads_and_a_hook_on_an_image_are_of_each_step(hook):
    between = nn.Identity() if hook else Through(lambda _, x: x / (0.1 + float(x.detach().numpy().mean())))
    model, found = Net(nn.Linear(6, 16), sltt.LIF(), between, nn.Linear(16, 3)).double(), []
    nn.init.uniform_(model[0].weight, -0.2, 0.4)
    for fold in ("auto", 1):
        x = torch.linspace(0, 2, 30).double().view(5, 6).requires_grad_()
        if hook:
            x.register_hook(hook)
        copied = copy.deepcopy(model)
        sltt.SLTT(fold=fold)(copied, x, torch.arange(5) % 3, LOSS, steps=6)
        found.append([x.grad, copied[0].weight.grad])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("read", [lambda x: x.max().clamp(min=1), lambda x: max(1.0, *x.flatten().tolist())])
def test_what_differs_between_samples_in_a_later_batch_only_is_tried(read):
    rule, divided = sltt.SLTT(), Through(lambda _, x: x / read(x))
    model, x = Net(divided, nn.Linear(6, 16), sltt.LIF(), nn.Linear(16, 3)).double(), torch.ones(6, 5, 6).double()
    rule(model, x[0], torch.zeros(5).long(), LOSS, steps=6)
    assert called(rule, model, x) == [5] * 6


def mean_taken_off(module, args):
    return args[0] - args[0].mean(0), args[1]


@pytest.mark.parametrize("change", ["forward", "hook"])
def test_a_loss_of_pytorch_that_was_changed_sees_one_step(change):
    model, (x, y), loss = Net().double(), batch(), nn.CrossEntropyLoss()
    if change == "hook":
        loss.register_forward_pre_hook(mean_taken_off)
    else:
        loss.forward = lambda logits, y: F.cross_entropy(*mean_taken_off(None, (logits, y)))
    found, expected = (gradients(model, sltt.SLTT(fold=n), x, y, loss)[0] for n in ("auto", 1))
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_a_target_that_pytorch_broadcasts_is_that_of_each_step():
    model = Net(nn.Linear(6, 5), sltt.LIF(), nn.Linear(5, 5)).double()
    x, y = torch.randn(6, 5, 6).double(), torch.randn(5)
    found, expected = (gradients(model, sltt.SLTT(fold=n), x, y, nn.MSELoss())[0] for n in ("auto", 1))
    torch.testing.assert_close(found, expected)


class Twice(nn.Module):
    """Layers without places of their own: one that runs twice has one name."""

    def __init__(self, *layers):
        super().__init__()
        self.kept = nn.ModuleList(dict.fromkeys(layers))
        self.order = [[*self.kept].index(layer) for layer in layers]

    def forward(self, x):
        for i in self.order:
            x = self.kept[i](x)
        return x


@pytest.mark.parametrize("rule", [sltt.SLTT, sltt.BPTT])
def test_trying_a_network_gives_what_is_outside_of_it_no_gradient(rule):
    (x, y), found = batch(), []
    outside = torch.ones(3, dtype=torch.float64)
    model = small_network(sltt.LIF).append(Through(lambda layer, z: torch.einsum("bi->bi", z) * outside))
    for fold in ("auto", 1):
        given, outside.grad = x.clone().requires_grad_(), torch.ones(3, dtype=torch.float64)
        outside.requires_grad_()
        rule(fold=fold)(copy.deepcopy(model), given, y, LOSS)
        found.append((given.grad, outside.grad))
    torch.testing.assert_close(*found)


def test_a_trial_that_fails_leaves_gradients_outside_of_the_network_alone():
    (x, y), found, calls, outside = batch(), [], [], torch.ones(3)

    def scale(layer, z):
        calls.append(z.dtype)
        if calls[-1] == torch.float64 and calls.count(torch.float64) == 2:  # on a copy
            raise RuntimeError("once")
        return torch.einsum("bi->bi", z) * outside

    model = small_network(sltt.LIF).append(Through(scale)).float()
    for fold in ("auto", 1):
        outside.grad = torch.ones(3)
        outside.requires_grad_()
        sltt.SLTT(fold=fold)(copy.deepcopy(model), x.float(), y, LOSS)
        found.append(outside.grad)
    torch.testing.assert_close(*found)
    assert calls.count(torch.float64) >= 2


@pytest.mark.parametrize("kind", [nn.Sequential, Net, Twice])
@pytest.mark.parametrize("make", [lambda: nn.BatchNorm1d(6), lambda: sltt.Dropout(0.0)])
def test_a_layer_with_steps_that_runs_twice_takes_one(kind, make):
    """Its statistics, and the masks that it draws, come in the order of the steps."""
    shared, (x, y) = make(), batch()
    model = kind(nn.Linear(6, 6), shared, sltt.LIF(), nn.Linear(6, 6), shared, sltt.LIF(), nn.Linear(6, 3)).double()
    found, expected = (gradients(model, sltt.SLTT(fold=fold), x, y) for fold in ("auto", 1))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert len(set(sltt.unroll(model, x).shape)) == 3


def test_trying_a_network_leaves_no_trace():
    model = Net(nn.Linear(6, 16), nn.BatchNorm1d(16), sltt.LIF(), nn.Dropout(), nn.Linear(16, 3))
    x = torch.randn(6, 5, 6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    model.eval()
    sltt.unroll(model, x)
    assert torch.equal(torch.get_rng_state(), generator)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert not any("forward" in vars(m) for m in model.modules())


def test_a_function_in_place_of_a_forward_is_not_tried():
    """A copy of the network runs the layers of the original."""
    model, x = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), sltt.LIF()), torch.randn(6, 5, 6)
    model.forward = lambda x: model[2](model[1](model[0](x)))
    sltt.unroll(model, x)
    assert model[1].num_batches_tracked == 6


def test_steps_without_a_graph_are_tried_too():
    """Also where a step is too large for two with a graph."""
    model = Net(nn.Linear(6, 16), sltt.LIF(), SINGLE["mixes samples"](), nn.Linear(16, 3)).double()
    x = torch.randn(6, 1100, 6).double()
    torch.testing.assert_close(sltt.unroll(model, x), sltt.unroll(model, x, fold=1))
