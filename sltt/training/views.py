"""An image in several views, whose mean logits are its prediction."""

import torch.nn.functional as F
from torch import Tensor


def views(x: Tensor, static: bool, mirror: bool, shift: int) -> list[tuple[float, Tensor]]:
    """Views of images [B, C, H, W], or with time [T, B, C, H, W], and their weights, whose sum is 1.

    Args:
        x: the images.
        static: without time.
        mirror: each view in its mirror image too.
        shift: two views more, moved by so many pixels; the image itself counts as much as both.

    Raises:
        ValueError: no images, or images that are not larger than the shift.
    """
    if (mirror or shift) and x.ndim != (4 if static else 5):
        name = "mirror=True" if mirror else f"shift={shift}"
        raise ValueError(f"{name} needs images [C, H, W] as samples of a time step, got a batch {list(x.shape)}")
    if shift >= min(x.shape[-2:]):
        raise ValueError(f"shift must be less than the {min(x.shape[-2:])} pixels of the images, got {shift}")
    found = [(1.0, x)]
    if shift:
        found = [(0.5, x), *((0.25, moved(x, pixels)) for pixels in (-shift, shift))]
    return [(w / 2, one) for w, view in found for one in (view, view.flip(-1))] if mirror else found


def moved(x: Tensor, pixels: int) -> Tensor:
    """Images [..., H, W] moved right and down, or with negative `pixels` left and up; reflected at the border."""
    flat = x.flatten(0, -4) if x.ndim > 4 else x
    padded = F.pad(flat, [abs(pixels)] * 4, mode="reflect")
    start = abs(pixels) - pixels
    return padded[..., start : start + x.shape[-2], start : start + x.shape[-1]].reshape(x.shape)
