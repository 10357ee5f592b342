"""Augmentations for sequences of event frames [T, 2, H, W]: what is drawn is drawn once for all frames."""

import torch
from torch import Tensor

from sltt.checks import flag, number, whole_number


def clear_square(x: Tensor, side: int) -> Tensor:
    """Set a square of so many pixels to zero; its centre is anywhere, so its sides may be cut off."""
    spans = []
    for size in x.shape[-2:]:
        start = int(torch.randint(size, ())) - side // 2
        spans.append(slice(max(start, 0), start + side))
    x = x.clone()
    x[..., spans[0], spans[1]] = 0
    return x


class EventAugmentation:
    """Random changes to a training sample; 0 switches one off.

    After an optional flip, one of roll, rotation, shear and cutout, as in NDA (Li et al. 2022, arXiv 2203.06145).

    Args:
        flip: mirror left and right with probability one half.
        roll: shift in pixels, at most.
        rotate: degrees to either side, at most; to the nearest pixel.
        shear: degrees to either side along x, at most; to the nearest pixel.
        cutout: side of the square in pixels, at most.
    """

    def __init__(self, flip: bool = True, roll: int = 5, rotate: float = 15.0, shear: float = 8.6, cutout: int = 8):
        self.flip = flag("flip", flip)
        self.roll = whole_number("roll", roll, least=0)
        self.rotate = number("rotate", rotate, least=0)
        self.shear = number("shear", shear, least=0)
        self.cutout = whole_number("cutout", cutout, least=0)

    def __call__(self, x: Tensor) -> Tensor:
        """Change a sample [T, 2, H, W] to another of the same shape."""
        from torchvision.transforms import v2

        if self.flip:
            x = v2.RandomHorizontalFlip()(x)
        changes = (
            # what leaves one side enters on the other
            (self.roll, lambda x: x.roll(torch.randint(-self.roll, self.roll + 1, (2,)).tolist(), (-2, -1))),
            (self.rotate, v2.RandomAffine([-self.rotate, self.rotate])),
            (self.shear, v2.RandomAffine([0, 0], shear=[-self.shear, self.shear])),
            (self.cutout, lambda x: clear_square(x, int(torch.randint(1, self.cutout + 1, ())))),
        )
        moves = [change for most, change in changes if most]
        return moves[int(torch.randint(len(moves), ()))](x) if moves else x
