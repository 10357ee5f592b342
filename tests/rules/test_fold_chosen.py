"""How many time steps share a call of the network by default: several where that pays, and changes nothing."""

import random

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import sltt
from sltt.rules.fold_trial import Trial
from tests.conftest import LOSS, batch, gradients
from tests.references import measured

COUNT = [0]
CALLS = []  # samples in each call of a network, not counting those of a copy that is tried


class Net(nn.Sequential):
    """A network with a forward of its own."""

    def __init__(self, *layers):
        super().__init__(*(layers or (nn.Linear(6, 16), sltt.LIF(), nn.Linear(16, 3))))

    def forward(self, x):
        CALLS.append(len(x))
        return super().forward(x)


def called(rule, model, x, y=None, **kwargs):
    """The samples in the calls of a network."""
    rule(model, x, torch.zeros(x.shape[1], dtype=torch.long) if y is None else y, LOSS, **kwargs)
    CALLS.clear()
    rule(model, x, torch.zeros(x.shape[1], dtype=torch.long) if y is None else y, LOSS, **kwargs)
    return CALLS[:]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (sltt.SLTT(), [25 * 64] * 4),
        (sltt.BPTT(), [25 * 64] * 4),
        (sltt.TBPTT(10), [10 * 64] * 10),
        (sltt.TBPTT(50), [25 * 64] * 4),
        (sltt.OTTT(), [64] + [25 * 64] * 3 + [24 * 64]),
        (sltt.RateBased(), [50 * 64] * 2 + [64]),
        (sltt.SLTT(fold=1), [64] * 100),
        (sltt.SLTT(fold=40), [40 * 64] * 2 + [20 * 64]),
    ],
    ids=repr,
)
def test_small_layers_take_several_time_steps_in_a_call(rule, expected):
    assert called(rule, Net(), torch.randn(100, 64, 6)) == expected


def test_large_layers_take_one():
    model = Net(nn.Conv2d(2, 4, 3, padding=1), sltt.LIF(), nn.Flatten(), nn.Linear(4 * 64, 3))
    assert called(sltt.SLTT(), model, torch.randn(6, 32, 2, 8, 8)) == [32] * 6
    assert called(sltt.SLTT(), model, torch.randn(6, 8, 2, 8, 8)) == [24, 24]


def test_steps_without_a_graph_fold_further():
    torch.manual_seed(0)
    calls = called(sltt.SLTT(k=1), Net(), torch.randn(40, 500, 6), seed=0)
    assert max(calls) == 8 * 500
    assert 500 in calls
    x = torch.randn(40, 500, 6)
    CALLS.clear()
    sltt.unroll(model := Net(), x)
    assert CALLS[-5:] == [8 * 500] * 5
    torch.testing.assert_close(sltt.unroll(model, x), torch.cat([sltt.unroll(model, x[:1]), sltt.unroll(model, x)[1:]]))


def test_steps_without_a_graph_are_tried_too():
    """Also where a step is too large for two with a graph."""
    model, x = Net(nn.Linear(6, 16), sltt.LIF(), Mean(), nn.Linear(16, 3)).double(), torch.randn(6, 1100, 6).double()
    torch.testing.assert_close(sltt.unroll(model, x), sltt.unroll(model, x, fold=1))


class Mean(nn.Module):
    def forward(self, x):
        return x - 0.1 * x.mean(0)


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.t = 0

    def forward(self, x):
        self.t += 1
        return x * (1 + self.t % 3)


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


class Running(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(16))

    def forward(self, x):
        self.mean.mul_(0.5).add_(x.detach().mean(0))
        return x


class Memory(nn.Module):
    before = None

    def forward(self, x):
        before, self.before = self.before, x.detach()
        return x if before is None or before.shape != x.shape else x + before


class Noise(nn.Module):
    def forward(self, x):
        return x + 0.1 * torch.randn_like(x)


class Choice(nn.Module):
    """Reads something else where a value says so; which it seldom does."""

    def forward(self, x):
        return -x if x.max() > 1e9 else x


class Fixed(nn.Module):
    def forward(self, x):
        return x.view(5, 16)


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(16)

    def forward(self, x):
        return checkpoint(self.norm, x, use_reentrant=False)


