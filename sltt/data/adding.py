"""The adding problem, binary: count the ones among marked bits; nothing to download.

Shapes: N samples, T time steps.
"""

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from sltt.checks import whole_number
from sltt.data.base import Data, Splits

TEST_SAMPLES = 2000


class Adding(Data):
    """Random bits, some of them marked; the label counts the ones among the marked: sequences [T, 2].

        x[t] = (bit[t], mark[t])     bits and marks in {0, 1}, M marks at random steps
        y = Σ_t bit[t] mark[t]       in 0 … M, so M + 1 classes, equally frequent

    A bit counts only together with the mark of its own step. A layer that adds up its input over time loses which bit
    was marked: a hidden layer has to tell, step by step, before another remembers.

    Args:
        validation: share of the training samples held out to select the best epoch; 0 trains on everything.
        split_seed: which training samples are held out.
        marked: M, at least 1. NeuroSeqBench has 9 in T = 100.
        samples: training samples, those held out included; the test samples are 2,000 more.
        seed: of bits and marks. The same seed gives the same data.

    Raises:
        ValueError: an argument out of range; when loaded, fewer time steps than marks.

    Source: Hochreiter & Schmidhuber 1997; with bits and classes, Ma et al. 2025 (arXiv 2502.09449).
    """

    def __init__(
        self, validation: float = 0.1, split_seed: int = 0, marked: int = 9, samples: int = 20000, seed: int = 0
    ):
        super().__init__(validation, split_seed)
        self.marked = whole_number("marked", marked, least=1)
        self.samples = whole_number("samples", samples, least=self.marked + 1, remedy="give one of each class or more")
        self.seed = whole_number("seed", seed)

    def load(self, steps: int) -> Splits:
        if steps < self.marked:
            raise ValueError(f"{self.marked} marks take as many time steps or more, got steps={steps}: use more steps")
        generator = torch.Generator().manual_seed(self.seed)
        train, test = (self._draw(count, steps, generator) for count in (self.samples, TEST_SAMPLES))
        labels, identity = train[1].tolist(), (self.marked, self.seed)
        samples = TensorDataset(*train)
        return self.split_sequences(samples, labels, TensorDataset(*test), self.marked + 1, *identity, *labels)

    def _draw(self, count: int, steps: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Sequences [N, T, 2] and labels [N]."""
        labels = torch.randperm(count, generator=generator) % (self.marked + 1)
        rank = torch.rand(count, steps, generator=generator).argsort(1)  # of each step, in a random order
        marks = rank < self.marked
        bits = torch.where(marks, rank < labels[:, None], torch.rand(count, steps, generator=generator) < 0.5)
        return torch.stack([bits, marks], dim=2).float(), labels
