"""The network and the loss of a run that was made in Python, as its configuration names them."""

# pyright: reportInvalidTypeForm=false
from pathlib import Path

from jsonargparse.typing import Path_fr
from torch import nn

from sltt.training.describe import unpack


def network(file: Path_fr) -> nn.Module:
    """The network in a run's file, with the weights that it had before the training."""
    return unpack(Path(file.absolute).read_bytes())["model"]


def loss(file: Path_fr) -> nn.Module:
    """The loss in a run's file."""
    return unpack(Path(file.absolute).read_bytes())["loss"]
