from functools import partial

import pytest
import torch

import sltt
from sltt import models
from sltt.models.base import SHIPPED
from sltt.neurons import Neuron
from sltt.training.checkpoints import load_checkpoint

BUILDERS = [models.vgg11, models.resnet18, models.resnet34, models.DigitsNet]


EACH_KIND = [models.DigitsNet, models.vgg11, models.resnet18]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_pretrained_network_is_that_of_its_card(name):
    model, sample = models.pretrained(name), load_checkpoint(SHIPPED[name])["sample"]
    assert str(sltt.load(name)) == str(model)
    logits = sltt.predict(model, sample["x"] if model.trained.static else sample["x"][:, None])[0]
    torch.testing.assert_close(logits, sample["logits"][-1], atol=1e-3, rtol=1e-3)
    assert logits.argmax() == sample["label"]
    if data := {"digits": sltt.data.Digits, "recall-delays": sltt.data.Recall}.get(name):
        accuracy = sltt.evaluate(model, data(), device="cpu").accuracy
        assert f"| test accuracy | {accuracy:.2%} |" in SHIPPED[name].with_suffix(".md").read_text()


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (lambda: models.resnet18(classes=10), 11_176_906),
        (lambda: models.resnet18(classes=100), 11_223_076),
        (lambda: models.vgg11(in_channels=2, classes=10), 9_476_298),
        (models.nfresnet34, 21_797_688),
        (models.nfresnet50, 25_557_048),
        (models.nfresnet101, 44_549_193),
    ],
    ids=["resnet18, 10 classes", "resnet18, 100 classes", "vgg11", "nfresnet34", "nfresnet50", "nfresnet101"],
)
def test_parameter_counts_are_those_of_the_paper(model, expected):
    with torch.device("meta"):
        assert parameters(model()) == expected


@pytest.mark.parametrize(
    ("build", "count"), list(zip(BUILDERS, [8, 17, 33, 3], strict=True)), ids=lambda v: getattr(v, "__name__", str(v))
)
def test_networks_have_so_many_neurons_as_they_are_given(build, count):
    with torch.device("meta"):
        model = build(neuron=lambda: sltt.LIF(tau=1.5))
    assert [m.tau for m in model.modules() if isinstance(m, Neuron)] == [1.5] * count


@pytest.mark.parametrize("kind", [models.MLP, models.VGG, partial(models.VGG, dims=1)], ids=["MLP", "VGG", "1-D"])
def test_delays_stand_before_the_layers_with_weights(kind):
    """Also in front of what runs once for a static image."""
    shape, given = ((6,), ([6, 5, 4, 3],)) if kind is models.MLP else ((2, 8, 8), ([[5], [4]], 2, 3))
    shape = shape[:2] if isinstance(kind, partial) else shape
    model = kind(*given, delays=[[0, 3], None, [1, 2]])
    assert [list(m.taps) for m in model.modules() if isinstance(m, sltt.Delay)] == [[0, 3], [1, 2]]
    x, y = torch.rand(5, *shape), torch.randint(3, (5,))
    whole = sltt.SLTT(fold=1)(model, x.expand(6, *x.shape), y, sltt.losses.CrossEntropyMSE()).logits
    static = sltt.SLTT(hoist=True)(model, x, y, sltt.losses.CrossEntropyMSE(), steps=6).logits
    torch.testing.assert_close(static, whole)
    with pytest.raises(ValueError, match="delays must be taps of at most 3 layers with weights, got 4"):
        kind(*given, delays=[None] * 4)


@pytest.mark.parametrize("build", EACH_KIND, ids=lambda b: b.__name__)
def test_every_neuron_fires_and_every_weight_gets_a_gradient(build):
    model = build(in_channels=2, classes=7, neuron=lambda: sltt.LIF(tau=1.5), dropout=0.2)
    x, y = torch.randn(2, 3, 2, 16, 16), torch.randint(7, (3,))
    with sltt.analysis.firing_rates(model) as rates:
        out = sltt.SLTT()(model, x, y, sltt.losses.CrossEntropyMSE())
    assert out.logits.shape == (2, 3, 7)
    assert all(0 < rate < 1 for rate in rates.by_layer().values())
    assert len(rates.by_layer()) == sum(isinstance(m, Neuron) for m in model.modules())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("build", EACH_KIND, ids=lambda b: b.__name__)
