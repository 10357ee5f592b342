"""The contract of a data set, and its splits into training, validation and test samples."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from sltt.checks import number, whole_number

OnError = Literal["stop", "skip"]


@dataclass(frozen=True)
class Splits:
    """A data set, split. Samples are pairs (x, label).

    Attributes:
        train: samples to train on, augmented.
        validation: samples to select the epoch by; None if everything is trained on.
        test: samples that are looked at only after the selection.
        static: samples are images [C, H, W], shown at every time step; else sequences [T, C, H, W].
        classes: number of classes; labels are 0 … classes − 1.
        fingerprint: twelve hexadecimal digits of a hash of which sample is in which split.
    """

    train: Dataset[Any]
    validation: Dataset[Any] | None
    test: Dataset[Any]
    static: bool
    classes: int
    fingerprint: str

    def collate(self, samples: list[tuple[Any, int]]) -> tuple[Tensor, Tensor]:
        """Stack samples to a batch: images [B, C, H, W], sequences [T, B, C, H, W]; and labels [B]."""
        xs, labels = zip(*samples, strict=True)
        return torch.stack([torch.as_tensor(x) for x in xs], dim=0 if self.static else 1), torch.tensor(labels)


class Data(ABC):
    """Where a data set is and how it is split; `splits` loads it.

    Args:
        validation: share of the training samples held out to select the best epoch, in [0, 1); 0 trains on everything,
            and then the last epoch counts.
        split_seed: which samples are held out; the same seed gives the same split on every machine.
    """

    def __init__(self, validation: float = 0.1, split_seed: int = 0):
        self.validation = number("validation", validation, least=0, below=1)
        self.split_seed = whole_number("split_seed", split_seed)
        self._loaded: dict[int, Splits] = {}

    def splits(self, steps: int) -> Splits:
        """The splits, loaded once; `steps` is the T of sequences. Images are the same at every T."""
        steps = whole_number("steps", steps, least=1)
        if steps not in self._loaded:
            static = next((splits for splits in self._loaded.values() if splits.static), None)
            self._loaded[steps] = static or self.load(steps)
        return self._loaded[steps]

    def missing(self) -> dict[str, int]:
        """How many samples of the whole data set are not there, by split; empty if none or if that is not known."""
        return {}

    @abstractmethod
    def load(self, steps: int) -> Splits:
        """Read the data; raises FileNotFoundError that says where it looked and what it expected there."""


def hold_out(labels: Sequence[int], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Split sample indices into (kept, held out), with `share` of every class held out.

    Within a class, samples are ordered by a hash of seed and index and the first are held out, so the split depends on
    no random generator's version. A class of two or more samples keeps at least one on each side.
    """
    by_class: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        by_class.setdefault(label, []).append(index)
    kept: list[int] = []
    held: list[int] = []
    for indices in by_class.values():
        indices.sort(key=lambda i: hashlib.sha256(f"{seed}:{i}".encode()).digest())
        count = round(share * len(indices))
        if share > 0 and len(indices) > 1:
            count = min(max(count, 1), len(indices) - 1)
        held += indices[:count]
        kept += indices[count:]
    return sorted(kept), sorted(held)


def fingerprint(samples: Sequence[Any], *splits: Sequence[int]) -> str:
    """Twelve hexadecimal digits of a hash of the samples' names or labels, and of which is in which split."""
    digest = hashlib.sha256(repr([list(samples), *map(list, splits)]).encode())
    return digest.hexdigest()[:12]
