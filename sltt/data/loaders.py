"""Data loaders of your own as the data of a training."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, Subset

from sltt.data.base import Data
from sltt.data.own import _OwnData

Loaders = Sequence[DataLoader[Any] | None]
BATCH_SIZE = 128  # where neither the call nor a loader says one


def batch_size_of(data: Any, given: int | None) -> int:
    """Return the batch size that is given; None is that of the training loader, or BATCH_SIZE for other data."""
    if given is not None:
        return given
    train = data[0] if isinstance(data, tuple | list) and data else data
    size = train.batch_size if isinstance(train, DataLoader) else None
    return BATCH_SIZE if size is None else size


def as_data(data: Any, batch_size: int) -> Data:
    """Return a data set of `sltt.data`, or make one of loaders (train, validation, test); else raise ValueError."""
    if isinstance(data, DataLoader):
        data = (data,)
    if isinstance(data, tuple | list) and data and all(isinstance(loader, DataLoader | None) for loader in data):
        return from_loaders(data, batch_size)
    if not isinstance(data, Data):
        got = data.__name__ + ", a class: call it" if isinstance(data, type) else type(data).__name__
        remedy = "data sets of your own: sltt.data.from_datasets(train, static=…)"
        raise ValueError(f"data must be a Data, or loaders (train, validation), got {got}; {remedy}")
    return data


def from_loaders(loaders: Loaders, batch_size: int) -> Data:
    """Return the data of a training from its loaders: for training, validation and test; the last two may be missing.

    The loaders' data sets, `collate_fn` and batch size count. The training orders, loads and shares out the samples
    itself, so that a run resumes exactly.

    Raises:
        ValueError: a batch size other than the training's, an order of their own, or time that does not come first.
    """
    named = zip(("train", "validation", "test"), loaders, strict=False)
    parts = {name: loader for name, loader in named if loader is not None}
    if "train" not in parts:
        raise ValueError("expected a loader of training samples first, got None")
    for name, loader in parts.items():
        _check_loader(name, loader, batch_size)
    sets: dict[str, Any] = {name: loader.dataset for name, loader in parts.items()}
    return _OwnData(
        {name: Subset(part, range(len(part))) for name, part in sets.items()},  # two splits may read the same data set
        {"static": _is_static(parts["train"]), "collates": {name: loader.collate_fn for name, loader in parts.items()}},
    )


def _check_loader(name: str, loader: DataLoader[Any], batch_size: int) -> None:
    remedy = f"sltt.data.from_datasets({name}, static=…) takes the data set without a loader"
    order: Any = loader.sampler
    plain = isinstance(order, RandomSampler | SequentialSampler) and len(order) == len(order.data_source)
    if not plain or getattr(order, "replacement", False) or loader.batch_size is None:
        raise ValueError(f"the loader of {name} has an order of its own, which no resumed run could repeat: {remedy}")
    if name == "train" and (size := loader.batch_size) != batch_size:
        raise ValueError(f"the loader has batch_size={size}, the training {batch_size}: say batch_size={size}")


def _is_static(loader: DataLoader[Any]) -> bool:
    """Return whether batches are images [B, ...], not sequences [T, B, ...]. Two sizes of a batch tell."""
    dataset: Any = loader.dataset
    samples = [dataset[i % len(dataset)] for i in range(3)]
    two: Any = loader.collate_fn(samples[:2])
    three: Any = loader.collate_fn(samples)
    if not isinstance(two, tuple | list) or len(two) != 2 or not isinstance(two[0], Tensor):
        remedy = "sltt.data.from_datasets(…, columns=…) takes dictionaries"
        raise ValueError(f"expected batches (x, target) of tensors, got {type(two).__name__}; {remedy}")
    changed = [i for i, sizes in enumerate(zip(two[0].shape, three[0].shape, strict=False)) if sizes == (2, 3)]
    if changed[:1] == [1]:
        return False
    if changed[:1] == [0] and two[0].ndim in (2, 4):
        return True
    problem = f"the loader makes batches {list(three[0].shape)} of 3 images, or sequences whose time comes second"
    raise ValueError(f"{problem}. Say which: sltt.data.from_datasets(loader.dataset, static=True or False)")
