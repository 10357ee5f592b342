"""Tasks other than one class a sequence: losses of whole sequences, targets of each step, regression, penalties."""

import copy
import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sltt
from sltt.commands import main
from sltt.data import from_datasets
from sltt.losses import Activity, OfLast, OfMax, OfMean, PerStep, VanRossum
from tests.collecting import ConfusionMatrix
from tests.conftest import RULES, batch, gradient, gradients, small_network

CE = nn.CrossEntropyLoss()


def reference(model, x, loss_of):
    """The gradients of a loss of the logits [T, B, C] and of the spikes of all layers, by plain autograd."""
    model = copy.deepcopy(model)
    spikes = {}
    for name, module in model.named_modules():
        if isinstance(module, sltt.LIF):
            module.register_forward_hook(lambda m, i, out, name=name: spikes.setdefault(name, []).append(out))
    sltt.reset(model)
    logits = torch.stack([model(step) for step in x])
    value = loss_of(logits, spikes)
    value.backward()
    return value.detach(), gradient(model)


def by_rule(model, rule, x, y, loss):
    found, out = gradients(model, rule, x, y, loss)
    return out.loss, found


SEQUENCE_LOSSES = {
    "mean": (OfMean(CE), lambda o, y: F.cross_entropy(o.mean(0), y)),
    "last": (OfLast(CE), lambda o, y: F.cross_entropy(o[-1], y)),
    "max": (OfMax(CE), lambda o, y: F.cross_entropy(o.amax(0), y)),
}


@pytest.mark.parametrize("rule", [sltt.BPTT(), sltt.BPTT(fold=2), sltt.BPTT(recompute=True), sltt.TBPTT(4)], ids=repr)
@pytest.mark.parametrize(("loss", "expected"), SEQUENCE_LOSSES.values(), ids=SEQUENCE_LOSSES)
def test_a_loss_of_the_whole_sequence_has_its_exact_gradient(rule, loss, expected):
    model, (x, y) = small_network(), batch()
    value, found = by_rule(model, rule, x, y, loss)
    right, exact = reference(model, x, lambda o, _: expected(o, y))
    torch.testing.assert_close(value, right)
    torch.testing.assert_close(found, exact)


def test_van_rossum_is_the_distance_of_filtered_trains():
    model, (x, _) = small_network(), batch()
    y = torch.rand(4, 5, 3, dtype=torch.float64)

    def distance(o, _):
        kernel = torch.tensor([[0.5 ** (t - k) if k <= t else 0.0 for k in range(4)] for t in range(4)]).double()
        return torch.einsum("tk,kbc->tbc", kernel, o - y).square().mean()

    value, found = by_rule(model, sltt.BPTT(), x, y, VanRossum(tau=2.0))
    right, exact = reference(model, x, distance)
    torch.testing.assert_close(value, right)
    torch.testing.assert_close(found, exact)
    torch.testing.assert_close(by_rule(model, sltt.BPTT(), x, y, PerStep(nn.MSELoss()))[1],
                               by_rule(model, sltt.BPTT(), x, y, VanRossum(tau=1.0))[1])  # fmt: skip


def test_windows_have_the_loss_of_each():
    model, (x, y) = small_network(), batch(4)
    value, _ = by_rule(model, sltt.TBPTT(2), x, y, OfLast(CE))
    logits = sltt.unroll(model, x)
    torch.testing.assert_close(value, (CE(logits[1], y) + CE(logits[3], y)) / 2)


def test_rate_based_takes_the_mean_of_the_logits():
    model, (x, y) = small_network(), batch()
    for rule in (sltt.RateBased(), sltt.RateBased(steady=True)):
        plain, wrapped = by_rule(model, rule, x, y, CE), by_rule(model, rule, x, y, OfMean(CE))
        torch.testing.assert_close(plain, wrapped)


WHOLE = ["BPTT", "BPTT(recompute=True)", "BPTT(fold=4)", "TBPTT(2)", "TBPTT(3, fold=2)", "BPTT(hoist)"]


