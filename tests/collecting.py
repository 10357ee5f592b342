"""A metric as torchmetrics has them, which is not installed everywhere: it takes in batches and computes at the end."""

import torch
import torch.distributed as dist
from torch import nn


class MacroF1(nn.Module):
    """The mean over classes of F1, of all samples; that of batches is another number."""

    higher_is_better = True
    distributed_available_fn = staticmethod(dist.is_initialized)

    def __init__(self, classes=3, average="macro"):
        super().__init__()
        self.classes, self.average, self.kept = classes, average, False
        self.reset()

    def reset(self):
        self.counts = torch.zeros(3, self.classes)  # right, predicted, there

    def update(self, prediction, target):
        assert prediction.device.type == target.device.type == "cpu"
        found = prediction.argmax(-1)
        of_class = (found == target) & (found == torch.arange(self.classes)[:, None])
        self.counts += torch.stack(
            [of_class.sum(1), found.bincount(minlength=self.classes), target.bincount(minlength=self.classes)]
        )

    def compute(self):
        assert not self.distributed_available_fn(), "each process has all samples, and torchmetrics would add them up"
        right, predicted, there = self.counts
        f1 = 2 * right / (predicted + there).clamp(min=1)
        return f1.mean() if self.average == "macro" else f1

    def persistent(self, mode=False):
        self.kept = mode

    def state_dict(self, *args, **kwargs):
        return {"counts": self.counts.clone()} if self.kept else {}

    def load_state_dict(self, state, *args, **kwargs):
        self.counts = state["counts"].clone()

    def forward(self, prediction, target):
        raise AssertionError("the value of a batch says nothing about that of all")


def macro_f1(prediction, target, classes=3):
    """The same by its definition."""
    found = prediction.argmax(-1)
    of_class = [
        2 * ((found == c) & (target == c)).sum() / ((found == c).sum() + (target == c).sum()).clamp(min=1)
        for c in range(classes)
    ]
    return float(torch.stack(of_class).mean())


class ConfusionMatrix:
    """The samples [C, C] of each class, a row, by the class that is predicted."""

    def reset(self):
        self.counts = 0

    def update(self, prediction, target):
        classes = prediction.shape[1]
        pairs = (target * classes + prediction.argmax(1)).flatten()
        self.counts = self.counts + pairs.bincount(minlength=classes**2).view(classes, classes)

    def compute(self):
        return self.counts
