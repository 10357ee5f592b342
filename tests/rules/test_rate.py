import copy

import pytest
import torch
from torch import nn

import sltt
from sltt.analysis import count_operations
from sltt.sequence.layout import spiking_layers
from sltt.sequence.spikes import observe_spikes, watches
from tests.conftest import LOSS, batch, gradient, gradients, small_network
from tests.rules.rate_equations import (
    RULE,
    SETTINGS,
    STEADY,
    by_equations,
    by_rates,
    inputs_of,
    network,
    steady_inputs_of,
)


def by_autograd(neuron, inputs, decay=None):
    """∂r/∂c by differentiating T steps by a constant added to the inputs; or ∂r/∂λ at a given λ for each neuron."""
    c = torch.zeros_like(inputs[0]).requires_grad_()
    lam = torch.full_like(inputs[0], float(neuron.decay() if decay is None else decay)).requires_grad_()
    v = torch.full_like(inputs[0], neuron.start)
    total = 0
    for x in inputs:
        s, v = sltt.lif_step(v, x + c, decay=lam, **neuron.constants())
        total = total + s / len(inputs)
    return torch.autograd.grad(total.sum(), c if decay is None else lam)[0]


@pytest.mark.parametrize("rule", [RULE, STEADY], ids=repr)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_it_is_the_equations(settings, rule):
    model = network(lambda: sltt.LIF(tau=2.5, **settings))
    x, y = batch(steps=6)
    found, out = gradients(model, rule, x, y)
    inputs, logits = inputs_of(model, x)
    inputs, mean = steady_inputs_of(model, x) if rule.steady else (inputs, logits.mean(0))
    expected, loss = by_rates(model, x, y, inputs, mean)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(out.loss, loss)
    assert torch.equal(out.logits, logits) or (rule.steady and out.logits.shape == (6, 5, 3))
    assert not torch.allclose(found, gradients(model, sltt.SLTT(), x, y)[0])
    for neuron, currents in inputs.items():
        torch.testing.assert_close(by_equations(neuron, currents)[1], by_autograd(neuron, currents))


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_a_learnable_time_constant(settings):
    model = nn.Sequential(nn.Linear(6, 8), sltt.PLIF(tau=2.0, **settings), nn.Linear(8, 3)).double()
    model[0].weight.data.mul_(3)
    x, y = batch(steps=5)
    found = copy.deepcopy(model)
    RULE(found, x, y, LOSS)
    (inputs,), logits = (list(inputs_of(model, x)[0].values()), inputs_of(model, x)[1])
    mean = logits.mean(0).requires_grad_()
    (error,) = torch.autograd.grad(LOSS(mean, y), mean)
    neuron = model[1]
    of_decay = (error @ model[2].weight * by_autograd(neuron, inputs, decay=neuron.decay().detach())).sum()
    (of_w,) = torch.autograd.grad(neuron.decay(), neuron.w, of_decay.detach())
    torch.testing.assert_close(found[1].w.grad, of_w)
    assert of_w != 0


@pytest.mark.parametrize(("rule", "norm"), [(RULE, False), (RULE, True), (STEADY, True)], ids=str)
def test_with_one_step_it_is_bptt(neurons, rule, norm):
    model = small_network(neurons, norm=norm)
    x, y = batch(steps=1)
    torch.testing.assert_close(gradients(model, rule, x, y)[0], gradients(model, sltt.BPTT(), x, y)[0])


def test_with_dropout_the_rate_pass_has_the_mask_of_the_steps():
    model = network(sltt.LIF)
    model.insert(3, sltt.Dropout(0.5))
    x, y = batch()
    torch.manual_seed(1)
    found, _ = gradients(model, RULE, x, y)
    torch.manual_seed(1)
    mask = torch.empty(5, 8, dtype=torch.float64).bernoulli_(0.5).mul_(2)
    fixed = copy.deepcopy(model)

    class Fixed(nn.Module):
        def forward(self, x):
            return x * mask

    fixed[3] = Fixed()
    torch.testing.assert_close(found, gradients(fixed, RULE, x, y)[0])


def test_batch_norm_of_a_constant_input_is_differentiated_exactly():
    model = network(sltt.LIF, norm=True)
    x, y = batch(steps=1)
    found, _ = gradients(model, RULE, x[0], y, steps=4)
    twin = copy.deepcopy(model)
    inputs, logits = inputs_of(model, x.expand(4, 5, 6))
    first, norm, _, second, _, third = twin
    (r1, e1), (r2, e2) = (by_equations(m, i) for m, i in inputs.items())
    r = r1 + e1 * ((z := norm(first(x[0]))) - z.detach())
    r = r2 + e2 * ((z := second(r)) - z.detach())
    torch.testing.assert_close(third(r), logits.mean(0))
    LOSS(third(r), y).backward()
    expected = gradient(twin)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_of_a_sequence_has_the_statistics_of_its_steps(affine):
    model = nn.Sequential(nn.BatchNorm1d(6, affine=affine), sltt.LIF(tau=2.0), nn.Linear(6, 3)).double()
    x, y = batch(steps=6, size=8)
    seen = []
    handle = model[0].register_forward_hook(lambda m, inputs, output: seen.append(output.detach()))
    x.requires_grad_()
    RULE(model, x, y, LOSS)
    handle.remove()
    *steps, rates = seen
    mean, inverse = (
        torch.stack([f(x_t.detach()) for x_t in x]).mean(0)
        for f in (lambda x_t: x_t.mean(0), lambda x_t: (x_t.var(0, correction=0) + 1e-5).rsqrt())
    )
    torch.testing.assert_close(rates, (x.detach().mean(0) - mean) * inverse)
    goal = torch.stack(steps).mean(0)
    again = nn.functional.batch_norm(x.detach().mean(0), None, None, training=True)
    assert (rates - goal).norm() < 0.2 * (again - goal).norm()