@pytest.mark.parametrize("name", [name for name in RULES if name not in WHOLE])
def test_another_rule_names_the_nearest_loss(name):
    model, (x, y) = small_network(), batch()
    message = "no graph of all logits" if "segment" in name else "the nearest sum, the loss inside OfLast by itself"
    with pytest.raises(ValueError, match=message):
        by_rule(model, RULES[name], x, y, OfLast(CE))
    if "segment" not in name:
        with pytest.raises(ValueError, match=r"PerStep\(MSELoss\(\)\) for VanRossum"):
            by_rule(model, RULES[name], x, torch.rand(4, 5, 3).double(), VanRossum())


STEP_RULES = ["BPTT", "BPTT(segment=2)", "BPTT(fold=4)", "TBPTT(2)", "SLTT", "SLTT(fold=3)", "SLTT(k=1)", "OTTT"]


@pytest.mark.parametrize("name", [*STEP_RULES, "Mixed"])
def test_targets_of_each_step(name):
    model, (x, _) = small_network(), batch()
    y = torch.randint(3, (4, 5))
    value, found = by_rule(model, RULES[name], x, y, PerStep(CE))
    right, exact = reference(model, x, lambda o, _: sum(F.cross_entropy(o[t], y[t]) for t in range(4)) / 4)
    torch.testing.assert_close(value, right)
    if name.startswith("BPTT"):
        torch.testing.assert_close(found, exact)
    repeated = y[:1].expand(4, 5)  # the same target at all steps is the loss of one
    torch.manual_seed(1)
    expected = by_rule(model, RULES[name], x, y[0], CE)
    torch.manual_seed(1)
    torch.testing.assert_close(by_rule(model, RULES[name], x, repeated, PerStep(CE)), expected)


def test_targets_of_another_form_are_refused():
    model, (x, y) = small_network(), batch()
    with pytest.raises(ValueError, match=r"expected targets \[T, B, ...\] = \[4, 5\] for each time step, got \[5\]"):
        by_rule(model, sltt.SLTT(), x, y, PerStep(CE))
    with pytest.raises(ValueError, match="RateBased has mean logits only"):
        by_rule(model, sltt.RateBased(), x, y.expand(4, 5), PerStep(CE))


@pytest.mark.parametrize("rate", [None, 0.2])
@pytest.mark.parametrize("rule", ["BPTT", "BPTT(segment=2)", "BPTT(recompute=True)", "BPTT(fold=4)"])
def test_a_penalty_on_rates_has_its_exact_gradient(rule, rate):
    model, (x, y) = small_network(), batch()

    def penalised(logits, spikes):
        rates = torch.stack([torch.stack([s.mean() for s in steps]) for steps in spikes.values()])  # [layers, T]
        found = rates if rate is None else (rates - rate).square()
        return sum(F.cross_entropy(o, y) for o in logits) / 4 + 0.3 * found.mean()

    value, found = by_rule(model, RULES[rule], x, y, Activity(CE, weight=0.3, rate=rate))
    right, exact = reference(model, x, penalised)
    torch.testing.assert_close(value, right)
    torch.testing.assert_close(found, exact)


class Tokens(nn.Sequential):
    def forward(self, x):  # [B, N, F]
        return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2]).mean(1)


def penalised():
    """Networks of more than plain spikes [B, F], and the shape of an input."""
    lif = partial(sltt.LIF, tau=2.0, v_threshold=0.3)
    back = nn.Linear(6, 8), lif(), nn.Linear(8, 8), sltt.Recurrent(lif(), nn.Linear(8, 8)), nn.Linear(8, 3)
    return {
        "recurrent": (nn.Sequential(*back), (6,)),
        "tokens": (Tokens(nn.Linear(6, 8), lif(), nn.Linear(8, 3)), (7, 6)),
        "negative spikes": (nn.Sequential(nn.Linear(6, 8), sltt.TernaryLIF(tau=2.0), nn.Linear(8, 3)), (6,)),
    }


