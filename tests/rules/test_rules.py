import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import sltt
from sltt.rules.gradients import add_together
from tests.conftest import LOSS, RULES, batch, each_kind, gradient, gradients, seeded, small_network
from tests.references import marked


def test_output_is_that_of_the_forward_loop(rule, neurons):
    x, y = batch()
    model = small_network(neurons)
    _, out = gradients(model, rule, x, y)
    assert not out.loss.requires_grad
    assert not out.logits.requires_grad
    if getattr(rule, "steady", False):
        pytest.skip("its logits are those of steady currents, not of the time steps: test_rate.py")
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


def test_parametrised_weights_in_a_cache_of_pytorch_have_their_gradients(rule):
    model, (x, y) = small_network(), batch()
    for layer in (model[0], model[4]):
        parametrizations.weight_norm(layer)
    expected, _ = gradients(model, rule, x, y, seed=0)
    with parametrize.cached():
        model(x[0])  # these weights have a graph of their own
        for _ in range(2):
            model.zero_grad()
            rule(model, x, y, LOSS, seed=0)
            torch.testing.assert_close(gradient(model), expected)


# of a sequence of four time steps
BACKWARDS = {
    "BPTT": 1,
    "BPTT(segment=2)": 2 + 1,  # of the logits of the first call
    "BPTT(recompute=True)": 1,
    "BPTT(fold=4)": 1,
    "BPTT(segment=2, fold=2)": 2 + 1,
    "TBPTT(2)": 2,
    "TBPTT(3, fold=2)": 2,
    "SLTT": 1,
    "SLTT(recompute)": 4,
    "SLTT(fold=3)": 2,
    "SLTT(hoist)": 4,
    "BPTT(hoist)": 1,
    "SLTT(k=1)": 1,
    "OTTT": 2,
    "OTTT(k=2)": 1,
    "OTTT(inputs=False)": 2,
    "RateBased": 1,
    "RateBased(steady)": 1,
    "Mixed": 4,
    "Mixed(default=2)": 4,
    "SLTT(k=2, rescale)": 1,
    "SLTT(k=2, fold=4)": 1,
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


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_what_made_the_input_gets_its_gradient_once(rule, static, frozen):
    model, encoder, (x, y) = small_network().requires_grad_(not frozen), nn.Linear(6, 6).double(), batch()
    given = torch.tanh(encoder(x[0] if static else x))
    leaf = given.detach().requires_grad_()
    for z in (given, leaf):
        seeded(rule, model, z, y, LOSS, steps=4 if static else None)
    found = gradient(encoder)
    encoder.zero_grad()
    torch.tanh(encoder(x[0] if static else x)).backward(leaf.grad)
    torch.testing.assert_close(found, gradient(encoder))


@pytest.mark.parametrize("delayed", [False, True])
def test_a_backward_for_some_tensors_gives_their_gradients_or_is_refused(rule, delayed):
    model, (x, y) = small_network(), batch()
    if delayed:
        model[3] = sltt.Delay([1])
    weights = [*model.parameters()]

    def backward(value):
        for p, grad in zip(weights, torch.autograd.grad(value, weights, allow_unused=True), strict=True):
            if grad is not None:
                p.grad = grad if p.grad is None else p.grad + grad

    refused = ""
    try:
        seeded(rule, model, x, y, LOSS, backward=backward)
    except ValueError as error:
        refused = str(error)
    if refused:
        assert "without inputs" in refused or (delayed and isinstance(rule, sltt.RateBased))
        return
    found = gradient(model)
    model.zero_grad()
    seeded(rule, model, x, y, LOSS)
    torch.testing.assert_close(found, gradient(model))


def test_a_hook_may_update_and_clear_a_gradient_in_the_backward(rule):
    model, (x, y) = small_network(), batch()
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(marked(lambda p: setattr(p, "grad", None)))
    rule(model, x, y, LOSS)


@each_kind
def test_gradients_add_up_until_they_are_zeroed(rule):
    x, y = batch()
    model = small_network()
    for _ in range(2):
        seeded(rule, model, x, y, LOSS)
    twice = gradient(model)
    torch.testing.assert_close(twice, 2 * seeded(gradients, model, rule, x, y)[0])


def test_norms_run_and_are_counted_once_a_step_also_in_steps_without_a_graph(rule):
    model = small_network(norm=True)
    expected = nn.BatchNorm1d(8).double()
    for _ in range(2):
        x, y = batch(steps=5)
        rule(model, x, y, LOSS)
        for x_t in x.mean(0, keepdim=True) if getattr(rule, "steady", False) else x:  # under the mean input, once
            expected(model[0](x_t))
    torch.testing.assert_close([*model[1].buffers()], [*expected.buffers()])


def test_gradients_that_are_added_together_are_those_of_autograd_to_the_bit(rule):
    found = []
    for together in (False, True):
        torch.manual_seed(0)
        x, y = batch()
        model = small_network(norm=True)
        model[0].weight.requires_grad_(False)
        model[4].bias.register_hook(marked(lambda grad: 2 * grad))
        kept = model[6].weight.grad = torch.ones_like(model[6].weight)
        backward = add_together(torch.Tensor.backward, model) if together else torch.Tensor.backward
        for _ in range(2):
            rule(model, x, y, LOSS, backward=backward)
        assert model[6].weight.grad is kept
        found.append(gradient(model))
    assert torch.equal(*found)


def test_gradients_that_somebody_looks_at_are_added_by_autograd():
    model, seen = nn.Sequential(nn.EmbeddingBag(4, 3, sparse=True, mode="sum"), nn.Linear(3, 2)), []
    model[1].bias.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    backward = add_together(torch.Tensor.backward, model)
    for _ in range(3):
        backward(model(torch.tensor([[0, 2]])).sum())
    assert [one.tolist() for one in seen] == [[1, 1], [2, 2], [3, 3]]
    assert model[0].weight.grad.is_sparse
    assert torch.equal(model[0].weight.grad.to_dense()[1], torch.zeros(3))
    torch.testing.assert_close(model[0].weight.grad.to_dense()[2], 3 * model[1].weight.sum(0))


@each_kind
def test_autocast_hardly_turns_the_gradient(rule):
    model, (x, y) = small_network(norm=True).float(), batch()
    expected, _ = seeded(gradients, model, rule, x.float(), y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = seeded(gradients, model, rule, x.float(), y)
    assert torch.cosine_similarity(found, expected, dim=0) > 0.9


@pytest.mark.parametrize("how", ["unrolled before", "steps before", "compiled"])
def test_weights_cached_by_autocast_without_a_graph_do_not_cut_later_steps(how):
    model, rule, seed = nn.Sequential(nn.Linear(6, 8), sltt.LIF(), nn.Linear(8, 3)), sltt.SLTT(), None
    x, y = torch.randn(3, 4, 6), torch.randint(3, (4,))
    if how == "compiled":  # a step is checked without the compiler
        model = torch.compile(model, backend="eager")
    elif how == "steps before":
        rule, draws = sltt.SLTT(k=1), ((s, torch.Generator().manual_seed(s)) for s in range(99))
        seed = next(s for s, generator in draws if torch.randperm(3, generator=generator)[0] == 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if how == "unrolled before":
            sltt.unroll(model, x)
        rule(model, x, y, LOSS, seed=seed)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_the_default_device_does_not_change_the_steps_that_are_drawn():
    drawing = SimpleNamespace(model=None, steps=5, seed=3, target=None)
    expected = sltt.SLTT(k=2).trained_steps(drawing)
    with torch.device("meta"):  # stands for a GPU
        assert sltt.SLTT(k=2).trained_steps(drawing) == expected
        assert len(sltt.SLTT(k=2).trained_steps(SimpleNamespace(**vars(drawing) | {"seed": None}))) == 2


def test_every_layer_of_the_test_network_spikes(neuron):
    model = small_network(neuron)
    with sltt.analysis.firing_rates(model) as rates:
        sltt.unroll(model, batch()[0])
    assert len(rates.by_layer()) == 2
    assert all(0.02 < rate < 0.98 for rate in rates.by_layer().values())


@pytest.mark.parametrize("segment", [1, 2, "auto"])
def test_spikes_of_steps_that_run_again_count_once(segment):
    model, (x, y) = small_network(sltt.LIF), batch()
    with sltt.analysis.firing_rates(model) as expected:
        sltt.unroll(model, x)
    with sltt.analysis.firing_rates(model) as rates:
        sltt.BPTT(segment=segment)(model, x, y, LOSS)
        sltt.unroll(model, x)  # after it, spikes count again
    assert rates.state_dict() == {name: (2 * n, 2 * of) for name, (n, of) in expected.state_dict().items()}


class Sum(sltt.Stateful):
    """Adds up what it reads; `in_place` changes what it gave before."""

    states = ("total",)
    in_place = True

    def forward(self, x):
        if self.total is None:
            self.total = torch.zeros_like(x)
        if self.in_place:
            self.total += x
        else:
            self.total = self.total + x
        return self.total


class NewSum(Sum):
    in_place = False


@pytest.mark.parametrize(
    ("rule", "loss"),
    [
        *((rule, nn.CrossEntropyLoss()) for rule in (sltt.BPTT(), sltt.SLTT(), sltt.SLTT(k=2), sltt.OTTT(decay=0.5))),
        (sltt.BPTT(), sltt.losses.OfMean(nn.CrossEntropyLoss())),
    ],
    ids=repr,
)
def test_a_model_that_changes_what_it_gave_has_the_logits_of_each_step(rule, loss):
    x, y = batch()
    network = small_network()
    models = [nn.Sequential(*network, kind()) for kind in (Sum, NewSum)]
    found, expected = (seeded(gradients, model, rule, x, y, loss) for model in models)
    torch.testing.assert_close(found[1].logits, expected[1].logits)
    torch.testing.assert_close(found[1].loss, expected[1].loss)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(*(sltt.unroll(model, x) for model in models))


def test_a_rule_without_gradients_is_refused():
    with torch.no_grad(), pytest.raises(ValueError, match=r"a rule makes gradients, and torch\.no_grad"):
        sltt.SLTT()(small_network(), *batch(), LOSS)


@each_kind
@pytest.mark.parametrize(
    ("model", "loss", "message"),
    [
        (small_network().requires_grad_(False), LOSS, "the model has none that is not frozen"),
        (small_network(), lambda o, y: LOSS(o, y).detach(), "the model or the loss detaches it"),
    ],
    ids=["frozen", "detached"],
)
def test_a_loss_without_a_gradient_is_explained(rule, model, loss, message):
    with pytest.raises(ValueError, match=f"the loss has no gradient for any parameter: {message}"):
        rule(model, *batch(), loss)


@pytest.mark.parametrize(
    "neuron", [sltt.LIF(), sltt.LIF(v_reset=0.0), sltt.ALIF(), sltt.Recurrent(sltt.IF(), nn.Linear(8, 8))], ids=repr
)
def test_weights_that_are_nan_give_nan(neuron):
    model, (x, y) = nn.Sequential(nn.Linear(6, 8), neuron, nn.Linear(8, 3)).double(), batch()
    assert sltt.unroll(model, x).isfinite().all()
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    assert sltt.unroll(model, x).isnan().all()
    for rule in (sltt.SLTT(), sltt.BPTT(), sltt.OTTT(decay=0.5)):
        assert rule(model, x, y, LOSS).loss.isnan()
