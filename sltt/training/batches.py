"""Batches in an order, and with augmentations, that depend on the seed and the epoch only.

Whatever the number of workers and of processes is, and wherever in an epoch a run stopped: a sample's random numbers
come with its index.
"""

import hashlib
import random
import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from sltt._torch import end_workers, keep_generators
from sltt.checks import whole_number
from sltt.data import Splits
from sltt.data.base import Collate
from sltt.rules import Output
from sltt.sequence.padding import Padded

POOL = 50  # batches that are sorted by length together


Key = tuple[int, int]  # of a sample: its place in the data, and the seed of its random numbers


class EpochSampler(Sampler[Key]):
    """Yields the keys of an epoch's samples, shuffled; by the `lengths` of their sequences, similar ones in a batch."""

    def __init__(self, length: int, seed: int, lengths: Sequence[int] | None = None, batch_size: int = 1):
        self.length, self.seed, self.lengths, self.batch_size = length, seed, lengths, batch_size
        self.set_epoch(0)

    @classmethod
    def of(cls, splits: Splits, seed: int, batch_size: int) -> "EpochSampler":
        """Make the sampler of a data set's training samples."""
        return cls(splits.sizes["train"], seed, splits.lengths, batch_size)

    def set_epoch(self, epoch: int, start: int = 0, stop: int | None = None) -> None:
        """Choose the epoch, how many of its samples are seen already, and after how many it ends; None is after all."""
        self.epoch = epoch
        self.stop = self.length if stop is None else min(stop, self.length)
        self.start = min(start, self.stop)

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[Key]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        order = torch.randperm(self.length, generator=generator).tolist()
        if self.lengths is not None:
            order = by_length(order, self.lengths, self.batch_size, generator)
        seeds = torch.randint(2**62, (self.length,), generator=generator).tolist()
        yield from zip(order[self.start : self.stop], seeds[self.start : self.stop], strict=True)


def by_length(order: list[int], lengths: Sequence[int], size: int, generator: torch.Generator) -> list[int]:
    """Return a random order in which batches of `size` have samples of similar length; those of the last batch are any.

    Each POOL batches in a row are sorted, so that an epoch has other batches than the one before.
    """
    whole = len(order) // size * size
    batches = []
    for start in range(0, whole, POOL * size):
        pool = sorted(order[start : min(start + POOL * size, whole)], key=lengths.__getitem__)
        batches += [pool[i : i + size] for i in range(0, len(pool), size)]
    shuffled = torch.randperm(len(batches), generator=generator).tolist()
    return [*chain.from_iterable(batches[i] for i in shuffled), *order[whole:]]


@contextmanager
def keep_all_generators() -> Iterator[None]:
    """Leave the global random generators as they were, those of all GPUs too."""
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count() * torch.cuda.is_initialized())]
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    try:
        with keep_generators(*devices):
            yield
    finally:
        if not devices:  # nothing was drawn before: they begin at the seed of the CPU
            torch.cuda.manual_seed_all(torch.initial_seed())
        if mps is not None:
            torch.mps.set_rng_state(mps)


def _seed_generators(seed: int) -> None:
    """Seed the global generators of the CPU; those of other devices would take longer than a sample."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


class _Seeded(Dataset[Any]):
    """Takes keys: reads, crops and mirrors each sample under its seed, and makes a batch under that of the first."""

    def __init__(self, data: Dataset[Any], collate: Collate, crop: int | None = None):
        self.data, self.collate, self.crop = data, collate, crop

    def __getitems__(self, keys: Sequence[Key]) -> Any:
        with keep_generators():  # once a batch: keeping takes longer than seeding
            samples = [self._read(key) for key in keys]
            _seed_generators(keys[0][1] + 1)
            return self.collate(samples)

    def _read(self, key: Key) -> Any:
        index, seed = key
        _seed_generators(seed)
        sample = self.data[index]
        return sample if self.crop is None else (random_crop(sample[0], self.crop), *sample[1:])


def random_crop(x: Tensor, size: int) -> Tensor:
    """Return a square of an image or of frames [..., H, W], at the same random place in all of them: [..., size, size].

    Raises ValueError if the sample is no image, or one that is smaller than `size`.
    """
    check_crop(x, size)
    top, left = (int(torch.randint(side - size + 1, ())) for side in x.shape[-2:])
    return x[..., top : top + size, left : left + size]


def check_crop(x: Tensor, size: int) -> None:
    """Raise ValueError for a sample that is no image, or one that is smaller than `size`."""
    if x.ndim < 3 or min(x.shape[-2:]) < size:
        raise ValueError(f"a phase crops {size} pixels out of samples [..., C, H, W], got one of shape {list(x.shape)}")


class Shares(BatchSampler):
    """The batches of a sampler's order, of all processes together, and of each what falls to the process `rank`.

    A batch with fewer than two samples for each process goes to all of them as a whole, and counts once (`share`): they
    cannot leave a batch out, and BatchNorm needs two.
    """

    def __init__(self, sampler: Iterable[Any], batch_size: int, rank: int = 0, processes: int = 1):
        super().__init__(sampler, batch_size, drop_last=False)
        self.rank, self.processes = rank, processes

    def __iter__(self) -> Iterator[list[Any]]:
        for batch in super().__iter__():
            yield batch if len(batch) < 2 * self.processes else batch[self.rank :: self.processes]


def share(samples: int, rank: int, processes: int) -> tuple[float, int]:
    """Return the weight in a batch's loss of the mean over a process's part, and how many samples are its own."""
    if samples < 2 * processes:
        return 1 / processes, samples if rank == 0 else 0
    own = len(range(rank, samples, processes))
    return own / samples, own


def count_parts(asked: int, size: int, processes: int) -> int:
    """Into how many parts a batch of `size` samples is cut, in all processes alike.

    A part has two samples at least, which BatchNorm needs.
    """
    smallest = size if size < 2 * processes else size // processes  # as `share` has it
    return max(1, min(asked, smallest // 2))


class Part(NamedTuple):
    """A part of a batch, and its weight in the loss of the batch."""

    x: Tensor
    y: Tensor | Padded
    weight: float


def cut(x: Tensor, y: Tensor | Padded, count: int, *, static: bool, per_step: bool) -> list[Part]:
    """Return a batch in so many parts: x [B, ...] or [T, B, ...], y [B, ...] or with `per_step` [T, B, ...]."""
    xs = x.tensor_split(count, dim=0 if static else 1)
    if isinstance(y, Padded):
        ys = y.split(count, per_step)
        weights = [part.steps / y.steps for part in ys]
    else:
        ys = y.tensor_split(count, dim=1 if per_step else 0)
        weights = [part.shape[0 if static else 1] / x.shape[0 if static else 1] for part in xs]
    return [Part(*part) for part in zip(xs, ys, weights, strict=True)]


def join_outputs(outs: Sequence[Output], parts: Sequence[Part]) -> Output:
    """Join a rule's results of the parts of a batch."""
    loss = torch.stack([out.loss * part.weight for out, part in zip(outs, parts, strict=True)]).sum()
    return Output(loss, torch.cat([out.logits for out in outs], dim=1))