class OfBatch(torch.autograd.Function):
    """Its backward divides by the size of the gradient of all samples."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad / (grad.norm() + 1)


class Normed(nn.Module):
    def forward(self, x):
        return OfBatch.apply(x)


class Hooked(nn.Module):
    def forward(self, x):
        x = x * 1
        x.register_hook(lambda grad: grad - grad.mean(0))
        return x


class Behind(Running):
    """Running statistics whose changes autograd does not count."""

    def forward(self, x):
        self.mean.data.mul_(0.5).add_(x.detach().mean(0))
        return x


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.mean, self.seen = torch.zeros(16), {"steps": 0}

    def forward(self, x):
        self.mean.add_(x.detach().mean(0))
        return x


class Late(Plain):
    """Does something else after some steps."""

    def forward(self, x):
        self.seen["steps"] += 1
        return x if self.seen["steps"] < 4 else -x


class Skipped(nn.Module):
    def forward(self, x):
        return x if random.random() < 0.5 else x.relu()


class OneMask(nn.Dropout):
    def forward(self, x):
        return x * (torch.rand(x.shape[1]) > self.p)


class Sized(nn.Module):
    def forward(self, x):
        return x if len(x) < 20 else 2 * x


class Parts(nn.Module):
    """Normalises parts of a batch."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(16)

    def forward(self, x):
        return torch.cat([self.norm(part) for part in x.split(6)])


class Pairs(nn.Module):
    def forward(self, x):
        return x if len(x) % 2 else (x.view(-1, 2, 16) - 0.1 * x.view(-1, 2, 16).flip(1)).flatten(0, 1)


def looked_at():
    layer = nn.Identity()
    layer.register_forward_hook(lambda module, args, output: CALLS.append(len(output)) if len(output) > 5 else None)
    return layer


def clipped():
    """Each time step's gradient is clipped."""
    layer = nn.Linear(16, 16)
    layer.weight.register_hook(lambda grad: grad.clamp(-1e-3, 1e-3))
    return layer


def noted():
    layer = nn.Linear(16, 16)
    layer.weight.register_post_accumulate_grad_hook(lambda p: None)
    return layer


def hooked_before():
    layer = nn.Linear(16, 16)
    layer.register_full_backward_pre_hook(lambda module, grads: None)
    return layer


def hooked():
    layer = nn.Identity()
    layer.register_forward_hook(lambda module, args, output: output + output.mean(0))
    return layer


