import pytest
import torch
import torch.nn.functional as F

import sltt
from sltt.losses import CrossEntropyMSE

LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, 1.0]], dtype=torch.float64)
LABELS = torch.tensor([0, 2])


@pytest.mark.parametrize("alpha", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("one_hot", [False, True])
def test_loss_equals_its_formula(alpha, one_hot):
    goal = [[1, 0, 0], [0, 0, 1]] if one_hot else [[1, 1, 1], [1, 1, 1]]
    p = LOGITS.exp() / LOGITS.exp().sum(1, keepdim=True)
    cross_entropy = -(p[0, 0].log() + p[1, 2].log()) / 2
    mse = ((LOGITS - torch.tensor(goal)) ** 2).sum() / 6
    expected = (1 - alpha) * cross_entropy + alpha * mse
    torch.testing.assert_close(CrossEntropyMSE(alpha, one_hot)(LOGITS, LABELS), expected)
    pixels = LOGITS.T[None, :, None], LABELS[None, None]  # one image of 1×2
    torch.testing.assert_close(CrossEntropyMSE(alpha, one_hot)(*pixels), expected)


def test_label_smoothing_is_that_of_the_cross_entropy():
    expected = F.cross_entropy(LOGITS, LABELS, label_smoothing=0.1)
    torch.testing.assert_close(CrossEntropyMSE(0, label_smoothing=0.1)(LOGITS, LABELS), expected)


@pytest.mark.parametrize("labels", [[0, 3], [-1, 0]])
def test_labels_out_of_range_are_named(labels):
    with pytest.raises(ValueError, match=r"labels must be in 0 … 2 \(the model has 3 outputs\)"):
        CrossEntropyMSE()(LOGITS, torch.tensor(labels))


def test_logits_of_another_rank_are_refused():
    with pytest.raises(ValueError, match=r"expected logits \[B, C\] and labels \[B\]"):
        CrossEntropyMSE()(LOGITS[..., None], LABELS)


@pytest.mark.parametrize("outer", [sltt.losses.Activity, sltt.losses.PerStep, sltt.losses.OfMean])
def test_activity_inside_another_loss_is_refused(outer):
    with pytest.raises(ValueError, match="Activity sees spikes as the outermost loss alone"):
        outer(sltt.losses.Activity())
