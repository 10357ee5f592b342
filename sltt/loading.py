"""Batches in an order, and with augmentations, that depend on the seed and the epoch only.

Whatever the number of workers is, and wherever in an epoch a run stopped: a sample's random numbers come with its
index.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from sltt.data import Splits

Key = tuple[int, int]


class EpochSampler(Sampler[Key]):
    """Yields (index, seed) for every sample of an epoch, shuffled; `start` leaves out the samples already seen.

    Args:
        length: number of samples.
        seed: seed of the run.
    """

    def __init__(self, length: int, seed: int):
        self.length = length
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch, and how many of its samples to leave out."""
        self.epoch = epoch
        self.start = start

    def __len__(self) -> int:
        return self.length - self.start

    def __iter__(self) -> Iterator[Key]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        order = torch.randperm(self.length, generator=generator).tolist()
        seeds = torch.randint(2**62, (self.length,), generator=generator).tolist()
        yield from zip(order[self.start :], seeds[self.start :], strict=True)


class _Seeded(Dataset[Any]):
    """Takes (index, seed) and reads the sample under that seed, leaving the global generator as it was."""

    def __init__(self, data: Dataset[Any]):
        self.data = data

    def __getitem__(self, key: Key) -> Any:
        index, seed = key
        state = torch.default_generator.get_state()
        torch.default_generator.manual_seed(seed)
        try:
            return self.data[index]
        finally:
            torch.default_generator.set_state(state)


def train_loader(
    splits: Splits, batch_size: int, sampler: EpochSampler, workers: int, pin: bool = False
) -> DataLoader[Any]:
    """Training batches in the sampler's order; `pin` their memory to copy them to a GPU."""
    return _loader(_Seeded(splits.train), splits, batch_size, workers, sampler, pin)


def eval_loader(dataset: Dataset[Any], splits: Splits, batch_size: int, workers: int) -> DataLoader[Any]:
    """Every sample of a validation or test set once, in order."""
    return _loader(dataset, splits, batch_size, workers, None, False)


def _loader(
    dataset: Dataset[Any], splits: Splits, batch_size: int, workers: int, sampler: EpochSampler | None, pin: bool
) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=splits.collate,
        pin_memory=pin,
        persistent_workers=workers > 0,
        # a generator of its own: the loader draws from it, and so leaves the run's random numbers alone
        generator=torch.Generator().manual_seed(0),
    )
