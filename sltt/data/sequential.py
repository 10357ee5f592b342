"""Images read a few pixels at a time: sequential digits, with their pixels permuted or in order.

Shapes: P pixels of an image, T time steps.
"""

import hashlib
from functools import partial
from typing import Any

import torch

from sltt.checks import flag
from sltt.data.base import Mapped, Splits, fingerprint
from sltt.data.digits import Digits

PIXELS = 64


class SequentialDigits(Digits):
    """scikit-learn's digits, P/T of their 64 pixels in each time step: sequences [T, 64/T].

    T = 64 reads pixel by pixel, T = 8 row by row. One fixed permutation of the pixels makes every part of the sequence
    matter: without it the image's margins are silent steps.

    Args:
        permute: put the pixels in a fixed random order, the same on every machine.
        kwargs: `validation` and `augment`, as for `sltt.data.Digits`.

    Raises ValueError when loaded, for a T that does not divide 64.
    """

    def __init__(self, permute: bool = True, **kwargs: Any):
        super().__init__(**kwargs)
        self.permute = flag("permute", permute)

    def load(self, steps: int) -> Splits:
        if PIXELS % steps:
            parts = ", ".join(str(n) for n in range(1, PIXELS + 1) if PIXELS % n == 0)
            raise ValueError(f"{PIXELS} pixels do not part into steps={steps} equal time steps: choose one of {parts}")
        splits = super().load(steps)
        pixels = list(range(PIXELS))
        if self.permute:  # in an order that depends on no random generator's version
            pixels.sort(key=lambda i: hashlib.sha256(f"pixel {i}".encode()).digest())
        order = torch.tensor(pixels).view(steps, -1)
        return splits.with_each(
            lambda _, images: Mapped(images, partial(torch.take, index=order)),
            static=False,
            fingerprint=fingerprint([splits.fingerprint, *order.flatten().tolist()]),
        )
