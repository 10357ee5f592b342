import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sltt
from sltt import kernels
from sltt.analysis import peak_memory
from tests.conftest import NEURONS, RULES, batch, gradients, small_network

LOSS = sltt.losses.CrossEntropyMSE()


def by_hand(model, x, y, detached):
    """BPTT over the literal loop, or SLTT by detaching the state by hand after every step."""
    model = copy.deepcopy(model)
    sltt.reset(model)
    total = 0
    for x_t in x:
        total = total + LOSS(model(x_t), y) / len(x)
        if detached:
            for module in model.modules():
                if hasattr(module, "v"):
                    module.v = module.v.detach()
    total.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()]), total


@pytest.fixture(params=[False, True], ids=["plain", "norm+dropout"])
def model(request, neuron):
    """A network of every neuron; its dropout draws the same mask in every call that is seeded alike."""
    if request.param:
        return small_network(neuron, norm=True, dropout=0.3)
    return small_network(neuron)


def seeded(call, *args, **kwargs):
    torch.manual_seed(1)
    return call(*args, **kwargs)


def test_bptt_equals_the_literal_loop(model):
    x, y = batch()
    grad, out = seeded(gradients, model, sltt.BPTT(), x, y)
    expected, total = seeded(by_hand, model, x, y, detached=False)
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(out.loss, total.detach())
    assert expected.abs().max() > 0


def test_sltt_equals_the_loop_detached_by_hand(model):
    x, y = batch()
    grad, out = seeded(gradients, model, sltt.SLTT(), x, y)
    expected, total = seeded(by_hand, model, x, y, detached=True)
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(out.loss, total.detach())


@pytest.mark.parametrize(
    ("rule", "twin"),
    [
        (sltt.TBPTT(4), sltt.BPTT()),
        (sltt.BPTT(segment=1), sltt.BPTT()),
        (sltt.BPTT(segment=3), sltt.BPTT()),
        (sltt.BPTT(segment=9), sltt.BPTT()),
        (sltt.TBPTT(9), sltt.BPTT()),
        (sltt.TBPTT(1), sltt.SLTT()),
        (sltt.SLTT(k=4, generator=torch.Generator()), sltt.SLTT()),
        (sltt.SLTT(k=4, rescale=True, generator=torch.Generator()), sltt.SLTT()),
    ],
    ids=[
        "TBPTT(4)",
        "BPTT(segment=1)",
        "BPTT(segment=3)",
        "BPTT(segment=9)",
        "TBPTT(9)",
        "TBPTT(1)",
        "SLTT(k=4)",
        "SLTT(k=4, rescale)",
    ],
)
def test_members_of_the_family_that_are_the_same(model, rule, twin):
    x, y = batch(steps=4)
    torch.testing.assert_close(seeded(gradients, model, rule, x, y)[0], seeded(gradients, model, twin, x, y)[0])


@pytest.mark.parametrize(
    "rule", [sltt.SLTT(), sltt.TBPTT(1), sltt.TBPTT(3), sltt.SLTT(k=1), sltt.BPTT(segment=1)], ids=repr
)
def test_with_one_step_all_rules_are_the_same(model, rule):
    x, y = batch(steps=1)
    assert torch.equal(seeded(gradients, model, rule, x, y)[0], seeded(gradients, model, sltt.BPTT(), x, y)[0])


@settings(max_examples=25, deadline=None)
@given(steps=st.integers(1, 6), window=st.integers(1, 7), size=st.integers(1, 4), seed=st.integers(0, 99))
def test_tbptt_equals_a_loop_that_detaches_between_windows(steps, window, size, seed):
    torch.manual_seed(seed)
    model = small_network()
    x, y = batch(steps, size)
    twin = copy.deepcopy(model)
    sltt.reset(twin)
    for t, x_t in enumerate(x):
        if t % window == 0:
            sltt.detach(twin)
        (LOSS(twin(x_t), y) / steps).backward(retain_graph=True)
    expected = torch.cat([p.grad.flatten() for p in twin.parameters()])
    torch.testing.assert_close(gradients(model, sltt.TBPTT(window), x, y)[0], expected)


