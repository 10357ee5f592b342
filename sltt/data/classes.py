"""The samples of some classes of a data set, with the classes numbered anew."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from sltt.checks import instance, whole_numbers
from sltt.data.base import Data, Splits, fingerprint
from sltt.data.images import Mixup
from sltt.data.own import find_labels


class Classes(Data):
    """Some classes of a data set: class `classes[i]` is class i here, and the samples of the others are left out.

    The split is that of the whole data set, so that a test sample there is a test sample here.

    Args:
        data: the data set; its targets are classes.
        classes: which classes, each once.

    Raises:
        ValueError: a class that stands twice; when loaded, one that the data lacks, or without training samples.
    """

    def __init__(self, data: Data, classes: list[int]):
        self.data = instance("data", data, Data)
        self.classes = whole_numbers("classes", classes, least=0)
        if twice := [label for label in self.classes if self.classes.count(label) > 1]:
            raise ValueError(f"class {twice[0]} stands twice in classes={list(self.classes)}: name each once")
        super().__init__(data.validation)

    def load(self, steps: int) -> Splits:
        splits = self.data.splits(steps)
        if splits.classes is None or splits.per_step:
            raise ValueError(f"the targets of {self.data} are no classes, one for each sample: none can be chosen")
        if isinstance(splits.train, Mixup):
            raise ValueError("mixup mixes samples of all classes: leave it out where classes are chosen, mixup=0")
        labels = class_labels(splits.unaugmented_train)
        if empty := sorted({*self.classes} - {*labels}):
            raise ValueError(f"class {empty[0]} of {self.data} has no training samples: leave it out")

        def choose(split: str, samples: Dataset[Any]) -> Dataset[Any]:
            return _Chosen(samples, self.classes, labels if split in ("train", "plain") else class_labels(samples))

        lengths, kept = splits.lengths, [i for i, label in enumerate(labels) if label in self.classes]
        return splits.with_each(
            choose,
            lengths=lengths and [lengths[i] for i in kept],
            classes=len(self.classes),
            fingerprint=fingerprint([splits.fingerprint, *self.classes]),
        )

    def read(self, path: Path, steps: int) -> Tensor:
        self.data.statistics = self.statistics
        return self.data.read(path, steps)


def class_labels(samples: Any) -> list[int]:
    """Return the class of each sample; read sample by sample where the data set does not keep a list."""
    kept = find_labels(samples, None)
    return [int(y) for y in (kept if kept is not None else (samples[i][1] for i in range(len(samples))))]


class _Chosen(Dataset[Any]):
    """The samples of some classes; class `classes[i]` is i."""

    def __init__(self, samples: Dataset[Any], classes: Sequence[int], labels: Sequence[int]):
        number = {label: i for i, label in enumerate(classes)}
        self.samples = samples
        self.indices = [i for i, label in enumerate(labels) if label in number]
        self.targets = [number[labels[i]] for i in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.samples[self.indices[index]][0], self.targets[index]
