"""Data of your own: any PyTorch or Hugging Face data sets as the data of a training."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from sltt.checks import flag, number, whole_number
from sltt.data.base import Collate, Data, Mapped, Splits, fingerprint, hold_out


def from_datasets(
    train: Any,
    validation: Any = None,
    test: Any = None,
    *,
    static: bool,
    columns: tuple[str, str] | None = None,
    classes: int | None = None,
    pad: bool = False,
    by_length: bool = False,
    per_step: bool = False,
) -> Data:
    """Return the data of a training, from data sets of your own.

        data = sltt.data.from_datasets(train, 0.1, test, static=False)

    A data set has `len(dataset)` and `dataset[index]`, as those of PyTorch and of Hugging Face have. A sample is a pair
    (x, target), or a dictionary with `columns`. x is a tensor, a NumPy array or a PIL image. An 8-bit PIL image becomes
    float32 in [0, 1]; scale uint8 tensors and arrays yourself.

    Args:
        train: samples to train on.
        validation: samples to select the best epoch by; or the share of `train` that is held out for that, in [0, 1),
            of each class alike, as `train` gives them, augmented. None trains on all, and the last epoch counts.
        test: samples for the end; None if there are none.
        static: True for images [C, H, W] or features [F], shown at every time step; False for sequences [T, ...].
        columns: keys of x and of the target, where samples are dictionaries: ("image", "label").
        classes: number of classes; None takes the largest label of `train` plus one. Targets that are not whole numbers
            have no classes.
        pad: take sequences of several lengths, `steps` of the training at most: zeros are added at the end, up to the
            longest of a batch. The added steps do not count in the loss and in the prediction, see `sltt.Padded`;
            normalisation and firing rates see them.
        by_length: train on batches of sequences of similar length, which have few added steps. Each sample is read once
            for its length.
        per_step: targets are sequences [T, ...], one target for each time step.

    Raises ValueError for data sets or samples of another form, which says what to do.
    """
    static, pad, by_length = flag("static", static), flag("pad", pad), flag("by_length", by_length)
    if pad and static:
        raise ValueError("pad=True adds time steps to sequences: set static=False, or leave pad out")
    if by_length and not pad:
        raise ValueError("by_length=True is for sequences of several lengths, which pad=True takes: set both")
    share = 0.0
    if isinstance(validation, float | int):
        share, validation = number("validation", validation, least=0, below=1), None
    classes = None if classes is None else whole_number("classes", classes, least=1)
    form = {"static": static, "pad": pad, "per_step": flag("per_step", per_step)}
    datasets = {"train": train, "validation": validation, "test": test}
    return _OwnData(datasets, form, share, columns, classes, by_length)


class _OwnData(Data):
    """Data sets by name, as `from_datasets` explains them; `form` are fields of the splits."""

    def __init__(
        self,
        datasets: Mapping[str, Any],
        form: dict[str, Any],
        validation: float = 0.0,
        columns: tuple[str, str] | None = None,
        classes: int | None = None,
        by_length: bool = False,
    ):
        super().__init__(validation)
        self.datasets = {name: dataset for name, dataset in datasets.items() if dataset is not None or name == "train"}
        for name, dataset in self.datasets.items():
            _check_dataset(name, dataset, columns)
        self.form, self.columns, self.classes, self.by_length = form, columns, classes, by_length
        self.collates: Mapping[str, Collate] | None = form.get("collates")

    def __str__(self) -> str:
        train = self.datasets["train"]
        return type(getattr(train, "dataset", train)).__name__  # behind a Subset

    def load(self, steps: int) -> Splits:
        samples = {name: self._samples(name, dataset, steps) for name, dataset in self.datasets.items()}
        labels = self._labels(samples["train"])
        kept, held = hold_out(labels or [0] * len(samples["train"]), self.validation)
        parts: dict[str, Any] = {"validation": None, "test": None, **samples}
        if held:
            parts |= {"train": Subset(samples["train"], kept), "validation": Subset(samples["train"], held)}
        lengths = [len(samples["train"][i][0]) for i in kept] if self.by_length else None
        split = fingerprint(labels or [], kept, held, [len(dataset) for dataset in samples.values()])
        return Splits(**parts, **self.form, classes=self._count(labels), fingerprint=split, lengths=lengths)

    def _samples(self, name: str, dataset: Any, steps: int) -> Any:
        if self.collates:
            return dataset
        checked = _Samples(name, dataset, self.columns, self.form["static"], steps if self.form["pad"] else None)
        checked[0]  # a mistake shows here, and not in the middle of a training
        return checked

    def _labels(self, samples: Any) -> list[int] | None:
        """Return the class of each training sample; None where targets are no classes."""
        if self.form.get("per_step") or not _is_class(self._target(samples, 0)):
            return None
        labels = find_labels(samples.dataset if isinstance(samples, _Samples) else samples, self.columns)
        last, told = len(samples) - 1, labels or ()
        if len(told) == last + 1 and all(told[i] == self._target(samples, i) for i in (0, last // 2, last)):
            return [int(y) for y in told]
        return [int(self._target(samples, i)) for i in range(len(samples))]

    def _target(self, samples: Any, i: int) -> Any:
        """Return the target of a sample, as a batch has it."""
        return self.collates["train"]([samples[i]])[1][0] if self.collates else samples[i][1]

    def _count(self, labels: list[int] | None) -> int | None:
        """Return the number of classes; raise ValueError where labels are not 0 … classes − 1."""
        if labels is None:
            return self.classes
        least, most = min(labels), max(labels)
        if least < 0 or (self.classes is not None and most >= self.classes):
            last = "" if self.classes is None else f" … {self.classes - 1}"
            raise ValueError(f"labels of train must be class indices 0{last}, got {least} … {most}")
        if least > 0 and self.classes is None:
            remedy = f"subtract {least}, or say classes={most + 1}"
            raise ValueError(f"labels of train are {least} … {most}, and class indices begin at 0: {remedy}")
        return self.classes or most + 1


class _Samples(Dataset[Any]):
    """The samples of a data set as pairs of a tensor and a target; sequences of `most` steps, if that is given."""

    def __init__(self, name: str, dataset: Any, columns: tuple[str, str] | None, static: bool, most: int | None):
        self.name, self.dataset, self.columns, self.static, self.most = name, dataset, columns, static, most

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        try:
            sample = self.dataset[index]
        except Exception as error:
            error.add_note(f"while reading {self.name}[{index}]")
            raise
        x, target = _pair(f"{self.name}[{index}]", sample, self.columns)
        x = _tensor(f"{self.name}[{index}]", x)
        if x.ndim < (1 if self.static else 2):
            form = "images [C, H, W] or features [F]" if self.static else "sequences [T, ...], such as x.unsqueeze(-1)"
            raise ValueError(f"{self.name}[{index}]: expected {form}, got shape {list(x.shape)}")
        if self.most is not None and len(x) > self.most:
            remedy = f"set steps={len(x)} or more, or cut it"
            raise ValueError(f"{self.name}[{index}] has {len(x)} time steps, more than steps={self.most}: {remedy}")
        return x, _target(target)


def _pair(name: str, sample: Any, columns: tuple[str, str] | None) -> tuple[Any, Any]:
    """Return x and the target of a sample."""
    if isinstance(sample, Mapping):
        keys = ", ".join(map(str, sample))
        if columns is None:
            raise ValueError(f"{name} is a dictionary with the keys {keys}: say columns=(key of x, key of the target)")
        if missing := [key for key in columns if key not in sample]:
            raise ValueError(f"{name} has no {missing[0]!r} of columns; its keys are {keys}")
        return sample[columns[0]], sample[columns[1]]
    if not isinstance(sample, tuple | list) or len(sample) != 2:
        got = type(sample).__name__ + (f" of {len(sample)}" if isinstance(sample, tuple | list) else "")
        raise ValueError(f"{name}: expected a pair (x, target), got a {got}; two tensors make a TensorDataset(x, y)")
    return sample[0], sample[1]


def _tensor(name: str, x: Any) -> Tensor:
    """Return a sample as a tensor; images in [0, 1], and NumPy's float64 as float32."""
    if hasattr(x, "getbands"):  # a PIL image
        from torchvision.transforms.functional import to_tensor

        image = to_tensor(x.convert("RGB") if x.mode in ("P", "PA") else x)  # colours, not indices of a palette
        if not image.is_floating_point():
            raise ValueError(f"{name} is an image of mode {x.mode} and of unknown range: make it an array of floats")
        return image
    try:
        tensor = x if isinstance(x, Tensor) else _single(torch.as_tensor(np.asarray(x)))
    except (TypeError, ValueError) as error:
        got = type(x).__name__
        raise ValueError(f"{name}: expected a tensor, a NumPy array or a PIL image, got a {got}: convert it") from error
    if tensor.dtype == torch.uint8:
        scaled = "x.float() / 255" if isinstance(x, Tensor) else 'x.astype("float32") / 255'
        raise ValueError(f"{name} has whole numbers from 0 to 255, which layers do not take: {scaled}")
    return tensor