def test_bptt_differs_from_sltt_and_less_for_a_smaller_decay():
    x, y = batch(steps=6, size=32)
    gaps = []
    for tau in (4.0, 2.0, 1.33, 1.1):
        torch.manual_seed(3)
        model = small_network(lambda tau=tau: sltt.LIF(tau=tau))
        bptt, _ = gradients(model, sltt.BPTT(), x, y)
        spatial, _ = gradients(model, sltt.SLTT(), x, y)
        gaps.append(1 - torch.cosine_similarity(bptt, spatial, dim=0).item())
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > 1.5 * gaps[-1] > 0


def test_rescaled_single_draws_average_to_sltt(neuron):
    steps = 4
    x, y = batch(steps)
    model = small_network(neuron)
    total, seen, seed = 0, set(), 0
    while len(seen) < steps:
        generator = torch.Generator().manual_seed(seed)
        seed += 1
        step = torch.randperm(steps, generator=torch.Generator().manual_seed(seed - 1))[0].item()
        if step in seen:
            continue
        seen.add(step)
        total = total + gradients(model, sltt.SLTT(k=1, rescale=True, generator=generator), x, y)[0]
    torch.testing.assert_close(total / steps, gradients(model, sltt.SLTT(), x, y)[0])


def test_sltt_k_keeps_the_loss_over_t_unless_rescaled():
    x, y = batch(steps=4)
    model = small_network()
    plain, rescaled = (seeded(gradients, model, sltt.SLTT(k=2, rescale=r), x, y) for r in (False, True))
    torch.testing.assert_close(2 * plain[0], rescaled[0])
    assert plain[1].loss == rescaled[1].loss


def test_output_is_that_of_the_forward_loop(rule, neuron):
    x, y = batch()
    model = small_network(neuron)
    _, out = gradients(model, rule, x, y)
    assert not out.loss.requires_grad
    assert not out.logits.requires_grad
    if getattr(rule, "steady", False):
        pytest.skip("its logits are those of steady currents, not of the time steps: tests/test_rate.py")
    logits = sltt.unroll(model, x)
    assert torch.equal(out.logits, logits)
    of_mean = isinstance(rule, sltt.RateBased)
    expected = LOSS(logits.mean(0), y) if of_mean else torch.stack([LOSS(o, y) for o in logits]).mean()
    torch.testing.assert_close(out.loss, expected)


def test_static_input_equals_its_repetition(rule):
    x, y = batch(steps=1)
    model = small_network()
    static = seeded(gradients, model, rule, x[0], y, steps=4)
    repeated = seeded(gradients, model, rule, x.repeat(4, 1, 1), y)
    torch.testing.assert_close(static[0], repeated[0], rtol=1e-12, atol=1e-14)
    assert torch.equal(static[1].logits, repeated[1].logits)
    assert torch.equal(sltt.unroll(model, x[0], steps=4), sltt.unroll(model, x.repeat(4, 1, 1)))


# of a sequence of four time steps
BACKWARDS = {
    "BPTT": 1,
    "BPTT(segment=2)": 2,
    "BPTT(recompute=True)": 1,
    "BPTT(fold=4)": 1,
    "BPTT(segment=2, fold=2)": 2,
    "TBPTT(2)": 2,
    "TBPTT(3, fold=2)": 2,
    "SLTT": 4,
    "SLTT(recompute)": 4,
    "SLTT(fold=3)": 2,
    "SLTT(hoist)": 4,
    "BPTT(hoist)": 1,
    "SLTT(k=1)": 1,
    "OTTT": 4,
    "OTTT(inputs=False)": 4,
    "RateBased": 1,
    "RateBased(steady)": 1,
    "Mixed": 5,
    "Mixed(default=2)": 5,
    "SLTT(k=2, rescale)": 2,
    "SLTT(k=2, fold=4)": 2,
    "SLTT(k=2, hoist)": 2,
}


def test_backward_hook_gets_every_scalar(rule):
    x, y = batch()
    model = small_network()
    scale = 1024.0
    calls = []

    def backward(loss):
        calls.append(loss.item())
        (scale * loss).backward()

    scaled, _ = seeded(gradients, model, rule, x, y, backward=backward)
    plain, _ = seeded(gradients, model, rule, x, y)
    torch.testing.assert_close(scaled / scale, plain)
    assert len(calls) == BACKWARDS[next(name for name, one in RULES.items() if one is rule)]


