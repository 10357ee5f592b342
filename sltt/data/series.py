"""Time series that come with `aeon`: speech, of unequal lengths, and accelerometers; nothing to download.

Shapes: T time steps, C channels.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from sltt.checks import choice, number
from sltt.data.base import Data, Splits
from sltt.data.encodings import Delta
from sltt.data.own import from_datasets

Samples = Sequence[tuple[Tensor, int]]
Name = Literal["JapaneseVowels", "BasicMotions"]


class TimeSeries(Data):
    """A data set of the UEA archive (Bagnall et al. 2018, arXiv 1811.00075): sequences [T, C], with its test samples.

    `JapaneseVowels`: two vowels by 9 speakers, C = 12 cepstral coefficients, 7 to 29 steps, 270 training samples
    (Kudo et al. 1999). `BasicMotions`: standing, walking, running and badminton, C = 6 of accelerometer and gyroscope,
    100 steps, 40 training samples.

    Each channel has mean 0 and standard deviation 1 over the training samples. Sequences of unequal lengths are padded
    at the end, up to the longest of a batch, with targets `sltt.Padded`.

    Args:
        name: `JapaneseVowels` or `BasicMotions`.
        validation: share of the training samples held out to select the best epoch; 0 trains on everything.
        delta: threshold of `Delta`, in standard deviations: the samples are then its spikes [T, 2C]. None gives the
            values themselves, as input current.

    Raises:
        ImportError: when loaded, without `aeon`.
        ValueError: when loaded, a T that is shorter than the longest sample.
    """

    def __init__(self, name: Name = "JapaneseVowels", validation: float = 0.2, delta: float | None = None):
        super().__init__(validation)
        self.name = choice("name", name, get_args(Name))
        self.delta = None if delta is None else number("delta", delta, above=0)

    def __str__(self) -> str:
        return self.name

    def load(self, steps: int) -> Splits:
        train, test, statistics = prepare(_read(self.name, "train"), _read(self.name, "test"), self.delta)
        pad = len({len(x) for x, _ in [*train, *test]}) > 1
        splits = from_datasets(train, self.validation, test, static=False, pad=pad).splits(steps)
        return replace(splits, statistics=statistics)

    def read(self, path: Path, steps: int) -> Tensor:
        """Read a sample; `.csv` has a line of measurements for each time step, to be standardised."""
        if path.suffix != ".csv":
            return super().read(path, steps)
        x = torch.from_numpy(np.loadtxt(path, delimiter=",", ndmin=2))
        return standardise(x, self.statistics or self.splits(steps).statistics, self.delta)


def prepare(train: Samples, test: Samples, delta: float | None) -> tuple[Samples, Samples, dict[str, Tensor]]:
    """Standardise samples [T, C] by the mean and standard deviation of `train`, and return these too."""
    values = torch.cat([x for x, _ in train])
    statistics = {"mean": values.mean(0), "std": values.std(0)}
    train, test = ([(standardise(x, statistics, delta), y) for x, y in part] for part in (train, test))
    return train, test, statistics


def standardise(x: Tensor, statistics: Any, delta: float | None) -> Tensor:
    """Standardise a sample [T, C], then code it as spikes."""
    if x.shape[1:] != statistics["mean"].shape:
        raise ValueError(f"expected {len(statistics['mean'])} columns of measurements, got {x.shape[1]}")
    x = ((x - statistics["mean"]) / statistics["std"]).float()
    return x if delta is None else Delta(delta)(x, len(x))


def _read(name: str, split: str) -> Samples:
    """Read a split of the archive: samples [T, C] and class indices, in the order of the names of the classes."""
    try:
        from aeon.datasets import load_classification  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(f"{name} comes with aeon: pip install 'sltt[timeseries]'") from error
    series, labels = load_classification(name, split=split)
    classes = sorted(set(labels))
    return [(torch.from_numpy(x.T), classes.index(y)) for x, y in zip(series, labels, strict=True)]
