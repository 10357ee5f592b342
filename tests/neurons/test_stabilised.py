"""OnlineRenorm and StableLIF beside a literal transcription of their equations, and under every rule."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import sltt
from sltt.parallel import processes
from tests.conftest import LOSS, RULES, batch, gradient
from tests.neurons.plain import alone

RULES = {name: rule for name, rule in RULES.items() if not isinstance(rule, sltt.RateBased)}
TRIANGLE = sltt.surrogates.Triangle()
EPS = 1e-5


class LiteralNorm(nn.Module):
    """y = γ (z r + d) + β with r and d constants; running statistics once a sequence, by `finish`."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.bias = (nn.Parameter(p.detach().clone()) for p in (norm.weight, norm.bias))
        self.mean, self.var = norm.running_mean.clone(), norm.running_var.clone()
        self.seen = []

    def forward(self, x):
        dims = [0, *range(2, x.ndim)]
        form = (1, -1, *[1] * (x.ndim - 2))
        var, mean = torch.var_mean(x, dims, correction=0)
        self.seen.append((mean.detach(), var.detach()))
        r = ((var + EPS) / (self.var + EPS)).sqrt().detach()
        d = ((mean - self.mean) / (self.var + EPS).sqrt()).detach()
        z = (x - mean.view(form)) / (var + EPS).sqrt().view(form)
        y = z * r.view(form) + d.view(form)
        return self.weight.view(form) * y + self.bias.view(form)

    def finish(self, momentum=0.1):
        mean = sum(m for m, _ in self.seen) / len(self.seen)
        var = sum(v + m**2 for m, v in self.seen) / len(self.seen) - mean**2
        self.mean = (1 - momentum) * self.mean + momentum * mean
        self.var = (1 - momentum) * self.var + momentum * var
        self.seen = []


class LiteralNeuron(sltt.Stateful):
    states = ("v", "ratio")
    spikes = True
    decay = 0.5

    def forward(self, x):
        u = x if self.v is None else 0.5 * self.v + x
        mean, std = u.detach().mean(), u.detach().std(correction=0)
        self.ratio = (0.8 - mean) / std if self.ratio is None else self.ratio
        threshold = mean + self.ratio * std
        s = TRIANGLE(u - threshold)
        self.v = u - threshold * s
        return s


def renorm(channels):
    norm = sltt.OnlineRenorm(channels).double()
    for value in (norm.running_mean, norm.running_var, norm.weight.data, norm.bias.data):
        value.uniform_(0.3, 1.3)
    return norm


def networks():
    """A network of both, and the same of literal ones."""
    layers = [nn.Linear(6, 8), renorm(8), sltt.StableLIF(2.0, 0.8), nn.Linear(8, 7), sltt.StableLIF(2.0, 0.8)]
    model = nn.Sequential(*layers, nn.Linear(7, 3)).double()
    model[0].weight.data.mul_(3)
    model[3].weight.data.mul_(3)
    literal = copy.deepcopy(model)
    literal[1], literal[2], literal[4] = LiteralNorm(model[1]), LiteralNeuron(), LiteralNeuron()
    return model, literal


