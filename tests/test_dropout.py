import pytest
import torch

import sltt


def test_the_mask_stays_within_a_sequence_and_changes_after_a_reset():
    dropout = sltt.Dropout(0.5)
    x = torch.ones(4, 1000)
    first = dropout(x)
    assert torch.equal(dropout(x), first)
    assert torch.equal(dropout(2 * x), 2 * first)
    sltt.reset(dropout)
    assert not torch.equal(dropout(x), first)


def test_what_is_kept_is_scaled_so_that_the_mean_stays():
    y = sltt.Dropout(0.3)(torch.ones(100_000))
    assert y.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert y.mean().item() == pytest.approx(1, abs=0.02)


def test_evaluation_is_the_identity():
    dropout = sltt.Dropout(0.5).eval()
    x = torch.randn(3, 4)
    assert dropout(x) is x
    assert dropout.mask is None


def test_a_changed_batch_without_a_reset_is_refused():
    dropout = sltt.Dropout(0.5)
    dropout(torch.ones(4, 2))
    with pytest.raises(ValueError, match=r"sltt\.reset"):
        dropout(torch.ones(3, 2))
