"""Augmentation of training images: which samples it changes, and what it may change."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from sltt.data import CIFAR10, ImageFolder, Mixup
from sltt.training.batches import _Seeded


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(4):
                pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.png")
    return str(tmp_path)


@pytest.mark.parametrize(
    "kwargs", [{"randaugment": 2}, {"erase": 1.0}, {"mixup": 0.5}], ids=lambda kwargs: "-".join(kwargs)
)
def test_training_images_change_and_others_do_not(folder, kwargs):
    drawn = []
    for options in ({"crop_padding": kwargs.get("crop_padding")}, kwargs):
        splits = ImageFolder(folder, size=32, validation=0.25, **options).splits(1)
        train = _Seeded(splits.train, splits.collate)
        images = torch.stack([train.__getitems__([(i, 7)])[0][0] for i in range(len(splits.train))])
        assert torch.equal(images[1], train.__getitems__([(1, 7)])[0][0])  # by the sample's seed alone
        drawn.append(images)
        for split in (splits.validation, splits.test):
            assert torch.equal(split[0][0], split[0][0])
    assert drawn[0].shape == drawn[1].shape
    assert not torch.equal(*drawn)


PLAIN, CROPPED = ["ToDtype", "Normalize"], ["RandomHorizontalFlip", "ToDtype", "Normalize"]


@pytest.mark.parametrize(
    ("data", "of_training", "of_others"),
    [
        (CIFAR10(), ["RandomCrop", *CROPPED, "partial"], PLAIN),
        (CIFAR10(augment=False), PLAIN, PLAIN),
        (
            CIFAR10(randaugment=2, erase=0.5),
            ["RandomCrop", "RandomHorizontalFlip", "RandAugment", *PLAIN, "partial", "RandomErasing"],
            PLAIN,
        ),
        (ImageFolder("images", size=28), ["RandomResizedCrop", *CROPPED], ["Resize", "CenterCrop", *PLAIN]),
        (ImageFolder("images", size=28, crop_padding=4), ["Resize", "RandomCrop", *CROPPED], ["Resize", *PLAIN]),
    ],
    ids=["CIFAR", "CIFAR, plain", "CIFAR, all", "folder", "folder, padded"],
)
def test_images_are_changed_in_this_order(data, of_training, of_others):
    for train, expected in ((True, of_training), (False, of_others)):
        assert [type(one).__name__ for one in data.transform(train).transforms] == ["PILToTensor", *expected]


def test_a_folder_is_resized_as_published():
    assert ImageFolder("images", size=28).transform(False).transforms[1].size == [32]


def test_an_erased_rectangle_is_zero():
    hole = CIFAR10(cutout=0, erase=1.0).transform(True).transforms[-1]
    images = [hole(torch.ones(3, 32, 32)) for _ in range(50)]
    assert all(set(image.unique().tolist()) == {0.0, 1.0} for image in images)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 5.0])
def test_mixed_images_have_the_labels_of_their_parts_by_their_shares(alpha):
    data = TensorDataset(torch.eye(2), torch.arange(2))  # an image is the share of each label
    mixed = Mixup(data, alpha)
    assert len(mixed) == 2
    samples = [mixed[i % 2] for i in range(4000)]
    x, y = torch.stack([x for x, _ in samples]), torch.tensor([int(y) for _, y in samples])
    torch.testing.assert_close(x.sum(1), torch.ones(len(x)))
    for low in (0.0, 0.25, 0.5, 0.75):
        chosen = (x[:, 1] >= low) & (x[:, 1] <= low + 0.25)
        assert (y[chosen].float().mean() - x[chosen, 1].mean()).abs() < 0.06
    share = torch.where(torch.arange(4000) % 2 == 1, x[:, 1], x[:, 0])  # λ, or 1 where it is mixed with itself
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(share[share < 1].var() - variance) < 0.02


@pytest.mark.parametrize(
    "make", [CIFAR10, lambda **how: ImageFolder("images", size=32, crop_padding=4, **how)], ids=["CIFAR", "folder"]
)
@pytest.mark.parametrize("reflect", [False, True])
def test_the_margin_of_a_crop_is_zero_or_the_image_reflected(make, reflect):
    crop = make(cutout=0, reflect=reflect).crop(augment=True)[-1]
    image = torch.rand(3, 32, 32)
    padded = torch.nn.functional.pad(image, [4] * 4, mode="reflect" if reflect else "constant")
    windows = padded.unfold(1, 32, 1).unfold(2, 32, 1)
    for _ in range(10):
        assert (windows == crop(image)[:, None, None]).all((0, 3, 4)).any()