def test_gradients_add_up_until_they_are_zeroed(rule):
    x, y = batch()
    model = small_network()
    for _ in range(2):
        seeded(rule, model, x, y, LOSS)
    twice = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(twice, 2 * seeded(gradients, model, rule, x, y)[0])


def test_nothing_is_left_behind(rule, neuron):
    x, y = batch()
    model = small_network(neuron, dropout=0.5)
    rule(model, x, y, LOSS)
    rule(model, x[:, :2], y[:2], LOSS)  # another batch size needs no reset by the user
    assert model[2].v is None
    assert model[3].mask is None


def test_an_exception_resets_the_model(rule):
    x, y = batch()
    model = small_network(dropout=0.5)
    calls = []

    def fails(logits, target):
        calls.append(1)
        if len(calls) == (1 if isinstance(rule, sltt.RateBased) else 3):  # of as many as it has
            raise RuntimeError("planted")
        return LOSS(logits, target)

    with pytest.raises(RuntimeError, match="planted"):
        rule(model, x, y, fails)
    assert model[2].v is None
    assert model[3].mask is None


def test_batch_norm_runs_once_a_step_also_in_steps_without_a_graph(rule):
    x, y = batch(steps=5)
    model = small_network(norm=True)
    rule(model, x, y, LOSS)
    if getattr(rule, "steady", False):
        x = x.mean(0, keepdim=True)  # the network runs once, under the mean input
    assert model[1].num_batches_tracked == len(x)
    expected = torch.zeros(8, dtype=torch.float64)
    for x_t in x:
        expected = 0.9 * expected + 0.1 * model[0](x_t).mean(0)
    torch.testing.assert_close(model[1].running_mean, expected.detach())


