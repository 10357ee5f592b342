"""The contract of a data set, and its splits into training, validation and test samples."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from sltt.checks import number, whole_number
from sltt.sequence.padding import Padded, pad

Collate = Callable[[list[Any]], Any]


@dataclass(frozen=True)
class Splits:
    """A data set, split. Samples are pairs (x, target).

    Attributes:
        train: samples to train on, augmented.
        validation: samples to select the epoch by; None if everything is trained on.
        test: samples that are looked at only after the selection; None if there are none.
        static: samples are images [C, H, W], shown at every time step; else sequences [T, C, H, W].
        classes: number of classes; targets are class indices 0 … classes − 1. None for targets of another kind.
        fingerprint: twelve hexadecimal digits of a hash of which sample is in which split.
        per_step: targets are sequences too, [T, ...]: one target for each time step.
        plain: the training samples without augmentation, in the order of `train`; None if `train` has none.
        lengths: time steps of each training sample: a batch has samples of similar length. None: any samples.
        pad: sequences are padded to the longest of a batch, whose targets are `sltt.Padded`.
        collates: functions of the user's that make batches, by the names of the splits; None stacks samples.
        statistics: of the training samples, by which `Data.read` standardises another. Checkpoints keep them.
    """

    train: Dataset[Any]
    validation: Dataset[Any] | None
    test: Dataset[Any] | None
    static: bool
    classes: int | None
    fingerprint: str
    per_step: bool = False
    plain: Dataset[Any] | None = None
    lengths: Sequence[int] | None = None
    pad: bool = False
    collates: Mapping[str, Collate] | None = None
    statistics: dict[str, Tensor] | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """Return the number of samples to train on, to validate by and to test on; 0 where there are none."""
        parts: dict[str, Any] = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: 0 if part is None else len(part) for name, part in parts.items()}

    @property
    def unaugmented_train(self) -> Dataset[Any]:
        """Return the training samples without augmentation."""
        return self.train if self.plain is None else self.plain

    def collate(self, samples: list[tuple[Any, Any]]) -> tuple[Tensor, Any]:
        """Stack samples to a batch: images [B, C, H, W], sequences [T, B, C, H, W]; and targets [B, ...].

        Targets of each time step are stacked like sequences: [T, B, ...].
        """
        if self.collates:
            return self.collates["train"](samples)
        xs, targets = zip(*samples, strict=True)
        if not self.pad:
            return _stack("samples", xs, not self.static), _stack("targets", targets, self.per_step)
        lengths = tuple(map(len, xs))
        x = _stack("samples", [pad(x, max(lengths)) for x in xs], True)
        if self.per_step:  # a target of another length than x stays one
            targets = [pad(y, len(y) + max(lengths) - n) for y, n in zip(targets, lengths, strict=True)]
        return x, Padded(_stack("targets", targets, self.per_step), lengths)

    def collate_of(self, dataset: Dataset[Any]) -> Collate:
        """Return the function that makes the batches of a split."""
        names = [name for name in self.collates or () if getattr(self, name) is dataset]
        return self.collates[names[0]] if self.collates and names else self.collate

    def with_each(self, make: Callable[[str, Dataset[Any]], Dataset[Any]], **fields: Any) -> Self:
        """These splits with other fields, and other data sets: `make(name, samples)` of each that there is."""
        parts = {name: getattr(self, name) for name in ("train", "validation", "test", "plain")}
        made = {name: make(name, samples) for name, samples in parts.items() if samples is not None}
        return replace(self, **made, **fields)


class Mapped(Dataset[Any]):
    """Samples (change(x), target) of samples (x, target)."""

    def __init__(self, samples: Dataset[Any], change: Callable[[Tensor], Tensor]):
        self.samples, self.change = samples, change

    def __len__(self) -> int:
        return len(self.samples)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        x, target = self.samples[index]
        return self.change(torch.as_tensor(x)), target


def _stack(name: str, values: Sequence[Any], time_first: bool) -> Tensor:
    """Stack along the batch dimension, the second one behind the time."""
    tensors = [torch.as_tensor(value) for value in values]
    if time_first and not tensors[0].ndim:
        raise ValueError(f"expected {name} of each time step, [T, ...], got one number: is per_step=True right?")
    if len(shapes := {tensor.shape for tensor in tensors}) > 1:
        first, second = map(list, sorted(shapes)[:2])
        raise ValueError(f"expected {name} of one shape in a batch, got {first} and {second}: resize, cut or pad them")
    # detached: a process that loads data cannot send a graph, and the training would wait for ever
    return torch.stack(tensors, dim=1 if time_first else 0).detach()


class Data(ABC):
    """Base of data sets: where one is and how it is split; `splits` loads it.

    Args:
        validation: share of the training samples held out to select the best epoch, in [0, 1); 0 trains on everything,
            and then the last epoch counts.
    """

    statistics: dict[str, Tensor] | None = None  # of the splits that a run was trained on, once it is loaded

    def __init__(self, validation: float = 0.1):
        self.validation = number("validation", validation, least=0, below=1)
        self._loaded: dict[int, Splits] = {}

    def __str__(self) -> str:
        """Return the name of the data in messages and in the model card."""
        return type(self).__name__

    def splits(self, steps: int) -> Splits:
        """Return the splits, loaded once; `steps` is the T of sequences. Images are the same at every T."""
        steps = whole_number("steps", steps, least=1)
        if steps not in self._loaded:
            static = next((splits for splits in self._loaded.values() if splits.static), None)
            self._loaded[steps] = static or self.load(steps)
        return self._loaded[steps]

    def read(self, path: Path, steps: int) -> Tensor:
        """Read a sample without its label, as the network sees it: `.npy` holds the array of one.

        Args:
            path: of the file.
            steps: T of a sequence.

        Raises ValueError for a file that holds no sample.
        """
        if path.suffix != ".npy" and path.exists():
            raise ValueError(f"{path}: expected a file as {self} reads them, or .npy with the array of a sample")
        try:
            x = torch.from_numpy(np.load(path, allow_pickle=False))
        except (ValueError, TypeError, EOFError) as error:
            raise ValueError(f"{path}: cannot be read as an array of numbers ({error})") from error
        if x.dtype == torch.uint8 and x.numel() and x.max() > 1:
            raise ValueError(f"{path} has whole numbers up to {x.max()}: save it as the data has it, in [0, 1] say")
        return x.float()

    def split(
        self,
        samples: Any,
        labels: Sequence[int],
        test: Any,
        identity: Sequence[Any],
        *,
        augmented: Any = None,
        **form: Any,
    ) -> Splits:
        """Return the splits of samples, with a share of each class held out.

        Args:
            samples: without augmentation.
            labels: of all samples.
            test: test samples; or a list of the indices of `samples` that test, and neither train nor validate.
            identity: what the fingerprint has beside the indices.
            augmented: the same samples with augmentation.
            form: other fields of the splits.
        """
        tested = test if isinstance(test, list) else []
        test_samples: Any = Subset(samples, tested) if tested else test
        rest = sorted({*range(len(labels))} - {*tested})
        parts = hold_out([labels[i] for i in rest], self.validation)
        kept, held = ([rest[i] for i in part] for part in parts)
        plain = Subset(samples, kept)
        train = plain if augmented is None else Subset(augmented, kept)
        validation = Subset(samples, held) if held else None
        split = fingerprint(identity, kept, held, *([tested] if tested else []))
        return Splits(train, validation, test_samples, plain=plain, fingerprint=split, **form)

    @abstractmethod
    def load(self, steps: int) -> Splits:
        """Read the data; raises FileNotFoundError that says where it looked and what it expected there."""


def hold_out(labels: Sequence[int], share: float) -> tuple[list[int], list[int]]:
    """Split sample indices into (kept, held out), with `share` of every class held out.

    Within a class, samples are ordered by a hash of their index and the first are held out, so the split is the same on
    every machine. A class of two or more samples keeps at least one on each side.
    """
    by_class: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        by_class.setdefault(label, []).append(index)
    kept: list[int] = []
    held: list[int] = []
    for indices in by_class.values():
        indices.sort(key=lambda i: hashlib.sha256(f"0:{i}".encode()).digest())
        count = round(share * len(indices))
        if share > 0 and len(indices) > 1:
            count = min(max(count, 1), len(indices) - 1)
        held += indices[:count]
        kept += indices[count:]
    return sorted(kept), sorted(held)


def fingerprint(samples: Sequence[Any], *splits: Sequence[int]) -> str:
    """Return twelve hexadecimal digits of a hash of the samples' names or labels, and of which is in which split."""
    return hashlib.sha256(repr([list(samples), *map(list, splits)]).encode()).hexdigest()[:12]