@pytest.mark.parametrize("name", penalised())
def test_a_penalty_is_of_the_mean_rate_and_does_not_depend_on_the_fold(name):
    model, shape = penalised()[name]
    model.double()
    x, y = 3 * torch.randn(4, 5, *shape, dtype=torch.float64), torch.randint(3, (5,))
    (plain, _), (more, _) = (by_rule(model, sltt.SLTT(), x, y, one) for one in (CE, Activity(CE, weight=1.0)))
    with sltt.analysis.firing_rates(model) as rates:
        sltt.unroll(model, x)
    assert more - plain == pytest.approx(rates.mean())
    for rule in (sltt.BPTT, sltt.SLTT):
        expected, found = (
            by_rule(model, one, x, y, Activity(CE, weight=1.0, rate=0.1)) for one in (rule(), rule(fold=4))
        )
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", [name for name in RULES if not name.startswith(("RateBased", "SLTT(k"))])
def test_every_rule_with_spikes_takes_a_penalty(name):
    model, (x, y) = small_network(), batch()
    plain, penalised = (by_rule(model, RULES[name], x, y, loss) for loss in (CE, Activity(CE, weight=0.5)))
    rates = []
    for module in model.modules():
        if isinstance(module, sltt.LIF):
            module.register_forward_hook(lambda m, i, out: rates.append(out.mean()))
    sltt.unroll(model, x)
    torch.testing.assert_close(penalised[0] - plain[0], 0.5 * torch.stack(rates).mean())
    assert not torch.equal(penalised[1], plain[1])


def test_a_penalty_needs_layers_and_gradients_of_spikes():
    model, (x, y) = small_network(), batch()
    with pytest.raises(ValueError, match="no layer of neurons is called 'conv'; there are 2, 5"):
        by_rule(model, sltt.SLTT(), x, y, Activity(CE, layers="conv"))
    with pytest.raises(ValueError, match="no gradients of spikes, and Activity needs them"):
        by_rule(model, sltt.RateBased(), x, y, Activity(CE))
    for outer, inner in ((Activity, OfMean(CE)), (PerStep, VanRossum()), (OfLast, VanRossum())):
        name = type(inner).__name__
        with pytest.raises(ValueError, match=f"is made of the loss of one time step, and {name} has none: use a loss"):
            outer(inner)


def test_a_penalty_lowers_the_firing_rate_and_the_energy(tmp_path):
    def trained(loss, run):
        torch.manual_seed(0)
        model = sltt.models.DigitsNet(width=4)
        sltt.fit(model, sltt.data.Digits(), loss=loss, epochs=1, steps=3, device="cpu", run=tmp_path / run)
        energy = sltt.analysis.measure_energy(model.eval(), torch.rand(4, 1, 8, 8), steps=3).layers
        rate = sltt.evaluate(model, sltt.data.Digits(), steps=3, device="cpu").firing_rate
        return rate, sum(layer.picojoules for layer in energy)

    plain, sparse = trained(CE, "plain"), trained(Activity(CE, weight=3.0), "sparse")
    assert sparse[0] < 0.7 * plain[0]
    assert sparse[1] < plain[1]


def fitted(tmp_path, data, loss, metric, outputs=2, steps=6, **settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), sltt.LIF(), nn.Linear(16, outputs))
    result = sltt.fit(
        model, data, loss=loss, metric=metric, steps=steps, epochs=2, device="cpu", run=tmp_path / "run", **settings
    )
    return model, result


