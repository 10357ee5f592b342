"""What is random in the data comes with the sample and the batch, wherever a run stops, whoever loads them."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import sltt
from sltt.data import Splits
from sltt.training.batches import EpochSampler, eval_loader, train_loader
from tests.training.blobs import noting


def drawn():
    """A number of each of three generators."""
    return torch.tensor([torch.rand(()).item(), np.random.rand(), random.random()])


class Noise(torch.utils.data.Dataset):
    """Twelve samples that are drawn."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        if index >= len(self):
            raise IndexError(index)
        return drawn(), index % 3


class Mixing(Splits):
    """A batch with noise, which comes while it is made."""

    def collate(self, samples):
        x, y = super().collate(samples)
        return x + torch.rand(1) + np.random.rand() + random.random(), y


SPLITS = Mixing(Noise(), Noise(), Noise(), True, 3, "noise")


def seed():
    random.seed(5), np.random.seed(5), torch.manual_seed(5)


def batches(workers=0, start=0):
    sampler = EpochSampler(12, seed=0)
    sampler.set_epoch(3, start)
    return [x for x, _ in train_loader(SPLITS, 4, sampler, workers)]


def test_a_batch_is_the_same_wherever_an_epoch_is_continued_and_whoever_loads_it():
    whole = batches()
    assert (whole[0] != whole[1]).all()
    seed()
    for found, expected in ((batches(start=4), whole[1:]), (batches(workers=2), whole)):
        assert len(found) == len(expected)
        assert all(map(torch.equal, found, expected))


def test_an_evaluation_draws_the_same_each_time_and_leaves_the_generators_alone():
    seed()
    before = drawn()
    seed()
    first, second = ([x for x, _ in eval_loader(SPLITS.validation, SPLITS, 4, 0)] for _ in range(2))
    assert all(map(torch.equal, first, second))
    assert torch.equal(before, drawn())


class Drawing(torch.utils.data.Dataset):
    """Samples from a generator of its own."""

    def __init__(self):
        self.generator, self.read = torch.Generator(), []

    def __len__(self):
        return 13

    def __getitem__(self, index):
        self.read.append(index)
        return torch.rand(4, 8, generator=self.generator), index % 3


def test_all_checks_before_a_training_share_one_reading_of_its_samples(tmp_path):
    class Data(sltt.data.Data):
        def load(self, steps):
            return Splits(drawing, None, None, True, 3, "drawn")

    def see(batch):
        seen.append(list(drawing.read))

    drawing, seen = Drawing(), []
    model = nn.Sequential(nn.Flatten(), nn.Linear(32, 8), nn.BatchNorm1d(8), sltt.LIF(), nn.Linear(8, 3))
    with pytest.raises(ValueError, match="the last of 13 training samples is a batch by itself"):
        sltt.fit(model, Data(), batch_size=4, device="cpu", run=tmp_path / "run")
    assert drawing.read == [0, 1, 2, 3, 4]
    drawing.read.clear()
    sltt.fit(model, Data(), noting(see), steps=4, epochs=1, batch_size=7, device="cpu", run=tmp_path / "run")
    assert seen[0][:5] == [0, 1, 2, 3, 4]
    assert len(seen[0]) == 5 + 7


def test_each_loader_makes_its_batches_by_its_own_function(tmp_path):
    made = []

    def collate(name):
        def make(samples):
            made.append(name)
            return torch.stack([x for x, _ in samples]), torch.tensor([y for _, y in samples])

        return make

    loaders = [DataLoader(Noise(), 4, collate_fn=collate(name)) for name in ("train", "validation", "test")]
    run = {"device": "cpu", "run": tmp_path / "run"}
    model = sltt.models.MLP([3, 8, 3])
    sltt.fit(model, loaders, steps=2, epochs=1, batch_size=4, **run)
    assert {"train", "validation"} <= set(made)
    made.clear()
    sltt.evaluate(model, loaders, steps=2, batch_size=4, device="cpu")
    assert "test" in made
