"""Which networks share calls among time steps by default: those whose results stay the same."""

import random

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import sltt
from tests.conftest import batch, gradients
from tests.rules.test_fold_chosen import CALLS, Net, called

COUNT = [0]


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
def test_a_network_that_would_give_other_results_takes_one(make, silent):
    """Also where no neuron fires, so that its layers show nothing, and others hide what is behind them."""
    hide = [sltt.LIF()] if silent else []
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


def test_steps_without_a_graph_are_tried_too():
    """Also where a step is too large for two with a graph."""
    model, x = Net(nn.Linear(6, 16), sltt.LIF(), Mean(), nn.Linear(16, 3)).double(), torch.randn(6, 1100, 6).double()
    torch.testing.assert_close(sltt.unroll(model, x), sltt.unroll(model, x, fold=1))
