"""Small data sets, a network and a training for the tests of this folder."""

import signal
from dataclasses import replace
from functools import partial

import torch
from torch import nn

import sltt
from sltt.data import Data, Splits
from sltt.training.checkpoints import load_checkpoint
from sltt.training.console import Console


class Blobs(Data):
    """Three clouds of points [4], static; 60 to train on, 12 held out, 12 to test."""

    def __init__(self, validation=0.2, static=True, spoil=None):
        super().__init__(validation)
        self.static = static
        self.spoil = spoil

    def load(self, steps):
        generator = torch.Generator().manual_seed(0)
        centres = 3 * torch.randn(3, 4, generator=generator)

        def samples(count):
            labels = torch.arange(count) % 3
            x = centres[labels] + 0.3 * torch.randn(count, 4, generator=generator)
            if self.spoil:
                self.spoil(x, labels)
            return [(v if self.static else v.expand(steps, 4), int(label)) for v, label in zip(x, labels, strict=True)]

        validation = samples(12) if self.validation else None
        return Splits(samples(60), validation, samples(12), self.static, 3, "blobs")


class Images(Data):
    """Three noisy images [2, 8, 8]; 60 to train on, 12 held out."""

    def load(self, steps):
        generator = torch.Generator().manual_seed(0)
        centres = torch.randn(3, 2, 8, 8, generator=generator)

        def samples(count):
            return [(centres[i % 3] + torch.randn(2, 8, 8, generator=generator), i % 3) for i in range(count)]

        return Splits(samples(60), samples(12), samples(12), True, 3, "images")


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), sltt.LIF(), sltt.Dropout(0.1), nn.Linear(16, 3))


QUIET = Console(quiet=True)
ADAM = partial(torch.optim.AdamW, lr=0.02)


def train(run, model=None, data=None, **kwargs):
    model = model if model is not None else network()
    settings = {"optimizer": ADAM, "epochs": 4, "batch_size": 16, "report": QUIET, "device": "cpu", **kwargs}
    return model, sltt.fit(model, data or Blobs(), run=run, **settings)


def weights(path):
    return load_checkpoint(path)["model"]


def averaged(path):
    return load_checkpoint(path)["averaged"]


def rows(result):
    """The history without what is measured by a clock."""
    return [{k: v for k, v in row.items() if k not in ("seconds", "peak_memory")} for row in result.history]


def keep(made, **settings):
    """SGD as `fit` takes it, which keeps the optimizer that it makes in the list `made`."""

    def optimizer(parameters):
        made.append(torch.optim.SGD(parameters, **settings))
        return made[-1]

    return optimizer


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def stop_at(batch, k=2):
    """SLTT-K that presses Ctrl-C in its nth batch."""
    left = [batch]

    def before(batch):
        left[0] -= 1
        if left[0] == 0:
            signal.raise_signal(signal.SIGINT)

    return noting(before, k=k)


def noting(before=lambda batch: None, after=lambda batch: None, k=None):
    """SLTT that calls a function with each batch before it runs, and another one afterwards."""
    rule = sltt.SLTT(k=k)
    plain = rule.run

    def run(batch):
        before(batch)
        output = plain(batch)
        after(batch)
        return output

    rule.run = run
    return rule


class Ends(torch.utils.data.Dataset):
    """Samples that raise at the given place."""

    def __init__(self, samples, error, place=20):
        self.samples, self.error, self.place = samples, error, place

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        if index == self.place:
            raise self.error
        return self.samples[index]


def ending(error, split="train"):
    data = Blobs()
    splits = data.load(4)
    samples = getattr(splits, split)
    place = len(samples) - 1
    data.load = lambda steps: replace(splits, **{split: Ends(samples, error, place)})
    return data
