"""Few-shot class-incremental learning: classes come in sessions, and a new one is known from a few samples.

A network is trained on the base classes and then frozen. A class is its prototype, the mean embedding of its samples; a
sample belongs to the seen class whose prototype has the largest cosine with its embedding. Classes are numbered in the
order in which they come.

Source: the protocol of Tao et al., CVPR 2020 (arXiv 2004.10956), with prototypes as in Zhang et al., CVPR 2021 (arXiv
2104.03047). Shapes: N samples, D features, C classes, B samples of a batch, T time steps.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sltt.checks import whole_number
from sltt.rules import unroll
from sltt.sequence.hooks import keep_hooks


@dataclass(frozen=True)
class FewShot:
    """Results after the sessions; accuracies of test samples.

    Attributes:
        accuracies: of all classes seen so far, after the base training and after each session.
        base: mean over the base classes of the accuracy of a class, after the last session.
        new: the same of the classes that came later.
    """

    accuracies: list[float]
    base: float
    new: float

    @property
    def harmonic(self) -> float:
        """Return 2 base new / (base + new)."""
        return 2 * self.base * self.new / (self.base + self.new) if self.base + self.new else 0.0

    @property
    def last(self) -> float:
        """Return the accuracy after the last session."""
        return self.accuracies[-1]

    @property
    def average(self) -> float:
        """Return the mean over the base training and the sessions."""
        return sum(self.accuracies) / len(self.accuracies)


def session_sizes(classes: int, base: int, way: int) -> list[int]:
    """Return the number of classes that come at once: `base`, then `way` in each session, until all have come.

    Raises ValueError for more classes than there are, and where some are left over.
    """
    whole_number("base", base, least=2)
    whole_number("way", way, least=1)
    rest = classes - base
    if rest < way:
        raise ValueError(f"{base} base classes and {way} new ones are more than {classes}: choose a smaller base")
    if rest % way:
        raise ValueError(f"{rest} new classes do not part into sessions of {way}: choose another way, or fewer classes")
    return [base, *[way] * (rest // way)]


def draw_shots(labels: Sequence[int], classes: Sequence[int], shot: int, seed: int) -> list[int]:
    """Return indices of `shot` samples of each class, drawn by `seed`; raise ValueError if a class has fewer."""
    whole_number("shot", shot, least=1)
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for number in classes:
        indices = [i for i, label in enumerate(labels) if label == number]
        if len(indices) < shot:
            raise ValueError(f"class {number} has {len(indices)} training samples, fewer than shot={shot}")
        drawn += [indices[i] for i in torch.randperm(len(indices), generator=generator)[:shot].tolist()]
    return drawn


def prototypes(embeddings: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Return the mean embedding of each class [C, D], of embeddings [N, D] and labels [N]; each class has a sample."""
    sums = embeddings.new_zeros(classes, embeddings.shape[1]).index_add_(0, labels, embeddings)
    return sums / labels.bincount(minlength=classes).unsqueeze(1)


def incremental(centres: Tensor, embeddings: Tensor, labels: Tensor, sizes: Sequence[int]) -> FewShot:
    """Classify test samples after each session, by the prototypes [C, D] of the classes seen so far.

    ŷ = argmax_c ⟨e, p_c⟩ / (|e| |p_c|)
    """
    cosine = F.normalize(embeddings, dim=1) @ F.normalize(centres, dim=1).T
    accuracies, right = [], torch.empty(0)
    for seen in itertools.accumulate(sizes):
        of_seen = labels < seen
        right = (cosine[of_seen, :seen].argmax(1) == labels[of_seen]).double()
        accuracies.append(float(right.mean()))
    of_class = prototypes(right.unsqueeze(1), labels[labels < sum(sizes)], sum(sizes))
    return FewShot(accuracies, float(of_class[: sizes[0]].mean()), float(of_class[sizes[0] :].mean()))


def chance(sizes: Sequence[int]) -> FewShot:
    """Return the accuracy of guessing: 1 / C of the classes seen."""
    accuracies = [1 / seen for seen in itertools.accumulate(sizes)]
    return FewShot(accuracies, accuracies[-1], accuracies[-1])


def embeddings(model: nn.Module, x: Tensor, *, steps: int | None = None) -> Tensor:
    """Return the mean over time of the inputs [B, D] of the classifier, the last linear layer that runs.

    Raises ValueError for a model without a linear layer.
    """
    sums: dict[nn.Module, Tensor] = {}
    calls: dict[nn.Module, int] = {}

    def keep(module: nn.Module, inputs: Any) -> None:
        read = inputs[0].detach().flatten(1).float()
        sums[module] = sums[module] + read if module in sums else read
        calls[module] = calls.get(module, 0) + 1

    with keep_hooks(*(m.register_forward_pre_hook(keep) for m in model.modules() if isinstance(m, nn.Linear))):
        unroll(model, x, steps=steps)
    if not sums:
        raise ValueError(f"{type(model).__name__} has no nn.Linear that classifies: embeddings are what it reads")
    last = list(sums)[-1]
    return sums[last] / calls[last]