@pytest.mark.parametrize("momentum", [0.1, None])
def test_statistics_are_those_of_the_steps_alone(momentum):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4, momentum=momentum)
            self.instance = nn.InstanceNorm1d(4, affine=True, track_running_stats=True)
            self.lif, self.head = sltt.LIF(), nn.Linear(4 * 5, 3)

        def forward(self, x):
            return self.head(self.lif(self.instance(self.norm(x))).flatten(1))

    model = Net()
    x, y = torch.randn(3, 6, 4, 5), torch.randint(3, (6,))
    twin = copy.deepcopy(model)
    sltt.unroll(twin, x)
    with pytest.warns(UserWarning, match=r"instance \(InstanceNorm1d\) divides .* its gradients are too large"):
        RULE(model, x, y, LOSS)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))
    assert model.norm.num_batches_tracked == 3
    model.eval()  # by the running statistics, which are constants
    RULE(model, x, y, LOSS)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))


def test_one_backward_whatever_t_is():
    model, y = small_network(norm=True), torch.randint(3, (5,))
    found = [count_operations(model, batch(steps)[0], y, LOSS, RULE) for steps in (2, 8)]
    assert found[0].backward == found[1].backward > 0
    assert found[1].forward == 3 * found[0].forward  # T steps and one
    calls = []
    RULE(model, *batch(8), LOSS, backward=lambda loss: (calls.append(1), loss.backward()))
    assert len(calls) == 1


def test_observers_see_the_spikes_of_the_steps_only():
    model = network(sltt.LIF)
    x, y = batch()
    with sltt.analysis.firing_rates(model) as rates:
        RULE(model, x, y, LOSS)
    with sltt.analysis.firing_rates(model) as expected:
        sltt.unroll(model, x)
    assert rates.by_layer() == expected.by_layer()


def test_the_loss_is_that_of_the_mean_logits_also_where_rates_give_others():
    class Squared(nn.Module):
        def forward(self, x):
            return x**2

    model = nn.Sequential(*network(sltt.LIF), Squared())
    x, y = batch()
    seen = []

    def loss(logits, target):
        seen.append(logits.detach())
        return LOSS(logits, target)

    out = RULE(model, x, y, loss)
    torch.testing.assert_close(seen, [out.logits.mean(0)])
    torch.testing.assert_close(out.loss, LOSS(out.logits.mean(0), y))


@pytest.mark.parametrize("make", [sltt.IF, sltt.LIF, sltt.PLIF])
def test_steady_is_exact_where_the_current_is(make):
    model = nn.Sequential(nn.Linear(6, 8), make(), nn.Linear(8, 3)).double()
    model[0].weight.data.mul_(3)
    x, y = batch(steps=1)
    found, expected = copy.deepcopy(model), copy.deepcopy(model)
    a = STEADY(found, x[0], y, LOSS, steps=5)
    b = RULE(expected, x[0], y, LOSS, steps=5)
    torch.testing.assert_close(a.loss, b.loss)
    for p, q in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_steady_runs_the_layers_once_and_observers_see_the_spikes_of_all_steps():
    model, seen, calls = network(sltt.LIF), {}, []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    x, y = batch(steps=11)
    layers = spiking_layers(model)
    with (
        sltt.analysis.firing_rates(model) as rates,
        observe_spikes(layers, lambda name, s: seen.setdefault(name, []).append(s)),
    ):
        STEADY(model, x, y, LOSS)
    assert len(calls) == 1
    assert [s.shape for s in seen["2"]] == 11 * [(5, 8)]
    (current,) = steady_inputs_of(model, x)[0][model[2]][:1]
    v, expected = torch.full_like(current, model[2].start), []
    for _ in range(11):
        s, v = sltt.lif_step(v, current, decay=model[2].decay())
        expected.append(s)
    assert torch.equal(torch.cat(seen["2"]), torch.cat(expected))
    assert rates.by_layer() == {name: pytest.approx(torch.cat(spikes).mean().item()) for name, spikes in seen.items()}
    assert all("forward" not in vars(m) and not watches(m) for m in layers.values())


