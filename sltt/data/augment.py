"""Augmentations for sequences of event frames [T, 2, H, W]: what is drawn is drawn once for all frames."""

from functools import partial

import torch
from torch import Tensor

from sltt.checks import flag, number, whole_number


def flip(x: Tensor) -> Tensor:
    """Mirror left and right with probability one half."""
    return x.flip(-1) if torch.rand(()) < 0.5 else x


def roll(x: Tensor, pixels: int) -> Tensor:
    """Shift by up to `pixels` in each direction; what leaves one side enters on the other."""
    dy, dx = torch.randint(-pixels, pixels + 1, (2,)).tolist()
    return x.roll((dy, dx), (-2, -1))


def rotate(x: Tensor, degrees: float) -> Tensor:
    """Rotate by up to `degrees` to either side, to the nearest pixel."""
    return _affine(x, angle=_uniform(degrees))


def shear(x: Tensor, degrees: float) -> Tensor:
    """Shear along x by up to `degrees`, to the nearest pixel."""
    return _affine(x, shear=_uniform(degrees))


def cutout(x: Tensor, length: int) -> Tensor:
    """Remove the events of a square whose side is 1 to `length` pixels and whose centre is anywhere."""
    return clear_square(x, int(torch.randint(1, length + 1, ())))


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
        rotate: degrees to either side, at most.
        shear: degrees to either side, at most.
        cutout: side of the square in pixels, at most.
    """

    def __init__(
        self,
        flip: bool = True,
        roll: int = 5,
        rotate: float = 15.0,
        shear: float = 8.6,
        cutout: int = 8,
    ):
        self.flip = flag("flip", flip)
        self.roll = whole_number("roll", roll, least=0)
        self.rotate = number("rotate", rotate, least=0)
        self.shear = number("shear", shear, least=0)
        self.cutout = whole_number("cutout", cutout, least=0)

    def __call__(self, x: Tensor) -> Tensor:
        """Change a sample [T, 2, H, W] to another of the same shape."""
        if self.flip:
            x = flip(x)
        changes = (roll, self.roll), (rotate, self.rotate), (shear, self.shear), (cutout, self.cutout)
        moves = [partial(change, x, most) for change, most in changes if most]
        return moves[int(torch.randint(len(moves), ()))]() if moves else x


def _uniform(most: float) -> float:
    return (2 * float(torch.rand(())) - 1) * most


def _affine(x: Tensor, angle: float = 0.0, shear: float = 0.0) -> Tensor:
    from torchvision.transforms.v2 import functional

    return functional.affine(x, angle=angle, translate=[0, 0], scale=1.0, shear=[shear, 0.0])