def test_labels_that_the_loss_ignores_are_no_damage(tmp_path):
    samples = [(torch.rand(6, 4), torch.tensor([0, 1, -100, 0, 0, -100 if i % 2 else 1])) for i in range(20)]
    data = from_datasets(samples, static=False, per_step=True, classes=2)
    loss = sltt.losses.PerStep(nn.CrossEntropyLoss(ignore_index=-100))
    model, result = fitted(tmp_path, data, loss, sltt.metrics.Accuracy())
    assert len(result.history) == 2
    data = from_datasets(samples[:5], None, samples, static=False, per_step=True, classes=2)
    scores = [sltt.evaluate(model, data, loss=loss, steps=6, batch_size=size).score for size in (1, 3, 20)]
    x, y = torch.stack([x for x, _ in samples], 1), torch.stack([y for _, y in samples], 1)
    right = (sltt.unroll(model, x).argmax(2) == y).sum().item()
    assert scores == [right / (y >= 0).sum().item()] * 3


def test_regression_is_selected_and_reported_by_its_error(tmp_path, capsys):
    samples = [(x, x.mean().reshape(1)) for x in torch.rand(60, 6, 4)]
    data = from_datasets(samples, 0.2, samples[:10], static=False)
    model, result = fitted(tmp_path, data, nn.MSELoss(), sltt.metrics.MeanAbsoluteError(), outputs=1)
    errors = [row["validation_mean_absolute_error"] for row in result.history]
    assert result.epoch == 1 + errors.index(min(errors))
    assert "val mean_absolute_error" in capsys.readouterr().out
    assert "validation mean_absolute_error" in (tmp_path / "run" / "card.md").read_text()
    how = {"loss": nn.MSELoss(), "metric": sltt.metrics.MeanAbsoluteError(), "steps": 6, "device": "cpu"}
    found = sltt.evaluate(sltt.load(result.run, model), data, **how)
    x, y = torch.stack([x for x, _ in samples[:10]], 1), torch.stack([y for _, y in samples[:10]])
    assert found.score == pytest.approx(float((sltt.predict(model, x) - y).abs().mean()))
    with pytest.raises(ValueError, match="the metric is mean_absolute_error, not accuracy: its value is `score`"):
        _ = found.accuracy


def test_multi_label_targets(tmp_path):
    samples = [(x, (x.mean(0)[:2] > 0.5).float()) for x in torch.rand(60, 6, 4)]
    data = from_datasets(samples, 0.2, static=False)
    metric = sltt.metrics.MultiLabelAccuracy()
    _, result = fitted(tmp_path, data, nn.BCEWithLogitsLoss(), metric)
    assert 0 < result.history[-1]["validation_multi_label_accuracy"] <= 1


def test_a_class_at_each_step(tmp_path):
    samples = [(x, (x[:, 0] > 0.5).long()) for x in torch.rand(60, 6, 4)]
    data = from_datasets(samples, 0.2, static=False, per_step=True, classes=2)
    with pytest.raises(ValueError, match=r"a target for each time step: wrap the loss, sltt.losses.PerStep\(loss\)"):
        fitted(tmp_path, data, CE, sltt.metrics.Accuracy())
    model, result = fitted(tmp_path, data, PerStep(CE), sltt.metrics.Accuracy(), batch_size=8)
    assert result.history[-1]["train_accuracy"] > 0.4
    model = sltt.load(result.run, model)
    assert sltt.predict(model, torch.rand(6, 3, 4)).shape == (6, 3, 2)
    classes = from_datasets([(torch.rand(6, 4), 0)] * 4, static=False)
    with pytest.raises(ValueError, match="PerStep needs a target for each time step: from_datasets"):
        fitted(tmp_path, classes, PerStep(CE), sltt.metrics.Accuracy())


@pytest.mark.parametrize("per_step", [False, True])
def test_a_class_for_each_pixel(tmp_path, per_step):
    masks = torch.rand(40, 6, 1, 4, 4) > 0.5
    samples = [(x.float(), x[:, 0].long() if per_step else x[0, 0].long()) for x in masks]
    data = from_datasets(samples, 0.2, samples[:8], static=False, per_step=per_step, classes=2)
    model = nn.Sequential(nn.Conv2d(1, 4, 1), sltt.LIF(), nn.Conv2d(4, 2, 1))
    loss = PerStep(sltt.losses.CrossEntropyMSE()) if per_step else sltt.losses.CrossEntropyMSE()
    result = sltt.fit(model, data, loss=loss, steps=6, epochs=1, batch_size=8, device="cpu", run=tmp_path / "run")
    x, y = torch.stack([x for x, _ in samples[:8]], 1), torch.stack([y for _, y in samples[:8]], int(per_step))
    right = sltt.predict(sltt.load(result.run, model), x).argmax(1 + per_step) == y
    matrix = ConfusionMatrix()
    found = sltt.evaluate(model, data, loss=loss, metric=[sltt.metrics.Accuracy(), matrix], steps=6, device="cpu")
    assert found.score == pytest.approx(float(right.double().mean()))
    assert found.scores["confusion_matrix"].trace() == right.sum()