def train_loader(
    splits: Splits, batch_size: int, sampler: EpochSampler, workers: int, crop: int | None = None, **here: Any
) -> DataLoader[Any]:
    """Training batches in the sampler's order; for `crop` see `Phase`, for `here` `Session.place`."""
    return _loader(_Seeded(splits.train, splits.collate, crop), sampler, batch_size, workers, **here)


def eval_loader(dataset: Any, splits: Splits, batch_size: int, workers: int, **here: Any) -> DataLoader[Any]:
    """Every sample of a data set once, in order; what is random is the same each time."""
    order = [(i, i) for i in range(len(dataset))]
    return _loader(_Seeded(dataset, splits.collate_of(dataset)), order, batch_size, workers, **here)


def _loader(
    samples: _Seeded,
    order: Iterable[Key],
    batch_size: int,
    workers: int,
    device: torch.device | None = None,
    rank: int = 0,
    processes: int = 1,
) -> DataLoader[Any]:
    """Batches in an order, or the share of each of a process, to be copied to the device."""
    cuda = device is not None and device.type == "cuda"
    return DataLoader(
        samples,
        batch_sampler=Shares(order, batch_size, rank, processes),
        num_workers=workers,
        collate_fn=tuple,  # of what the data set has made
        # memory to copy from while the GPU works; not what lies on it already
        pin_memory=cuda and samples.__getitems__([(0, 0)])[0].device.type == "cpu",
        persistent_workers=workers > 0,
        worker_init_fn=_outlive_sigterm,
        # a generator of its own: the loader draws from it, and so leaves the run's random numbers alone
        generator=torch.Generator().manual_seed(0),
    )


def whole_epoch(loader: DataLoader[Any]) -> Iterator[Any]:
    """Yield the batches of a loader; raise RuntimeError where they end early, as by a StopIteration of the data."""
    count = 0
    for batch in loader:
        yield batch
        count += 1
    if count < (expected := len(loader)):
        raise RuntimeError(f"the data ended after {count} of {expected} batches: does it raise StopIteration?")


@contextmanager
def finish_loaders(*loaders: DataLoader[Any] | None) -> Iterator[None]:
    """End the loaders' workers at the end of this block.

    After an exception, whose traceback keeps the loaders, Python would wait for the workers for ever: it ends them by
    SIGTERM, which they ignore.
    """
    try:
        yield
    finally:
        for loader in loaders:
            if loader is not None:
                end_workers(loader)


def _outlive_sigterm(worker: int) -> None:
    """Ignore SIGTERM: it is for the process that trains, which still needs batches to end in order."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def seed_everything(seed: int) -> None:
    """Seed every global random generator."""
    _seed_generators(whole_number("seed", seed, least=0, most=2**63 - 1))
    if torch.accelerator.is_available():
        torch.manual_seed(seed)  # of all devices: for each that is absent, it takes longer than a small layer


def seed_batch(*numbers: int) -> int:
    """Seed every global random generator by numbers such as seed, epoch and batch: no state needs saving; return it."""
    seed = int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:8]) >> 1
    seed_everything(seed)
    return seed