def _target(target: Any) -> Any:
    """Return a target for a batch: a class index as an int, others as a tensor."""
    if _is_class(target):
        return int(target)
    try:
        tensor = target if isinstance(target, Tensor) else _single(torch.as_tensor(target))
        return tensor if tensor.ndim else tensor.unsqueeze(0)  # [B, 1] as the outputs of a network, not [B]
    except (TypeError, ValueError, RuntimeError) as error:
        remedy = "map names to 0 … C − 1"
        raise ValueError(f"expected a class index or numbers as target, got {target!r}: {remedy}") from error


def _single(x: Tensor) -> Tensor:
    """NumPy's float64 as float32, the type of the weights."""
    return x.float() if x.dtype == torch.float64 else x


def _is_class(target: Any) -> bool:
    if isinstance(target, Tensor | np.ndarray):
        return target.ndim == 0 and not (torch.as_tensor(target).is_floating_point())
    return isinstance(target, int | np.integer | np.bool_)


def find_labels(dataset: Any, columns: tuple[str, str] | None) -> Sequence[Any] | None:
    """Return all labels of a data set that keeps them as a list: nothing else of its samples is loaded."""
    if isinstance(dataset, Subset):
        labels = find_labels(dataset.dataset, columns)
        return labels if labels is None else [labels[i] for i in dataset.indices]
    if isinstance(dataset, Mapped):
        return find_labels(dataset.samples, columns)
    if columns and hasattr(dataset, "column_names"):  # of Hugging Face
        return list(dataset[columns[1]])
    if isinstance(dataset, TensorDataset):
        return dataset.tensors[-1].tolist()
    if getattr(dataset, "target_transform", None) is None and hasattr(dataset, "targets"):  # of torchvision
        return list(dataset.targets)
    if isinstance(dataset, _Samples) and isinstance(dataset.dataset, TensorDataset):  # others may change a target
        return find_labels(dataset.dataset, None)
    return None


def _check_dataset(name: str, dataset: Any, columns: Any) -> None:
    if isinstance(dataset, Mapping):
        keys = ", ".join(map(repr, dataset))
        raise ValueError(f"{name} is a dictionary of data sets: choose one of {keys}, as in from_datasets(found[…])")
    if isinstance(dataset, DataLoader):
        raise ValueError(f"{name} is a loader: pass its data set, {name}.dataset; or the loaders to sltt.fit")
    try:
        size = len(dataset)
        dataset.__getitem__  # noqa: B018
    except (TypeError, AttributeError):
        remedy = "an iterable data set has no order to resume: load its samples into a list"
        got = type(dataset).__name__
        raise ValueError(f"{name} must have len({name}) and {name}[index], got a {got}; {remedy}") from None
    if not size:
        raise ValueError(f"there are no samples in {name}: expected one or more")
