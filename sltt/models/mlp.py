"""A fully connected network, for inputs without an image plane."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from sltt.checks import flag, whole_numbers
from sltt.dropout import Dropout
from sltt.models.base import NeuronFactory, neuron_maker
from sltt.neurons import LIF, Recurrent


class MLP(nn.Module):
    """Layers of (linear, BatchNorm, neuron, dropout), and a linear layer without a neuron.

    Args:
        features: sizes of the input, of each hidden layer, and of the logits.
        neuron: makes a neuron; called once for each hidden layer.
        dropout: probability of the dropout after each neuron.
        norm: with BatchNorm. Its running statistics are those of all time steps together; leave it out where the steps
            differ, such as a silent one.
        recurrent: the spikes of each hidden layer come back one time step later, through a linear layer without bias.
    """

    def __init__(
        self,
        features: Sequence[int],
        neuron: NeuronFactory = LIF,
        dropout: float = 0.0,
        norm: bool = True,
        recurrent: bool = False,
    ):
        super().__init__()
        self.features = list(whole_numbers("features", features, least=1, fewest=2))
        norm, recurrent = flag("norm", norm), flag("recurrent", recurrent)
        neuron = neuron_maker(neuron)
        layers: list[nn.Module] = []
        for before, after in pairwise(features[:-1]):
            neurons = Recurrent(neuron(), nn.Linear(after, after, bias=False)) if recurrent else neuron()
            layers += [nn.Linear(before, after), *([nn.BatchNorm1d(after)] if norm else []), neurons, Dropout(dropout)]
        self.hidden = nn.Sequential(*layers)
        self.head = nn.Linear(features[-2], features[-1])

    def forward(self, x: Tensor) -> Tensor:
        """One time step [B, ...], flattened to [B, features[0]], to logits [B, features[-1]]."""
        return self.head(self.hidden(x.flatten(1)))
