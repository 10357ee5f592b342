import copy

import pytest
import torch
from torch import nn

import sltt
from sltt.models import qkformer, spikformer
from sltt.models.transformers import SelfAttention, TokenAttention
from sltt.neurons import Neuron
from tests.conftest import KINDS, RULES, gradients

SMALL = {
    "spikformer": lambda **kwargs: spikformer(channels=16, depth=1, heads=2, classes=3, **kwargs),
    "qkformer": lambda **kwargs: qkformer(channels=16, depths=(1, 1, 1), heads=2, classes=3, **kwargs),
}


@pytest.fixture(params=SMALL.values(), ids=SMALL.keys())
def small(request):
    return request.param


@pytest.mark.parametrize(
    ("build", "kwargs", "millions"),
    [
        (spikformer, {}, 9.32),
        (spikformer, {"classes": 1000, "channels": 384, "depth": 8, "heads": 6, "patch": 16}, 16.82),
        (spikformer, {"classes": 1000, "channels": 512, "depth": 8, "heads": 8, "patch": 16}, 29.69),
        (spikformer, {"classes": 1000, "channels": 768, "depth": 8, "patch": 16}, 66.34),
        (qkformer, {"classes": 100}, 6.74),
        (qkformer, {"classes": 1000, "channels": 384, "depths": (1, 2, 7), "heads": 6, "patch": 16}, 16.47),
        (qkformer, {"classes": 1000, "channels": 512, "depths": (1, 2, 7), "heads": 8, "patch": 16}, 29.08),
        (qkformer, {"classes": 1000, "channels": 768, "depths": (1, 2, 7), "heads": 12, "patch": 16}, 64.96),
    ],
)
def test_parameter_counts_are_those_published(build, kwargs, millions):
    with torch.device("meta"):
        count = sum(p.numel() for p in build(**kwargs).parameters())
    assert round(count / 1e6, 2) == millions


@pytest.mark.parametrize(("patch", "poolings"), [(4, [[], [1], [1]]), (16, [[0], [0], [0]])])
def test_stages_of_a_qkformer_pool_in_the_second_layer_for_cifar_and_else_in_the_first(patch, poolings):
    with torch.device("meta"):
        sums = [m.main for m in qkformer(patch=patch).blocks if hasattr(m, "main")]
    found = []
    for main in sums:
        kinds = [type(m) for m in main if isinstance(m, nn.Conv2d | nn.MaxPool2d)]
        found.append([kinds[:i].count(nn.Conv2d) - 1 for i, kind in enumerate(kinds) if kind is nn.MaxPool2d])
    assert found == poolings


