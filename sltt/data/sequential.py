"""Images read a few pixels at a time: sequential digits and sequential MNIST, with their pixels permuted or in order.

Shapes: P pixels of an image, T time steps.
"""

import hashlib
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sltt.checks import flag
from sltt.data.base import Mapped, Splits, fingerprint
from sltt.data.digits import Digits
from sltt.data.images import _Images


class SequentialDigits(Digits):
    """scikit-learn's digits, P/T of their 64 pixels in each time step: sequences [T, 64/T].

    T = 64 reads pixel by pixel, T = 8 row by row. One fixed permutation of the pixels makes every part of the sequence
    matter: without it the image's margins are silent steps.

    Args:
        validation: share of the training images held out to select the best epoch; 0 trains on everything.
        split_seed: which training images are held out.
        augment: shift training images by up to one pixel in each direction.
        permute: put the pixels in a fixed random order, the same on every machine.

    Raises:
        ValueError: when loaded, a T that does not divide 64.
    """

    def __init__(self, validation: float = 0.1, split_seed: int = 0, augment: bool = True, permute: bool = True):
        super().__init__(validation, split_seed, augment)
        self.permute = flag("permute", permute)

    def load(self, steps: int) -> Splits:
        return _sequential(super().load(steps), steps, 64, self.permute)


class SequentialMNIST(_Images):
    """MNIST (LeCun et al. 1998), P/T of its 784 pixels in each time step: sequences [T, 784/T], normalised.

    T = 784 reads pixel by pixel, T = 28 row by row. `permute` makes it permuted sequential MNIST (Le et al. 2015, arXiv
    1504.00941).

    Args:
        root: folder of the data, in the layout of torchvision: `root/MNIST/raw/train-images-idx3-ubyte` and so on.
        validation: share of the training images held out to select the best epoch; 0 trains on everything.
        split_seed: which training images are held out.
        permute: put the pixels in a fixed random order, the same on every machine.
        download: fetch the data into `root` where it is not there.

    Raises:
        ValueError: when loaded, a T that does not divide 784.
        FileNotFoundError: when loaded, no MNIST in `root`.
    """

    source = name = "MNIST"
    layout = "MNIST/raw of its four files"
    mean, std = (0.1307,), (0.3081,)

    def __init__(
        self,
        root: str = "data",
        validation: float = 0.1,
        split_seed: int = 0,
        permute: bool = True,
        download: bool = False,
    ):
        super().__init__(root, validation, split_seed, augment=False, cutout=0, download=download)
        self.permute = flag("permute", permute)

    def open(self, train: bool) -> Any:
        images = super().open(train)
        images.targets = images.targets.tolist()
        return images

    def load(self, steps: int) -> Splits:
        return _sequential(super().load(steps), steps, 784, self.permute)


def _sequential(splits: Splits, steps: int, pixels: int, permute: bool) -> Splits:
    """Return the splits of static images with P `pixels`, as sequences."""
    if pixels % steps:
        parts = ", ".join(str(n) for n in range(1, pixels + 1) if pixels % n == 0)
        raise ValueError(f"{pixels} pixels do not part into steps={steps} equal time steps: choose one of {parts}")
    order = torch.tensor(_permutation(pixels) if permute else range(pixels)).view(steps, -1)
    return splits.with_each(
        lambda _, images: Mapped(images, partial(_in_order, order=order)),
        static=False,
        fingerprint=fingerprint([splits.fingerprint, *order.flatten().tolist()]),
    )


def _permutation(pixels: int) -> list[int]:
    """Return an order of the pixels that depends on no random generator's version."""
    return sorted(range(pixels), key=lambda i: hashlib.sha256(f"pixel {i}".encode()).digest())


def _in_order(image: Tensor, order: Tensor) -> Tensor:
    """Return an image as a sequence [T, P/T]: pixel `order[t, i]` is value i of step t."""
    return image.flatten()[order]