@pytest.mark.parametrize("shape", [(20,), (4, 7), (3, 4, 2)], ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
def test_renorm_is_its_equations(shape, last):
    norm = renorm(3)
    literal = LiteralNorm(norm)
    for steps in (3, 2):
        for _ in range(steps):
            x = (2 * torch.randn(shape[0], 3, *shape[1:], dtype=torch.float64) + 0.7).requires_grad_()
            x_in = x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x
            grad = torch.randn_like(x)
            y, expected = norm(x_in), literal(x)
            torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
            found = torch.autograd.grad(y, [x, norm.weight, norm.bias], grad)
            torch.testing.assert_close(
                found, torch.autograd.grad(expected, [x, literal.weight, literal.bias], grad), rtol=1e-10, atol=1e-12
            )
        literal.finish()
        sltt.reset(norm)
        torch.testing.assert_close(norm.running_mean, literal.mean)
        torch.testing.assert_close(norm.running_var, literal.var)
    assert norm.num_batches_tracked == 2
    norm.eval()
    form = (1, -1, *[1] * (x.ndim - 2))
    scaled = (x - literal.mean.view(form)) / (literal.var + EPS).sqrt().view(form)
    torch.testing.assert_close(norm(x), norm.weight.view(form) * scaled + norm.bias.view(form))
    assert norm.before is None


@pytest.mark.parametrize("scale", [100.0, 0.01])
def test_renorm_takes_the_statistics_of_a_batch_that_differs_too_much(scale):
    x = torch.randn(20, 3, dtype=torch.float64)
    x[:, 1] *= scale
    x.requires_grad_()
    norm, plain = sltt.OnlineRenorm(3).double(), nn.BatchNorm1d(3).double()
    grad = torch.randn_like(x)
    y, expected = norm(x), plain(x)
    torch.testing.assert_close(y, expected)
    found, wanted = (torch.autograd.grad(out, [x, *m.parameters()], grad) for out, m in ((y, norm), (expected, plain)))
    torch.testing.assert_close(found, wanted)
    near = sltt.OnlineRenorm(3, limit=200.0).double()
    torch.testing.assert_close(near(x), x / (1 + EPS) ** 0.5)


def test_stable_lif_is_its_equations():
    neuron, literal = sltt.StableLIF(2.0, 0.8).double(), LiteralNeuron()
    x = (torch.randn(6, 50, 4, dtype=torch.float64) + 0.3).requires_grad_()
    weights = torch.randn_like(x)
    found, expected = (torch.stack([n(x_t) for x_t in x]) for n in (neuron, literal))
    assert torch.equal(found, expected)
    a, b = (torch.autograd.grad((s * weights).sum(), x)[0] for s in (found, expected))
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    rates = found.mean((1, 2))
    assert (rates - rates[0]).abs().max() < 0.05
    assert neuron.follow.running[0] == pytest.approx(0.8)
    assert len(neuron.follow.running[:6].unique()) == 6
    assert (neuron.follow.running[5:] == neuron.follow.running[5]).all()


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_every_rule_trains_them(rule):
    model, literal = networks()
    if isinstance(rule, sltt.OTTT):  # traces β in normalisations of PyTorch and ours
        literal[1] = copy.deepcopy(model[1])
    x, y = batch(size=9)
    for _ in range(2):  # the second sequence has the running statistics of the first
        model.zero_grad()
        literal.zero_grad()
        out = rule(model, x, y, LOSS, seed=3)
        expected = alone(rule)(literal, x, y, LOSS, seed=3)
        torch.testing.assert_close(gradient(model), gradient(literal), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(out.logits, expected.logits)
        assert gradient(model).count_nonzero() > len(gradient(model)) / 3
        if isinstance(literal[1], LiteralNorm):
            literal[1].seen = literal[1].seen[-4:]  # a rule may have run steps twice
            literal[1].finish()
            torch.testing.assert_close(model[1].running_var, literal[1].var)


def test_ottt_has_the_trace_of_beta():
    """β adds the same at every step, so that its gradient is that of BPTT where the reset is a constant."""
    neuron = sltt.LIF(2.0, detach_reset=True)
    model = nn.Sequential(nn.Linear(6, 8), renorm(8), neuron, nn.Linear(8, 3)).double()
    x, y = batch(steps=6, size=9)
    found = []
    for rule in (sltt.OTTT(), sltt.BPTT(), sltt.SLTT()):
        model.zero_grad()
        with torch.no_grad():
            model[1].running_mean.zero_()
            model[1].running_var.fill_(1.0)
        rule(model, x, y, LOSS)
        found.append(model[1].bias.grad.clone())
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)
    assert not torch.allclose(found[0], found[2])


def test_a_layer_that_runs_once_a_sequence_gives_the_same():
    model = sltt.models.ShallowResNet((4, 8), norm=sltt.OnlineRenorm, neuron=sltt.StableLIF).double()
    x, y = torch.randn(5, 3, 8, 8, dtype=torch.float64), torch.randint(10, (5,))
    results = []
    for rule in (sltt.SLTT(), sltt.SLTT(hoist=True), sltt.SLTT(fold=3)):
        copied = copy.deepcopy(model)
        rule(copied, x, y, LOSS, steps=4)
        results.append([gradient(copied), *(b for _, b in copied.named_buffers())])
    assert len(results[0]) > 10
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


def test_the_test_does_not_depend_on_other_samples_and_goes_on_with_the_last_threshold():
    model, _ = networks()
    for _ in range(3):
        sltt.SLTT()(model, *batch(size=9), LOSS)
    x, _ = batch(steps=7, size=9)
    model.eval()
    alone = torch.cat([sltt.unroll(model, x[:, [i]]) for i in range(9)], 1)
    torch.testing.assert_close(alone, sltt.unroll(model, x))
    running = model[2].follow.running
    assert (running[3:] == running[3]).all()
    assert running[2] != running[3]


def test_a_short_sequence_leaves_the_thresholds_of_later_steps():
    model, _ = networks()
    follow = model[2].follow
    for steps in (6, 6, 2):
        before = follow.running.clone()
        sltt.SLTT()(model, *batch(steps=steps, size=9), LOSS)
    assert before[:6].unique().numel() == 6
    assert not torch.isclose(before[:2], follow.running[:2], rtol=1e-9, atol=0)[1]
    assert torch.equal(before[2:], follow.running[2:])


def test_thresholds_wait_for_a_step_that_is_not_silent():
    neuron = sltt.StableLIF(2.0, 0.8)
    x = torch.randn(5, 400)
    x[:2] = 0
    spikes = sltt.unroll(neuron.train(), x.unsqueeze(1))
    assert not spikes[:2].any()
    assert spikes[2:].mean(2).min() > 0.05
    assert neuron.follow.running[:3].tolist() == pytest.approx([0.8] * 3)
    assert neuron.follow.running.max() < 1


@pytest.mark.parametrize(("mean", "deviation"), [(30.0, 1e-3), (100.0, 1e-2), (7.3, 0.0)])
def test_renorm_of_a_channel_that_hardly_varies(mean, deviation):
    norm = sltt.OnlineRenorm(1, momentum=1.0)
    x = mean + deviation * torch.randn(3, 64, 1)
    for x_t in x:
        assert norm(x_t).isfinite().all()
    expected = x.double().var(correction=0)
    torch.testing.assert_close(norm.running_var.double(), expected[None], rtol=1e-3, atol=1e-10)


def test_processes_end_a_batch_with_the_mean_of_their_statistics(monkeypatch):
    model, _ = networks()
    model.append(norm := nn.InstanceNorm1d(3, track_running_stats=True).double())
    monkeypatch.setattr(processes.dist, "all_reduce", lambda flat: flat.add_(3 / 2))
    before = model[1].running_var.clone()
    together = processes.Processes(SimpleNamespace(global_rank=0, world_size=2, local_rank=0))
    together.average_statistics(model)
    assert (norm.running_mean == 0 / 2 + 3 / 2).all()
    torch.testing.assert_close(model[1].running_var, before / 2 + 3 / 2)
    torch.testing.assert_close(model[4].follow.running, torch.full((64,), 0.8 / 2 + 3 / 2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sltt.OnlineRenorm(0), "channels must be at least 1"),
        (lambda: sltt.OnlineRenorm(3, momentum=0.0), "momentum must be greater than 0"),
        (lambda: sltt.OnlineRenorm(3, limit=0.5), "limit must be at least 1"),
        (lambda: sltt.OnlineRenorm(3)(torch.randn(2, 4)), r"expected input \[B, 3, ...\], got shape \[2, 4\]"),
        (lambda: sltt.OnlineRenorm(3)(torch.randn(1, 3)), r"more than one value for each channel, got \[1, 3\]"),
        (lambda: sltt.StableLIF(tau=1.0), "tau must be greater than 1"),
        (lambda: sltt.StableLIF(v_threshold=0.0), "v_threshold must be greater than 0"),
        (lambda: sltt.StableLIF(momentum=2.0), "momentum must be greater than 0 and at most 1"),
        (lambda: sltt.RateBased()(networks()[0], *batch(), LOSS), r"plain BatchNorm, not 1 \(OnlineRenorm\)"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
