"""Delayed recall, a synthetic task that cannot be learned without the gradient through time; nothing to download.

Shapes: N samples, T time steps, C classes.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, Subset

from sltt.checks import number, whole_number
from sltt.data.base import Data, Splits

TEST_SAMPLES = 2000


class Recall(Data):
    """A cue in noise, a silent delay, then a probe; the label takes both: sequences [T, channels].

        x[0] = (P[a] + noise ξ) / √(1 + noise²)     the cue a in 0 … C − 1, with ξ normal
        x[t] = 0                                    for 0 < t ≤ delay
        x[t] = Q[b] / m                             the probe b in 0 … C − 1, in each of the m steps that remain
        y = (a + b) mod C

    The patterns P and Q are normal numbers, C of each, and all pairs (a, b) are equally frequent. So the weights that
    have to find P in the noise learn it only through the state that the neurons kept.

    With several cues, a pattern in noise stands in each of the first n steps. Each step then has one more value, the
    mark: √channels at one random cue, 0 elsewhere. The marked cue is a: one layer of neurons has to tell it, and a
    second to remember it.

    Args:
        validation: share of the training samples held out to select the best epoch; 0 trains on everything.
        classes: C, at least 2; chance is 1/C.
        delay: silent time steps between cue and probe.
        noise: standard deviation of the cue's noise, where that of its pattern is 1.
        channels: values in a time step. The best decision about the cue improves with √channels / noise. Along one
            random direction the signal is 1 / noise, for any number of channels.
        samples: training samples, those held out included, at least C²; the test samples are 2,000 more.
        seed: of patterns, noise and order. The same seed gives the same data.
        cues: n, number of cues, at least 1; with 2 or more a sequence is [T, channels + 1].

    Raises:
        ValueError: an argument out of range; when loaded, fewer time steps than cue, delay and one step of the probe.
    """

    def __init__(
        self,
        validation: float = 0.1,
        classes: int = 4,
        delay: int = 7,
        noise: float = 2.0,
        channels: int = 200,
        samples: int = 8000,
        seed: int = 0,
        cues: int = 1,
    ):
        super().__init__(validation)
        self.classes = whole_number("classes", classes, least=2)
        self.delay = whole_number("delay", delay, least=0)
        self.noise = number("noise", noise, least=0)
        self.channels = whole_number("channels", channels, least=1)
        self.samples = whole_number("samples", samples, least=self.classes**2, remedy="each pair of classes takes one")
        self.seed = whole_number("seed", seed)
        self.cues = whole_number("cues", cues, least=1)

    def load(self, steps: int) -> Splits:
        least = self.cues + self.delay + 1
        if steps < least:
            parts = f"cues ({self.cues}), delay ({self.delay}) and a step of the probe"
            raise ValueError(f"{parts} take {least} time steps or more, got {steps}: use more steps or a shorter delay")
        generator = torch.Generator().manual_seed(self.seed)
        patterns, probes = torch.randn(2, self.classes, self.channels, generator=generator)
        count = self.samples + TEST_SAMPLES
        train = _pairs(self.samples, self.classes, generator)
        a, b = torch.cat([train, _pairs(TEST_SAMPLES, self.classes, generator)]).T
        noise = self.noise * torch.randn(count, self.cues, self.channels, generator=generator)
        shown = torch.randint(self.classes, (count, self.cues), generator=generator)
        marked = torch.randint(self.cues, (count, 1), generator=generator)
        shown = shown.scatter(1, marked, a[:, None])
        cues = (patterns[shown] + noise) / (1 + self.noise**2) ** 0.5
        if self.cues > 1:
            marks = torch.zeros(count, self.cues, 1).scatter(1, marked[..., None], self.channels**0.5)
            cues, probes = torch.cat([cues, marks], dim=2), F.pad(probes, (0, 1))
        samples = _Sequences(cues, probes, b, (a + b) % self.classes, self.cues + self.delay, steps)
        labels = samples.labels.tolist()
        test = Subset(samples, range(self.samples, count))
        identity = [self.classes, self.delay, self.noise, self.channels, self.seed, self.cues, *labels]
        return self.split(samples, labels[: self.samples], test, identity, static=False, classes=self.classes)


class _Sequences(Dataset[Any]):
    """Sequences [T, channels], put together when they are read: most of their values are 0 or repeated."""

    def __init__(self, cues: Tensor, probes: Tensor, probe: Tensor, labels: Tensor, start: int, steps: int):
        self.cues, self.probes, self.probe, self.labels = cues, probes, probe, labels
        self.start, self.steps = start, steps  # start of the probe

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        x = torch.zeros(self.steps, self.cues.shape[2])
        x[: self.cues.shape[1]] = self.cues[index]
        x[self.start :] = self.probes[self.probe[index]] / (self.steps - self.start)
        return x, int(self.labels[index])


def _pairs(count: int, classes: int, generator: torch.Generator) -> Tensor:
    """Cues and probes [count, 2] in random order, each pair as often as every other, to within one."""
    pair = torch.randperm(count, generator=generator) % classes**2
    return torch.stack([pair // classes, pair % classes], dim=1)