@pytest.mark.parametrize(("patch", "side"), [(4, 16), (16, 32)])
def test_every_neuron_fires_and_every_weight_gets_a_gradient(small, patch, side):
    model = small(in_channels=2, patch=patch, neuron=lambda: sltt.LIF(tau=2.0, v_threshold=0.5))
    tokens = []
    model.blocks.register_forward_hook(lambda module, inputs, y: tokens.append(tuple(y.shape)))
    x, y = torch.randn(3, 3, 2, side, side), torch.randint(3, (3,))
    with sltt.analysis.firing_rates(model) as rates:
        out = sltt.SLTT()(model, x, y, sltt.losses.CrossEntropyMSE())
    assert tokens[0] == (3, 16, side // patch, side // patch)
    assert out.logits.shape == (3, 3, 3)
    assert len(rates.by_layer()) == sum(isinstance(m, Neuron) for m in model.modules())
    assert all(rate > 0 for rate in rates.by_layer().values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


class Spikes(nn.Module):
    """In place of a layer: the same spikes, whatever the input."""

    def __init__(self, spikes):
        super().__init__()
        self.spikes = spikes

    def forward(self, x):
        return self.spikes


PUBLISHED = {"tau": 2.0, "v_reset": 0.0, "decay_input": True, "detach_reset": True}


@pytest.mark.parametrize(("heads", "density"), [(1, 0.5), (2, 0.6)])
def test_self_attention_is_its_equation_with_the_published_neurons(heads, density):
    attention = SelfAttention(8, heads, lambda: sltt.LIF(**PUBLISHED)).double()
    q, k, v = ((torch.rand(3, 8, 2, 3, dtype=torch.float64) < density).double() for _ in range(3))
    attention.q, attention.k, attention.v, attention.project = Spikes(q), Spikes(k), Spikes(v), nn.Identity()
    lif = sltt.LIF(v_threshold=0.5, **PUBLISHED)
    fired = []
    for _ in range(4):
        tokens = [s.flatten(2).mT.unflatten(2, (heads, -1)).transpose(1, 2) for s in (q, k, v)]  # [B, h, N, d]
        scores = tokens[0] @ tokens[1].mT * 0.125
        expected = lif((scores @ tokens[2]).transpose(1, 2).flatten(2).mT.reshape(3, 8, 2, 3))
        assert torch.equal(attention(q), expected)
        fired.append(expected.mean())
    assert 0 < sum(fired) < 4


def test_token_attention_is_its_equation_with_the_published_neurons():
    attention = TokenAttention(8, 2, lambda: sltt.LIF(**PUBLISHED)).double()
    q, k = ((torch.rand(3, 8, 2, 3, dtype=torch.float64) < 0.2).double() for _ in range(2))
    attention.q, attention.k, attention.project = Spikes(q), Spikes(k), nn.Identity()
    lif = sltt.LIF(v_threshold=0.5, **PUBLISHED)
    for _ in range(4):
        chosen = lif(torch.stack([q[:, :4].sum(1), q[:, 4:].sum(1)], 1))  # [B, h, H, W]
        assert torch.equal(attention(q), k * chosen.repeat_interleave(4, 1))
        assert 0 < chosen.mean() < 1


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_rule_trains_a_transformer(name):
    """A QKFormer, which has self-attention in its last stage."""
    model, rule = SMALL["qkformer"](neuron=lambda: sltt.LIF(tau=2.0, v_threshold=0.5)), RULES[name]
    x, y = torch.randn(3, 3, 8, 8), torch.randint(3, (3,))
    found, out = gradients(model, rule, x, y, steps=4, seed=0)
    assert out.loss.isfinite()
    assert found.isfinite().all()
    assert found.norm() > 0


@pytest.mark.parametrize(
    ("name", "plain", "others"),
    [
        ("spikformer", sltt.BPTT(), [sltt.TBPTT(4), sltt.BPTT(fold=4), sltt.BPTT(segment=2)]),
        ("qkformer", sltt.SLTT(), [sltt.TBPTT(1), sltt.SLTT(fold=3), sltt.SLTT(recompute=True), sltt.SLTT(k=4)]),
    ],
)
def test_ways_to_run_a_rule_give_one_gradient(name, plain, others):
    model = SMALL[name](neuron=lambda: sltt.LIF(tau=2.0, v_threshold=0.5)).double()
    x, y = torch.randn(4, 3, 3, 8, 8, dtype=torch.float64), torch.randint(3, (3,))
    expected, _ = gradients(model, plain, x, y)
    assert expected.norm() > 0
    for rule in others:
        found, _ = gradients(model, rule, x, y)
        torch.testing.assert_close(found, expected)


def test_products_of_attention_are_counted():
    model = spikformer(channels=16, depth=1, heads=2, classes=3)
    x, y = torch.randn(2, 3, 8, 8), torch.randint(3, (2,))
    loss = sltt.losses.CrossEntropyMSE()
    counted = sltt.analysis.count_operations(model, x, y, loss, sltt.SLTT(), steps=3).forward
    one = {layer.name: layer for layer in sltt.analysis.measure_energy(copy.deepcopy(model), x, steps=1).layers}
    assert one["blocks.1.attention"].ann_macs == 2 * 2 * 8 * 8 * 4  # k vᵀ and its product with q: h d d N each
    assert counted > 2 * 3 * sum(layer.ann_macs for layer in one.values())  # which leave out the padding


def test_energy_counts_the_pairs_of_spikes_that_meet_in_attention():
    class Attention(nn.Module):
        def forward(self, x):
            q, k, v = x.unflatten(1, (3, 4)).unbind(1)
            return ((v @ k.mT) @ q).sum(2)

    model = nn.Sequential(sltt.LIF(), Attention())
    x = (torch.rand(5, 2, 12, 6) < 0.4).double() * 2
    (layer,) = sltt.analysis.measure_energy(model, x).layers
    spikes, expected = torch.stack([model[0](x_t) for x_t in x]), 0
    for q, k, v in (s.reshape(3, 4, 6) for s in spikes.flatten(0, 1)):
        kv = torch.einsum("in,jn->ij", v, k)
        expected += int((v[:, None, :] * k[None, :, :]).count_nonzero())
        expected += int((kv[:, :, None] * q[None, :, :]).count_nonzero())
    assert (layer.name, layer.ann_macs, layer.spiking) == ("1", 5 * 2 * 4 * 4 * 6, True)
    assert layer.acs * 2 == pytest.approx(expected)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_activations_of_attention_are_in_the_memory_of_bptt_and_do_not_grow_under_sltt():
    model = spikformer(channels=16, depth=1, heads=2, classes=3)
    x, y = torch.randn(4, 3, 8, 8), torch.randint(3, (4,))

    def saved(rule, steps):
        return sltt.analysis.memory_parts(model, x, y, sltt.losses.CrossEntropyMSE(), rule, steps=steps).saved

    assert saved(sltt.BPTT(), 8) > 2.5 * saved(sltt.BPTT(), 2)
    assert saved(sltt.SLTT(fold=1), 8) < 1.1 * saved(sltt.SLTT(fold=1), 2)


def test_arguments_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="3 heads must share the channels evenly, got 16"):
        spikformer(channels=16, heads=3)
    with pytest.raises(ValueError, match=r"each of 3 stages, got \(1, 2, 3, 4\)"):
        qkformer(depths=(1, 2, 3, 4))
    with pytest.raises(ValueError, match="patch must be one of 4, 16, got 8"):
        spikformer(patch=8)
    with pytest.raises(ValueError, match=r"expected one time step \[B, 3, H, W\], got shape"):
        spikformer(channels=16, heads=2)(torch.randn(2, 2, 8, 8))
