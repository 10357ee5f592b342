"""Trained networks that come with the package: files of `sltt pack`, each with a card beside it."""

from torch import nn

from sltt.checks import choice
from sltt.models.base import SHIPPED


def pretrained(name: str) -> nn.Module:
    """Return a trained network of the package, in evaluation mode on the CPU, as `sltt.load` does.

        model = sltt.models.pretrained("speech")

    Args:
        name: of the recipe that trained it: `digits`, `digits-events`, `recall-delays` or `speech`.
    """
    from sltt.training.trained import load

    return load(SHIPPED[choice("name", name, SHIPPED)])