def test_dropout_is_in_the_model_and_keeps_its_mask(build):
    model = build(dropout=0.5)
    dropouts = [m for m in model.modules() if isinstance(m, sltt.Dropout) and m.p == 0.5]
    assert dropouts
    model(torch.randn(2, model.in_channels, 16, 16))
    masks = [d.mask for d in dropouts]
    model(torch.randn(2, model.in_channels, 16, 16))
    assert all(d.mask is mask for d, mask in zip(dropouts, masks, strict=True))


@pytest.mark.parametrize("build", BUILDERS, ids=lambda b: b.__name__)
@pytest.mark.parametrize("shape", [(2, 5, 16, 16), (2, 16, 16), (4, 2, 3, 16, 16)])
def test_wrong_rank_or_channels_are_named(build, shape):
    with torch.device("meta"), pytest.raises(ValueError, match=r"expected one time step \[B, 3, H, W\], got shape"):
        build(in_channels=3)(torch.randn(shape))


def test_the_shortcut_of_a_block_that_changes_shape_reads_spikes():
    block = models.resnet.Block(4, 8, 2, sltt.LIF, 0.0)
    seen = []
    block.shortcut.register_forward_hook(lambda m, inputs, out: seen.append(inputs[0]))
    block(torch.randn(2, 4, 6, 6))
    assert set(seen[0].unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize(("blocks", "bottleneck"), [((1, 2, 1, 1), False), ((2, 1, 1, 1), True)])
def test_nf_resnets_train_every_weight_once_their_skip_gains_have_moved(blocks, bottleneck):
    model = models.NFResNet(blocks, bottleneck, in_channels=2, classes=5, neuron=lambda: sltt.LIF(v_threshold=0.3))
    x, y = 3 * torch.randn(2, 2, 32, 32), torch.randint(5, (2,))
    for block in model.blocks:
        block.skip_gain.data.fill_(0.5)
    sltt.SLTT()(model, x, y, sltt.losses.CrossEntropyMSE(), steps=1)
    assert all(p.grad is not None for p in model.parameters())
    assert all(p.grad.abs().max() > 0 for name, p in model.named_parameters() if "bias" not in name)


def test_standardised_weights_have_the_variance_of_one_over_the_inputs():
    conv = models.nfresnet.ScaledWSConv2d(6, 8, 3)
    conv.weight.data.mul_(7).add_(3)
    weight = conv.standardised_weight()
    torch.testing.assert_close(weight.mean((1, 2, 3)), torch.zeros(8), atol=1e-6, rtol=0)
    torch.testing.assert_close(weight.var((1, 2, 3), unbiased=False), torch.full((8,), 1 / 54))
    conv.weight.data.fill_(1.0)
    assert conv.standardised_weight().isfinite().all()


def test_a_block_expects_the_variance_that_the_blocks_before_add():
    betas = [block.beta**2 for block in models.nfresnet34(classes=2).blocks]
    assert betas[:5] == pytest.approx([1.0, 1.04, 1.08, 1.12, 1.04])


@pytest.mark.parametrize("make", [models.ResNet, lambda blocks: models.NFResNet(blocks, False)], ids=["plain", "NF"])
def test_the_first_block_of_a_stage_halves_the_image_but_in_the_first_stage(make):
    with torch.device("meta"):
        blocks = make((2, 1, 2, 1)).blocks
    convs = [block.convs[0] if hasattr(block, "convs") else block.conv1 for block in blocks]
    assert [conv.stride[0] for conv in convs] == [1, 1, 2, 2, 1, 2]
    assert [conv.out_channels for conv in convs] == [64, 64, 128, 256, 256, 512]


def test_weights_of_one_step_load_for_six():
    one, six = (models.NFResNet((1, 1, 1, 1), False, classes=3) for _ in range(2))
    sltt.SLTT()(one, torch.randn(1, 3, 32, 32), torch.tensor([1]), sltt.losses.CrossEntropyMSE(), steps=1)
    six.load_state_dict(one.state_dict())
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(sltt.unroll(six, x, steps=6)[0], sltt.unroll(one, x, steps=1)[0])


RESIDUAL = [(96, 16, 16)] * 2 + [(192, 8, 8)] * 2 + [(384, 4, 4)] * 2


@pytest.mark.parametrize(
    ("make", "count", "shapes"),
    [
        (lambda: models.ShallowResNet(stem=0), 2_580_394, RESIDUAL),
        (lambda: models.ShallowResNet(stem=16), 2_592_090, [(16, 32, 32), *RESIDUAL]),
        (models.ShallowVGG, 1_972_816, [(24, 31, 31)] + [(64, 15, 15)] * 2 + [(256, 7, 7)] * 2 + [(256, 3, 3)] * 2),
    ],
    ids=["ResNet", "ResNet with a stem", "VGG"],
)
def test_shallow_networks_have_neurons_of_these_shapes(make, count, shapes):
    model, found = make(), []
    assert parameters(model) == count
    for module in model.modules():
        if isinstance(module, Neuron):
            module.register_forward_hook(lambda module, args, spikes: found.append(tuple(spikes.shape[1:])))
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert found == shapes


def test_mlp():
    model = models.MLP([12, 8, 7, 3], dropout=0.1)
    out = sltt.SLTT()(model, torch.randn(4, 5, 3, 4), torch.randint(3, (5,)), sltt.losses.CrossEntropyMSE())
    assert out.logits.shape == (4, 5, 3)
    with pytest.raises(ValueError, match=r"features must be a sequence of 2 or more whole numbers, got \[3\]"):
        models.MLP([3])


def test_mlp_without_norm_is_linear_layers_and_neurons():
    model = models.MLP([6, 5, 3], norm=False)
    assert parameters(model) == 6 * 5 + 5 + 5 * 3 + 3
    assert parameters(models.MLP([6, 5, 3])) == parameters(model) + 2 * 5
    x = torch.randn(2, 4, 6)
    linear, head = model.hidden[0], model.head
    s, v = sltt.neurons.lif_step(torch.zeros(4, 5), linear(x[0]), decay=1 - 1 / 1.1)
    s, _ = sltt.neurons.lif_step(v, linear(x[1]), decay=1 - 1 / 1.1)
    torch.testing.assert_close(sltt.unroll(model, x)[1], head(s))


def test_contrasts_are_orthogonal_patterns_of_both_signs():
    filters = models.ShallowVGG().contrasts[0].weight.flatten(1)
    torch.testing.assert_close(filters[:12] @ filters[:12].T, torch.eye(12))
    assert torch.equal(filters[12:], -filters[:12])


def test_a_shallow_vgg_learns_convolutions_shifts_and_the_head():
    model = models.ShallowVGG(widths=(8, 12), classes=5, neuron=lambda: sltt.IF(v_threshold=0.5))
    fixed = model.contrasts[0].weight.clone()
    x, y = torch.randn(2, 3, 3, 16, 16), torch.randint(5, (3,))
    sltt.SLTT()(model, x, y, sltt.losses.CrossEntropyMSE())
    learned = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    norms = [name for name, m in model.named_modules() if isinstance(m, torch.nn.BatchNorm2d)]
    convs = [name for name, m in model.features.named_modules() if isinstance(m, torch.nn.Conv2d)]
    assert learned == {f"{n}.bias" for n in norms} | {f"features.{n}.weight" for n in convs} | {"head.weight"}
    assert torch.equal(model.contrasts[0].weight, fixed)


def test_convolutions_of_a_shallow_vgg_pass_their_inputs_on_before_training():
    convs = [m for m in models.ShallowVGG(widths=(32, 32)).features.modules() if isinstance(m, torch.nn.Conv2d)]
    x = torch.rand(1, 24, 6, 6)
    torch.testing.assert_close(convs[0](x)[:, :24], x)
    torch.testing.assert_close(convs[1](convs[0](x))[:, :24], x)


def test_a_shallow_vgg_gives_logits_by_the_pooled_sum_over_time_times_its_scale():
    torch.manual_seed(0)
    model = models.ShallowVGG(widths=(8,), neuron=lambda: sltt.IF(v_threshold=2.0, v_init=1.0), scale=0.25).eval()
    x, steps, counts = torch.randn(2, 3, 9, 9), 6, []
    model.features[-2].register_forward_hook(lambda module, args, spikes: counts.append(spikes))
    logits = sltt.unroll(model, x, steps=steps).mean(0)
    rates = torch.stack(counts).mean(0).amax((2, 3))
    torch.testing.assert_close(logits, 0.25 * rates @ model.head.weight.T)
    assert [type(layer) for layer in model.features].count(sltt.RunningMax) == 2


@pytest.mark.parametrize("side", [8, 7])
def test_images_too_small_for_a_shallow_vgg_are_refused(side):
    with pytest.raises(ValueError, match="a height and a width of at least 9, got"):
        models.ShallowVGG()(torch.randn(1, 3, side, side))
