"""scikit-learn's 1,797 handwritten digits, as images and as the events of a simulated camera; nothing to download.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI 1998 (its test set), CC BY 4.0,
doi 10.24432/C50P49. `digits.npz` has images [1797, 8, 8] with values 0 … 16, and labels [1797].
Shapes: N images, T time steps, H = W = size.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import TensorDataset

from sltt.checks import flag, number, whole_number
from sltt.data.base import Data, Mapped, Splits, hold_out

TEST_SHARE = 0.2  # 359 test images, always the same


class Digits(Data):
    """The digits as static images [1, 8, 8], mean 0 and standard deviation 1; training images shift by up to a pixel.

    Args:
        validation: share of the training images held out to select the best epoch; 0 trains on everything.
        augment: shift training images by up to one pixel in each direction.
    """

    def __init__(self, validation: float = 0.1, augment: bool = True):
        super().__init__(validation)
        self.augment = flag("augment", augment)

    def load(self, steps: int) -> Splits:
        images, labels = _digits()
        return _split(self, ((images - images.mean()) / images.std()).unsqueeze(1), labels)


class DigitsEvents(Digits):
    """The digits as an event camera sees them move: frames of event counts [T, 2, size, size].

    As N-MNIST was recorded (Orchard et al. 2015), each image moves along a triangle in three saccades. A pixel fires an
    event each time its log intensity has changed by the contrast threshold: channel 0 counts increases, channel 1
    decreases. The frames are T equal parts of the recording. No noise: the events are the same on every machine.

    Args:
        size: height and width of the sensor in pixels, at least 12.
        threshold: contrast threshold, in units of log intensity.
        kwargs: `validation` and `augment`, as for `sltt.data.Digits`.
    """

    def __init__(self, size: int = 16, threshold: float = 0.2, **kwargs: Any):
        super().__init__(**kwargs)
        self.size = whole_number("size", size, least=12)
        self.threshold = number("threshold", threshold, above=0)

    def load(self, steps: int) -> Splits:
        images, labels = _digits()
        return _split(self, record(images / 16, steps, self.size, self.threshold), labels)


POSITIONS = 96  # camera positions of a recording: 32 a saccade


def record(images: Tensor, steps: int, size: int, threshold: float) -> Tensor:
    """Simulate an event camera that sees images [N, h, w] in 0 … 1 move in three saccades; counts [N, T, 2, H, W].

    The reference of a pixel moves by the threshold with each event, so what remains below it carries over to the next
    position. Position i falls into frame ⌊i T / 96⌋.

    Raises ValueError for more than 96 time steps.
    """
    if not 1 <= steps <= POSITIONS:
        raise ValueError(f"a recording has {POSITIONS} positions: steps must be in 1 … {POSITIONS}, got {steps}")
    frames = torch.zeros(len(images), steps, 2, size, size)
    path = _saccades()
    reference = _log_intensity(images, path[0], size)
    for i, offset in enumerate(path[1:]):
        change = _log_intensity(images, offset, size) - reference
        count = (change / threshold).trunc()
        reference += count * threshold
        frame = frames[:, i * steps // POSITIONS]
        frame[:, 0] += count.clamp(min=0)
        frame[:, 1] += (-count).clamp(min=0)
    return frames


def _saccades() -> Tensor:
    """Positions [97, 2] of the image's centre along a triangle, in units of its half width; a closed path."""
    corners = torch.tensor([[-0.25, -0.25], [0.0, 0.25], [0.25, -0.25], [-0.25, -0.25]])
    part = torch.linspace(0, 3, POSITIONS + 1)[:, None]
    side = part.floor().clamp(max=2).long().squeeze(1)
    return torch.lerp(corners[side], corners[side + 1], part - side[:, None])


def _log_intensity(images: Tensor, offset: Tensor, size: int) -> Tensor:
    """Log intensity [N, H, W] of images [N, h, w], two pixels of margin around them, moved by offset [2]."""
    zoom = size / (size - 4)
    matrix = torch.tensor([[zoom, 0.0, -offset[0]], [0.0, zoom, -offset[1]]])
    grid = F.affine_grid(matrix.expand(len(images), 2, 3), [len(images), 1, size, size], align_corners=False)
    seen = F.grid_sample(images[:, None], grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return torch.log(seen.squeeze(1) + 0.1)


def _digits() -> tuple[Tensor, Tensor]:
    """Return images [1797, 8, 8] with values 0 … 16, and labels [1797]."""
    with np.load(Path(__file__).with_name("digits.npz")) as file:
        return torch.from_numpy(file["images"]).float(), torch.from_numpy(file["labels"]).long()


def _shift(x: Tensor, fill: float) -> Tensor:
    """Return x [..., H, W] moved by −1, 0 or 1 pixels in each direction; `fill` enters at the other side."""
    dy, dx = torch.randint(0, 3, (2,)).tolist()
    height, width = x.shape[-2:]
    return F.pad(x, (1, 1, 1, 1), value=fill)[..., dy : dy + height, dx : dx + width]


def _split(data: Digits, x: Tensor, labels: Tensor) -> Splits:
    samples, names = TensorDataset(x, labels), labels.tolist()
    augmented = Mapped(samples, partial(_shift, fill=float(x.min()))) if data.augment else None
    test = hold_out(names, TEST_SHARE)[1]
    return data.split(samples, names, test, names, augmented=augmented, static=x.ndim == 4, classes=10)
