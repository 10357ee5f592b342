"""Multiplications and energy beside literal counts: groups, attention in all its spellings, layers at several sizes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sltt
from sltt.analysis import count_operations, measure_energy

LOSS = nn.CrossEntropyLoss()


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("transposed", [False, True])
def test_multiplications_of_grouped_convolutions_are_those_of_their_weights(groups, transposed):
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    model = nn.Sequential(
        nn.Conv2d(2, 8, 1), sltt.LIF(), kind(8, 16, 3, groups=groups, stride=2), nn.Flatten(), nn.LazyLinear(3)
    )
    x, y = torch.randn(2, 2, 7, 7), torch.tensor([0, 1])
    model(x)
    sltt.reset(model)
    _, _, layer, _, head = model
    pixels = 49 if transposed else 9
    first, second, last = 49 * 2 * 8, pixels * layer.weight.numel(), head.weight.numel()
    found = count_operations(model, x, y, LOSS, sltt.SLTT(), steps=3)
    assert found.forward == 6 * (first + second + last)
    assert found.backward == 6 * (first + 2 * second + 2 * last)


@pytest.mark.parametrize("rule", [sltt.SLTT(fold=1), sltt.BPTT(fold=1)])
def test_layers_that_run_once_for_a_static_input_count_once(rule):
    layers = nn.Conv2d(2, 4, 3, padding=1), nn.AvgPool2d(2), sltt.LIF(), nn.Flatten(), nn.Linear(64, 3)
    found = count_operations(nn.Sequential(*layers), torch.rand(4, 2, 8, 8), torch.arange(4) % 3, LOSS, rule, steps=6)
    once, each = 4 * 64 * 72, 4 * 6 * 64 * 3
    assert found == (once + each, once + 2 * each)


class Attention(nn.Module):
    """Products of spikes [B, 4, 6] with themselves, in one of the ways to write them."""

    def __init__(self, product):
        super().__init__()
        self.layer, self.neuron, self.head, self.product = nn.Linear(6, 6), sltt.LIF(), nn.Linear(6, 3), product

    def forward(self, x):
        s = self.neuron(self.layer(x))
        return self.head(self.product(s, s.mT)).mean(1)


PRODUCTS = {
    "@": lambda a, b: (a @ b) @ a,
    "matmul by name": lambda a, b: torch.matmul(torch.matmul(a, other=b), a),
    "all by name": lambda a, b: torch.bmm(input=torch.matmul(input=a, other=b), mat2=a),
    "bmm": lambda a, b: torch.bmm(torch.bmm(a, mat2=b), a),
    "einsum": lambda a, b: torch.einsum("bnm,bmd->bnd", torch.einsum("bnd,bdm->bnm", a, b), a),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_attention_counts_alike_however_it_is_written(name):
    torch.manual_seed(0)
    model, x = Attention(PRODUCTS[name]), 3 * torch.randn(2, 4, 6)
    products = {one.name: one for one in measure_energy(model, x.expand(2, *x.shape)).layers}[""]
    assert products.ann_macs == 2 * (4 * 4 * 6 + 4 * 4 * 6)
    torch.manual_seed(0)
    same = Attention(PRODUCTS["@"])
    assert products in measure_energy(same, x.expand(2, *x.shape)).layers


def test_products_of_single_elements_are_no_matrix_products():
    model = Attention(lambda a, b: torch.einsum("bnd,bnd->bnd", a, a))
    assert [one.name for one in measure_energy(model, torch.randn(2, 4, 6), steps=2).layers] == ["layer", "head"]


@pytest.mark.parametrize(("segment", "again"), [(2, 4), (3, 3), (6, 0)])
def test_steps_that_a_segment_repeats_count_as_forward(segment, again):
    model = nn.Sequential(nn.Linear(3, 4), sltt.LIF(), nn.Linear(4, 2))
    batch = torch.rand(5, 3), torch.zeros(5).long(), nn.CrossEntropyLoss()
    plain = count_operations(model, *batch, sltt.BPTT(), steps=6)
    found = count_operations(model, *batch, sltt.BPTT(segment=segment), steps=6)
    assert (found.forward, found.backward) == (plain.forward * (6 + again) // 6, plain.backward)


class Twice(nn.Module):
    """One convolution at two sizes, and a linear layer over tokens that are folded into the batch."""

    def __init__(self):
        super().__init__()
        self.conv, self.neuron, self.tokens = nn.Conv2d(2, 2, 3, padding=1), sltt.LIF(), nn.Linear(2, 3)

    def forward(self, x):
        x = self.neuron(F.avg_pool2d(self.conv(x), 2))
        x = self.conv(x)
        return self.tokens(x.flatten(2).mT.flatten(0, 1)).unflatten(0, (-1, 4)).mean(1)


def test_a_layer_counts_at_each_of_its_sizes_and_for_each_token():
    conv, tokens = measure_energy(Twice(), torch.randn(5, 2, 4, 4), steps=3).layers
    reached = 10 * 10 + 4 * 4  # pixels of 3 × 3 windows over 4 × 4 and 2 × 2 images, without the padding
    assert conv.dense == 3 * reached * 2 * 2
    assert tokens.dense == 3 * 4 * 2 * 3
    assert conv.ann_macs == pytest.approx(conv.dense / 3)


def test_a_transposed_convolution_multiplies_each_input_with_its_kernel():
    layers = sltt.LIF(), nn.Unflatten(1, (2, 2, 2)), nn.ConvTranspose2d(2, 6, 3, stride=2, groups=2)
    (found,) = measure_energy(nn.Sequential(*layers), torch.randn(3, 8), steps=1).layers
    assert found.dense == 8 * 3 * 9