def test_a_loss_of_the_last_step_predicts_by_it(tmp_path):
    data = from_datasets([(x, int(x.mean() > 0.5)) for x in torch.rand(40, 6, 4)], static=False)
    model, result = fitted(tmp_path, data, OfLast(CE), sltt.metrics.Accuracy(), rule=sltt.BPTT())
    x = torch.rand(6, 3, 4)
    torch.testing.assert_close(sltt.predict(sltt.load(result.run, model), x), sltt.unroll(model.eval(), x)[-1])


def test_metrics_are_what_they_say():
    logits, labels = torch.tensor([[1.0, -2.0], [-1.0, 3.0]]), torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    assert sltt.metrics.MultiLabelAccuracy()(logits, labels) == 0.75
    assert sltt.metrics.Accuracy()(logits, torch.tensor([0, 0])) == 0.5
    assert sltt.metrics.Accuracy()(logits, torch.tensor([0, -100])) == 1.0
    assert sltt.metrics.Accuracy()(logits, torch.tensor([255, 0])) == 0.0
    assert sltt.metrics.MeanAbsoluteError()(logits, labels) == pytest.approx((0 + 3 + 1 + 2) / 4)
    assert sltt.metrics.MeanSquaredError()(logits, labels) == pytest.approx((0 + 9 + 1 + 4) / 4)
    logits[0, 1] = torch.nan
    assert sltt.metrics.MultiLabelAccuracy()(logits, labels).isnan()
    assert sltt.metrics.Accuracy()(logits, torch.tensor([0, 0])).isnan()


@pytest.mark.parametrize(
    ("metric", "prediction", "target"),
    [
        (sltt.metrics.Accuracy(), (5, 1), (5, 1)),
        (sltt.metrics.Accuracy(), (3, 3), (3, 3)),
        (sltt.metrics.MultiLabelAccuracy(), (3, 3), (3,)),
        (sltt.metrics.MeanAbsoluteError(), (5, 1), (5,)),
        (sltt.metrics.MeanSquaredError(), (5, 1), (5,)),
    ],
)
def test_targets_that_would_be_broadcast_are_refused(metric, prediction, target):
    with pytest.raises(ValueError, match=f"{type(metric).__name__} compares predictions with targets"):
        metric(torch.rand(prediction), torch.ones(target).long())


RECIPE = """
model: {class_path: sltt.models.DigitsNet, init_args: {width: 2}}
data: sltt.data.Digits
loss: {class_path: sltt.losses.Activity, init_args: {loss: torch.nn.CrossEntropyLoss, rate: 0.1}}
metric: sltt.metrics.Accuracy
steps: 2
epochs: 1
device: cpu
"""


def test_a_recipe_names_losses_of_pytorch_and_leaves_out_the_optimizer(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text(RECIPE)
    run = str(tmp_path / "run")
    assert main(["train", str(tmp_path / "mine.yaml"), "--run", run, "--batch_size", "512", "--steps", "1"]) == 0
    capsys.readouterr()
    assert main(["eval", run, "--json"]) == 0
    assert 0 <= json.loads(capsys.readouterr().out)["accuracy"] <= 1
    assert main(["eval", run, "--metric", "Accuracyy"]) == 2
    assert "did you mean sltt.metrics.Accuracy?" in capsys.readouterr().err
