import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm

import sltt
from sltt.analysis import agreement, count_operations
from sltt.sequence.copies import copy_model
from tests.conftest import LOSS, batch
from tests.training.blobs import train


def pruned(layer):
    prune.l1_unstructured(layer, "weight", 0.5)
    return layer


KINDS = {"pruning": pruned, "weight norm": weight_norm, "parametrization": parametrizations.weight_norm}
pytestmark = [
    pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys()),
    pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning"),
]


def network(kind, inputs=6):
    torch.manual_seed(0)
    return nn.Sequential(kind(nn.Linear(inputs, 8)), sltt.LIF(), nn.Linear(8, 3))


def test_copies_of_layers_with_computed_weights(kind):
    model, (x, _) = network(kind).double(), batch()
    expected = sltt.unroll(model, x)
    other = copy_model(model)
    torch.testing.assert_close(sltt.unroll(other, x), expected)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(2)
    torch.testing.assert_close(sltt.unroll(model, x), expected)
    assert not torch.allclose(sltt.unroll(other, x), expected)


def test_measures_and_averages_take_them(kind, tmp_path):
    model, (x, y) = network(kind).double(), batch()
    (row,) = agreement(model, x, y, LOSS, [sltt.SLTT()])
    assert 0 < row.cosine <= 1
    assert count_operations(model, x, y, LOSS, sltt.SLTT()).forward > 0
    _, result = train(tmp_path / "run", network(kind, 4), ema=0.9)
    assert result.history[-1]["validation_accuracy"] > 0.5