@pytest.mark.parametrize("steps", [1, 3, 63, 64, 300])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_firing_rates_are_exact(dtype, steps):
    neuron = sltt.IF(v_init=0.5)
    x = torch.linspace(-0.1, 1.1, 301, dtype=dtype).repeat(2, 1)
    with sltt.analysis.firing_rates(nn.Sequential(neuron, nn.Linear(301, 2, dtype=dtype))) as expected:
        sltt.unroll(nn.Sequential(neuron, nn.Identity()), x, steps=steps)
    model = nn.Sequential(neuron, nn.Linear(301, 2, dtype=dtype))
    with sltt.analysis.firing_rates(model) as found:
        STEADY(model, x, torch.tensor([0, 1]), lambda logits, y: LOSS(logits.float(), y), steps=steps)
    assert found.state_dict() == {"0": expected.state_dict()["0"]}


@pytest.mark.parametrize("rule", [RULE, STEADY], ids=repr)
def test_sums_over_many_steps_do_not_stand_still_in_16_bits(rule):
    model = nn.Sequential(sltt.IF(half_state=True), nn.Linear(4, 2)).to(torch.bfloat16)
    x = torch.full((3, 4), 1.5, dtype=torch.bfloat16)  # a spike in every step
    seen = []
    model[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    rule(model, x, torch.tensor([0, 1, 0]), lambda logits, y: LOSS(logits.float(), y), steps=400)
    assert torch.equal(seen[-1], torch.ones(3, 4, dtype=torch.bfloat16))


def test_frames_of_whole_numbers():
    class Scaled(nn.Sequential):
        def forward(self, x):
            return super().forward(x.double() / 255)

    model = Scaled(*network(sltt.LIF))
    x, y = torch.randint(256, (4, 5, 6), dtype=torch.uint8), torch.randint(3, (5,))
    torch.testing.assert_close(
        gradients(model, RULE, x, y)[0], gradients(nn.Sequential(*model), RULE, x.double() / 255, y)[0], rtol=1e-5,
        atol=1e-7,
    )  # fmt: skip


def test_batch_norm_of_a_single_value_is_refused():
    model = nn.Sequential(nn.BatchNorm1d(6), sltt.LIF(), nn.Linear(6, 3))
    with pytest.raises(ValueError, match="more than one value a channel"):
        RULE(model, torch.randn(2, 1, 6), torch.tensor([0]), LOSS)


class Twice(nn.Module):
    def __init__(self, resting=False):
        super().__init__()
        self.lif, self.layer, self.head, self.resting = sltt.LIF(), nn.Linear(6, 6), nn.Linear(6, 3), resting

    def forward(self, x):
        if self.resting:
            return self.head(self.lif(x) if x[0, 0] > 0 else x)
        return self.head(self.lif(self.layer(self.lif(x))))


class Own(sltt.Stateful):
    states = ("seen",)

    def forward(self, x):
        return x


class OwnForward(sltt.LIF):
    def forward(self, x):
        return super().forward(2 * x)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Twice(), r"lif \(LIF\) runs twice in a time step"),
        (Twice(resting=True), r"lif \(LIF\) ran 1 times in 2 time steps"),
        (nn.Sequential(Own(), nn.Linear(6, 3)), r"not of 0 \(Own\)"),
        (nn.Sequential(OwnForward(), nn.Linear(6, 3)), r"not of 0 \(OwnForward\)"),
        (nn.Sequential(nn.SyncBatchNorm(6), sltt.LIF(), nn.Linear(6, 3)), r"plain BatchNorm, not 0 \(SyncBatchNorm\)"),
        (nn.Sequential(nn.Dropout(0.1), sltt.LIF(), nn.Linear(6, 3)), r"0 \(Dropout\) draws a mask .* sltt.Dropout"),
    ],
    ids=["twice", "resting", "foreign state", "own forward", "SyncBatchNorm", "dropout"],
)
def test_networks_that_it_does_not_know_are_refused(model, message):
    x, y = torch.randn(2, 4, 6), torch.randint(3, (4,))
    x[:, 0, 0] = torch.tensor([1.0, -1.0])
    with pytest.raises(ValueError, match=message):
        RULE(model, x, y, LOSS)
    assert all("forward" not in vars(m) for m in model.modules())


def test_modules_have_their_own_names_under_fabric_and_losses_that_it_trains_are_named():
    wrapped = nn.Module()
    wrapped.add_module("_forward_module", nn.Sequential(Own(), nn.Linear(6, 3)))
    wrapped.forward = wrapped._forward_module
    x, y = torch.randn(2, 4, 6), torch.randint(3, (4,))
    with pytest.raises(ValueError, match=r"not of 0 \(Own\)"):
        RULE(wrapped, x, y, LOSS)
    with pytest.raises(ValueError, match=r"RateBased\(\) trains losses of one step and OfMean, and not OfLast: use"):
        sltt.RateBased()(nn.Sequential(sltt.LIF(), nn.Linear(6, 3)), x, y, sltt.losses.OfLast(LOSS))