def test_weights_cached_by_autocast_without_a_graph_do_not_cut_later_steps():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), sltt.LIF(), nn.Linear(8, 3))
    x, y = torch.randn(3, 4, 6), torch.randint(3, (4,))
    last = next(s for s in range(99) if torch.randperm(3, generator=torch.Generator().manual_seed(s))[0] == 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sltt.SLTT(k=1, generator=torch.Generator().manual_seed(last))(model, x, y, LOSS)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("rule", [sltt.SLTT(), sltt.SLTT(k=2), sltt.TBPTT(2)], ids=repr)
def test_memory_does_not_grow_with_time(rule):
    assert measured(rule, 64) <= 1.05 * measured(rule, 4)


def test_recomputing_bptt_takes_the_memory_of_its_segments():
    assert measured(sltt.BPTT(segment=4), 32) < 0.35 * measured(sltt.BPTT(), 32)


def test_a_replay_repeats_statistics_masks_and_random_numbers():
    """BatchNorm's statistics, dropout of both kinds and the generator end as if each step had run once."""

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.plain = small_network(norm=True, dropout=0.4), nn.Dropout(0.3)

        def forward(self, x):
            return self.net(self.plain(x))

    x, y = batch(steps=7)
    results = []
    for rule in (sltt.BPTT(), sltt.BPTT(segment=3)):
        torch.manual_seed(2)
        model = Noisy()
        out = rule(model, x, y, LOSS)
        grads = [p.grad for p in model.parameters()]
        results.append([out.loss, out.logits, *grads, *model.buffers(), torch.get_rng_state()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_a_replay_carries_the_gradient_through_a_state_that_rests():
    class EverySecond(nn.Module):
        """Its hidden neurons run on even steps only."""

        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.Sequential(nn.Linear(6, 8), sltt.LIF(tau=4.0)), nn.Linear(14, 3)

        def forward(self, x):
            hidden = self.inner(x) if x[0, 0] > 0 else x.new_zeros(len(x), 8)
            return self.outer(torch.cat([hidden, x], 1))

    x, y = batch(steps=6)
    x[:, 0, 0] = torch.tensor([1.0, -1.0] * 3)
    model = EverySecond().double()
    expected, _ = gradients(model, sltt.BPTT(), x, y)
    for length in (1, 2, 3):
        torch.testing.assert_close(gradients(model, sltt.BPTT(segment=length), x, y)[0], expected)
    assert not torch.allclose(gradients(model, sltt.SLTT(), x, y)[0], expected)


def test_a_replay_that_is_not_the_first_run_is_noticed():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.generator = small_network(), torch.Generator()

        def forward(self, x):
            return self.net(x + torch.randn(x.shape, generator=self.generator, dtype=x.dtype))

    with pytest.raises(RuntimeError, match="time step 0 gave other logits when it was run again"):
        sltt.BPTT(segment=2)(Noisy(), *batch(), LOSS)


def test_memory_of_bptt_grows_with_time():
    assert measured(sltt.BPTT(), 32) > 1.7 * measured(sltt.BPTT(), 16)


def measured(rule, steps):
    model = sltt.models.DigitsNet()
    x, y = torch.randn(64, 1, 8, 8), torch.randint(10, (64,))
    with kernels.using(compile="off"):  # the same whatever other tests have compiled before
        rule(model, x, y, LOSS, steps=2)  # gradients exist from here on
        return peak_memory(lambda: rule(model, x, y, LOSS, steps=steps))


@pytest.mark.parametrize(
    ("x", "steps", "message"),
    [
        (torch.randn(5), None, r"expected input \[T, B, ...\], time first, got shape \[5\]"),
        (torch.randn(5), 3, r"expected input \[B, ...\] with steps=T"),
        (torch.randn(0, 5, 6), None, "at least one time step"),
        (torch.randn(5, 6), 0, "steps must be at least 1, got 0"),
        (torch.randn(4, 3, 6), None, "a target for each of the 3 samples"),
        (torch.full((4, 5, 6), float("nan")), None, "expected a finite input, got 120 NaN or infinite of 120 values"),
    ],
)
def test_bad_input_is_named(rule, x, steps, message):
    y = torch.randint(3, (5,))
    model = small_network()
    with pytest.raises(ValueError, match=message):
        rule(model, x.double(), y, LOSS, steps=steps)
    assert all(p.grad is None for p in model.parameters())


def test_k_above_t_is_refused():
    x, y = batch(steps=4)
    with pytest.raises(ValueError, match=r"SLTT\(k=5\) trains 5 steps, but the sequence has T = 4"):
        sltt.SLTT(k=5)(small_network(), x, y, LOSS)


@pytest.mark.parametrize(
    "make",
    [lambda: sltt.TBPTT(0), lambda: sltt.BPTT(segment=0), lambda: sltt.SLTT(k=0), lambda: sltt.SLTT(rescale=True)],
)
def test_arguments_out_of_range_are_refused(make):
    with pytest.raises(ValueError, match=r"at least 1|needs k"):
        make()


def test_a_model_that_returns_its_state_is_refused(rule):
    class Tuple(nn.Sequential):
        def forward(self, x):
            return super().forward(x), None

    with pytest.raises(ValueError, match="expected the model to return the logits"):
        rule(Tuple(nn.Linear(6, 6), nn.Identity(), sltt.LIF(), nn.Linear(6, 3)).double(), *batch(), LOSS)


def test_a_loss_without_a_mean_is_refused(rule):
    with pytest.raises(ValueError, match="returns a scalar"):
        rule(small_network(), *batch(), nn.CrossEntropyLoss(reduction="none"))


def test_every_layer_of_the_test_network_spikes(neuron):
    model = small_network(neuron)
    with sltt.analysis.firing_rates(model) as rates:
        sltt.unroll(model, batch()[0])
    assert all(0.02 < rate < 0.98 for rate in rates.by_layer().values())


def test_fixtures_cover_every_rule_and_neuron():
    assert {type(rule) for rule in RULES.values()} == {
        sltt.BPTT,
        sltt.TBPTT,
        sltt.SLTT,
        sltt.OTTT,
        sltt.RateBased,
        sltt.Mixed,
    }
    assert {type(make()) for make in NEURONS.values()} == {sltt.LIF, sltt.IF, sltt.PLIF}