SINGLE = {
    "mixes samples": Mean,
    "counts its calls": Counter,
    "has a layer for each step": ByStep,
    "has a layer for each call": ByCall,
    "has a hook that looks": looked_at,
    "has a hook on a gradient": clipped,
    "has a hook behind a gradient": noted,
    "has statistics of its own": Running,
    "keeps its input": Memory,
    "draws noise": Noise,
    "decides by a value": Choice,
    "knows the batch": Fixed,
    "has a checkpoint with a norm": Checkpointed,
    "has a hook": hooked,
    "has a hook before a backward": hooked_before,
    "has a hook on what it computes": Hooked,
    "normalises gradients over the batch": Normed,
    "has statistics that autograd does not count": Behind,
    "changes a plain tensor": Plain,
    "counts in a dictionary": Late,
    "draws from Python's generator": Skipped,
    "has one mask for the batch": OneMask,
    "takes few samples otherwise": Sized,
    "normalises parts of the batch": Parts,
    "mixes pairs of samples": Pairs,
    "is scripted": lambda: torch.jit.script(nn.Identity()),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("make", SINGLE.values(), ids=SINGLE)
@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize("last", ["the logits show it", "neurons hide it"])
def test_a_network_that_would_give_other_results_takes_one(make, silent, last):
    """Also where no neuron fires, so that its layers show nothing."""
    hide = [sltt.LIF()] if last == "neurons hide it" else []
    first = sltt.LIF(v_threshold=1e3 if silent else 1.0)
    model = Net(nn.Linear(6, 16), first, make(), *hide, nn.Linear(16, 3)).double()
    assert called(sltt.SLTT(), model, torch.randn(6, 5, 6, dtype=torch.float64)) == [5] * 6


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
    "a state that changes in place": Accumulated,
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
    model.eval()
    y = torch.randint(3, (5,))
    for rule, plain in ((sltt.SLTT(), sltt.SLTT(fold=1)), (sltt.BPTT(), sltt.BPTT(fold=1))):
        torch.testing.assert_close(gradients(model, rule, x, y)[0], gradients(model, plain, x, y)[0])


def test_a_state_that_is_given_and_changed_in_place_is_that_of_each_step():
    model, (x, y) = Net(nn.Linear(6, 16), Given(), nn.Linear(16, 3)).double(), batch()
    found, expected = (gradients(model, sltt.SLTT(fold=n), x, y)[0] for n in (4, 1))
    torch.testing.assert_close(found, expected)


def test_trying_a_network_leaves_no_trace():
    model, x = (
        Net(nn.Linear(6, 16), nn.BatchNorm1d(16), sltt.LIF(), nn.Dropout(), nn.Linear(16, 3)),
        torch.randn(6, 5, 6),
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    model.eval()
    sltt.unroll(model, x)
    assert torch.equal(torch.get_rng_state(), generator)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert not any("forward" in vars(m) for m in model.modules())


class Full(nn.Module):
    """Runs out of memory for more than so many samples in a call."""

    def __init__(self, room):
        super().__init__()
        self.room = room

    def forward(self, x):
        if len(x) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x


@pytest.mark.filterwarnings("ignore:runs out of memory")
def test_a_fold_that_does_not_fit_is_halved_once():
    def net(room):
        return Net(nn.Linear(6, 16), nn.BatchNorm1d(16), sltt.LIF(), Full(room), nn.Linear(16, 3))

    x, y = torch.randn(100, 64, 6), torch.randint(3, (64,))
    expected, model = net(10**6), net(1000)
    model.load_state_dict(expected.state_dict())
    with pytest.warns(UserWarning, match="runs out of memory: 12 time steps share a call, half as many"):
        sltt.SLTT()(model, x, y, LOSS)
    sltt.SLTT(fold=12)(expected, x, y, LOSS)
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(model.state_dict(), expected.state_dict())
    assert called(sltt.SLTT(), model, x)[:2] == [12 * 64] * 2
    assert called(sltt.SLTT(), net(100), x) == [64] * 100
    with pytest.raises(torch.OutOfMemoryError):
        gradients(net(1000), sltt.SLTT(fold=25), x, y)


def test_memory_stays_flat_in_time():
    model = nn.Sequential(nn.Linear(700, 256), sltt.LIF(), nn.Linear(256, 256), sltt.LIF(), nn.Linear(256, 20))
    y = torch.randint(20, (64,))
    peaks = {}
    for steps, rule in ((320, sltt.SLTT()), (640, sltt.SLTT()), (640, sltt.SLTT(fold=1))):
        x = (torch.rand(steps, 64, 700) < 0.05).float()
        rule(model, x, y, LOSS)
        peaks[steps, rule.fold] = measured(rule, model, x, y)
    logits = 320 * 64 * 20 * 4  # of the further steps
    assert peaks[640, "auto"] <= 1.01 * peaks[320, "auto"] + logits
    assert peaks[640, "auto"] <= peaks[640, 1] + 2**24


def test_another_length_is_not_compared_again(monkeypatch):
    compared, model, x = [], Net(), torch.randn(20, 64, 6)
    plain = Trial.compare
    monkeypatch.setattr(Trial, "compare", lambda trial, steps: compared.append(steps) or plain(trial, steps))
    for steps in (20, 12, 20):
        sltt.unroll(model, x[:steps])
    sltt.unroll(model, torch.randn(30, 64, 6))
    sltt.unroll(model, x[:, :32])
    assert compared == [20, 30, 20]


def test_the_number_of_steps_depends_on_shapes_alone():
    """A network that learned, or that was loaded, runs as a new one does."""
    model, x = Net(), torch.randn(100, 64, 6)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert called(sltt.SLTT(), model, x) == called(sltt.SLTT(), Net(), x)


def test_another_thread_that_seeds_the_generator_changes_no_choice(monkeypatch):
    plain, seeds = torch.manual_seed, iter(range(10**6))
    monkeypatch.setattr(torch, "manual_seed", lambda seed: plain(next(seeds)))  # as if it came between two lines
    assert called(sltt.SLTT(), Net(), torch.randn(100, 64, 6)) == [25 * 64] * 4
