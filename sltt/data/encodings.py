"""Spike codes of intensities, and data sets whose samples are coded.

Direct coding needs none of these: a static image is shown at every time step, and the first layer learns the code.
Shapes: T time steps, C channels.
"""

from abc import ABC, abstractmethod
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sltt._torch import keep_generators
from sltt.checks import instance, number
from sltt.data.base import Data, Mapped, Splits
from sltt.frozen import Frozen
from sltt.sequence.steps import check_input


class Encoding(Frozen, ABC):
    """Makes spikes [T, ...] of a sample, or of a batch.

    Attributes:
        static: takes images; else sequences.
    """

    static: bool = True

    @abstractmethod
    def __call__(self, x: Tensor, steps: int) -> Tensor:
        """Spikes of T = `steps` time steps, in the type of x."""


class _OfImages(Encoding):
    """Base of codes of images: the intensities that mean 0 and 1.

    Args:
        low: intensity that means 0: the least of the images.
        high: intensity that means 1: the largest of the images.

    Raises ValueError if `high` is not above `low`; when called on the CPU, for an intensity outside.
    """

    def __init__(self, low: float = 0.0, high: float = 1.0):
        self.low = number("low", low)
        self.high = number("high", high, above=self.low)

    def share(self, x: Tensor) -> Tensor:
        """Intensities as shares of the range, in 0 … 1."""
        share = (_to_float32(x) - self.low) / (self.high - self.low)
        # to look waits for a GPU
        if x.device.type == "cpu" and not (-1e-4 <= share.min() <= share.max() <= 1 + 1e-4):  # nor for NaN
            got = f"{x.min():.4g} … {x.max():.4g}"
            raise ValueError(f"expected intensities in {self.low:g} … {self.high:g}, got {got}: give low=… and high=…")
        return share.clamp(0, 1)


class Poisson(_OfImages):
    """Rate code: s[t] = 1 with probability p, drawn anew at every time step; p is the share of the intensity.

    Draws from PyTorch's global generator. For the arguments see `Latency`.
    """

    def __call__(self, x: Tensor, steps: int) -> Tensor:
        """Code an image [...] as spikes [T, ...]."""
        return self.share(x).expand(steps, *x.shape).bernoulli().to(x.dtype)


class Latency(_OfImages):
    """Time code: one spike, at t = round((1 − p) (T − 1)), where p is the share of the intensity; none for p = 0.

    Args:
        low: intensity of p = 0.
        high: intensity of p = 1.
    """

    def __call__(self, x: Tensor, steps: int) -> Tensor:
        """Code an image [...] as spikes [T, ...]."""
        share = self.share(x)
        first = ((1 - share) * (steps - 1)).round()
        times = torch.arange(steps, device=x.device).view(-1, *[1] * x.ndim)
        return ((times == first) & (share > 0)).to(x.dtype)


class Delta(Encoding):
    """Code of changes: a spike where a signal has moved by θ, in one channel where it rose and in one where it fell.

        d = x[t] − r[t−1],   s⁺[t] = [d ≥ θ],  s⁻[t] = [d ≤ −θ],   r[t] = r[t−1] + θ (s⁺[t] − s⁻[t]),   r[−1] = x[0]

    Args:
        threshold: θ, in units of the signal.
    """

    static = False

    def __init__(self, threshold: float = 0.1):
        self.threshold = number("threshold", threshold, above=0)

    def __call__(self, x: Tensor, steps: int) -> Tensor:
        """Code a sequence [T, C, ...] of any T as spikes [T, 2C, ...], those of increases first."""
        check_input(x)
        dtype, x, frames = x.dtype, _to_float32(x), []
        reference = x[0]
        for frame in x:
            change = frame - reference
            rose, fell = ((sign * change >= self.threshold).to(x.dtype) for sign in (1, -1))
            reference = reference + self.threshold * (rose - fell)
            frames.append(torch.cat([rose, fell]))
        return torch.stack(frames).to(dtype)


def _to_float32(x: Tensor) -> Tensor:
    """Return x in float32 at least, where differences have a sign and time steps are exact."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Encoded(Data):
    """A data set whose samples are spikes: the same samples and splits, coded.

    The random numbers of a training sample depend on the run's seed, the sample and the epoch, not on the number of
    workers and processes; for other samples they are always the same.

    Args:
        data: the data set: images, or sequences for `Delta`.
        encoding: makes the spikes.
    """

    def __init__(self, data: Data, encoding: Encoding):
        self.data = instance("data", data, Data)
        self.encoding = instance("encoding", encoding, Encoding, "such as sltt.data.Poisson()")
        super().__init__(data.validation)

    def load(self, steps: int) -> Splits:
        splits = self.data.splits(steps)
        if splits.static != self.encoding.static:
            has, remedy = ("images", "Poisson or Latency") if splits.static else ("sequences", "Delta")
            code = type(self.encoding).__name__
            raise ValueError(f"{code} does not code the {has} of {self.data}: use {remedy}")
        code = partial(self.encoding, steps=steps)
        return splits.with_each(
            lambda name, samples: Mapped(samples, code) if name == "train" else _Fixed(samples, code), static=False
        )

    def read(self, path: Path, steps: int) -> Tensor:
        self.data.statistics = self.statistics
        samples: Any = [(self.data.read(path, steps), None)]
        return _Fixed(samples, partial(self.encoding, steps=steps))[0][0]


class _Fixed(Mapped):
    """Mapped samples, for which the same is drawn every time."""

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        x, target = self.samples[index]
        with keep_generators():
            torch.default_generator.manual_seed(index)
            return self.change(torch.as_tensor(x)), target
