import pytest
import torch

from sltt.data import Digits, SequentialDigits


def read(dataset):
    """Sequences [N, T, ...] and labels [N]."""
    xs, labels = zip(*dataset, strict=True)
    return torch.stack(xs), torch.tensor([int(y) for y in labels])


@pytest.mark.parametrize("steps", [1, 8, 64])
def test_digits_are_read_a_few_pixels_at_a_time(steps):
    plain, permuted = (SequentialDigits(permute=permute).splits(steps) for permute in (False, True))
    images, labels = read(Digits().splits(1).test)
    x, y = read(plain.test)
    assert torch.equal(x, images.view(-1, steps, 64 // steps))
    assert torch.equal(y, labels)
    assert not plain.static
    shuffled, y = read(permuted.test)
    assert torch.equal(shuffled.flatten(1).sort(1).values, images.flatten(1).sort(1).values)
    assert not torch.equal(shuffled, x)
    assert torch.equal(y, labels)
    assert plain.fingerprint != permuted.fingerprint
    batch, _ = plain.collate([plain.train[i] for i in range(5)])
    assert batch.shape == (steps, 5, 64 // steps)


def test_a_permutation_is_one_of_pixels_and_the_same_for_every_t():
    (rows, _), (pixels, _) = (read(SequentialDigits().splits(steps).test) for steps in (8, 64))
    assert torch.equal(rows.flatten(1), pixels.flatten(1))


def test_training_images_are_shifted_before_their_pixels_are_permuted():
    splits = SequentialDigits().splits(8)
    assert len({tuple(splits.train[0][0].flatten().tolist()) for _ in range(20)}) > 1
    fixed = SequentialDigits(augment=False).splits(8)
    assert torch.equal(fixed.train[0][0], fixed.train[0][0])


def test_steps_that_do_not_divide_the_image_are_refused():
    with pytest.raises(ValueError, match=r"64 pixels do not part into steps=7 equal time steps: choose one of 1, 2, 4"):
        SequentialDigits().splits(7)
