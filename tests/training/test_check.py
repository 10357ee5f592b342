"""Misuse that only running copies of a network can show is named before it is trained."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sltt


class AmongSamples(nn.Module):
    def forward(self, x):
        return torch.softmax(x @ x.mT, -1) @ x  # [B, B]


class AmongTokens(nn.Module):
    def forward(self, x):
        x = x.unflatten(-1, (4, 2))
        return (torch.softmax(x @ x.mT, -1) @ x).flatten(-2)


class OverTime(nn.Module):
    def forward(self, x):
        steps = x.unflatten(0, (3, -1))
        return (steps + steps.mean(0)).flatten(0, 1) if len(x) % 3 == 0 else x


class Centred(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


class Sometimes(nn.Module):
    """Runs a layer or not, by values."""

    def __init__(self):
        super().__init__()
        self.aux, self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        if x.sum() % 2:
            self.aux(x)
        return self.q(x) + self.k(x)


class Drawn(nn.Module):
    def forward(self, x):
        return x + torch.poisson(x.abs())


def fit(layer, tmp_path, rule=None):
    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.rand(12, 6), torch.randint(3, (12,)))
    data = sltt.data.from_datasets(data, test=data, classes=3, static=True)
    model = nn.Sequential(nn.Linear(6, 8), sltt.IF(v_threshold=0.1), layer, nn.Linear(8, 3))
    settings = {"steps": 3, "epochs": 1, "batch_size": 6, "device": "cpu", "run": tmp_path / "run"}
    return sltt.fit(model, data, rule or sltt.SLTT(), **settings)


@pytest.mark.parametrize("layer", [AmongSamples(), Centred()], ids=lambda m: type(m).__name__)
def test_a_layer_that_mixes_samples_is_named(layer, tmp_path):
    name = type(layer).__name__
    with pytest.warns(UserWarning, match=rf"2 \({name}\) mixes the samples of a batch, in evaluation mode too"):
        fit(layer, tmp_path)


@pytest.mark.parametrize(
    "layer",
    [
        AmongTokens(),
        nn.BatchNorm1d(8),
        nn.BatchNorm1d(8, track_running_stats=False),
        Sometimes(),
        nn.Sequential(Drawn(), Drawn()),
    ],
    ids=["tokens", "BatchNorm", "of the batch", "by values", "random"],
)
def test_a_layer_that_treats_samples_one_by_one_is_not(layer, tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".* mixes ")
        fit(layer, tmp_path)
        if isinstance(layer, AmongTokens):
            fit(layer, tmp_path / "folded", sltt.SLTT(fold=3))


def test_a_layer_that_mixes_folded_time_steps_is_refused(tmp_path):
    fit(OverTime(), tmp_path)
    with pytest.raises(ValueError, match=r"fold=3 would change results: .* mixes samples.*; use fold=1"):
        fit(OverTime(), tmp_path / "folded", sltt.SLTT(fold=3))


class Attends(nn.Module):
    """Tokens [B, 3, 4] of an image, in the form that its attention is made for."""

    def __init__(self, batch_first, form=lambda x: x):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first)
        self.neuron, self.head = sltt.LIF(), nn.Linear(4, 3)
        self.form = form

    def forward(self, x):
        x = self.form(x.unflatten(1, (3, 4)))
        return self.head(self.neuron(self.attention(query=x, key=x, value=x)[0]).sum(0 if x.shape[0] == 3 else 1))


class Tokens(nn.Module):
    """Attention by a function, among what `form` makes of tokens [B, 3, 4]."""

    def __init__(self, form):
        super().__init__()
        self.form, self.neuron, self.head = form, sltt.LIF(), nn.Linear(4, 3)

    def forward(self, x):
        q = self.form(x.unflatten(1, (3, 4)))
        return self.head(self.neuron(F.scaled_dot_product_attention(q, q, q).reshape(len(x), 3, 4)).sum(1))


@pytest.mark.parametrize(
    "model",
    [
        Attends(batch_first=False),
        Attends(batch_first=True, form=lambda x: x.transpose(0, 1)),
        Tokens(lambda x: x.flatten(1)),
        Tokens(lambda x: x.transpose(0, 1)),
        Tokens(lambda x: x.flatten(1)[None, None]),
    ],
)
def test_attention_among_samples_is_named(model):
    with pytest.warns(UserWarning, match="mixes the samples .*batch_first=True"):
        sltt.check(model, torch.randn(4, 5, 12))


@pytest.mark.filterwarnings("error")
def test_attention_among_tokens_is_not():
    for form in (lambda x: x, lambda x: x[:, None], lambda x: x.unflatten(2, (2, 2)).transpose(1, 2)):
        for samples in (5, 3):  # as many as tokens
            sltt.check(Tokens(form), torch.randn(4, samples, 12))
    sltt.check(Attends(batch_first=True), x := torch.randn(4, 5, 12))
    sltt.check(Attends(batch_first=False, form=lambda x: x.transpose(0, 1)), x)
